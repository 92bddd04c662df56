"""The planted models hold what their record says, and nothing else that could be removed."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import planted
import pytest
from numpy.typing import NDArray

from lindep_onnx.errors import UsageError

FAST = "squeezenet"
NAMES = [name if name == FAST else pytest.param(name, marks=pytest.mark.slow) for name in planted.NAMES]
TWO = [FAST, pytest.param("inception_v1", marks=pytest.mark.slow)]


@cache
def _built(name: str) -> Any:
    return planted.build(name, seed=0)


@cache
def _plain(name: str) -> Any:
    return planted.build_plain(name, seed=0)


def _activations(built: Any, tensors: set[str], n: int = 6) -> dict[str, NDArray[np.float64]]:
    """Values per channel on unseen images, [channels, rows], from ONNX Runtime without graph optimizations."""
    model = onnx.ModelProto()
    model.CopyFrom(built.model)
    names = sorted(tensors - {info.name for info in model.graph.output})
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    ((key, images),) = built.calibration(n, seed=99).items()
    runs = [session.run(names, {key: image[None]}) for image in images]
    values = {name: np.concatenate([run[i] for run in runs]) for i, name in enumerate(names)}
    return {name: np.moveaxis(a, 1, 0).reshape(a.shape[1], -1).astype(np.float64) for name, a in values.items()}


def _defect(channel: Any, rows: NDArray[np.float64]) -> float:
    """Largest deviation of a planted channel from its record, relative to the RMS of the tensor."""
    own, offset = rows[channel.index], channel.index - channel.channel
    if channel.kind == "dead":
        return float(np.abs(own).max())
    if channel.kind == "constant":
        return float(np.ptp(own) / own.mean()) if own.min() > 0 else np.inf
    parents = rows[[offset + partner for partner in channel.partners]]
    deviation = np.abs(own - np.array(channel.coefficients) @ parents).max()
    return float(deviation / np.sqrt(np.mean(rows**2)))


def _relus(built: Any) -> set[str]:
    return {node.output[0] for node in built.model.graph.node if node.op_type == "Relu"}


def _nearest_pair(rows: NDArray[np.float64]) -> float:
    """The largest |cosine| between the centred values of two channels."""
    centred = rows - rows.mean(1, keepdims=True)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return float(np.abs(np.triu(unit @ unit.T, 1)).max())


@pytest.mark.parametrize("name", NAMES)
def test_every_planted_channel_is_what_its_record_says_on_unseen_images(name: str) -> None:
    built = _built(name)
    rows = _activations(built, {channel.tensor for channel in built.channels} or _relus(built))
    assert all(_defect(channel, rows[channel.tensor]) < 2e-4 for channel in built.channels)


def test_a_record_that_names_the_wrong_channel_is_noticed() -> None:
    built = _built("squeezenet")
    rows = _activations(built, {channel.tensor for channel in built.channels})
    planted = {(channel.tensor, channel.index) for channel in built.channels}
    for channel in built.channels:
        free = [i for i in range(len(rows[channel.tensor])) if (channel.tensor, i) not in planted]
        free = [i for i in free if i - channel.index + channel.channel not in channel.partners]
        shuffled = rows[channel.tensor].copy()
        shuffled[channel.index] = shuffled[free[0]]
        assert _defect(channel, shuffled) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_a_plain_model_has_no_dead_constant_or_collinear_channel(name: str) -> None:
    built = _plain(name)
    assert built.channels == ()
    for rows in _activations(built, _relus(built)).values():
        if rows.shape[1] >= 100:  # six values of a Gemm output say nothing
            assert rows.std(1).min() > 0.05
            assert (rows > 0).mean(1).min() > 0.1
            assert _nearest_pair(rows) < 0.9999


def test_the_scan_for_pairs_finds_a_planted_copy() -> None:
    built = _built("squeezenet")
    copy = next(channel for channel in built.channels if channel.kind == "copy")
    rows = _activations(built, {copy.tensor})[copy.tensor]
    assert _nearest_pair(rows[[copy.index, copy.index - copy.channel + copy.partners[0]]]) > 1 - 1e-9


@pytest.mark.parametrize("name", TWO)
def test_the_rank_at_every_reader_is_its_width_less_the_planted_channels(name: str) -> None:
    built = _built(name)
    producers: Counter[str] = Counter(output for channel in built.channels for output in channel.outputs)
    relus = {node.output[0]: node.input[0] for node in built.model.graph.node if node.op_type == "Relu"}
    found = 0
    for tensor, rows in _activations(built, set(relus)).items():
        planted = producers[relus[tensor]]
        if rows.shape[1] < 3 * len(rows) or not planted:
            continue
        centred = rows - rows.mean(1, keepdims=True)
        scale = centred.std(1, keepdims=True)
        singular = np.linalg.svd(centred / np.where(scale > 1e-5, scale, 1), compute_uv=False)
        assert int((singular > 1e-4 * singular[0]).sum()) == len(rows) - planted
        found += planted
    assert found > 100


@pytest.mark.parametrize("name", TWO)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(name: str) -> None:
    first = _built(name).model.SerializeToString(deterministic=True)
    again = planted.build(name, seed=0)
    assert again.model.SerializeToString(deterministic=True) == first
    assert again.channels == _built(name).channels
    assert planted.build(name, seed=1).model.SerializeToString(deterministic=True) != first


@pytest.mark.parametrize("name", planted.NAMES)
def test_every_topology_exists_and_its_axes_can_be_followed(name: str) -> None:
    topology = planted.Topology.load(name)
    open_axes = [axis for axis in topology.axes() if not axis.blocked and axis.readers]
    assert len({node.name for node in topology.nodes}) == len(topology.nodes)
    assert (not open_axes) == (name == "shufflenet")


def test_residual_channels_are_planted_in_all_their_producers() -> None:
    topology = planted.Topology.load("resnet50")
    linked = sorted(len(axis.producers) for axis in topology.axes() if len(axis.producers) > 1)
    assert linked == [4, 4, 5, 7]  # blocks per stage, and the projection shortcut


@pytest.mark.slow
def test_no_channel_next_to_a_grouped_convolution_or_lrn_is_planted() -> None:
    producers = {channel.producers[0] for channel in _built("bvlc_alexnet").channels}
    gemms = {node.name for node in _built("bvlc_alexnet").model.graph.node if node.op_type == "Gemm"}
    assert producers and producers < gemms


@pytest.mark.parametrize("name", TWO)
def test_a_planted_model_is_valid_and_keeps_opset_input_and_node_names(name: str) -> None:
    model = _built(name).model
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 9)]
    assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 224, 224]
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [({"share": 1.0}, "share"), ({"samples": 0}, "samples"), ({"kinds": ("twin",)}, "twin")],
)
def test_an_option_without_a_meaning_is_named(options: dict[str, Any], culprit: str) -> None:
    with pytest.raises(UsageError, match=culprit):
        planted.build("squeezenet", seed=0, **options)
    with pytest.raises(UsageError, match="lenet"):
        planted.build("lenet", seed=0)


def test_the_kinds_that_were_asked_for_are_planted_on_the_asked_share() -> None:
    built = planted.build("squeezenet", seed=3, share=0.5, kinds=("copy",))
    assert {channel.kind for channel in built.channels} == {"copy"}
    per_axis = Counter(channel.producers for channel in built.channels)
    widths = {node.output[0]: node.input[1] for node in built.model.graph.node if node.op_type == "Conv"}
    sizes = {tensor.name: tensor.dims[0] for tensor in built.model.graph.initializer}
    for channel in built.channels:
        assert per_axis[channel.producers] == sizes[widths[channel.outputs[0]]] // 2


def test_random_images_differ_among_themselves_and_repeat_with_their_seed() -> None:
    images = planted.random_inputs("squeezenet", 4, seed=0)
    assert images.shape == (4, 3, 224, 224) and images.dtype == np.float32
    assert np.abs(np.triu(np.corrcoef(images.reshape(4, -1)), 1)).max() < 0.9
    assert np.array_equal(images, planted.random_inputs("squeezenet", 4, seed=0))
    assert not np.array_equal(images, planted.random_inputs("squeezenet", 4, seed=1))
