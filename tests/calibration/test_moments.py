"""Moments: whatever the order and size of the pieces, the same sums, in double precision."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lindep_onnx.calibration.moments import Moments, MomentsAccumulator, load_moments, save_moments
from lindep_onnx.errors import CalibrationError, OutputError


def update(accumulator: MomentsAccumulator, rows: np.ndarray) -> None:
    """As calibration does it."""
    if accumulator.take(rows):
        accumulator.add_up()


@pytest.fixture
def rows() -> np.ndarray:
    """(samples, positions, features) as a Relu puts them out."""
    rng = np.random.default_rng(5)
    values = np.maximum(rng.normal(size=(64, 20, 7)), 0).astype(np.float32)
    values[:, :, 3] = 0.0  # a feature that is never active
    values[1:, :, 4] = 0.0  # and one that is active in one sample
    return values


def moments(*batches: np.ndarray) -> Moments:
    accumulator = MomentsAccumulator(batches[0].shape[-1])
    for batch in batches:
        update(accumulator, batch)
    return accumulator.result()


def assert_same(found: Moments, expected: Moments, rtol: float = 1e-13) -> None:
    for field in dataclasses.fields(Moments):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        np.testing.assert_allclose(one, other, rtol=rtol, err_msg=field.name)


def test_moments_are_what_their_names_say(rows: np.ndarray) -> None:
    found = moments(rows)
    flat = rows.reshape(-1, 7).astype(np.float64)
    assert (found.rows, found.samples, found.effective_rows) == (64 * 20, 64, 64 * 16)
    np.testing.assert_allclose(found.gram, flat.T @ flat, rtol=1e-13)
    np.testing.assert_allclose(found.sum, flat.sum(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.mean, flat.mean(axis=0), rtol=1e-13)
    np.testing.assert_array_equal(found.low, flat.min(axis=0))
    np.testing.assert_array_equal(found.high, flat.max(axis=0))
    assert found.active.tolist() == [64, 64, 64, 0, 1, 64, 64]
    np.testing.assert_array_equal(found.gram, found.gram.T)


def test_second_moments_about_a_centre_are_those_of_the_shifted_rows(rows: np.ndarray) -> None:
    flat, center = rows.reshape(-1, 7).astype(np.float64), np.arange(7.0)
    expected = (flat - center).T @ (flat - center) / len(flat)
    np.testing.assert_allclose(moments(rows).about(center), expected, rtol=1e-12)
    np.testing.assert_allclose(moments(rows).about(flat.mean(0)), np.cov(flat.T, bias=True), atol=1e-13)


@pytest.mark.parametrize("sizes", [[64], [8] * 8, [1] * 64, [3, 1, 50, 10]])
def test_pieces_add_up_to_the_whole(rows: np.ndarray, sizes: list[int]) -> None:
    pieces = np.split(rows, np.cumsum(sizes)[:-1])
    assert_same(moments(*pieces), moments(rows))
    merged = moments(pieces[0])
    for piece in pieces[1:]:
        merged = merged.merge(moments(piece))
    assert_same(merged, moments(rows))


def test_a_missing_piece_is_seen(rows: np.ndarray) -> None:
    with pytest.raises(AssertionError, match=r"gram|rows"):
        assert_same(moments(*np.split(rows, 8)[1:]), moments(rows))


def test_an_intermediate_result_is_not_changed_by_what_follows(rows: np.ndarray) -> None:
    accumulator = MomentsAccumulator(7)
    update(accumulator, rows[:8])
    early = accumulator.result()
    update(accumulator, rows[8:])
    assert_same(early, moments(rows[:8]))
    assert accumulator.result().rows > early.rows


def test_few_positions_count_as_they_are_and_many_as_sixteen(rows: np.ndarray) -> None:
    assert moments(rows[:, :5]).effective_rows == 64 * 5
    assert moments(rows[:, :5], rows).effective_rows == 64 * 5 + 64 * 16


def test_no_rows_change_nothing(rows: np.ndarray) -> None:
    assert_same(moments(rows[:0], rows, rows[:, :0]), moments(rows))
    empty = moments(rows[:0])
    assert empty.rows == 0 and np.isfinite(empty.mean).all()
    assert_same(empty.merge(moments(rows)), moments(rows))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_sums_are_in_double_precision_whatever_comes_in(rows: np.ndarray, dtype: type) -> None:
    values = rows.astype(dtype)
    before = values.copy()
    assert_same(moments(values), moments(values.astype(np.float64)))
    np.testing.assert_array_equal(values, before)


def test_double_precision_sees_a_small_independent_part_that_single_precision_loses() -> None:
    rng = np.random.default_rng(0)
    common, own = rng.normal(size=(4000, 1)), rng.normal(size=(4000, 30))
    values = (common + 1e-4 * own).astype(np.float32)
    smallest = np.linalg.svd(values.astype(np.float64), compute_uv=False)[-1] ** 2
    found = np.linalg.eigvalsh(moments(values[None]).gram)[0]
    np.testing.assert_allclose(found, smallest, rtol=1e-3)
    single = np.linalg.eigvalsh((values.T @ values).astype(np.float64))[0]  # the negative control
    assert abs(single - smallest) > 0.5 * smallest


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_refused_and_not_added(rows: np.ndarray, value: float) -> None:
    accumulator = MomentsAccumulator(7)
    update(accumulator, rows)
    bad = rows.copy()
    bad[40, 11, 2] = value
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        update(accumulator, bad)
    assert_same(accumulator.result(), moments(rows))


# ------------------------------------------------------------------------------------------------------ saved and loaded


def test_what_is_saved_is_loaded_bit_by_bit(rows: np.ndarray, tmp_path: Path) -> None:
    named = {"a|1||f": moments(rows), "b/ü": moments(rows[:3, :, :2]), "empty": moments(rows[:0])}
    save_moments(tmp_path / "moments", named)
    loaded, _ = load_moments(tmp_path / "moments")
    assert list(loaded) == list(named)
    for name, expected in named.items():
        assert_same(loaded[name], expected, rtol=0)
        assert loaded[name].active.dtype == np.int64 and isinstance(loaded[name].rows, int)


def test_loaded_moments_can_be_added_to(rows: np.ndarray, tmp_path: Path) -> None:
    save_moments(tmp_path / "moments.npz", {"a": moments(rows[:30])})
    assert_same(load_moments(tmp_path / "moments.npz")[0]["a"].merge(moments(rows[30:])), moments(rows))


def test_nothing_to_save_is_loaded_as_nothing(tmp_path: Path) -> None:
    save_moments(tmp_path / "moments.npz", {})
    assert load_moments(tmp_path / "moments.npz") == ({}, {})


def test_saving_where_there_is_no_folder_is_an_output_error(rows: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        save_moments(tmp_path / "missing" / "moments.npz", {"a": moments(rows)})


def test_a_failed_save_leaves_the_old_file(rows: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "moments.npz"
    save_moments(path, {"a": moments(rows)})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OutputError, match="No space left"):
        save_moments(path, {"b": moments(rows)})
    assert list(load_moments(path)[0]) == ["a"]
    assert [item.name for item in tmp_path.iterdir()] == ["moments.npz"]


@pytest.mark.parametrize("content", ["missing", b"", b"not an archive", "npy", "other npz", "cut", "damaged", "shapes"])
def test_a_file_that_holds_no_moments_is_refused_by_name(
    content: bytes | str, rows: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "moments.npz"
    save_moments(path, {"a": moments(rows)})
    whole = path.read_bytes()
    if content == "missing":
        path.unlink()
    elif content == "npy":
        with path.open("wb") as file:
            np.save(file, rows)
    elif content == "other npz":
        np.savez(path, x=rows)
    elif content == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif content == "damaged":
        path.write_bytes(whole[:400] + bytes(50) + whole[450:])
    elif content == "shapes":
        save_moments(path, {"a": dataclasses.replace(moments(rows), gram=np.ones((3, 3)))})
    else:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"moments\.npz: is not a readable file of moments"):
        load_moments(path)


@pytest.mark.parametrize("pieces", [1, 3, 10])
def test_samples_that_leave_the_rest_are_counted(pieces: int) -> None:
    values = np.random.default_rng(0).normal(size=(10, 4, 5)) + 5.0
    values[:, :, 0] = 1.0  # rests at its lowest value, but in two samples
    values[[3, 7], 2, 0] = 2.0
    values[:, :, 1] = -values[:, :, 0]  # at its highest
    values[:, :, 2] = values[:, :, 0] - 1.0  # at zero
    values[:, 0, 3] = 0.0  # at an end at one position only: that is no rest
    parts = []
    for piece in np.array_split(values, pieces):
        accumulator = MomentsAccumulator(5)
        update(accumulator, piece)
        parts.append(accumulator.result())
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    whole = MomentsAccumulator(5)
    for piece in np.array_split(values, pieces):
        update(whole, piece)
    assert merged.moving.tolist() == whole.result().moving.tolist() == [2, 2, 2, 10, 10]
