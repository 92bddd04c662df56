"""Models and data that mean harm, or were damaged: one clear error, or a result that equals the original."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from build import build, run, traced
from onnx import TensorProto, numpy_helper

import lindep_onnx
from lindep_onnx.errors import CalibrationError, LindepError, ModelError
from lindep_onnx.model import ir as graph
from lindep_onnx.model.shapes import resolve
from lindep_onnx.options import Config
from lindep_onnx.proofs.traced import load_and_trace

ROOT = Path(__file__).parents[2]
PROVEN = Config(proven_only=True)


def model(**weights: np.ndarray) -> onnx.ModelProto:
    given = {"w": (6, 3, 3, 3), "b": (6,), "v": (4, 6, 1, 1), **weights}
    return build("h = Conv<pads=[1,1,1,1]>(x, w, b)\nr = Relu(h)\ny = Conv(r, v)", given, x=("N", 3, 6, 6))


def changed(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    made = model()
    change(made)
    return made


def tensor(made: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(entry for entry in made.graph.initializer if entry.name == name)


def set_attribute(made: onnx.ModelProto, node: int, **values: object) -> None:
    for key, value in values.items():
        kept = [attribute for attribute in made.graph.node[node].attribute if attribute.name != key]
        del made.graph.node[node].attribute[:]
        made.graph.node[node].attribute.extend([*kept, onnx.helper.make_attribute(key, value)])


def outside(made: onnx.ModelProto) -> None:
    entry = tensor(made, "w")
    entry.ClearField("raw_data")
    entry.data_location = TensorProto.EXTERNAL
    entry.external_data.add(key="location", value="weights")


REFUSED = {
    "a cycle": lambda m: m.graph.node[0].input.__setitem__(0, "r"),
    "two tensors of one name": lambda m: m.graph.node[1].output.__setitem__(0, "h"),
    "two initializers of one name": lambda m: m.graph.initializer.add().CopyFrom(tensor(m, "w")),
    "an initializer that is missing": lambda m: m.graph.initializer.pop(0),
    "more values declared than there are": lambda m: tensor(m, "w").dims.__setitem__(0, 2**40),
    "a negative size": lambda m: tensor(m, "w").dims.__setitem__(0, -6),
    "a type that does not exist": lambda m: setattr(tensor(m, "w"), "data_type", 99),
    "weights in a file that was not read": outside,
    "an operator without its inputs": lambda m: (
        setattr(m.graph.node[1], "op_type", "MatMulInteger"),
        m.graph.node[0].input.pop(),
    ),
    "an output that nothing computes": lambda m: setattr(m.graph.output[0], "name", "z"),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED.keys())
def test_a_damaged_model_is_refused(change: Callable) -> None:
    with pytest.raises(ModelError) as caught:
        lindep_onnx.compress(changed(change), proven_only=True)
    assert 1 <= len(str(caught.value).splitlines()) <= 3


SURVIVED = {
    "groups without number": lambda m: set_attribute(m, 0, group=2**40),
    "groups that do not divide": lambda m: set_attribute(m, 0, group=4),
    "an input of impossible size": lambda m: setattr(
        m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 2**62
    ),
    "an input of negative size": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", -3),
    "an input of no rows": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[2], "dim_value", 0),
    "an input of strings": lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.STRING),
    "an input of integers": lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.INT64),
    "an operator set of the future": lambda m: setattr(m.opset_import[0], "version", 999),
    "an operator that does not exist": lambda m: setattr(m.graph.node[1], "op_type", "Nonsense"),
    "strange attributes": lambda m: set_attribute(m, 0, pads=[2**62] * 4, strides=[0, -1], kernel_shape=[0, 0]),
    "attributes of another type": lambda m: set_attribute(m, 0, pads="x", group=[1, 2]),
    "an axis beyond all": lambda m: (setattr(m.graph.node[1], "op_type", "Softmax"), set_attribute(m, 1, axis=99)),
    "an inner vector declared endless": lambda m: (
        m.graph.node.add(op_type="Shape", input=["h"], output=["n"]),
        m.graph.node.add(op_type="Gather", input=["n", "n"], output=["k"]),
        m.graph.value_info.append(onnx.helper.make_tensor_value_info("n", TensorProto.INT64, [2**63 - 1])),
    ),
    "an input vector declared endless": lambda m: (
        m.graph.input.append(onnx.helper.make_tensor_value_info("n", TensorProto.INT64, [2**62])),
        m.graph.node.add(op_type="Gather", input=["n", "n"], output=["k"]),
        m.graph.node.add(op_type="Reshape", input=["h", "k"], output=["j"]),
    ),
    "a bias of one": lambda m: tensor(m, "b").CopyFrom(numpy_helper.from_array(np.zeros(1, np.float32), "b")),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("change", SURVIVED.values(), ids=SURVIVED.keys())
def test_a_strange_model_is_an_error_of_ours_or_none(change: Callable) -> None:
    made = changed(change)
    tracemalloc.start()
    for ranges in ({}, {"*": (0.0, 1.0)}):
        try:
            lindep_onnx.compress(made, proven_only=True, input_range=ranges)
        except LindepError as error:
            assert 1 <= len(str(error).splitlines()) <= 3
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def picked(index: int) -> onnx.ModelProto:
    made = model(i=np.array([0, index, 2, 3, 4, 5]))
    made.graph.node[1].CopyFrom(onnx.helper.make_node("Gather", ["h", "i"], ["r"], axis=1))
    return made


MISFITS = {
    "a Conv bias of another length": (model, "b", np.zeros(5, np.float32), "misfit"),
    "a Conv bias of one": (model, "b", np.zeros(1, np.float32), "misfit"),
    "a Conv bias of two axes": (model, "b", np.zeros((1, 6), np.float32), "misfit"),
    "an index beyond the axis": (lambda: picked(1), "i", np.array([0, 6, 2, 3, 4, 5]), "outside"),
    "an index before the axis": (lambda: picked(1), "i", np.array([0, -7, 2, 3, 4, 5]), "outside"),
}


@pytest.mark.parametrize("case", MISFITS.values(), ids=MISFITS.keys())
def test_constants_that_do_not_fit_are_a_named_refusal(case: tuple) -> None:
    make, name, value, reason = case
    made = make()
    assert traced(made).units == 6  # the control: what fits
    tensor(made, name).CopyFrom(numpy_helper.from_array(value, name))
    found = traced(made)
    assert found.units == 0 and reason in [refusal.reason.code for refusal in found.refusals]
    report = lindep_onnx.compress(made, proven_only=True, input_range={"*": (0.0, 1.0)}).report
    assert reason in [refusal.reason for refusal in report.refusals]


def test_names_of_dimensions_that_are_no_text_are_names() -> None:
    made = model()
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "Qzzq"
    damaged = onnx.ModelProto.FromString(made.SerializeToString().replace(b"Qzzq", b"Q\xd3zq"))
    assert isinstance(damaged.graph.input[0].type.tensor_type.shape.dim[0].dim_param, bytes)
    loaded = graph.load(damaged)
    assert resolve(loaded).shapes["x"][0] == "Q\\xd3zq"


def test_what_a_file_says_of_its_inner_tensors_never_overrules_the_operators() -> None:
    made = model()
    for name, shape in (("h", ["N", 6, 9, 9]), ("r", [1, 2])):
        made.graph.value_info.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    shapes = resolve(graph.load(made)).shapes
    assert shapes["h"] == ("N", 6, 6, 6)
    assert shapes["r"][1:] == (6, 6, 6)


@pytest.mark.parametrize("declared", ["input", "value_info", "output"])
def test_sizes_below_zero_do_not_end_the_process(declared: str) -> None:
    made = build(
        "h = Slice(x, a, b, a)\ny = Slice(h, a, b, a)", {"a": np.array([1]), "b": np.array([2])}, x=("N", 3, 8, 8)
    )
    value = onnx.helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", -1, 8, 8])
    if declared == "value_info":
        made.graph.value_info.append(value)
    else:
        getattr(made.graph, declared)[0].type.tensor_type.shape.dim[1].dim_value = -1
    program = "import sys, onnx, lindep_onnx; lindep_onnx.compress(onnx.load_from_string(sys.stdin.buffer.read()), proven_only=True)"
    ran = subprocess.run([sys.executable, "-c", program], input=made.SerializeToString(), capture_output=True, cwd=ROOT)
    assert ran.returncode in (0, 1), ran.stderr.decode()[-300:]
    assert ran.returncode == 0 or b"LindepError" in ran.stderr or b"ModelError" in ran.stderr


def test_a_location_that_is_no_text_is_a_location(tmp_path: Path) -> None:
    made = model()
    outside(made)
    tensor(made, "w").external_data[0].value = "Qzzq"
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString().replace(b"Qzzq", b"Q\xd3zq"))
    with pytest.raises(ModelError, match="external data cannot be read"):
        graph.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_change_nothing_but_themselves(value: float) -> None:
    w = numpy_helper.to_array(tensor(model(), "w")).copy()
    w[1] = w[4]
    w[2, 0, 0, 0] = value
    made = model(w=w, b=np.zeros(6, np.float32))
    result = lindep_onnx.compress(made, proven_only=True).model
    x = np.random.default_rng(0).normal(size=(3, 3, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(run(result, {"x": x})[0], run(made, {"x": x})[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(CalibrationError, match=r"Tensor .* becomes NaN or infinite"):
        lindep_onnx.compress(made, {"x": np.repeat(x, 20, axis=0)})


@pytest.mark.parametrize("location", ["../secret", "{folder}/secret", "link", "up/secret", "/dev/zero", "", "a" * 300])
def test_external_data_outside_the_folder_of_the_model_is_never_read(location: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    made = model()
    (tmp_path / "secret").write_bytes(tensor(made, "w").raw_data)
    (home / "link").symlink_to(tmp_path / "secret")
    (home / "up").symlink_to(tmp_path)
    outside(made)
    tensor(made, "w").external_data[0].value = location.format(folder=tmp_path)
    (home / "m.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(ModelError, match=r"outside the folder|external data cannot be read"):
        graph.load(home / "m.onnx")


def test_external_data_inside_the_folder_is_read(tmp_path: Path) -> None:
    made = model()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights").write_bytes(tensor(made, "w").raw_data)
    want = numpy_helper.to_array(tensor(made, "w"))
    outside(made)
    tensor(made, "w").external_data[0].value = "sub/weights"
    (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
    np.testing.assert_array_equal(graph.load(tmp_path / "m.onnx").stored["w"], want)


def test_a_batch_that_nobody_could_fill_is_refused() -> None:
    made = model()
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**40
    with pytest.raises(CalibrationError, match="declares a batch of"):
        lindep_onnx.compress(made, {"x": np.zeros((9, 3, 6, 6), np.float32)})


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"])
def test_names_that_no_file_can_have_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"cannot be looked up|no such model file"):
        load_and_trace(name, PROVEN)
    with pytest.raises(CalibrationError, match=r"cannot be looked up|no such calibration data"):
        lindep_onnx.compress(model(), name)


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "corpus").glob("*.onnx")), ids=lambda path: path.stem)
def test_the_undamaged_corpus_is_understood(path: Path) -> None:
    assert len(load_and_trace(path, PROVEN).structure.model.nodes) > 1


@pytest.mark.parametrize("name", ["kernel_shape", "strides", "dilations"])
def test_a_window_of_nothing_is_refused_before_anything_runs_it(name: str) -> None:
    made = changed(lambda model: set_attribute(model, 0, **{name: [1, 0]}))
    with pytest.raises(LindepError, match=f"{name} .1, 0.*at least 1"):
        lindep_onnx.compress(made, proven_only=True)
