"""Is what goes redundant, and is what is redundant found? Samples are drawn, the tool decides, the others are asked.

`lossless` and `few_samples`: the command on real models; samples that have no part in it tell. `few_samples` gives so
little data that naive methods see dependence where there is none.

| column | what |
|---|---|
| calib, test | samples |
| same arg-max | share of the test samples whose decision stays |
| error | worst output error on the test samples, as `lindep_onnx.verify` defines it |
| removed | removable channels that went, of all that are removable |
| parameters, MACs | what is left |
| seconds, CPU s, peak MB | of the whole command, start-up and report included |

`planted_topologies` and `planted_nets`: models that are built with known redundancy, see `tests/support/planted.py` and
`tests/support/planted_nets.py`.

| column | what |
|---|---|
| planted, removed, recall | planted channels, and how many of them went, counted axis by axis |
| extra | further channels that went |
| error, whole | of the outputs on images that nothing has seen: the worst slice, and over the whole tensor |
| rounding | the error of the original itself once every weight has moved to a neighbouring float32 or stayed |
| plain | channels removed from the same model with nothing planted |
| again | channels removed from the result by a second run on the same images |
| refused | output channels that tracing leaves alone, in the planted model, with where and why |

No error below `rounding` tells a result from the original: a deep random network amplifies the last bit of its weights.

`margins`: how far a silent channel must be from waking, the constant of `calibration.inactive`. Each model runs over
all of its samples; then many times some are drawn, the rule decides from them alone which channels behind activations
will stay silent, and the others tell. One column for each value of the constant, 0 being no margin at all: channels
that the rule lets go; how many of these woke in some other sample; share of the other samples in which one did. All are
means over the draws.

`budgets`: no budget is exceeded, sizes being counted again; from the mildest limit to the most severe the result never
grows; the same options give the same bytes.

`proofs`: small nets in which every redundancy follows from the weights, `tests/support/proven_nets.py`; is it found,
and does any input show a proof to be wrong?
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import planted
import proven_nets
import pytest
from measure import Bench, apart, command
from numpy.typing import NDArray
from tasks import Places, every, model_of, open_task, session, shuffled

import lindep_onnx
from lindep_onnx.calibration import inactive
from lindep_onnx.calibration.range_probe import RangeProbe, RangeStats, WatchedTensor
from lindep_onnx.data.inputs import InputSpec
from lindep_onnx.data.samples import open_samples
from lindep_onnx.data.split import Part
from lindep_onnx.errors import BudgetError
from lindep_onnx.model.cost import cost
from lindep_onnx.model.ir import load
from lindep_onnx.model.shapes import resolve
from lindep_onnx.options import DataOptions
from lindep_onnx.runtime.backend import Runtime
from lindep_onnx.runtime.rows import RowSampler
from lindep_onnx.structure.layout import features
from lindep_onnx.structure.trace import trace
from lindep_onnx.structure.types import Structure
from lindep_onnx.verify.metrics import OutputComparison, OutputErrors

# ---- real models ------------------------------------------------------------------------------------------------

#: Calibration and test samples.
LOSSLESS = {
    "demo": (300, 300),
    **dict.fromkeys(("efficientnet_lite0", "mobilenetv2", "mtcnn_onet", "open_nsfw"), (400, 200)),
    **dict.fromkeys(("resnet56", "resnet20", "cifar10_keras_cnn"), (1000, 1000)),
    "hed_vgg16": (100, 20),
}
FEW = ("efficientnet_lite0", "mobilenetv2", "resnet56", "resnet20", "cifar10_keras_cnn")


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless(bench: Bench, name: str) -> None:
    calib, test = LOSSLESS[name]
    samples = shuffled(name, bench.places)
    bench.row(**bench.once(_compressed, name, bench.places, samples[:calib], samples[calib:][-test:], bench.folder))


@pytest.mark.parametrize("calib", [16, 64, 256])
@pytest.mark.parametrize("name", ["demo", *FEW])
def test_few_samples(bench: Bench, name: str, calib: int) -> None:
    samples = shuffled(name, bench.places)
    bench.row(**bench.once(_compressed, name, bench.places, samples[:calib], samples[calib:], bench.folder))


def _compressed(name: str, places: Places, calib: NDArray[Any], test: NDArray[Any], folder: Path) -> dict[str, str]:
    model, data, result, report = (
        model_of(name, places),
        *(folder / what for what in ("calib.npz", "small.onnx", "report.json")),
    )
    np.savez(data, allow_pickle=False, **{_input(model): calib})
    ran = command(model, result, "--calib", data, "--report", report)
    assert ran.code == 0, ran.said
    found = json.loads(report.read_text(encoding="utf-8"))
    groups, before, after = found["groups"], found["before"], found["after"]
    errors = OutputErrors()
    originals, results = (session(path) for path in (model, result))
    outputs = [output.name for output in originals.get_outputs()]
    batch = originals.get_inputs()[0].shape[0]
    batch = batch if isinstance(batch, int) else 16
    for first in range(0, len(test), batch):
        feeds = {_input(model): test[first : first + batch]}
        errors.update(*(dict(zip(outputs, one.run(outputs, feeds), strict=True)) for one in (originals, results)))
    verdict = errors.result()
    removed = sum(group["channels_before"] - group["channels_after"] for group in groups)
    return {
        "model": name,
        "calib": str(len(calib)),
        "test": str(len(test)),
        "same arg-max": "-" if verdict.agreement is None else f"{verdict.agreement:.2%}",
        "error": f"{verdict.relative_error:.1e}",
        "removed": f"{removed} of {sum(group['channels_before'] for group in groups)}",
        "parameters": f"{after['parameters'] / before['parameters']:.1%}",
        "MACs": f"{after['macs'] / before['macs']:.1%}",
        "seconds": f"{ran.seconds:.0f}",
        "CPU s": f"{ran.cpu:.0f}",
        "peak MB": f"{ran.peak:.0f}",
    }


def _input(model: Path) -> str:
    return onnx.load(model, load_external_data=False).graph.input[0].name


# ---- planted dependence -----------------------------------------------------------------------------------------

FRESH_IMAGES = 24


@dataclass(frozen=True)
class Found:
    """What became of planted channels; see the module for the meaning of the fields."""

    planted: int
    removed: int
    extra: int
    error: float
    whole: float
    rounding: float
    plain: int
    again: int
    refused: Sequence[str]
    peak: int

    @property
    def recall(self) -> float:
        """Share of the planted channels that went; 1 where none are planted."""
        return self.removed / self.planted if self.planted else 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", planted.NAMES)
def test_planted_topologies(bench: Bench, name: str) -> None:
    found = bench.once(planted_in, name, bench.folder)
    bench.row(
        topology=name,
        planted=found.planted,
        removed=found.removed,
        recall=f"{found.recall:.2%}",
        extra=found.extra,
        error=f"{found.error:.1e}",
        whole=f"{found.whole:.1e}",
        rounding=f"{found.rounding:.1e}",
        plain=found.plain,
        again=found.again,
        **{"refused": "; ".join(found.refused), "peak MB": found.peak},
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", range(17))
def test_planted_nets(bench: Bench, number: int) -> None:
    planted_nets = pytest.importorskip("planted_nets", reason="PyTorch makes these")
    name = list(planted_nets.NETS)[number]
    found, plain = bench.once(planted_nets.found_in, name), planted_nets.found_in(name, dependent=False)
    recall = f"{found.removed / found.planted:.1%}"
    bench.row(
        net=name,
        planted=found.planted,
        removed=found.removed,
        recall=recall,
        error=f"{found.error:.1e}",
        plain=plain.removed,
    )


def planted_in(name: str, folder: Path, *, samples: int = 64, seed: int = 0) -> Found:
    """Plant, compress, compare."""
    source, result, again, plain, smaller = (folder / f"{what}.onnx" for what in ("a", "b", "c", "p", "q"))
    calib = folder / "calib.npz"
    built = planted.build(name, seed=seed, samples=samples)
    onnx.save(built.model, source)
    np.savez(calib, allow_pickle=False, **built.calibration(samples, seed + 1))
    onnx.save(planted.build_plain(name, seed).model, plain)
    peak = apart(_compress, source, calib, result)[2]
    apart(_compress, result, calib, again)
    apart(_compress, plain, calib, smaller)

    structure = _traced(source)
    before, after = _widths(structure), _widths(_traced(result))
    wanted = Counter(channel.producers for channel in built.channels)
    axes = [*wanted, *((node,) for node in before if not any(node in axis for axis in wanted))]
    gone = {axis: before[axis[0]] - after[axis[0]] for axis in axes}
    fresh = planted.random_inputs(name, FRESH_IMAGES, seed + 2)
    compared = _compare(built.model, onnx.load(result), fresh)
    return Found(
        planted=wanted.total(),
        removed=sum(min(gone[axis], count) for axis, count in wanted.items()),
        extra=sum(max(0, count - wanted[axis]) for axis, count in gone.items()),
        error=compared.relative_error,
        whole=compared.whole_error,
        rounding=_compare(built.model, _neighbour(built.model, seed), fresh).relative_error,
        plain=sum(_widths(_traced(plain)).values()) - sum(_widths(_traced(smaller)).values()),
        again=sum(after.values()) - sum(_widths(_traced(again)).values()),
        refused=[f"{r.channels} at {', '.join(r.nodes)} ({r.reason.code})" for r in structure.refusals],
        peak=peak,
    )


def _compress(source: Path, calib: Path, result: Path) -> None:
    onnx.save(lindep_onnx.compress(source, calib).model, result)


def _traced(path: Path) -> Structure:
    model = load(path)
    return trace(model, resolve(model))


def _widths(structure: Structure) -> dict[str, int]:
    """Output channels of every Conv and Gemm."""
    return {structure.model.nodes[producer.node].name: len(producer.atoms) for producer in structure.producers}


def _compare(left: onnx.ModelProto, right: onnx.ModelProto, images: NDArray[np.float32]) -> OutputComparison:
    """How the one output differs between two models."""
    name, sessions, errors = left.graph.input[0].name, [session(model) for model in (left, right)], OutputErrors()
    for image in images:
        errors.update(*({"y": one.run(None, {name: image[None]})[0]} for one in sessions))
    (output,) = errors.result().outputs
    return output


def _neighbour(model: onnx.ModelProto, seed: int) -> onnx.ModelProto:
    """The model with every weight moved to the next float32 above or below, or left, at random."""
    rng = np.random.default_rng(seed)
    moved = onnx.ModelProto()
    moved.CopyFrom(model)
    for tensor in moved.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        if value.dtype == np.float32:
            towards = rng.choice(np.array([-np.inf, np.nan, np.inf], np.float32), value.shape)
            value = np.where(np.isnan(towards), value, np.nextafter(value, towards))
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    return moved


# ---- margins of silent channels ---------------------------------------------------------------------------------

MARGINS = (
    *("demo", "lenet", "crepe_tiny", "resnet20", "resnet56", "cifar10_keras_cnn", "mtcnn_onet", "mobilenetv2"),
    "efficientnet_lite0",
)
#: What is left for decisions of 38, 64, 128, 256, 512 and 1,000 samples, once a share only verifies.
SIZES = (32, 54, 108, 216, 432, 850)
CERTAINTIES = (0.0, 16.0, 24.0, 32.0, 48.0)
DRAWS, MOST, MIN_UNSEEN = 20, 2000, 100


@dataclass(frozen=True)
class Observed:
    """One model and what every sample does behind its activations.

    Attributes:
        units: number of units.
        watched: where to look.
        samples: for each sample, what was seen there.
    """

    units: int
    watched: tuple[WatchedTensor, ...]
    samples: list[tuple[RangeStats, ...]]


@pytest.mark.parametrize("name", MARGINS)
def test_margins(bench: Bench, name: str) -> None:
    draws, most = (2, 300) if name == "demo" else (DRAWS, MOST)
    model = bench.once(observe, model_of(name, bench.places), every(name, bench.places)[:most])
    for cells in tried(model, draws) if model.watched else [{"samples": "no activation is flat anywhere"}]:
        bench.row(model=name, **cells)


def observe(model: Path, images: NDArray[np.float32]) -> Observed:
    """Run a model over all images, one by one."""
    structure = _traced(model)
    everything = [np.ones(len(features(consumer.columns).atoms), dtype=bool) for consumer in structure.consumers]
    watched = tuple(flat for flat in inactive.watched_tensors(structure, everything) if flat.parts)
    if not watched:
        return Observed(structure.units, (), [])
    spec = InputSpec(_input(model), np.dtype(np.float32), ("N", *images.shape[1:]))
    sampler = RowSampler(
        *(structure.model, structure.shape_info, {}, Runtime()),
        probe=RangeProbe(structure, watched),
    )
    seen = []
    with open_samples({spec.name: images}, [spec], DataOptions(batch_size=1)) as samples:
        for batch in samples.batches(*Part):
            alone = RangeProbe(structure, watched)
            alone.extend(onnx.ModelProto())  # only to learn what it asks for
            alone.update(sampler.run(batch, np.random.default_rng(0)).probed, batch)
            ranges = alone.ranges()
            seen.append(tuple(ranges[flat.key][1] for flat in watched))
    return Observed(structure.units, watched, seen)


def tried(model: Observed, draws: int) -> Iterator[dict[str, str]]:
    """Let the rule see some samples, and judge it by the others; the means over several draws for each size."""
    count, rng = len(model.samples), np.random.default_rng(0)
    awake = [
        [np.stack([seen[place].margins[part].count == 0 for seen in model.samples]) for part in range(len(flat.parts))]
        for place, flat in enumerate(model.watched)
    ]
    for size in (size for size in SIZES if size + MIN_UNSEEN <= count):
        orders = [rng.permutation(count) for _ in range(draws)]
        found = np.mean([_judged(model, awake, order[:size], order[size:]) for order in orders], axis=0)
        cells = [f"{own[0]:.1f}, {own[1]:.2f}, {own[2]:.2%}" for own in found[1:].reshape(-1, 3)]
        titles = [f"{certainty:g}" for certainty in CERTAINTIES]
        yield {"samples": str(size), "silent": f"{found[0]:.1f}", **dict(zip(titles, cells, strict=True))}


def _judged(
    model: Observed, awake: list[list[NDArray[np.bool_]]], chosen: NDArray[np.int64], others: NDArray[np.int64]
) -> list[float]:
    """Silent channels; for each constant those trusted, those of them that wake, and the share of samples with one."""
    known = [reduce(RangeStats.merge, seen) for seen in zip(*(model.samples[i] for i in chosen), strict=True)]
    found: list[float] = []
    for certainty in CERTAINTIES:
        uncertain = inactive.uncertain_units(model.units, model.watched, known, len(chosen), certainty)
        silent = trusted = woke = 0
        touched = np.zeros(len(others), dtype=bool)
        for flat, seen, woken in zip(model.watched, known, awake, strict=True):
            for part, own in zip(seen.margins, woken, strict=True):
                quiet = part.count[flat.inactive] == len(chosen)
                goes = flat.inactive[quiet & ~uncertain[flat.units]]
                later = own[np.ix_(others, goes)]
                silent, trusted, woke = silent + quiet.sum(), trusted + len(goes), woke + later.any(axis=0).sum()
                touched |= later.any(axis=1)
        found += [trusted, woke, touched.mean()]
    return [silent, *found]


# ---- budgets ----------------------------------------------------------------------------------------------------

#: A share is severe where it is small, an error where it is large: that asks for the smaller model.
SWEEPS = {
    "params": (0.97, 0.9, 0.8, 0.65, 0.5),
    "macs": (0.97, 0.9, 0.8, 0.65, 0.5),
    "max_error": (0.003, 0.01, 0.03, 0.1, 0.3),
}


@pytest.mark.parametrize("name", ["demo", "resnet56", "efficientnet_lite0", "mobilenetv2", "hed_vgg16"])
def test_budgets(bench: Bench, name: str) -> None:
    task = open_task(name, bench.places)
    calib, shapes = {task.input: task.calib}, {task.input: (1, *task.calib.shape[1:])}
    before = cost(load(task.model), shapes)
    smaller = partial(lindep_onnx.compress, task.model, calib, refit="fold")
    for kind, limits in SWEEPS.items():
        last: int | None = None
        for limit in limits:
            try:
                result = smaller(**{kind: limit})
            except BudgetError as problem:
                bench.row(model=name, budget=kind, limit=limit, achieved=str(problem))
                # A milder error than one that was met can be met; a smaller share need not be.
                assert last is None or kind != "max_error", problem
                continue
            after = cost(load(result.model), shapes)
            size = after.macs if kind == "macs" else after.parameters
            (budget,) = (budget for budget in result.report.budget if budget.kind == kind)
            share = {"params": after.parameters / before.parameters, "macs": after.macs / before.macs}
            reached = share.get(kind, budget.achieved)
            bench.row(model=name, budget=kind, limit=limit, achieved=f"{reached:.5f}", parameters=after.parameters)
            assert reached <= limit and (last is None or size <= last)
            last = size
    one, other = (smaller(params=0.8).model.SerializeToString() for _ in range(2))
    assert bench.once(lambda: one == other)


# ---- proofs -----------------------------------------------------------------------------------------------------

#: A violation is a difference beyond this share of the largest output, and beyond so many times what the original's own
#: output changes when the input changes by a rounding.
TOLERANCE, ROUNDINGS = 2e-5, 8.0
#: Steps of the search and inputs tried in each.
STEPS, TRIES = 25, 48


@pytest.mark.parametrize("nets", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_proofs(bench: Bench, nets: int) -> None:
    wanted, found, worst = bench.once(proven_in, range(nets))
    for kind in sorted(wanted):
        bench.row(kind=kind, planted=wanted[kind], found=found[kind])
    bench.row(kind="all", planted=wanted.total(), found=found.total(), largest_difference=f"{worst:.2g} of the output")
    assert found == wanted and worst <= TOLERANCE


def proven_in(seeds: Sequence[int]) -> tuple[Counter[str], Counter[str], float]:
    """Planted and found channels by kind over some nets, and the worst counterexample found."""
    wanted: Counter[str] = Counter()
    found: Counter[str] = Counter()
    worst = 0.0
    for seed in seeds:
        net, box = proven_nets.make(seed)
        model = net.model()
        result = lindep_onnx.compress(model, proven_only=True, round_to=1, input_range={"x": box} if box else {})
        for (kind, count), group in zip(net.planted, result.report.groups, strict=True):
            wanted[kind] += count
            found[kind] += min(count, group.removed)
            if group.removed < count:
                print(f"net {seed}: {group.removed} of {count} found of kind {kind!r} in {group.name}")
        for each in [box] if box else [(-size, size) for size in (1e-3, 1.0, 1e3)]:
            error = worst_error(model, result.model, each, np.random.default_rng(seed))
            worst = max(worst, error)
            if error > TOLERANCE:
                print(f"net {seed}: VIOLATION, an input in {each} changes the output by {error:.2g}")
    return wanted, found, worst


def worst_error(
    original: onnx.ModelProto, result: onnx.ModelProto, box: tuple[float, float], rng: np.random.Generator
) -> float:
    """The largest difference found in the box, as a share of the largest output in the box (some cancel to nothing).

    Random inputs, corners of the box, and hill climbing without gradients from the worst of them. Zero where it is no
    more than what rounding the input does to the original: values of thousands ahead of a Clip.
    """
    sessions = session(original, 1), session(result, 1)
    largest = 0.0

    def errors(x: NDArray[Any]) -> NDArray[Any]:
        nonlocal largest
        one, two = (s.run(None, {"x": x.astype(np.float32)})[0].reshape(len(x), -1).astype(float) for s in sessions)
        largest = max(largest, float(np.abs(one).max()))
        return np.abs(one - two).max(axis=1)

    low, high = box
    shape = (TRIES, 3, proven_nets.SIZE, proven_nets.SIZE)
    every = np.concatenate(
        [
            rng.uniform(low, high, shape),
            rng.choice([low, high], shape),
            np.broadcast_to(rng.choice([low, high], (TRIES, 3, 1, 1)), shape),
            *(np.full((1, *shape[1:]), end) for end in (low, high)),
        ]
    )
    found = errors(every)
    best, error = every[found.argmax()], float(found.max())
    for step in range(STEPS):  # another value, or another corner, for a share of the coordinates
        change = rng.choice([low, high], shape) if step % 2 else rng.uniform(low, high, shape)
        candidates = np.where(rng.random(shape) < rng.uniform(0, 1) ** 2, change, best)
        found = errors(candidates)
        if found.max() > error:
            best, error = candidates[found.argmax()], float(found.max())
    near = best * (1 + rng.choice([-1, 1], shape) * 2.0**-23)
    one, other = (sessions[0].run(None, {"x": x.astype(np.float32)})[0] for x in (near, best[None]))
    noise = float(np.abs(one.astype(float) - other).max())
    return error / (largest + 1e-30) if error > ROUNDINGS * noise or error < TOLERANCE * largest else 0.0
