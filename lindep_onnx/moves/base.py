"""What every kind of change has to be able to do: the contract that the search, the refit and the plan file rely on.

A kind finds its *sites* in a traced model. A site has *steps*, the smallest decisions there are (channels: one unit). A
kind prices its steps from statistics, says which of them can be taken together, and turns those that are taken into
edits of the graph. It knows nothing of budgets, searches, files and reports, and these know nothing of kinds. The steps
of all kinds meet on one path (`lindep_onnx.planning.path`), sorted by error per saving; every budget is a point of it.

`tests/moves/test_contract.py` holds any kind to this; `docs/extending.md` shows one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lindep_onnx.calibration.pairs import Pair
from lindep_onnx.calibration.statistics import Statistics
from lindep_onnx.errors import UsageError
from lindep_onnx.linalg.linear_map import ChannelMaps, LinearMap
from lindep_onnx.model.edit import GraphEdits
from lindep_onnx.runtime.targets import WidthRule
from lindep_onnx.structure.steps import ChannelSteps, Curve, Saving
from lindep_onnx.structure.types import Refusal, Structure


@dataclass(frozen=True)
class Site:
    """A place in the graph where a kind of change has steps to take.

    Attributes:
        name: of a node, for people.
        steps: numbers of its steps, ascending.
    """

    name: str
    steps: NDArray[np.int64]


@dataclass(frozen=True)
class Exactness:
    """What counts as free of cost.

    Attributes:
        tolerance: RMS relative error that one consumer may gain, on unseen samples too.
        uncertain: (units,) bool, channels that are constant so far but without a margin.
        keep: (steps,) bool, steps that are not taken in any case; None for none.
        proven: channels that the weights prove redundant, with their folds: they go whatever the data shows.
    """

    tolerance: float
    uncertain: NDArray[np.bool_]
    keep: NDArray[np.bool_] | None = None
    proven: ChannelSteps | None = None


class Steps(Protocol):
    """Steps of one kind that are taken, with all that carrying them out needs to know."""

    @property
    def taken(self) -> NDArray[np.bool_]:
        """(steps,) bool."""


class Move(Protocol):
    """One kind of change. It holds no state: all it knows comes from the traced model and its statistics.

    Attributes:
        name: of the kind, in plans and reports.
    """

    name: str

    def count(self, structure: Structure) -> int:
        """Number of steps of the model; they are numbered from 0 on, through all sites."""

    def sites(self, structure: Structure) -> tuple[Site, ...]:
        """Where the kind can do something."""

    def refusals(self, structure: Structure) -> tuple[Refusal, ...]:
        """Where it could but for something that is named."""

    def pairs(self, structure: Structure) -> tuple[Pair, ...]:
        """Two tensors at a time whose joint second moments calibration has to collect; mostly none."""

    def savings(self, structure: Structure, saving: Saving) -> NDArray[np.float64]:
        """(steps,) what each step saves alone."""

    def price(
        self, structure: Structure, statistics: Statistics, sensitivity: Sequence[float], saving: NDArray[np.float64]
    ) -> list[Curve]:
        """The curve of every site.

        Args:
            structure: the traced model.
            statistics: what the data says.
            sensitivity: by consumer, squared error of the outputs for a squared relative error of 1 there.
            saving: (steps,) what each saves.
        """

    def possible(self, structure: Structure, order: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(R,) bool, which of these steps can be taken one after the other; the others are skipped."""

    def admissible(
        self, structure: Structure, taken: NDArray[np.bool_], order: NDArray[np.int64], rule: WidthRule
    ) -> NDArray[np.bool_]:
        """(steps,) bool: as many of the steps as can be taken together, so that what stays is whole.

        Args:
            structure: the traced model.
            taken: (steps,) bool, what is wanted.
            order: the wanted steps in the order in which they were taken; the last ones are given up first.
            rule: the multiples that widths keep to.
        """

    def blocks(self, structure: Structure, order: NDArray[np.int64], rule: WidthRule) -> list[NDArray[np.int64]]:
        """Cut an order of steps into blocks that are worth taking only as a whole; what makes none is left out.

        Args:
            structure: the traced model.
            order: (R,) steps, in the order in which they would be taken.
            rule: the multiples that widths keep to.
        """

    def exact(self, structure: Structure, statistics: Statistics, bounds: Exactness) -> Steps:
        """All steps that cost nothing, fitted; a kind that is never exact takes none."""

    def unfitted(self, structure: Structure, taken: NDArray[np.bool_]) -> Steps:
        """The steps alone: their result has the right size and speed, not the right values."""

    def fit(self, structure: Structure, steps: Steps, statistics: Statistics) -> Steps:
        """The steps with the best that a single fit can do about their error."""

    def apply(self, structure: Structure, steps: Steps, statistics: Statistics | None) -> GraphEdits:
        """What to change in the graph; the outer tensors keep their names. Nothing is changed here.

        Args:
            structure: the traced model.
            steps: what to do.
            statistics: what the steps were fitted to; None for steps that are not.
        """

    def maps(self, structure: Structure, steps: Steps) -> ChannelMaps:
        """How tensors behind the change follow from those before it."""

    def refound(self, before: Structure, taken: NDArray[np.bool_], after: Structure) -> NDArray[np.bool_]:
        """(steps of `after`,) bool: the same steps in what another kind made of the model, but for sites that are gone.

        Args:
            before: the model that the steps are of, traced.
            taken: (steps of `before`,) bool.
            after: the changed model, traced; tensors and nodes go by the same names.
        """

    def to_names(self, structure: Structure, steps: Steps) -> Mapping[str, Any]:
        """The steps as JSON values, by names of tensors or nodes, so that they fit every model with the same layers."""

    def from_names(self, structure: Structure, names: Mapping[str, Any]) -> NDArray[np.bool_]:
        """(steps,) bool: the steps that `to_names` named.

        Raises:
            UsageError: the model has no such site, or another one.
        """


@dataclass(frozen=True)
class FittedSteps:
    """Steps that are taken, and what was fitted for them.

    Attributes:
        taken: (steps,) bool.
        fits: by site, whatever the kind needs to carry them out; empty before the fit.
    """

    taken: NDArray[np.bool_]
    fits: Mapping[int, tuple[NDArray[np.float64], ...]] = field(default_factory=dict)


class Independent:
    """What kinds say alike whose steps do not get in each other's way: all can be taken, none is exact.

    A kind made of it adds `name`, `sites`, `savings`, `price`, `fit`, `apply` and `maps`. The steps of a site are taken
    from the first on, so that a plan holds their number by the site's name.
    """

    def sites(self, structure: Structure) -> tuple[Site, ...]:
        """See `Move`."""
        raise NotImplementedError

    def count(self, structure: Structure) -> int:
        """As many as the sites have."""
        return sum(len(site.steps) for site in self.sites(structure))

    def refusals(self, structure: Structure) -> tuple[Refusal, ...]:
        """None."""
        return ()

    def pairs(self, structure: Structure) -> tuple[Pair, ...]:
        """None."""
        return ()

    def possible(self, structure: Structure, order: NDArray[np.int64]) -> NDArray[np.bool_]:
        """All."""
        return np.ones(len(order), dtype=bool)

    def admissible(
        self, structure: Structure, taken: NDArray[np.bool_], order: NDArray[np.int64], rule: WidthRule
    ) -> NDArray[np.bool_]:
        """All that are wanted."""
        return taken

    def blocks(self, structure: Structure, order: NDArray[np.int64], rule: WidthRule) -> list[NDArray[np.int64]]:
        """Each on its own."""
        return list(order[:, None])

    def exact(self, structure: Structure, statistics: Statistics, bounds: Exactness) -> FittedSteps:
        """None."""
        return FittedSteps(np.zeros(self.count(structure), dtype=bool))

    def unfitted(self, structure: Structure, taken: NDArray[np.bool_]) -> FittedSteps:
        """The steps alone."""
        return FittedSteps(taken)

    def refound(self, before: Structure, taken: NDArray[np.bool_], after: Structure) -> NDArray[np.bool_]:
        """By the names of the sites; a site that lost steps takes as many as it has."""
        found = np.zeros(self.count(after), dtype=bool)
        counts = {site.name: int(taken[site.steps].sum()) for site in self.sites(before)}
        for site in self.sites(after):
            found[site.steps[: counts.get(site.name, 0)]] = True
        return found

    def to_names(self, structure: Structure, steps: Steps) -> dict[str, Any]:
        """How many steps of each site."""
        counts = {site.name: int(steps.taken[site.steps].sum()) for site in self.sites(structure)}
        return {name: count for name, count in counts.items() if count}

    def from_names(self, structure: Structure, names: Mapping[str, Any]) -> NDArray[np.bool_]:
        """See `to_names`."""
        taken = np.zeros(self.count(structure), dtype=bool)
        known = {site.name: site for site in self.sites(structure)}
        for name, count in names.items():
            if name not in known or not 0 <= int(count) <= len(known[name].steps):
                raise UsageError(
                    f"The plan does not fit: nothing like it can be done at {str(name)[:80]!r} of the model."
                )
            taken[known[name].steps[: int(count)]] = True
        return taken


@dataclass(frozen=True)
class Composed:
    """Several changes, one after the other, as one `ChannelMaps`.

    Attributes:
        parts: first what was done first.
    """

    parts: tuple[ChannelMaps, ...]

    def of(self, tensor: str, axis: int) -> LinearMap | None:
        """See `ChannelMaps`."""
        found: LinearMap | None = None
        for part in self.parts:
            own = part.of(tensor, axis)
            if own is not None:
                found = own if found is None else own.after(found)
        return found

    def touches(self, tensor: str) -> bool:
        """See `ChannelMaps`."""
        return any(part.touches(tensor) for part in self.parts)
