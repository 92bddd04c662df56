"""Win back what a compression cost: train the smaller model to put out what the original puts out, without labels.

The original is the teacher and the calibration samples are the data. The loss of one sample is, averaged over the
outputs,

    mean over slices k of  || y_k - t_k ||^2 / V_k,   V_k = E || t_k - mean t_k ||^2,

with t the teacher's output and a slice one place along its channel axis, so that 1 is as bad as a constant, and a
box coordinate in pixels does not drown the score beside it; where the output is a Softmax it is the divergence
sum t (log t - log y) instead (Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015). ONNX
Runtime computes loss and gradients (see `lindep_onnx.differentiate`); Adam (Kingma, Ba, 2015) steps in NumPy, on
weights that stay inputs of one session.

Each tensor moves in proportion to the root mean square of its own values, so that one step length suits all layers,
whatever the scale that folding or the exporter left in them. FIT samples are trained on. SELECT samples say which state
was the best, and that one is kept: the result is never worse on them than what training started from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from lindep_onnx.config import Effort
from lindep_onnx.data import Part, Samples
from lindep_onnx.differentiate import differentiate, with_inputs
from lindep_onnx.errors import LindepError
from lindep_onnx.graph import Model, load
from lindep_onnx.verify import open_session

__all__ = ["Recovered", "recover", "trainable"]

Array: TypeAlias = NDArray[Any]
Weights: TypeAlias = dict[str, Array]
Progress: TypeAlias = Callable[[str, int, int], None]

#: The gradient rules are written for this operator set; older models are trained as a converted copy.
OPSET = 17
LOSS = "lindep_onnx_loss"
TARGET = "lindep_onnx_target_"
#: Length of a step relative to the root mean square of a tensor, at its peak.
RATE = 1e-2
#: Share of the steps in which the rate rises; it then falls along a cosine.
WARM_UP = 0.05
DECAY, SQUARED_DECAY, TINY = 0.9, 0.999, 1e-12
#: A gradient is cut to so many times the running mean of the norms.
CLIP = 3.0
#: So often the held-out loss is measured, and by how many samples at most.
LOOKS, HELD_OUT = 12, 512
#: Least V of a slice, relative to the mean of the output: a slice that hardly varies must not rule the others.
LEAST_SPREAD = 1e-2
#: Bytes of teacher outputs that are remembered.
REMEMBERED = 1 << 28


@dataclass(frozen=True)
class Recovered:
    """What training changed.

    Attributes:
        weights: new values of stored tensors, by name, of the type they had.
        steps: that were taken.
        history: (step, loss on trained samples since the last look, loss on held-out samples), in order; the first is
            the state before.
        notes: sentences on what kept weights from being trained.
    """

    weights: Mapping[str, Array]
    steps: int
    history: tuple[tuple[int, float, float], ...]
    notes: tuple[str, ...]

    @property
    def before(self) -> float:
        """Held-out loss before."""
        return self.history[0][2] if self.history else math.nan

    @property
    def after(self) -> float:
        """Held-out loss of the weights that were kept."""
        return min((entry[2] for entry in self.history), default=math.nan)


def recover(
    teacher: onnx.ModelProto,
    student: Model,
    samples: Samples,
    effort: Effort,
    *,
    frozen: Collection[str] = (),
    providers: Sequence[str],
    threads: int,
    seed: int,
    progress: Progress,
) -> Recovered:
    """Train a model towards the outputs of another.

    Args:
        teacher: the original.
        student: the smaller model; inputs and outputs as the teacher's.
        samples: the data.
        effort: how long.
        frozen: names of nodes whose weights stay as they are.
        providers: execution providers of ONNX Runtime.
        threads: intra-op threads, 0 for its own choice.
        seed: of the order of the samples.
        progress: called with (stage, done, all) in steps or seconds.
    """
    runtime: dict[str, Any] = {"providers": providers, "threads": threads}
    fitted = samples.parts[Part.FIT]
    if not samples.uniform or not len(fitted) or not len(samples.parts[Part.SELECT]):
        return _untrained("the samples differ in shape" if not samples.uniform else "there are too few samples")
    guide = _Teacher(teacher, samples, **runtime)
    if not guide.spread:
        return _untrained("no output of type float32 varies")
    try:
        modern = _with_loss(student, guide.spread)
        chosen = [name for name in trainable(student, frozen) if name in modern.stored]
        batch = min(samples.batch, len(fitted))
        shapes = {name: value.shape for name, value in guide.feeds(fitted[:batch]).items()}
        backward = differentiate(modern.proto, LOSS, chosen, shapes)
        notes = tuple(
            f"Weights in front of node {name!r} ({op}) were not trained: {why}." for name, op, why in backward.obstacles
        )
        if not backward.gradients:
            return Recovered({}, 0, (), notes or _untrained("no output depends on a float32 weight").notes)
        step = open_session(backward.proto, **runtime)
    except LindepError as error:  # the refit is worth keeping without it
        return _untrained(str(error))
    judge = _HeldOut(modern, list(backward.gradients), guide, samples, **runtime)
    weights = best = {name: modern.stored[name] for name in backward.gradients}
    optimiser, clock = _Adam(weights), _Clock(effort)
    history = [(0, math.nan, judge.loss(weights))]
    count, looked, losses = 0, 0, []
    for numbers in _shuffled(fitted, batch, np.random.default_rng(seed)):
        loss, *slopes = step.run([LOSS, *backward.gradients.values()], {**guide.feeds(numbers), **weights})
        weights = optimiser.moved(weights, dict(zip(weights, slopes, strict=True)), _rate(clock.share(count)))
        losses.append(float(loss) / batch)
        count += 1
        share = clock.share(count)
        progress("recover", *clock.done(count))
        if int(share * LOOKS) > looked or share >= 1:
            looked = int(share * LOOKS)
            found = judge.loss(weights)
            if found < min(entry[2] for entry in history):
                best = weights
            history.append((count, float(np.mean(losses)), found))
            losses = []
        if share >= 1:
            break
    changed = {name: value for name, value in best.items() if not np.array_equal(value, modern.stored[name])}
    return Recovered(changed, count, tuple(history), notes)


def _untrained(why: str) -> Recovered:
    return Recovered({}, 0, (), (f"The result was not trained: {why}.",))


def trainable(model: Model, frozen: Collection[str]) -> list[str]:
    """Stored float32 tensors that are weights: matrices, biases, scales and slopes, one value or more a channel.

    Args:
        model: the model.
        frozen: names of nodes that keep theirs.
    """
    # Positions of the weights of each operator; constants of arithmetic count where they are vectors (biases).
    places = {
        "Conv": (1, 2),
        "ConvTranspose": (1, 2),
        "Gemm": (0, 1, 2),
        "MatMul": (0, 1),
        "BatchNormalization": (1, 2),
        "LayerNormalization": (1, 2),
        "PRelu": (1,),
        "Add": (0, 1),
        "Mul": (0, 1),
    }
    found: dict[str, None] = {}
    kept: set[str] = {*model.overridable, *model.outputs}
    for node in model.nodes:
        for position, name in enumerate(node.inputs):
            value = model.stored.get(name)
            if value is None or value.dtype != np.float32:
                continue
            vector = value.size > 1 and value.size == max(value.shape)
            if node.name in frozen:
                kept.add(name)
            elif position in places.get(node.op, ()) and (node.op not in ("Add", "Mul") or vector):
                found[name] = None
            elif node.op not in ("Identity", "Reshape", "Transpose"):
                kept.add(name)  # read as something else too
    return [name for name in found if name not in kept and model.stored[name].ndim]


# ---- loss ---------------------------------------------------------------------------------------------------------


def _with_loss(student: Model, spread: Mapping[str, Array]) -> Model:
    """The student with its loss, summed over samples, as one more tensor; targets are inputs.

    Args:
        student: the smaller model.
        spread: V of the slices of each output that counts.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(student.proto)
    if student.opset < OPSET:
        try:
            proto = onnx.version_converter.convert_version(proto, OPSET)
        except Exception as error:  # the converter's exceptions have no common base
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise LindepError(
                f"operator set {student.opset} cannot be converted to {OPSET} for training: {first}"
            ) from error
    graph = proto.graph
    makers = {name: node for node in graph.node for name in node.output}
    terms = []
    for number, (name, energy) in enumerate(spread.items()):
        target, prefix = f"{TARGET}{number}", f"{LOSS}_{number}"
        declared = next(value for value in graph.output if value.name == name)
        value = onnx.ValueInfoProto()
        value.CopyFrom(declared)
        value.name = target
        graph.input.append(value)

        def node(op: str, inputs: Sequence[str], output: str, prefix: str = prefix, **attributes: Any) -> str:
            graph.node.append(onnx.helper.make_node(op, inputs, [prefix + output], **attributes))
            return prefix + output

        def number_of(value: float | Array, label: str, prefix: str = prefix) -> str:
            graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, np.float32), prefix + label))
            return prefix + label

        maker = makers.get(name)
        if maker is not None and maker.op_type == "Softmax":
            axis = next((attribute.i for attribute in maker.attribute if attribute.name == "axis"), -1)
            logs = node("LogSoftmax", [maker.input[0]], "_log", axis=axis)
            own = node("Log", [node("Max", [target, number_of(1e-30, "_least")], "_positive")], "_own")
            each = node("Mul", [target, node("Sub", [own, logs], "_apart")], "_each")
        else:
            apart = node("Sub", [name, target], "_apart")
            each = node(
                "Mul",
                [node("Mul", [apart, apart], "_square"), number_of(1 / (energy * energy.size), "_scale")],
                "_each",
            )
        terms.append(node("ReduceSum", [each], "_sum", keepdims=0))
    graph.node.append(onnx.helper.make_node("Mean", terms, [LOSS]))
    return load(proto)


def slice_axis(shape: Sequence[int]) -> int:
    """The channel axis of an output: 1, but the last of three if it is shorter (boxes in rows).

    Args:
        shape: of the output, samples first.
    """
    if len(shape) == 3 and shape[2] < shape[1]:
        return 2
    return min(1, len(shape) - 1)


class _Teacher:
    """Outputs of the original, computed once for each sample as long as they are small.

    Attributes:
        spread: V of the slices of each output that varies, over FIT samples, in a shape that broadcasts.
    """

    def __init__(self, teacher: onnx.ModelProto, samples: Samples, *, providers: Sequence[str], threads: int) -> None:
        self._session = open_session(teacher, providers=providers, threads=threads)
        self._samples = samples
        self._known: dict[int, list[Array]] = {}
        floats = [output.name for output in self._session.get_outputs() if output.type == "tensor(float)"]
        gathered: dict[str, list[Array]] = {name: [] for name in floats}
        axes: dict[str, tuple[int, int]] = {}
        taken = 0
        for batch in samples.batches(Part.FIT, limit=HELD_OUT) if floats else ():
            taken += batch.size
            for name, value in zip(floats, self._session.run(floats, dict(batch.feeds)), strict=True):
                if value.ndim == 0:
                    continue
                axes[name] = slice_axis(value.shape), value.ndim
                slices = np.moveaxis(value.astype(np.float64), axes[name][0], 0)
                slices = slices.reshape(len(slices), -1)
                sums = [np.full(len(slices), slices.shape[1]), slices.sum(axis=1), np.square(slices).sum(axis=1)]
                gathered[name].append(np.stack(sums))
        self.spread: dict[str, Array] = {}
        for name, parts in gathered.items():
            if len({part.shape for part in parts}) != 1:
                continue  # of varying size
            count, total, squares = np.sum(parts, axis=0)
            varies = (squares - total**2 / count) / taken
            if np.isfinite(varies).all() and varies.mean() > 0:
                aligned = [-1 if place == axes[name][0] else 1 for place in range(axes[name][1])]
                self.spread[name] = (varies + LEAST_SPREAD * varies.mean()).reshape(aligned)

    def feeds(self, numbers: NDArray[np.int64]) -> dict[str, Array]:
        """What a training graph reads for some samples: the inputs, and what the teacher makes of them."""
        feeds = dict(self._samples.take(numbers))
        if all(int(number) in self._known for number in numbers):
            rows = [self._known[int(number)] for number in numbers]
            targets = [np.stack(column) for column in zip(*rows, strict=True)]
        else:
            targets = self._session.run(list(self.spread), feeds)
            whole = all(len(target) == len(numbers) for target in targets)  # no filler, samples along the first axis
            if whole and (len(self._known) + len(numbers)) * sum(t[0].nbytes for t in targets) <= REMEMBERED:
                self._known.update((int(number), [t[row] for t in targets]) for row, number in enumerate(numbers))
        return {**feeds, **{f"{TARGET}{number}": target for number, target in enumerate(targets)}}


class _HeldOut:
    """The loss on samples that are not trained on."""

    def __init__(
        self,
        student: Model,
        weights: Collection[str],
        guide: _Teacher,
        samples: Samples,
        *,
        providers: Sequence[str],
        threads: int,
    ) -> None:
        forward = with_inputs(student, weights)
        del forward.graph.output[:]
        forward.graph.output.append(onnx.ValueInfoProto(name=LOSS))
        self._session, self._guide = open_session(forward, providers=providers, threads=threads), guide
        self._batches = [(batch.samples, batch.size) for batch in samples.batches(Part.SELECT, limit=HELD_OUT)]

    def loss(self, weights: Weights) -> float:
        """Mean over the samples."""
        total = sum(
            float(self._session.run([LOSS], {**self._guide.feeds(numbers), **weights})[0])
            for numbers, _ in self._batches
        )
        return total / sum(size for _, size in self._batches)


# ---- optimiser ----------------------------------------------------------------------------------------------------


class _Adam:
    """Adam, with steps relative to the size of each tensor."""

    def __init__(self, weights: Weights) -> None:
        self._mean = {name: np.zeros_like(value) for name, value in weights.items()}
        self._square = {name: np.zeros_like(value) for name, value in weights.items()}
        sizes = {name: float(np.sqrt(np.mean(np.square(value)))) for name, value in weights.items()}
        typical = float(np.median([size for size in sizes.values() if size > 0] or [1.0]))
        self._size = {name: size if size > 1e-3 * typical else 1e-3 * typical for name, size in sizes.items()}
        self._count, self._norm = 0, 0.0

    def moved(self, weights: Weights, slopes: Mapping[str, Array], rate: float) -> Weights:
        """The weights one step further; as they are if a slope is not finite."""
        norm = math.sqrt(sum(float(np.vdot(slope, slope)) for slope in slopes.values()))
        if not math.isfinite(norm):
            return weights
        self._count += 1
        factor = min(1.0, CLIP * self._norm / max(norm, TINY)) if self._count > 1 else 1.0
        self._norm = 0.9 * self._norm + 0.1 * norm * factor if self._count > 1 else norm
        first, second = 1 - DECAY**self._count, 1 - SQUARED_DECAY**self._count
        result = {}
        for name, slope in slopes.items():
            slope = slope * factor
            self._mean[name] += (1 - DECAY) * (slope - self._mean[name])
            self._square[name] += (1 - SQUARED_DECAY) * (slope * slope - self._square[name])
            direction = self._mean[name] / first / (np.sqrt(self._square[name] / second) + TINY)
            result[name] = (weights[name] - rate * self._size[name] * direction).astype(np.float32)
        return result


def _rate(share: float) -> float:
    """The step length when so much of the training is done: up in a line, down along a cosine."""
    if share < WARM_UP:
        return RATE * max(share / WARM_UP, 0.02)
    return RATE * 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


class _Clock:
    def __init__(self, effort: Effort) -> None:
        self._effort, self._start = effort, time.monotonic()

    def share(self, steps: int) -> float:
        if self._effort.steps is not None:
            return steps / max(1, self._effort.steps)
        return (time.monotonic() - self._start) / max(1e-9, self._effort.seconds or 0.0)

    def done(self, steps: int) -> tuple[int, int]:
        if self._effort.steps is not None:
            return steps, self._effort.steps
        return int(time.monotonic() - self._start), int(self._effort.seconds or 0)


def _shuffled(numbers: NDArray[np.int64], batch: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Batches without end: every sample once before any comes again, but for a rest that fills no batch."""
    while True:
        order = rng.permutation(numbers)
        for start in range(0, len(order) - batch + 1, batch):
            yield order[start : start + batch]
