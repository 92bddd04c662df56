"""What a trained model is to come close to: the outputs of the original, and how far from them counts how much.

The loss of one sample is, averaged over the float outputs,

    mean over slices k of  || y_k - t_k ||^2 / V_k,   V_k = E || t_k - mean t_k ||^2,

with t the teacher's output and a slice one place along its channel axis, so that 1 is as bad as a constant, and a
box coordinate in pixels does not drown the score beside it. Where the output is a Softmax it is the divergence
sum t (log t - log y) instead (Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015).

The output whose arg-max is the decision (see `lindep_onnx.verify`) adds, per decision, the divergence of softmax(s t)
and softmax(s y), where s makes 4 of the standard deviation of t within a decision: a squared error alone spends most of
its effort on scores that never decide anything.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from lindep_onnx.data.samples import Samples
from lindep_onnx.data.split import Part
from lindep_onnx.distill.autodiff.differentiate import with_inputs
from lindep_onnx.distill.autodiff.tape import Writer
from lindep_onnx.errors import LindepError, UsageError, one_line
from lindep_onnx.model.ir import Model, load
from lindep_onnx.model.shapes import resolve
from lindep_onnx.model.weights import embedded
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.verify.metrics import decision

Array: TypeAlias = NDArray[Any]

#: The gradient rules are written for this operator set; older models are trained as a converted copy.
OPSET = 17
LOSS = "lindep_onnx_loss"
TARGET = "lindep_onnx_target_"
#: Samples that the spread of the outputs is measured on, and that judge a state, at most.
MEASURED, HELD_OUT = 512, 512
#: Least V of a slice, relative to the mean of the output: a slice that hardly varies must not rule the others.
MIN_SPREAD = 1e-2
#: Standard deviation of the scores of a decision behind the factor s.
CONTRAST = 4.0
#: Bytes of teacher outputs that are remembered.
REMEMBERED = 1 << 28


@dataclass(frozen=True)
class Measure:
    """How far from the teacher's an output counts how much.

    Attributes:
        spread: V of its slices, in a shape that broadcasts.
        axis: along which its arg-max decides; None if it decides nothing.
        sharpness: s; the factor of the scores in the divergence.
        decisions: in one sample.
    """

    spread: Array
    axis: int | None = None
    sharpness: float = 1.0
    decisions: int = 1


def slice_axis(shape: Sequence[int]) -> int:
    """The channel axis of an output: 1, but the last of three if it is shorter (boxes in rows).

    Args:
        shape: of the output, samples first.
    """
    if len(shape) == 3 and shape[2] < shape[1]:
        return 2
    return min(1, len(shape) - 1)


class Teacher:
    """Outputs of the original, computed once for each sample as long as they are small.

    Args:
        teacher: the original.
        samples: the data; FIT samples tell how much outputs vary.
        agreement_output: see `lindep_onnx.verify.OutputErrors`.
        runtime: what models run on.

    Attributes:
        measures: of each output that varies, by name.
        leading: whether samples are on the leading axis of everything that is fed and put out.
    """

    def __init__(self, teacher: Model, samples: Samples, runtime: Runtime, *, agreement_output: str | None) -> None:
        self._session = runtime.open(teacher)
        sample_axes = resolve(teacher).moved_samples(teacher.outputs)
        self.leading = not sample_axes and samples.leading
        self._samples = samples
        self._known: dict[int, list[Array]] = {}
        floats = [output.name for output in self._session.get_outputs() if output.type == "tensor(float)"]
        decides: tuple[str, int] | None = None
        gathered: dict[str, list[_Variation]] = {}
        taken = runs = 0
        for batch in samples.batches(Part.FIT, limit=MEASURED) if floats else ():
            outputs = dict(zip(floats, self._session.run(floats, dict(batch.feeds)), strict=True))
            if not taken:
                with suppress(UsageError):  # it is none of the floats
                    decides = decision(outputs, agreement_output)
            taken, runs = taken + batch.size, runs + 1
            for name, value in outputs.items():
                place = sample_axes.get(name, 0)
                if value.ndim and value.shape[place] % batch.size == 0:
                    axis = decides[1] if decides is not None and decides[0] == name else None
                    gathered.setdefault(name, []).append(_Variation.of(value, axis, batch.size, place))
        measures = {name: _measure(parts, taken) for name, parts in gathered.items() if len(parts) == runs}
        self.measures: Mapping[str, Measure] = {name: found for name, found in measures.items() if found is not None}
        self._targets = [f"{TARGET}{number}" for number in range(len(self.measures))]

    def feeds(self, numbers: NDArray[np.int64]) -> dict[str, Array]:
        """What a training graph reads for some samples: the inputs, and what the teacher makes of them."""
        feeds = self._samples.take(numbers)
        rows = [self._known[number] for number in numbers.tolist() if number in self._known]
        if len(rows) == len(numbers):
            return {**feeds, **dict(zip(self._targets, map(np.stack, zip(*rows, strict=True)), strict=True))}
        taught = self.taught(feeds)
        targets = [taught[name] for name in self._targets]
        whole = self.leading and all(
            len(target) == len(numbers) for target in targets
        )  # no filler, samples along the first axis
        if whole and (len(self._known) + len(numbers)) * sum(t[0].nbytes for t in targets) <= REMEMBERED:
            self._known.update(zip(numbers.tolist(), map(list, zip(*targets, strict=True)), strict=True))
        return taught

    def taught(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The same for inputs that are no samples."""
        return {**feeds, **dict(zip(self._targets, self._session.run(list(self.measures), dict(feeds)), strict=True))}


@dataclass(frozen=True)
class _Variation:
    """An output in one run.

    Attributes:
        share: shape of what belongs to one sample.
        sums: (3, slices) count, sum and sum of squares.
        aligned: shape in which values by slice broadcast.
        axis: along which its arg-max decides; None if it decides nothing.
        within: sum of the variances within decisions.
        decisions: how many.
    """

    share: tuple[int, ...]
    sums: Array
    aligned: tuple[int, ...]
    axis: int | None
    within: float
    decisions: int

    @staticmethod
    def of(value: Array, axis: int | None, samples: int, place: int) -> _Variation:
        exact = value.astype(np.float64)
        order = [place, *(other for other in range(value.ndim) if other != place)]
        first, *rest = (value.shape[other] for other in order)
        share, channel = (first // samples, *rest), order[slice_axis((first, *rest))]
        slices = np.moveaxis(exact, channel, 0).reshape(value.shape[channel], -1)
        sums = np.stack([np.full(len(slices), slices.shape[1]), slices.sum(axis=1), np.square(slices).sum(axis=1)])
        aligned = tuple(-1 if place == channel else 1 for place in range(value.ndim))
        if axis is None:
            return _Variation(share, sums, aligned, None, 0.0, 0)
        variances = exact.var(axis=axis)
        return _Variation(share, sums, aligned, axis, float(variances.sum()), variances.size)


def _measure(parts: Sequence[_Variation], samples: int) -> Measure | None:
    """None for an output of varying size, or one that does not vary or is not finite."""
    if len({part.share for part in parts}) != 1 or not math.prod(parts[0].share):
        return None
    count, total, squares = np.sum([part.sums for part in parts], axis=0)
    varies = (squares - total**2 / count) / samples
    if not (np.isfinite(varies).all() and varies.mean() > 0):
        return None
    spread = (varies + MIN_SPREAD * varies.mean()).reshape(parts[0].aligned)
    decisions, within = sum(part.decisions for part in parts), sum(part.within for part in parts)
    if not decisions or within <= 0:
        return Measure(spread)
    return Measure(spread, parts[0].axis, CONTRAST / (within / decisions) ** 0.5, decisions // samples)


class HeldOut:
    """The loss on samples that are not trained on.

    Args:
        student: with its loss, see `with_loss`.
        weights: names of the weights that are inputs.
        teacher: the targets.
        samples: the data, of which SELECT samples judge.
        runtime: what models run on.
    """

    def __init__(
        self,
        student: Model,
        weights: Collection[str],
        teacher: Teacher,
        samples: Samples,
        runtime: Runtime,
    ) -> None:
        self._session = runtime.open(with_inputs(student, weights, [LOSS]), student.folder)
        self._teacher = teacher
        self._batches = [(batch.samples, batch.size) for batch in samples.batches(Part.SELECT, limit=HELD_OUT)]

    def loss(self, weights: Mapping[str, Array]) -> float:
        """Mean over the samples."""
        total = sum(
            float(self._session.run([LOSS], {**self._teacher.feeds(numbers), **weights})[0])
            for numbers, _ in self._batches
        )
        return total / sum(size for _, size in self._batches)


# ---- the loss as a graph ------------------------------------------------------------------------------------------


def with_loss(student: Model, measures: Mapping[str, Measure]) -> Model:
    """The student with its loss, summed over samples, as one more tensor; targets are inputs.

    Args:
        student: the smaller model.
        measures: of each output that counts.

    Raises:
        LindepError: its operator set cannot be converted to one that can be trained.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(embedded(student.proto, student.folder))
    if student.opset < OPSET:
        try:
            proto = onnx.version_converter.convert_version(proto, OPSET)
        except Exception as error:  # the converter's exceptions have no common base
            raise LindepError(
                f"operator set {student.opset} cannot be converted to {OPSET} for training: {one_line(error)}"
            ) from error
    graph = proto.graph
    softmaxes = {node.output[0]: node for node in graph.node if node.op_type == "Softmax"}
    write = Writer(f"{LOSS}_", np.dtype(np.float32))
    terms = []
    for number, (name, measure) in enumerate(measures.items()):
        target = f"{TARGET}{number}"
        value = onnx.ValueInfoProto()
        value.CopyFrom(next(value for value in graph.output if value.name == name))
        value.name = target
        graph.input.append(value)
        terms.append(
            _divergence(write, target, softmaxes[name])
            if name in softmaxes
            else _distance(write, target, name, measure)
        )
    write.append_to(graph)
    graph.node.append(onnx.helper.make_node("Mean", terms, [LOSS]))
    return load(proto)


def _divergence(write: Writer, target: str, softmax: onnx.NodeProto) -> str:
    """Of what a Softmax puts out from the target."""
    axis = next((attribute.i for attribute in softmax.attribute if attribute.name == "axis"), -1)
    own = write.Log(write.Max(target, 1e-30))
    logs = write.LogSoftmax(softmax.input[0], axis=axis)
    return write.ReduceSum(write.Mul(target, write.Sub(own, logs)), keepdims=0)


def _distance(write: Writer, target: str, name: str, measure: Measure) -> str:
    """Of an output from the target: squares, and the divergence of decisions."""
    apart = write.Sub(name, target)
    each = write.Mul(write.Mul(apart, apart), 1 / (measure.spread * measure.spread.size))
    squares = write.ReduceSum(each, keepdims=0)
    if measure.axis is None:
        return squares
    own, logs = (write.LogSoftmax(write.Mul(scores, measure.sharpness), axis=measure.axis) for scores in (target, name))
    each = write.Mul(write.Exp(own), write.Sub(own, logs))
    return write.Add(squares, write.ReduceSum(write.Mul(each, 1 / measure.decisions), keepdims=0))
