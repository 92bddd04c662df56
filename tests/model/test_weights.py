"""Large models, whose weights stay in files: here any model is one."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
import pytest
from build import build, run
from google.protobuf.message import EncodeError
from onnx import TensorProto, numpy_helper

import lindep_onnx
from lindep_onnx.errors import ModelError, OutputError
from lindep_onnx.files import WeightsDir
from lindep_onnx.model import save as saving
from lindep_onnx.model import weights as storage
from lindep_onnx.model.ir import load
from lindep_onnx.runtime.backend import Purpose, Runtime

BODY = "h = Conv<pads=[1,1,1,1]>(x, w, b)\nr = Relu(h)\nn = BatchNormalization(r, s, o, m, q)\ny = Conv(n, v)"
RUNTIME = Runtime(threads=1)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(storage, "IN_MEMORY", 0)
    monkeypatch.setattr(storage, "EXTERNAL_BYTES", 64)


def model(kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """Four of 16 channels are multiples of others."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(16, 3, 3, 3)).astype(np.float32)
    weight[12:] = 2 * weight[:4]
    ones = {name: np.ones(16, np.float32) for name in "soq"}
    zeros = {name: np.zeros(16, np.float32) for name in "bm"}
    made = build(BODY, {"w": weight, "v": (5, 16, 1, 1), **ones, **zeros}, x=("N", 3, 8, 8))
    if kind != TensorProto.FLOAT:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind)
        for tensor in made.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
        for value in (*made.graph.input, *made.graph.output):
            value.type.tensor_type.elem_type = kind
    return made


def data(count: int = 64, dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).normal(size=(count, 3, 8, 8)).astype(dtype)}


def values(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def written(proto: onnx.ModelProto, folder: Path, how: str) -> Path | onnx.ModelProto:
    """The model as somebody hands it over."""
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    external = how == "external data"
    onnx.save(copy, folder / "m.onnx", save_as_external_data=external, location="weights", size_threshold=0)
    return proto if how == "in memory" else folder / "m.onnx"


@pytest.mark.parametrize("how", ["in memory", "one file", "external data"])
def test_weights_are_mapped_and_nothing_is_lost(how: str, tmp_path: Path, large: None) -> None:
    proto = model()
    given, feeds = written(proto, tmp_path, how), data(3)
    want, before = run(proto, feeds)[0], proto.SerializeToString()
    loaded = load(given)
    assert loaded.folder is not None
    held = {tensor.name: len(tensor.raw_data) for tensor in loaded.proto.graph.initializer}
    assert held["w"] == held["v"] == 0
    assert isinstance(loaded.stored["w"].base, np.memmap) or isinstance(loaded.stored["w"].base.base, np.memmap)
    for name, value in values(proto).items():
        np.testing.assert_array_equal(loaded.stored[name], value)
    for purpose in (Purpose.RUN, Purpose.TIME):
        found = RUNTIME.open(loaded, purpose=purpose).run(None, feeds)[0]
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        loaded.stored["w"][0] = 0
    assert proto.SerializeToString() == before
    del loaded
    gc.collect()
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("external", [False, True])
def test_what_is_written_is_the_whole_model(external: bool, tmp_path: Path, large: None) -> None:
    proto = model()
    loaded = load(written(proto, tmp_path, "external data"))
    path = tmp_path / "out.onnx"
    saving.save(loaded.proto, loaded.folder, path, external_data=external)
    assert (tmp_path / "out.onnx.data").exists() is external
    found = onnx.load(path)
    onnx.checker.check_model(str(path), full_check=True)
    for name, value in values(proto).items():
        np.testing.assert_array_equal(values(found)[name], value)
    assert len(found.graph.initializer) == len(proto.graph.initializer)
    for field in ("node", "input", "output", "value_info"):
        assert list(getattr(found.graph, field)) == list(getattr(proto.graph, field))
    assert list(found.opset_import) == list(proto.opset_import) and found.ir_version == proto.ir_version
    np.testing.assert_array_equal(run(found, data(3))[0], run(proto, data(3))[0])


@pytest.mark.parametrize("length", [0, 1, 127, 128, 300, 2**31])
def test_frames_are_those_of_protobuf(length: int) -> None:
    from google.protobuf.internal import decoder

    frame = saving.field_header(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, length)
    tag, place = decoder._DecodeVarint(frame, 0)
    found, end = decoder._DecodeVarint(frame, place)
    assert (tag >> 3, tag & 7, found, end) == (onnx.TensorProto.RAW_DATA_FIELD_NUMBER, 2, length, len(frame))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
@pytest.mark.parametrize("options", [{}, {"params": 0.6}, {"params": 0.6, "recover": 5}, {"proven_only": True}])
def test_a_large_model_is_compressed_like_a_small_one(
    kind: int, options: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proto = model(kind)
    calib = data(dtype=onnx.helper.tensor_dtype_to_np_dtype(kind))
    small = lindep_onnx.compress(proto, calib, **options)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(storage, "IN_MEMORY", 0)
    monkeypatch.setattr(storage, "EXTERNAL_BYTES", 64)
    result = lindep_onnx.compress(proto, calib, **options)
    assert result.report.after.channels == small.report.after.channels
    assert bool(result.report.changed) is ("proven_only" not in options)
    exact = kind == TensorProto.FLOAT and not options.get("params")
    rounding = {"rtol": 1e-5, "atol": 1e-6} if exact else {"rtol": 1e-2, "atol": 1e-3}  # of half precision, of refits
    for name, value in values(small.model).items():
        found = values(result.model)[name]
        assert found.shape == value.shape and found.dtype == value.dtype
        np.testing.assert_allclose(found.astype(float), value.astype(float), **rounding)
    onnx.checker.check_model(result.model, full_check=True)
    del result
    gc.collect()
    assert not list(tmp_path.iterdir())


def _cut(path: Path) -> None:
    (path / "weights").write_bytes((path / "weights").read_bytes()[:100])


def _gone(path: Path) -> None:
    (path / "weights").unlink()


def _entry(key: str, value: str):
    def change(path: Path) -> None:
        proto = onnx.load(path / "m.onnx", load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == key:
                    entry.value = value
        (path / "m.onnx").write_bytes(proto.SerializeToString())

    return change


@pytest.mark.parametrize(
    "damage",
    [_cut, _gone, _entry("offset", "-4"), _entry("offset", "x"), _entry("length", "4"), _entry("location", "")],
)
def test_damaged_external_data_is_one_line(damage, tmp_path: Path, large: None) -> None:
    written(model(), tmp_path, "external data")
    load(tmp_path / "m.onnx")
    damage(tmp_path)
    with pytest.raises(ModelError, match=r"m\.onnx: .*") as caught:
        load(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)


def test_a_tensor_that_does_not_begin_at_a_number_is_copied(tmp_path: Path) -> None:
    want = np.arange(300, dtype=np.float32)
    (tmp_path / "weights").write_bytes(b"x" + want.tobytes())
    tensor = TensorProto(name="w", dims=[300], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights"), ("offset", "1")):
        tensor.external_data.add(key=key, value=value)
    found = storage.array_of(tensor, WeightsDir(tmp_path))
    assert found.flags.aligned
    np.testing.assert_array_equal(found, want)
    with pytest.raises(ValueError, match="path of the model"):
        storage.array_of(tensor, None)


def test_weights_in_constant_nodes_and_files_of_many_tensors(tmp_path: Path, large: None) -> None:
    names = [f"w{number}" for number in range(60)]
    body = "\n".join(
        f"{'y' if name == names[-1] else 'h' + name} = MatMul({'x' if name == names[0] else 'hw' + str(number - 1)}, {name})"
        for number, name in enumerate(names)
    )
    proto = build(body, {name: 0.1 * np.eye(8, dtype=np.float32) for name in names}, x=("N", 8))
    moved = proto.graph.initializer.pop()
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], [moved.name], value=moved))
    onnx.save(
        onnx.ModelProto.FromString(proto.SerializeToString()), tmp_path / "m.onnx", save_as_external_data=True,
        location="weights", size_threshold=0, convert_attribute=True,
    )  # fmt: skip
    descriptors = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    loaded = load(tmp_path / "m.onnx")
    if descriptors:
        assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 2
    np.testing.assert_array_equal(loaded.stored[moved.name], numpy_helper.to_array(moved))
    feeds = {"x": np.ones((2, 8), np.float32)}
    found = RUNTIME.open(loaded.proto, loaded.folder).run(None, feeds)[0]
    np.testing.assert_allclose(found, run(proto, feeds)[0], rtol=1e-5)


@pytest.mark.parametrize("change", ["written", "replaced", "gone"])
def test_weights_that_change_during_a_run_are_noticed(change: str, tmp_path: Path, large: None) -> None:
    loaded = load(written(model(), tmp_path, "external data"))
    saving.save(loaded.proto, loaded.folder, tmp_path / "first.onnx")
    weights = tmp_path / "weights"
    content = weights.read_bytes()
    if change != "written":
        weights.unlink()
    if change != "gone":
        weights.write_bytes(content)
    with pytest.raises(ModelError, match="weights: has changed since it was read"):
        saving.save(loaded.proto, loaded.folder, tmp_path / "second.onnx")
    with pytest.raises(ModelError, match="weights: has changed since it was read"):
        storage.embedded(loaded.proto, loaded.folder)
    assert (tmp_path / "first.onnx").exists() and not (tmp_path / "second.onnx").exists()


def test_what_no_file_of_weights_can_take_and_protobuf_cannot_write_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise EncodeError("Failed to serialize proto")

    monkeypatch.setattr(saving, "serialise", refused)
    with pytest.raises(EncodeError):  # a small one failed for another reason, which must not be hidden
        saving.save(model(), None, tmp_path / "m.onnx")
    monkeypatch.setattr(saving, "PROTOBUF_LIMIT", 1000)
    with pytest.raises(OutputError, match="more than 2 GB"):
        saving.save(model(), None, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_run_whose_model_changes_gives_nothing(tmp_path: Path, large: None) -> None:
    path = written(model(), tmp_path, "external data")
    weights = tmp_path / "weights"

    def rewritten(stage: str, done: int, whole: int) -> None:
        if stage == "calibrate":
            weights.write_bytes(weights.read_bytes())

    assert lindep_onnx.compress(path, data()).report.groups[0].removed == 4
    with pytest.raises(ModelError, match="weights: has changed since it was read"):
        lindep_onnx.compress(path, data(), progress=rewritten)


def test_the_folder_stays_where_it_was(tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch) -> None:
    written(model(), tmp_path, "external data")
    monkeypatch.chdir(tmp_path)
    loaded = load("m.onnx")
    monkeypatch.chdir("/")
    RUNTIME.open(loaded.proto, loaded.folder).run(None, data(2))
