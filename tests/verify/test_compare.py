"""Two models compared on the same data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from build import build, feed

from lindep_onnx.data.samples import Batch
from lindep_onnx.errors import ModelError, UsageError, VerificationError
from lindep_onnx.model import weights as storage
from lindep_onnx.model.checks import full_check_passes
from lindep_onnx.model.ir import load
from lindep_onnx.runtime.backend import Purpose, Runtime
from lindep_onnx.verify.compare import as_array, compare
from lindep_onnx.verify.metrics import MAX_SLICES, Comparison, OutputErrors

RUNTIME = Runtime(threads=1)


def compared(y: np.ndarray, other: np.ndarray, **options: object) -> Comparison:
    errors = OutputErrors(**options)
    errors.update({"y": y}, {"y": other}, None)
    return errors.result()


def brute_force(y: np.ndarray, other: np.ndarray) -> float:
    """The formula of the module, written slice by slice over the whole data."""
    worst = 0.0
    for axis in sorted({1, y.ndim - 1}):
        slices = [np.take(y, k, axis).astype(np.float64) for k in range(y.shape[axis])]
        largest = max(np.linalg.norm(part) for part in slices)
        for k, part in enumerate(slices):
            difference = np.linalg.norm(part - np.take(other, k, axis))
            worst = max(worst, difference / (np.linalg.norm(part - part.mean()) + 1e-6 * largest))
    return worst


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def detector(rng: np.random.Generator) -> np.ndarray:
    """Boxes of up to 640 pixels and class scores around 1e-3: (samples, 4 + 80, 100)."""
    boxes, scores = rng.uniform(0, 640, (6, 4, 100)), rng.uniform(0, 2e-3, (6, 80, 100))
    return np.concatenate([boxes, scores], axis=1).astype(np.float32)


# ------------------------------------------------------------------------------------------ the error of a float output


@pytest.mark.parametrize("shape", [(9, 5), (9, 5, 7), (9, 3, 4, 6)])
def test_streamed_error_equals_the_formula_over_all_data_at_once(
    rng: np.random.Generator, shape: tuple[int, ...]
) -> None:
    y = rng.normal(size=shape) * rng.uniform(0.1, 10, shape[1:]) + 3
    other = y + 1e-3 * rng.normal(size=shape)
    errors = OutputErrors()
    for part in (slice(0, 2), slice(2, 3), slice(3, 9)):
        errors.update({"y": y[part]}, {"y": other[part]}, None)
    found = errors.result()
    assert found.samples == 9
    np.testing.assert_allclose(found.relative_error, brute_force(y, other), rtol=1e-10)
    np.testing.assert_allclose(found.outputs[0].whole_error, np.linalg.norm(y - other) / np.linalg.norm(y), rtol=1e-10)
    np.testing.assert_allclose(found.max_abs_error, np.abs(y - other).max(), rtol=1e-10)
    assert found.relative_error > 1.2 * found.outputs[0].whole_error  # the two numbers are not the same thing


def test_equal_outputs_have_no_error_and_one_percent_is_seen(rng: np.random.Generator) -> None:
    y = rng.normal(size=(8, 10)).astype(np.float32)
    assert compared(y, y.copy()).relative_error == 0.0
    assert compared(y, 1.01 * y).relative_error >= 0.01


def test_destroyed_class_scores_beside_large_boxes_do_not_pass(detector: np.ndarray) -> None:
    destroyed = detector.copy()
    destroyed[:, 4:] = 0
    found = compared(detector, destroyed)
    assert found.outputs[0].whole_error < 1e-3
    assert found.relative_error >= 0.5
    assert compared(detector, detector * np.float32(1 + 1e-5)).relative_error < 1e-3


def test_destroyed_scores_along_the_last_axis_do_not_pass(detector: np.ndarray) -> None:
    y = detector.transpose(0, 2, 1)
    destroyed = y.copy()
    destroyed[..., 4:] = 0
    assert compared(y, destroyed).relative_error >= 0.5


def test_a_large_offset_does_not_hide_a_small_signal(rng: np.random.Generator) -> None:
    signal = rng.normal(size=(3000, 2))
    errors = OutputErrors()
    for start in range(0, 3000, 100):
        y = 1e6 + signal[start : start + 100]
        errors.update({"y": y}, {"y": y + 0.1 * signal[start : start + 100]}, None)
    spread = np.linalg.norm(signal - signal.mean(0), axis=0)
    norms = np.linalg.norm(1e6 + signal, axis=0)
    expected = (0.1 * np.linalg.norm(signal, axis=0) / (spread + 1e-6 * norms.max())).max()
    np.testing.assert_allclose(errors.result().relative_error, expected, rtol=1e-6)


def test_large_outputs_are_worked_on_piece_by_piece_with_the_same_result(
    rng: np.random.Generator,
) -> None:
    y = rng.normal(size=(11, 4, 5))
    other = y + 0.01 * rng.normal(size=y.shape)
    whole = compared(y, other)
    pieces = compared(y, other, chunk=45)
    np.testing.assert_allclose(pieces.relative_error, whole.relative_error, rtol=1e-12)
    assert pieces.worst_samples == whole.worst_samples


def test_axes_that_are_long_or_vary_are_skipped(rng: np.random.Generator) -> None:
    errors = OutputErrors()
    arrays = [rng.normal(size=(1, length, 3)) * [1.0, 1.0, 1e-4] for length in (7, 4)]
    for y in arrays:
        errors.update({"y": y}, {"y": y * [1.0, 1.0, 0.0]}, None)
    column = np.concatenate([y[0, :, 2] for y in arrays])
    largest = max(np.linalg.norm(np.concatenate([y[0, :, k] for y in arrays])) for k in range(3))
    expected = np.linalg.norm(column) / (np.linalg.norm(column - column.mean()) + 1e-6 * largest)
    np.testing.assert_allclose(errors.result().relative_error, expected)

    y = rng.normal(size=(2, MAX_SLICES + 1))
    other = y.copy()
    other[:, 0] = 0  # one of many positions
    assert compared(y, other).relative_error < 0.1
    assert compared(y[:, :-1], other[:, :-1]).relative_error >= 0.5


def test_a_single_sample_of_class_scores_is_measured_as_a_whole(rng: np.random.Generator) -> None:
    y = rng.normal(size=(1, 10))
    other = y * (1 + 1e-7)  # rounding, not an error: slices of one entry have no spread to compare with
    assert compared(y, other).relative_error < 1e-6
    assert compared(y, 0.9 * y).relative_error > 0.05


@pytest.mark.parametrize("shape", [(), (6,)])
def test_scalars_and_vectors_are_measured_as_a_whole(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    y = np.asarray(rng.normal(size=shape))
    assert compared(y, y * (1 + 1e-7)).relative_error < 1e-6
    assert compared(y, y * 1.1).relative_error > 0.05


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_became_infinite_or_nan_is_an_infinite_error(rng: np.random.Generator, value: float) -> None:
    y = rng.normal(size=(4, 3, 5)).astype(np.float32)
    other = y.copy()
    other[2, 1, 0] = value
    found = compared(y, other)
    assert found.relative_error == found.outputs[0].whole_error == found.max_abs_error == np.inf
    assert found.worst_samples == (2,)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_in_both_models_are_equal(rng: np.random.Generator, value: float) -> None:
    y = rng.normal(size=(4, 3))
    y[1, 1] = value
    other = y.copy()
    assert compared(y, other).relative_error == 0.0
    other[1, 1] = 0.0
    assert compared(y, other).relative_error == np.inf


def test_shared_nan_leaves_the_error_of_the_other_values_as_it_is(rng: np.random.Generator) -> None:
    y = rng.normal(size=(40, 1))
    other = 1.01 * y
    expected = brute_force(y[1:], other[1:])
    y[0] = other[0] = np.nan
    np.testing.assert_allclose(compared(y, other).relative_error, expected, rtol=1e-10)


def test_different_shapes_are_an_infinite_error_unless_both_are_empty() -> None:
    assert compared(np.ones((1, 5, 6)), np.ones((1, 4, 6))).relative_error == np.inf
    assert compared(np.ones((5, 6)), np.ones((7, 6))).max_abs_error == np.inf
    assert compared(np.ones((0, 6)), np.ones((0, 7))).relative_error == 0.0
    assert compared(np.ones((0, 6)), np.ones((1, 6))).relative_error == np.inf


def test_half_precision_is_compared_in_double() -> None:
    y = np.full((2, 3), 60000, np.float16)
    y[0] = 1
    assert compared(y, y.copy()).relative_error == 0.0
    assert np.isfinite(compared(y, (y * np.float16(0.5))).relative_error)


# --------------------------------------------------------------------------------------------- other kinds of outputs


@pytest.mark.parametrize("kind", [np.int64, np.bool_, np.str_])
def test_outputs_that_are_no_floats_count_what_differs(kind: type) -> None:
    y = np.array([[0, 1, 1, 0], [1, 1, 0, 0]]).astype(kind)
    other = y.copy()
    other[1, 3] = np.array(1).astype(kind)
    found = compared(y, other)
    assert found.outputs[0].changed_share == found.relative_error == 1 / 8
    assert found.worst_samples == (1,)
    assert compared(y, y.copy()).relative_error == 0.0


def test_the_worst_output_decides(rng: np.random.Generator) -> None:
    y, ids = rng.normal(size=(4, 3)), np.arange(4)
    errors = OutputErrors()
    errors.update({"a": y, "ids": ids}, {"a": y, "ids": ids[::-1]}, None)
    found = errors.result()
    assert [output.relative_error for output in found.outputs] == [0.0, 1.0]
    assert found.relative_error == 1.0
    assert found.max_abs_error == 0.0  # how far apart two class numbers are means nothing


def test_maps_and_sequences_are_compared_by_their_numbers() -> None:
    rows = as_array([{1: 0.25, 0: 0.75}, {0: 0.5, 1: 0.5}])
    np.testing.assert_array_equal(rows, [[0.75, 0.25], [0.5, 0.5]])
    np.testing.assert_array_equal(as_array([np.ones((1, 2)), np.zeros(1)]), [1, 1, 0])


# --------------------------------------------------------------------------------------------------- samples that count


def test_filler_at_the_end_of_a_batch_does_not_count(rng: np.random.Generator) -> None:
    y = rng.normal(size=(4, 3))
    other = y.copy()
    other[3] += 1
    errors = OutputErrors()
    errors.update({"y": y}, {"y": other}, 3)
    assert errors.result().relative_error == 0.0
    assert errors.result().samples == 3
    errors.update({"y": y}, {"y": other}, 4)
    assert errors.result().relative_error > 0.1
    assert errors.result().worst_samples == (6,)


def test_an_output_with_several_rows_a_sample_is_compared_to_its_end(rng: np.random.Generator) -> None:
    y = rng.normal(size=(8, 3))  # two rows for each of four samples, the last of which is filler
    other = y.copy()
    other[5] += 1
    errors = OutputErrors()
    errors.update({"y": y}, {"y": other}, 3, fed=4)
    assert errors.result().worst_samples == (2,)
    other = y.copy()
    other[6] += 1
    errors = OutputErrors()
    errors.update({"y": y}, {"y": other}, 3, fed=4)
    assert errors.result().relative_error == 0.0


def test_trimming_does_not_hide_that_shapes_differ() -> None:
    errors = OutputErrors()
    errors.update({"boxes": np.ones((5, 7))}, {"boxes": np.ones((9, 7))}, 1, fed=1)
    assert errors.result().relative_error == np.inf


def test_the_five_worst_samples_come_worst_first(rng: np.random.Generator) -> None:
    y = rng.normal(size=(12, 6))
    size = np.array([0, 3, 0, 9, 1, 0, 7, 2, 0, 8, 0, 5.0])
    other = y * (1 + 0.01 * size[:, None])
    errors = OutputErrors()
    for start in (0, 5, 10):
        part = slice(start, min(start + 5, 12))
        errors.update({"y": y[part]}, {"y": other[part]}, None)
    found = errors.result()
    assert found.worst_samples == (3, 9, 6, 11, 1)
    assert found.outputs[0].worst_sample == 3


def test_no_samples_is_an_error_and_no_pass() -> None:
    with pytest.raises(VerificationError, match="no sample to compare"):
        OutputErrors().result()


def test_inputs_are_not_changed(rng: np.random.Generator) -> None:
    y = rng.normal(size=(4, 3))
    y[0, 0] = np.nan
    other = y + 1
    copies = y.copy(), other.copy()
    compared(y, other)
    np.testing.assert_array_equal((y, other), copies)


# ----------------------------------------------------------------------------------------------------------- agreement


def test_agreement_is_the_share_of_samples_with_the_same_arg_max() -> None:
    y = np.eye(5)
    other = y.copy()
    other[2] = [1, 0, 0, 0, 0]
    assert compared(y, other).agreement == 0.8
    assert compared(y, y.copy()).agreement == 1.0


def test_agreement_of_a_map_counts_positions(rng: np.random.Generator) -> None:
    y = rng.normal(size=(2, 3, 4, 5))
    other = y.copy()
    other[1, :, 0, 0] = -y[1, :, 0, 0]
    expected = (y.argmax(1) == other.argmax(1)).mean()
    assert compared(y, other).agreement == expected == 39 / 40


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 2), (2, 1, 4, 4), (1, 1001, 2, 2)])
def test_what_is_no_class_score_has_no_agreement(shape: tuple[int, ...]) -> None:
    assert compared(np.ones(shape), np.ones(shape)).agreement is None


def test_the_first_output_that_qualifies_or_the_named_one_is_used(rng: np.random.Generator) -> None:
    y = {"ids": np.ones((4, 3), np.int64), "box": rng.normal(size=(4, 1)), "a": np.eye(4), "b:0": np.eye(4)[:, None]}
    other = {**y, "a": np.eye(4)[::-1]}

    def agreement(name: str | None) -> float | None:
        errors = OutputErrors(agreement_output=name)
        errors.update(y, other, None)
        return errors.result().agreement

    assert agreement(None) == 0.0
    assert agreement("a") == agreement("a:1") == agreement("a:-1") == 0.0
    assert agreement("b:0") == agreement("b:0:2") == 1.0


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("scores", "the outputs are: y, z"),
        ("y:one", "the outputs are: y, z"),
        ("y:0", "no axis 0"),
        ("y:5", "no axis 5"),
        ("z", "no axis 1"),
    ],
)
def test_an_agreement_output_that_does_not_exist_is_an_error(wanted: str, message: str) -> None:
    outputs = {"y": np.ones((2, 3)), "z": np.ones((2, 1))}
    with pytest.raises(UsageError, match=message):
        OutputErrors(agreement_output=wanted).update(outputs, outputs, None)


def test_nan_scores_do_not_agree_with_the_first_class() -> None:
    y = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert compared(y, np.array([[np.nan, np.nan], [1.0, 0.0]])).agreement == 0.5


# ------------------------------------------------------------------------------------------------- sessions and checker


@pytest.fixture
def model() -> onnx.ModelProto:
    return build("h = Gemm(x, w)\ny = Relu(h)", {"w": (6, 5)}, x=("N", 6))


def batches(rng: np.random.Generator) -> list[Batch]:
    arrays = [rng.normal(size=(4, 6)).astype(np.float32) for _ in range(3)]
    return [Batch({"x": x}, np.arange(4) + 4 * k, 4) for k, x in enumerate(arrays)]


def test_a_model_equals_itself_and_differs_from_one_with_another_weight(
    model: onnx.ModelProto, rng: np.random.Generator
) -> None:
    changed = build("h = Gemm(x, v)\ny = Relu(h)", {"v": (6, 5)}, x=("N", 6))
    original, same, other = (RUNTIME.open(m) for m in (model, model, changed))
    data = batches(rng)
    assert compare(original, same, data).relative_error == 0.0
    found = compare(original, other, data)
    assert found.relative_error > 0.1
    assert found.samples == 12
    assert found.agreement is not None and found.agreement < 1.0


def test_a_session_runs_from_a_path_without_optimisation(model: onnx.ModelProto, tmp_path, rng) -> None:
    onnx.save(model, tmp_path / "m.onnx")
    plain = RUNTIME.open(tmp_path / "m.onnx", purpose=Purpose.AS_WRITTEN)
    assert compare(RUNTIME.open(model), plain, batches(rng)).relative_error < 1e-5


def test_a_result_that_does_not_run_fails_verification(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    narrow = build("h = Gemm(x, w)\ny = Relu(h)", {"w": (7, 5)}, x=("N", 7))
    good, bad = RUNTIME.open(model), RUNTIME.open(narrow)
    with pytest.raises(VerificationError, match=r"result cannot run.*invalid dimensions"):
        compare(good, bad, batches(rng))
    with pytest.raises(ModelError, match="original model cannot run"):
        compare(bad, good, batches(rng))


def test_a_model_that_cannot_be_loaded_is_one_line_without_source_paths(model: onnx.ModelProto, tmp_path) -> None:
    model.ir_version = 999
    with pytest.raises(ModelError) as raised:
        RUNTIME.open(model)
    text = str(raised.value)
    assert "Unsupported model IR version: 999" in text
    assert not any(word in text for word in ("\n", ".cc", "::", "ONNXRuntimeError"))
    with pytest.raises(ModelError, match=r"none\.onnx: ONNX Runtime cannot load it"):
        RUNTIME.open(tmp_path / "none.onnx")


def test_a_model_too_large_for_one_string_goes_by_way_of_the_disk(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, feeds = model.SerializeToString(), feed(model)
    plain = RUNTIME.open(model).run(None, feeds)
    monkeypatch.setattr(storage, "IN_MEMORY", 0)
    monkeypatch.setattr(storage, "EXTERNAL_BYTES", 1)
    loaded = load(model)
    assert loaded.folder is not None and not any(t.raw_data for t in loaded.proto.graph.initializer)
    for source, purpose in ((model, Purpose.RUN), (loaded, Purpose.RUN), (model, Purpose.TIME)):
        found = RUNTIME.open(source, purpose=purpose).run(None, feeds)
        for one, two in zip(plain, found, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    assert full_check_passes(model) is None
    with pytest.raises(ModelError):
        RUNTIME.open(storage.without_weights(model))  # without its weights
    del loaded
    assert model.SerializeToString() == before and not list(tmp_path.iterdir())


def test_an_unknown_provider_is_a_usage_error_that_lists_the_known_ones(model: onnx.ModelProto) -> None:
    with pytest.raises(UsageError, match=r"'NoProvider' is not available.*CPUExecutionProvider"):
        Runtime.named(["NoProvider"]).open(model)


def test_the_cosine_is_that_of_the_whole_output(rng: np.random.Generator) -> None:
    y, other = rng.normal(size=(2, 6, 5))
    errors = OutputErrors()
    for rows in (slice(0, 2), slice(2, 6)):
        errors.update({"y": y[rows]}, {"y": other[rows]})
    expected = (y * other).sum() / np.linalg.norm(y) / np.linalg.norm(other)
    assert errors.result().outputs[0].cosine == pytest.approx(expected, abs=1e-12)
    ids = OutputErrors()
    ids.update({"y": np.arange(4)}, {"y": np.arange(4)})
    assert ids.result().outputs[0].cosine is None


def test_the_worst_samples_have_their_numbers_in_the_data() -> None:
    model = build("y = Relu(x)", {}, x=("N", 3))
    wrong = build("z = Relu(x)\nt = Constant<value_float=3.0>()\ny = Min(z, t)", {}, x=("N", 3))
    x = np.ones((4, 3), np.float32)
    x[2] = 9
    batch = Batch({"x": x}, np.array([11, 25, 40, 77]), 4)
    sessions = [RUNTIME.open(m) for m in (model, wrong)]
    found = compare(*sessions, [batch])
    assert found.worst_samples == (40,) and found.outputs[0].worst_sample == 40
