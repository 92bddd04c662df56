"""The demonstration model and its data are what models/README.md says."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from tasks import normalised, outputs

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"
DEMO, CALIB, SAMPLE = (MODELS / name for name in ("demo.onnx", "calib.npz", "test_sample.npz"))
README = (MODELS / "README.md").read_text(encoding="utf-8")
SHA256 = dict(re.findall(r"^\| `(\S+)` \|.*\| `([0-9a-f]{64})` \|$", README, flags=re.MULTILINE))


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return onnx.load(DEMO)


@pytest.fixture(scope="module")
def sample() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    with np.load(SAMPLE) as data:
        return data["images"], data["labels"]


def _damaged(model: onnx.ModelProto, path: Path) -> Path:
    """The model with its last weight set to zero: every image gets the same class."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weight = next(item for item in copy.graph.initializer if item.name == copy.graph.node[-1].input[1])
    zeros = np.zeros_like(onnx.numpy_helper.to_array(weight))
    weight.CopyFrom(onnx.numpy_helper.from_array(zeros, weight.name))
    onnx.save(copy, path)
    return path


def classes(path: Path, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    return outputs(path, normalised(images)).argmax(axis=1)


def test_every_data_file_is_listed_and_every_listed_file_exists():
    assert set(SHA256) == {path.name for path in MODELS.iterdir()} - {"README.md"}
    assert {"demo.onnx", "calib.npz", "test_sample.npz"} <= set(SHA256)


@pytest.mark.parametrize("name", sorted(SHA256))
def test_each_file_has_the_sha256_of_the_readme(name: str):
    content = (MODELS / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256[name]
    assert hashlib.sha256(content[:-1]).hexdigest() != SHA256[name]


def test_the_files_are_small():
    assert DEMO.stat().st_size < 2_500_000
    assert sum(path.stat().st_size for path in MODELS.iterdir()) < 4_000_000


def test_the_model_passes_the_full_check_and_a_broken_one_does_not(model: onnx.ModelProto):
    onnx.checker.check_model(model, full_check=True)
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    broken.graph.node[-1].input[0] = "missing"
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(broken, full_check=True)


def test_the_model_mixes_the_operators_that_the_readme_names(model: onnx.ModelProto):
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [17]
    assert Counter(node.op_type for node in model.graph.node) == {
        "Conv": 6, "BatchNormalization": 6, "Relu": 6, "Clip": 1, "Constant": 2, "Add": 1,
        "MaxPool": 2, "AveragePool": 1, "Flatten": 1, "Gemm": 2,
    }  # fmt: skip


def test_one_convolution_is_depthwise_and_every_3x3_is_padded(model: onnx.ModelProto):
    found = [
        {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        for node in model.graph.node
        if node.op_type == "Conv"
    ]
    assert sorted(conv["group"] for conv in found) == [1, 1, 1, 1, 1, 32]
    assert [conv["pads"] for conv in found if conv["kernel_shape"] == [3, 3]] == [[1, 1, 1, 1]] * 5


def test_normalization_is_in_inference_mode(model: onnx.ModelProto):
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert all(len(node.output) == 1 for node in norms)
    assert all(item.i == 0 for node in norms for item in node.attribute if item.name == "training_mode")


def test_flatten_joins_more_than_one_position(model: onnx.ModelProto):
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    flatten = next(node for node in model.graph.node if node.op_type == "Flatten")
    shape = next(item.type.tensor_type.shape for item in inferred.graph.value_info if item.name == flatten.input[0])
    assert [dim.dim_value for dim in shape.dim[1:]] == [64, 3, 3]


def test_the_batch_axis_is_free(model: onnx.ModelProto):
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "N"
    session = ort.InferenceSession(DEMO, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        assert session.run(None, {"image": np.zeros((count, 1, 28, 28), np.float32)})[0].shape == (count, 10)


def test_calibration_fits_the_input_and_holds_no_test_image(sample: tuple[NDArray[np.uint8], NDArray[np.uint8]]):
    with np.load(CALIB) as data:
        assert data.files == ["image"]
        images = data["image"]
    assert images.dtype == np.float32 and images.shape == (1000, 1, 28, 28)
    pixels = (images * 0.3530 + 0.2860) * 255  # back to 0 .. 255, by the formula of the README
    assert np.abs(pixels - pixels.round()).max() < 1e-3
    assert (pixels.round().min(), pixels.round().max()) == (0, 255)
    known = {image.tobytes() for image in pixels.round().astype(np.uint8)[:, 0]}
    assert not known & {image.tobytes() for image in sample[0]}


def test_accuracy_on_the_sample_is_that_of_the_readme(
    model: onnx.ModelProto, sample: tuple[NDArray[np.uint8], NDArray[np.uint8]], tmp_path: Path
):
    images, labels = sample
    stated = re.search(r"500 of `test_sample.npz` \| ([\d.]+) %", README)
    assert stated is not None
    measured = np.mean(classes(DEMO, images) == labels)
    assert measured >= 0.85
    assert measured == pytest.approx(float(stated[1]) / 100, abs=0.004)  # two images may tip on another CPU
    assert np.mean(classes(_damaged(model, tmp_path / "damaged.onnx"), images) == labels) < 0.2


def test_constant_channels_are_as_many_as_the_readme_says(model: onnx.ModelProto):
    names = [node.output[0] for node in model.graph.node if node.op_type in ("Relu", "Clip")]
    with np.load(CALIB) as data:
        images = data["image"]
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    lowest, highest = [], []
    for start in range(0, len(images), 100):
        values = session.run(names, {"image": images[start : start + 100]})
        axes = [tuple(axis for axis in range(value.ndim) if axis != 1) for value in values]
        lowest.append(np.concatenate([value.min(axis=axis) for value, axis in zip(values, axes, strict=True)]))
        highest.append(np.concatenate([value.max(axis=axis) for value, axis in zip(values, axes, strict=True)]))
    constant = np.min(lowest, axis=0) == np.max(highest, axis=0)
    stated = re.search(r"(\d+) of the (\d+) channels after an activation", README)
    assert stated is not None
    assert (constant.sum(), constant.size) == tuple(map(int, stated.groups()))
    assert constant.mean() > 0.15
