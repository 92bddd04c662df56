"""Candidates held against the original: how far their outputs are off, what they cost, how fast they are."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import onnx
from numpy.typing import NDArray

from lindep_onnx.data.samples import Batch, Samples
from lindep_onnx.data.split import Part
from lindep_onnx.errors import LindepError, UsageError, VerificationError
from lindep_onnx.log import Log
from lindep_onnx.model.cost import Cost, cost
from lindep_onnx.model.ir import Model
from lindep_onnx.model.precision import perturbed_one_ulp
from lindep_onnx.model.working import as_stored, working_copy
from lindep_onnx.options import LOSSLESS_VERIFIED_ERROR, Config
from lindep_onnx.planning.budgets import COMPARED, QUALITY, Budgets
from lindep_onnx.planning.path import STOPS
from lindep_onnx.planning.plan_file import ResolvedPlan
from lindep_onnx.planning.search import COARSE
from lindep_onnx.planning.values import Candidate, Evaluation
from lindep_onnx.runtime.backend import Runtime, Session, Shares
from lindep_onnx.runtime.node_times import LayerTime, layer_times
from lindep_onnx.runtime.timing import Stopwatch, Timing
from lindep_onnx.verify.compare import Outputs, compare
from lindep_onnx.verify.metrics import Comparison
from lindep_onnx.verify.outputs import held
from lindep_onnx.verify.verdict import Verdict

#: Errors that the original itself makes when every weight moves to a neighbouring number or stays: below so many of
#: them a result is lossless, whatever its error.
OUTPUT_ROUNDINGS = 2.0
#: Seconds that models are timed for where a budget depends on it.
DECISIVE = 6.0
#: Plans that a search by measured errors tries: two bisections, see `planning.search`.
PROBES = math.ceil(math.log2(STOPS)) + math.ceil(math.log2(STOPS / COARSE))


@dataclass(frozen=True)
class Reference:
    """What results are compared with.

    Attributes:
        model: the original as it is worked on.
        stored: the original as it is stored.
        activations: bytes of all tensors of one sample.
        sample_axes: which axis of outputs counts samples, where it is not the leading one.
    """

    model: Model
    stored: Model
    activations: int
    sample_axes: Mapping[str, int]


class Judge:
    """Compares, prices and times results of one original.

    Args:
        reference: the original.
        samples: the data; None if there are none.
        config: the options.
        runtime: what models run on.
        log: told of stages and how far they are.
        wanted: a plan to carry out again; None to make one.

    Attributes:
        before: what the original costs.
        budgets: what is asked for.
        shares: how the cores are shared out among runs.

    Raises:
        ModelError: ONNX Runtime cannot load the original.
    """

    def __init__(
        self,
        reference: Reference,
        samples: Samples | None,
        config: Config,
        runtime: Runtime,
        log: Log,
        wanted: ResolvedPlan | None = None,
    ) -> None:
        self._reference, self._samples, self._config, self._runtime, self._log = (
            reference,
            samples,
            config,
            runtime,
            log,
        )
        self.shares: Shares = runtime.shares(reference.activations * (1 if samples is None else samples.batch))
        original = self._open(reference.model)  # first of all, for damaged models do not load
        self._stopwatch: Stopwatch | None = None
        self._original = original if reference.model.folder is None else None
        self._first = None if samples is None else next(iter(samples.batches(limit=1)))
        self.before = self.priced(reference.stored)
        self.budgets = Budgets.of(config, self.before, wanted)

    # ---- size and time -----------------------------------------------------------------------------------------

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs in the run that counts."""
        return {} if self._first is None else {name: value.shape for name, value in self._first.feeds.items()}

    def cost(self, model: Model) -> Cost:
        """What a result costs as it is written."""
        return self.priced(self.stored(model))

    def priced(self, model: Model) -> Cost:
        """What a model costs as it is."""
        return cost(model, self.shapes, 1 if self._first is None else self._first.size)

    def stored(self, model: Model) -> Model:
        """A result as it is written: in the precision of the original."""
        return as_stored(model, self._reference.stored)

    def latency(self, model: Model) -> Timing | None:
        """How long a result takes beside the original, both as they are written; None without data.

        Raises:
            TimingError: one of them cannot be timed.
        """
        if self._samples is None:
            return None
        with self._log.stage("latency"), self.stopwatch() as stopwatch:
            return stopwatch.compare(self.stored(model))

    @contextmanager
    def stopwatch(self) -> Iterator[Stopwatch]:
        """What times models, as they are written, against the original; `latency` uses it too as long as it is open.

        Raises:
            UsageError: there is no data to run models on.
        """
        if self._stopwatch is not None:
            yield self._stopwatch
            return
        original, batch, runtime = self._run()
        feeds = _of_types(batch.feeds, original)
        seconds = self._config.benchmark or (None if self.budgets.latency is None else DECISIVE)
        try:
            with Stopwatch(original, feeds, runtime, batch=batch.size, seconds=seconds) as stopwatch:
                self._stopwatch = stopwatch
                yield stopwatch
        finally:
            self._stopwatch = None

    def layer_times(self, model: Model) -> tuple[LayerTime, ...]:
        """How long each node takes, in the original and in a result; nothing without data.

        Nothing either where weights lie in files, for what is profiled has copies of them.

        Raises:
            ModelError: a model does not run.
            UsageError: the profiler does not tell.
        """
        if self._samples is None or self._reference.model.folder is not None:
            return ()
        original, batch, runtime = self._run()
        with self._log.stage("layer times"):
            return layer_times(original, self.stored(model), _of_types(batch.feeds, original), runtime)

    def _run(self) -> tuple[Model, Batch, Runtime]:
        """What is timed: the original as it is written, a batch, and what both run on."""
        if self._samples is None:
            raise UsageError("Latency is measured on calibration data: give --calib.")
        config = self._config
        threads = self._runtime.threads if config.benchmark_threads is None else config.benchmark_threads
        runtime = replace(self._runtime, threads=threads)
        return self._reference.stored or self._reference.model, self._samples.run_of(config.benchmark_batch), runtime

    # ---- quality -----------------------------------------------------------------------------------------------

    def sessions(self, model: Model) -> tuple[Session, Session]:
        """Of the original, and of a result."""
        return self._original or self._open(self._reference.model), self._open(model)

    def _open(self, model: Model) -> Session:
        return self.shares.each.open(model)

    def compare(self, model: Model, batches: Iterator[Batch]) -> Comparison:
        """A result against the original.

        Args:
            model: the result.
            batches: what both are run on.
        """
        return compare(*self.sessions(model), batches, outputs=self._outputs, runs=self.shares.runs)

    @functools.cached_property
    def _outputs(self) -> Outputs:
        return Outputs(self._config.agreement_output, self._holds, self._reference.sample_axes)

    @functools.cached_property
    def _holds(self) -> Mapping[str, str]:
        """What outputs hold by the graph. Who asks for an agreement says that there are class scores."""
        asked = self._config.min_agreement is not None or self._config.agreement_output is not None
        found = held(self._reference.model)
        return {name: what for name, what in found.items() if what != "embedding" or not asked}

    def compare_part(self, model: Model, part: Part) -> Comparison | None:
        """A result against the original on one part of the data; None if there is none of it."""
        if self._samples is None or not len(self._samples.parts[part]):
            return None
        return self.compare(model, self._samples.batches(part))

    def quality(self, model: Model, found: Comparison | None) -> dict[str, float | None]:
        """What budgets on quality ask for, by option name.

        Args:
            model: the result.
            found: how it compares.
        """
        compared = dict(
            zip(COMPARED, (None, None) if found is None else (found.relative_error, found.agreement), strict=True)
        )
        wanted = [name for name in QUALITY if name in self.budgets.limits]
        return {name: compared[name] if name in COMPARED else self._drop(model) for name in wanted}

    def _drop(self, model: Model) -> float:
        assert self._config.eval is not None
        return self._metric - float(self._config.eval(self._runtime.open(model)))

    @functools.cached_property
    def _metric(self) -> float:
        assert self._config.eval is not None
        return float(self._config.eval(self._runtime.open(self._reference.model)))

    def good(self) -> Callable[[Model], bool]:
        """Whether a result is good enough on the samples that decide; tells how many were asked about."""
        probes = itertools.count(1)

        def holds(model: Model) -> bool:
            found = self.compare_part(model, Part.SELECT)
            measured = self.quality(model, found)
            done = next(probes)
            self._log.progress("search", done, max(done, PROBES))
            kept = all(self.budgets.holds(name, value) for name, value in measured.items())
            return kept and self.budgets.chance_failure(found) is None

        return holds

    # ---- the verdict -------------------------------------------------------------------------------------------

    def rounded(self, model: Model) -> Model:
        """A result whose weights have been rounded like what is written, in the precision that is worked in."""
        return working_copy(self.stored(model))

    def evaluate(self, candidate: Candidate) -> Evaluation:
        """Hold a candidate to everything that is asked for, on samples that nothing was fitted to or chosen by."""
        with self._log.stage("verify"):
            found = self.compare_part(candidate.model, Part.VERIFY)
            after = self.cost(candidate.model)
            achieved: dict[str, float | None] = {name: self.budgets.share(name, after) for name in self.budgets.sizes}
            achieved.update(self.quality(candidate.model, found))
            failure = self.budgets.failure(achieved, found) or self._not_lossless(found)
        return Evaluation(after, found, achieved, failure)

    def timed(self, evaluation: Evaluation, ratio: float) -> Evaluation:
        """The same with the share of the time that was reached.

        Args:
            evaluation: of a candidate.
            ratio: its latency as a share of the original's.
        """
        achieved = {**evaluation.achieved, "latency": ratio}
        failure = evaluation.failure or self.budgets.latency_failure(ratio)
        return replace(evaluation, achieved=achieved, failure=failure)

    def verdict(self, evaluation: Evaluation) -> Verdict:
        """What may be said of a candidate after it was evaluated."""
        budgets = replace(self.budgets, mode="lossless") if evaluation.lossless else self.budgets
        random = self._config.random_calib is not None
        different = None if self._samples is None else self._samples.different(Part.VERIFY)
        return budgets.verdict(evaluation.comparison, evaluation.failure, random, different=different)

    def _not_lossless(self, found: Comparison | None) -> LindepError | None:
        if self.budgets.mode == "budgeted" or found is None or self.is_lossless(found.relative_error):
            return None
        return VerificationError(
            f"The result differs from the original by {found.relative_error:.2g} on held-out samples, more than "
            f"the {LOSSLESS_VERIFIED_ERROR:.2g} allowed. Nothing was written; give more or more varied data."
        )

    def is_lossless(self, error: float) -> bool:
        """Whether an output error is small enough, or rounding: on few samples any difference can look large."""
        return error <= LOSSLESS_VERIFIED_ERROR or error <= OUTPUT_ROUNDINGS * self._rounding_error

    @functools.cached_property
    def _rounding_error(self) -> float:
        """What one rounding of all weights does to the outputs of the original; no error below it counts."""
        moved = perturbed_one_ulp(self._reference.stored, self._config.seed)
        found = self.compare_part(working_copy(moved), Part.VERIFY)
        return 0.0 if found is None else found.relative_error


def _of_types(feeds: Mapping[str, NDArray[Any]], model: Model) -> dict[str, NDArray[Any]]:
    """Feeds in the floating-point types that a model declares for its inputs."""
    declared = {value.name: value.type.tensor_type.elem_type for value in model.proto.graph.input}
    return {
        name: value.astype(onnx.helper.tensor_dtype_to_np_dtype(declared[name])) if value.dtype.kind == "f" else value
        for name, value in feeds.items()
    }
