"""The linear algebra, against brute force: every removal tried, every refit a least-squares problem on the raw rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import scipy.linalg

from lindep_onnx.linalg.elimination import Allowance, Elimination, Limits, eliminate
from lindep_onnx.linalg.fold import ConsumerProblem, choose_ridge, fold, removal_cost, residual_moments
from lindep_onnx.linalg.lossless import LosslessRemoval, collinear_classes, lossless_removals


@dataclasses.dataclass(frozen=True)
class Consumer:
    """Raw rows and weights, and the problem that they pose."""

    z: np.ndarray  # (rows, features)
    w: np.ndarray  # (outputs, features)
    unit: np.ndarray
    unseen: np.ndarray | None = None
    joint: bool = True

    @property
    def problem(self) -> ConsumerProblem:
        centred = (self.z - self.z.mean(0)) @ self.w.T
        holdout = None if self.unseen is None else self.unseen.T @ self.unseen / len(self.unseen)
        energy = float((centred**2).sum() / len(self.z))
        return ConsumerProblem(
            self.z.T @ self.z / len(self.z), holdout, self.w.T @ self.w, self.unit, energy, self.joint
        )

    def kept(self, removed: Sequence[int]) -> np.ndarray:
        return ~np.isin(self.unit, list(removed))

    def cost(self, removed: Sequence[int]) -> float:
        """Squared relative error without some units, all survivors refitted."""
        target, rest = self.z @ self.w.T, self.z[:, self.kept(removed)]
        residual = target - rest @ np.linalg.lstsq(rest, target, rcond=None)[0]
        return float((residual**2).sum() / len(self.z) / self.problem.energy)


def consumer(
    rng: np.random.Generator, unit: Sequence[int], *, rows: int = 300, outputs: int = 5, unseen: bool = False
) -> Consumer:
    """Correlated features of very different sizes, as a ReLU puts them out."""
    count = len(unit)
    mixing, scale = rng.normal(size=(count, count)), 10.0 ** rng.uniform(-2, 2, count)
    make = lambda: np.maximum(rng.normal(size=(rows, count)) @ mixing + 0.3, 0) * scale  # noqa: E731
    return Consumer(make(), rng.normal(size=(outputs, count)) / scale, np.array(unit), make() if unseen else None)


def problems(consumers: Sequence[Consumer]) -> list[ConsumerProblem]:
    return [one.problem for one in consumers]


def brute_force(consumers: Sequence[Consumer], units: int, gain: np.ndarray, steps: int) -> Elimination:
    order: list[int] = []
    cost: list[float] = []
    for _ in range(steps):
        spent = cost[-1] if cost else 0.0
        left = [unit for unit in range(units) if unit not in order]
        totals = [sum(one.cost([*order, unit]) for one in consumers) for unit in left]
        best = int(np.argmin([(total - spent) / gain[unit] for total, unit in zip(totals, left, strict=True)]))
        order.append(left[best])
        cost.append(totals[best])
    return Elimination(np.array(order), np.array(cost))


def assert_same(found: Elimination, expected: Elimination, rtol: float = 1e-6) -> None:
    assert found.order.tolist() == expected.order.tolist()
    np.testing.assert_allclose(found.cost, expected.cost, rtol=rtol)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


LAYOUTS: dict[str, list[list[int]]] = {
    "one feature for each unit": [list(range(9))],
    "features that stay": [[0, -1, 1, 2, -1, 3, 4, 5]],
    "two features for each unit": [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]],
    "one to three features": [[0, 1, 1, 2, 2, 2, 3, 4, 4, 5, -1]],
    "two sites": [list(range(7)), [6, 5, 4, 3, 2, 1, 0]],
    "sites that share some units": [[0, 1, 2, 3, 3], [2, 3, 4, 5], [5, 6, 6, -1, 0]],
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def everything(layout: list[list[int]]) -> int:
    return max(map(max, layout)) + 1


# --------------------------------------------------------------------------------------------------------- elimination


@each_layout
@pytest.mark.parametrize("seed", range(3))
def test_order_and_costs_are_those_of_trying_everything(layout: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    consumers = [consumer(rng, unit) for unit in layout]
    units = everything(layout)
    steps = units - 1
    found = eliminate(problems(consumers), np.ones(units, bool), limits=Limits(steps))
    assert_same(found, brute_force(consumers, units, np.ones(units), steps))
    assert (np.diff(found.cost) >= 0).all() and found.cost[-1] > 0


@each_layout
def test_costs_are_weighed_by_the_gain(layout: list[list[int]], rng: np.random.Generator) -> None:
    consumers = [consumer(rng, unit) for unit in layout]
    units = everything(layout)
    gain = rng.uniform(0.1, 10, units)
    ones = np.ones(units, bool)
    found = eliminate(problems(consumers), ones, gain=gain, limits=Limits(units - 2))
    assert_same(found, brute_force(consumers, units, gain, units - 2))
    assert found.order.tolist() != eliminate(problems(consumers), ones, limits=Limits(units - 2)).order.tolist()


@each_layout
def test_delayed_updates_change_nothing(layout: list[list[int]], rng: np.random.Generator) -> None:
    wide = [[unit + turn * everything(layout) for turn in range(6) for unit in part] for part in layout]
    consumers = [consumer(rng, unit, rows=500) for unit in wide]
    units = everything(wide)
    runs = [eliminate(problems(consumers), np.ones(units, bool), block=block) for block in (1, 5, 64, 1000)]
    for other in runs[1:]:
        assert_same(other, runs[0], rtol=1e-7)
    assert len(runs[0].order) == units


def test_the_sum_of_the_costs_is_the_error_of_the_whole_removal(rng: np.random.Generator) -> None:
    one = consumer(rng, list(range(120)), rows=400, outputs=30)
    found = eliminate([one.problem], np.ones(120, bool), limits=Limits(100))
    for count in (1, 10, 50, 100):
        expected = one.cost(found.order[:count].tolist())
        np.testing.assert_allclose(found.cost[count - 1], expected, rtol=1e-6)
        assert abs(found.cost[count - 1] - one.cost(found.order[: count - 1].tolist())) > 1e-6 * expected


def test_weights_decide_and_not_only_the_inputs(rng: np.random.Generator) -> None:
    one = consumer(rng, list(range(8)))
    first = eliminate([one.problem], np.ones(8, bool), limits=Limits(1)).order[0]
    loud = dataclasses.replace(one, w=one.w * np.where(np.arange(8) == first, 1e3, 1.0))
    assert eliminate([loud.problem], np.ones(8, bool), limits=Limits(1)).order[0] != first


@pytest.mark.parametrize("outputs", [1, 2, 50])
def test_few_or_many_outputs_are_alike(outputs: int, rng: np.random.Generator) -> None:
    one = consumer(rng, list(range(8)), outputs=outputs)
    found = eliminate([one.problem], np.ones(8, bool), limits=Limits(6))
    # With fewer outputs than features some removals cost nothing: the order is then up to rounding, the costs are not.
    np.testing.assert_allclose(found.cost[-1], one.cost(found.order.tolist()), rtol=1e-5, atol=1e-9)


def test_only_candidates_go_and_the_cheapest_of_them_first(rng: np.random.Generator) -> None:
    one = consumer(rng, list(range(8)))
    free = eliminate([one.problem], np.ones(8, bool)).order
    candidates = np.ones(8, bool)
    candidates[free[0]] = False
    found = eliminate([one.problem], candidates)
    assert free[0] not in found.order and len(found.order) == 7
    assert eliminate([one.problem], np.zeros(8, bool)).order.size == 0


def test_it_stops_before_the_cost_or_the_count_is_passed(rng: np.random.Generator) -> None:
    one = consumer(rng, list(range(8)))
    whole = eliminate([one.problem], np.ones(8, bool))
    for count in range(8):
        between = whole.cost[count] - 1e-9 * whole.cost[count]
        assert len(eliminate([one.problem], np.ones(8, bool), limits=Limits(cost=between)).order) == count
        assert len(eliminate([one.problem], np.ones(8, bool), limits=Limits(count)).order) == count


def test_so_many_of_every_set_survive(rng: np.random.Generator) -> None:
    one = consumer(rng, list(range(12)))
    free = eliminate([one.problem], np.ones(12, bool))
    sets = [(np.sort(free.order[:6]), 4), (np.arange(12), 3), (free.order[6:7], 1)]
    found = eliminate([one.problem], np.ones(12, bool), minimums=sets)
    left = [np.setdiff1d(members, found.order).size for members, _ in sets]
    assert left == [4, 5, 1] and len(free.order) == 12
    assert eliminate([one.problem], np.ones(12, bool), minimums=[(np.arange(12), 20)]).order.size == 0


def test_an_allowance_counts_what_goes_from_every_set() -> None:
    allowance = Allowance(5, [(np.array([0, 1, 2]), 1), (np.array([2, 3]), 1), (np.array([4]), 1)])
    assert allowance.free.tolist() == [True, True, True, True, False]
    assert [allowance.take(unit) for unit in (4, 3, 2, 0, 1)] == [False, True, False, True, True]
    assert not allowance.free.any()


def test_a_feature_that_is_always_zero_costs_nothing_and_goes_first(rng: np.random.Generator) -> None:
    one = consumer(rng, list(range(6)))
    one.z[:, 4] = 0
    found = eliminate([one.problem], np.ones(6, bool))
    assert found.order[0] == 4 and found.cost[0] == 0 < found.cost[1]


def test_a_unit_without_features_costs_nothing(rng: np.random.Generator) -> None:
    found = eliminate([consumer(rng, [0, 1, 3, 4]).problem], np.ones(5, bool))
    assert found.order[0] == 2 and found.cost[0] == 0


def test_exactly_dependent_features_leave_the_costs_finite(rng: np.random.Generator) -> None:
    base = rng.normal(size=(400, 5))
    one = Consumer(base @ rng.normal(size=(5, 12)), rng.normal(size=(6, 12)), np.arange(12))
    found = eliminate([one.problem], np.ones(12, bool))
    assert np.isfinite(found.cost).all() and len(found.order) == 12
    assert found.cost[6] < 1e-8 < 1e-4 < found.cost[7]  # seven of twelve are superfluous, and no more


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_moments_that_are_no_numbers_are_refused_instead_of_going_on_for_ever(
    bad: float, rng: np.random.Generator
) -> None:
    posed = consumer(rng, [0, 1, 2]).problem
    posed.gram[0, 1] = posed.gram[1, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        eliminate([posed], np.ones(3, bool))


def test_the_order_of_the_features_does_not_matter(rng: np.random.Generator) -> None:
    one = consumer(rng, [0, 1, 2, 3, 3, 4])
    turn = rng.permutation(6)
    turned = Consumer(one.z[:, turn], one.w[:, turn], one.unit[turn])
    assert_same(*(eliminate([s.problem], np.ones(5, bool), limits=Limits(4)) for s in (turned, one)), rtol=1e-8)


def test_the_scale_of_the_features_does_not_matter(rng: np.random.Generator) -> None:
    one = consumer(rng, [0, 1, 2, 3, 3, 4])
    scale = 10.0 ** rng.uniform(-4, 4, 6)
    scaled = dataclasses.replace(one, z=one.z * scale, w=one.w / scale)
    assert_same(*(eliminate([s.problem], np.ones(5, bool), limits=Limits(4)) for s in (scaled, one)), rtol=1e-8)


# --------------------------------------------------------------------------------------------------------------- folds


@pytest.fixture
def kept(rng: np.random.Generator) -> np.ndarray:
    return rng.permutation(10) < 6


def test_a_fold_is_the_least_squares_solution(rng: np.random.Generator, kept: np.ndarray) -> None:
    z = consumer(rng, list(range(10))).z
    expected = scipy.linalg.lstsq(z[:, kept], z[:, ~kept])[0]
    found = fold(z.T @ z, kept)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-10 * np.abs(expected).max())
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(fold(z[:20].T @ z[:20], kept), expected, rtol=1e-7)


def test_a_fold_with_a_ridge_solves_the_regular_system(rng: np.random.Generator, kept: np.ndarray) -> None:
    z = consumer(rng, list(range(10))).z
    scaled = z / np.sqrt((z**2).mean(0))
    rows = np.vstack([scaled[:, kept] / np.sqrt(len(z)), np.sqrt(0.1) * np.eye(6)])
    right = np.vstack([scaled[:, ~kept] / np.sqrt(len(z)), np.zeros((6, 4))])
    size = np.sqrt((z**2).mean(0))
    expected = np.linalg.lstsq(rows, right, rcond=None)[0] / size[kept, None] * size[~kept]
    found = fold(z.T @ z / len(z), kept, ridge=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert np.abs(found - fold(z.T @ z, kept)).max() > 1e-3 * np.abs(found).max()


def test_survivors_that_depend_on_each_other_still_give_the_best_fit(rng: np.random.Generator) -> None:
    base = rng.normal(size=(300, 4))
    z = base @ rng.normal(size=(4, 10))
    keep = np.arange(10) < 7  # rank 4
    found = fold(z.T @ z, keep)
    np.testing.assert_allclose(z[:, keep] @ found, z[:, ~keep], atol=1e-6 * np.abs(z).max())
    assert np.abs(found).max() < 100
    assert np.abs(z[:, keep] @ (1.01 * found) - z[:, ~keep]).max() > 1e-3


@pytest.mark.parametrize("zero", [0, 9])
def test_a_zero_feature_has_a_zero_fold(zero: int, rng: np.random.Generator) -> None:
    z = consumer(rng, list(range(10))).z
    z[:, zero] = 0
    keep = np.arange(10) < 6
    found = fold(z.T @ z, keep)
    assert np.isfinite(found).all()
    assert not (found[0] if zero == 0 else found[:, -1]).any()
    assert found.any()


def test_nothing_kept_and_nothing_removed_are_empty_folds(rng: np.random.Generator) -> None:
    gram = consumer(rng, list(range(5))).problem.gram
    assert fold(gram, np.zeros(5, bool)).shape == (0, 5)
    assert fold(gram, np.ones(5, bool)).shape == (5, 0)


@pytest.mark.parametrize("rows", ["the fitted", "others"])
def test_cost_and_residual_are_measured_on_the_rows(rows: str, rng: np.random.Generator, kept: np.ndarray) -> None:
    one = consumer(rng, list(range(10)), unseen=True)
    matrix = fold(one.problem.gram, kept)
    z, gram = (one.z, one.problem.gram) if rows == "the fitted" else (one.unseen, one.problem.holdout)
    residual = z[:, ~kept] - z[:, kept] @ matrix
    np.testing.assert_allclose(residual_moments(gram, kept, matrix), residual.T @ residual / len(z), rtol=1e-8)
    expected = ((residual @ one.w[:, ~kept].T) ** 2).sum() / len(z)
    np.testing.assert_allclose(removal_cost(gram, one.problem.outer, kept, matrix), expected, rtol=1e-8)
    assert removal_cost(gram, one.problem.outer, kept, 1.1 * matrix) > 1.001 * expected


def test_the_least_cost_is_the_schur_complement(rng: np.random.Generator, kept: np.ndarray) -> None:
    posed = consumer(rng, list(range(10))).problem
    inverse = np.linalg.inv(posed.gram)
    expected = np.trace(posed.outer[np.ix_(~kept, ~kept)] @ np.linalg.inv(inverse[np.ix_(~kept, ~kept)]))
    np.testing.assert_allclose(removal_cost(posed.gram, posed.outer, kept, fold(posed.gram, kept)), expected, rtol=1e-7)


def test_the_ridge_is_the_one_that_costs_least_on_unseen_rows(rng: np.random.Generator) -> None:
    few = consumer(rng, list(range(30)), rows=32, unseen=True)
    keep = np.arange(30) < 20
    posed = few.problem
    grid = (0.0, 1e-4, 1e-2, 1e-1, 1.0)
    costs = [removal_cost(posed.holdout, posed.outer, keep, fold(posed.gram, keep, ridge=ridge)) for ridge in grid]
    ridge, matrix = choose_ridge(posed, keep, grid)
    assert ridge == grid[int(np.argmin(costs))] > 0
    np.testing.assert_array_equal(matrix, fold(posed.gram, keep, ridge=ridge))
    assert min(costs) < 0.9 * costs[0]


def test_without_unseen_rows_there_is_no_ridge(rng: np.random.Generator, kept: np.ndarray) -> None:
    posed = consumer(rng, list(range(10))).problem
    ridge, matrix = choose_ridge(posed, kept)
    assert ridge == 0.0
    np.testing.assert_array_equal(matrix, fold(posed.gram, kept))


# ------------------------------------------------------------------------------------------- multiples of one another


def gram(z: np.ndarray) -> np.ndarray:
    return z.T @ z / len(z)


def test_multiples_are_one_class_with_their_factors(rng: np.random.Generator) -> None:
    z = rng.normal(size=(50, 6))
    z[:, 3], z[:, 5], z[:, 4] = -2e-3 * z[:, 1], 1e4 * z[:, 1], 0
    for unseen in (None, gram(z[:9])):
        found = collinear_classes(gram(z), unseen)
        assert found.label.tolist() == [0, 1, 2, 1, -1, 1]
        np.testing.assert_allclose(found.scale[[0, 1, 2, 3, 5]], [1, 1, 1, -2e-3, 1e4], rtol=1e-9)


def test_what_is_nearly_a_multiple_is_its_own_class(rng: np.random.Generator) -> None:
    z = rng.normal(size=(50, 2))
    labels = []
    for difference in (1e-6, 1e-4):
        z[:, 1] = z[:, 0] + difference * rng.normal(size=50)
        labels.append(collinear_classes(gram(z), None).label.tolist())
    assert labels == [[0, 0], [0, 1]]


@pytest.mark.parametrize("change", [lambda z: z + 1e-3, lambda z: 1.001 * z, lambda z: -z])
def test_a_multiple_that_does_not_stay_one_on_unseen_rows_is_none(change: Callable, rng: np.random.Generator) -> None:
    z = np.abs(rng.normal(size=(50, 2)))
    z[:, 1] = 3 * z[:, 0]
    unseen = z.copy()
    assert collinear_classes(gram(z), gram(unseen)).label.tolist() == [0, 0]
    unseen[:, 1] = change(unseen[:, 1])
    assert collinear_classes(gram(z), gram(unseen)).label.tolist() == [0, 1]


def test_small_differences_do_not_add_up_along_a_chain(rng: np.random.Generator) -> None:
    step = rng.normal(size=50)
    z = rng.normal(size=50)[:, None] + 5e-6 * np.arange(20) * step[:, None]
    found = collinear_classes(gram(z), None)
    near = np.abs(found.label - np.arange(20))
    assert near.max() < 4 and len(np.unique(found.label)) > 4  # each is near its own representative
    assert (found.label[found.label] == found.label).all()


# ------------------------------------------------------------------------------------------------------ exact removals


def lossless(consumers: Sequence[Consumer], units: int, **options: object) -> LosslessRemoval:
    return lossless_removals(problems(consumers), **{"candidates": np.ones(units, bool), **options})


def assert_exact(consumers: Sequence[Consumer], result: LosslessRemoval, tolerance: float = 1e-5) -> None:
    """The folded weights compute the same from what is left, on fitted and on unseen rows."""
    removed = np.flatnonzero(result.removed).tolist()
    for one, matrix in zip(consumers, result.folds, strict=True):
        kept = one.kept(removed)
        weight = one.w[:, kept] + one.w[:, ~kept] @ matrix.T
        for z in (one.z, one.unseen):
            if z is not None:
                error = np.linalg.norm(z[:, kept] @ weight.T - z @ one.w.T) / np.sqrt(one.problem.energy * len(z))
                assert error <= tolerance, error


def planted(rng: np.random.Generator, *, seen: int = 300, unseen: int = 80) -> Consumer:
    """Ten features: 2 = -3 x 0, 5 is zero, 7 = 0 + 2 x 1 - 4, 8 = 6 x 4, the other six are free."""
    z = rng.normal(size=(seen + unseen, 10))
    z[:, 2], z[:, 5] = -3 * z[:, 0], 0
    z[:, 7], z[:, 8] = z[:, 0] + 2 * z[:, 1] - z[:, 4], 6 * z[:, 4]
    return Consumer(z[:seen], rng.normal(size=(5, 10)), np.arange(10), z[seen:] if unseen else None)


@pytest.mark.parametrize("unseen", [0, 80])
def test_exactly_what_is_planted_goes_and_is_made_up_for(unseen: int, rng: np.random.Generator) -> None:
    one = planted(rng, unseen=unseen)
    result = lossless([one], 10)
    assert result.removed.sum() == 4 and result.removed[5]
    assert np.bincount(result.kind, minlength=4).tolist() == [6, 1, 2, 1]
    assert np.linalg.matrix_rank(one.z[:, ~result.removed]) == 6
    assert_exact([one], result, tolerance=1e-7)
    with pytest.raises(AssertionError):
        assert_exact([one], dataclasses.replace(result, folds=tuple(1.001 * matrix for matrix in result.folds)))


@each_layout
def test_where_nothing_is_planted_nothing_goes(layout: list[list[int]], rng: np.random.Generator) -> None:
    consumers = [consumer(rng, unit, unseen=True) for unit in layout]
    result = lossless(consumers, everything(layout))
    assert not result.removed.any() and not result.kind.any()
    assert all(matrix.shape == (len(unit), 0) for matrix, unit in zip(result.folds, layout, strict=True))


def test_what_is_left_holds_nothing_more_to_remove(rng: np.random.Generator) -> None:
    one = planted(rng)
    first = lossless([one], 10)
    left = ~first.removed
    weight = one.w[:, left] + one.w[:, ~left] @ first.folds[0].T
    again = Consumer(one.z[:, left], weight, np.arange(6), one.unseen[:, left])
    assert not lossless([again], 6).removed.any()


def test_many_planted_combinations_are_all_found(rng: np.random.Generator) -> None:
    z = rng.normal(size=(1500, 40))
    z = np.maximum(z, 0) @ np.hstack([np.eye(40), rng.normal(size=(40, 35))])
    turn = rng.permutation(75)
    one = Consumer(z[:1000, turn], rng.normal(size=(30, 75)), np.arange(75), z[1000:, turn])
    result = lossless([one], 75)
    assert result.removed.sum() == 35 and (result.kind[result.removed] == 3).all()
    assert_exact([one], result, tolerance=1e-6)


def test_without_rows_enough_only_single_partners_are_believed(rng: np.random.Generator) -> None:
    result = lossless([dataclasses.replace(planted(rng), joint=False)], 10)
    assert np.bincount(result.kind, minlength=4).tolist() == [7, 1, 2, 0]


def test_too_few_rows_make_everything_look_dependent_and_unseen_rows_say_no(rng: np.random.Generator) -> None:
    z = rng.normal(size=(80, 30))
    blind = Consumer(z[:20], rng.normal(size=(5, 30)), np.arange(30))
    assert lossless([blind], 30).removed.sum() >= 10
    assert not lossless([dataclasses.replace(blind, unseen=z[20:])], 30).removed.any()


def test_a_feature_that_is_zero_only_so_far_stays(rng: np.random.Generator) -> None:
    one = planted(rng)
    one.unseen[3, 5] = 1.0
    result = lossless([one], 10)
    assert not result.removed[5] and result.removed.sum() == 3


def test_a_unit_has_to_be_superfluous_at_all_its_sites(rng: np.random.Generator) -> None:
    dependent, free = planted(rng), consumer(rng, list(range(10)), unseen=True)
    assert lossless([dependent, dependent], 10).removed.sum() == 4
    assert not lossless([dependent, free], 10).removed.any()
    partly = Consumer(free.z[:, :3], free.w[:, :3], np.array([2, 5, 6]), free.unseen[:, :3])
    result = lossless([dependent, partly], 10)
    assert result.removed.sum() == 3 and not result.removed[[2, 5]].any()
    assert_exact([dependent, partly], result)


def test_all_features_of_a_unit_have_to_be_superfluous(rng: np.random.Generator) -> None:
    one = planted(rng)
    alone = dataclasses.replace(one, unit=np.array([0, 1, 2, 3, 4, 2, 5, 6, 6, 7]))  # 2 and 5 together, 7 and 8 too
    result = lossless([alone], 8)
    assert result.removed[2] and one.z[:, alone.kept(np.flatnonzero(result.removed))].shape[1] == 6
    assert_exact([alone], result)
    bound = dataclasses.replace(one, unit=np.array([0, 1, 2, 2, 3, 4, 4, 5, 5, 6]))  # 2 with 3, 5 with 6
    result = lossless([bound], 7)
    assert not result.removed[[2, 4]].any()
    assert_exact([bound], result)


def test_features_that_stay_can_make_up_for_others(rng: np.random.Generator) -> None:
    one = dataclasses.replace(planted(rng), unit=np.array([-1, -1, 0, -1, -1, 1, -1, 2, 3, -1]))
    result = lossless([one], 4)
    assert result.removed.all()
    assert_exact([one], result)


def test_so_many_survive_as_are_asked_for(rng: np.random.Generator) -> None:
    one = planted(rng)
    for bound in (6, 7, 8, 9, 10):
        result = lossless([one], 10, minimums=[(np.arange(10), bound)])
        assert result.removed.sum() == 10 - bound
        assert_exact([one], result)
    ends = lossless([one], 10, minimums=[(np.array([5]), 1), (np.array([4, 8]), 2)])
    assert not ends.removed[[4, 5, 8]].any() and ends.removed.sum() == 2


def test_only_candidates_go(rng: np.random.Generator) -> None:
    candidates = np.zeros(10, bool)
    candidates[[3, 5, 8]] = True
    assert np.flatnonzero(lossless([planted(rng)], 10, candidates=candidates).removed).tolist() == [5, 8]


def test_the_error_of_all_removals_together_is_bounded(rng: np.random.Generator) -> None:
    base = rng.normal(size=(2000, 10))
    near = np.repeat(base, 5, axis=1) + 4e-6 * rng.normal(size=(2000, 50))  # 40 removals of 4e-6 each
    one = Consumer(near[:1500], rng.normal(size=(5, 50)), np.arange(50), near[1500:])
    result = lossless([one], 50)
    assert_exact([one], result, tolerance=1e-5)
    assert 0 < result.removed.sum() <= 40
    exact = lossless(
        [dataclasses.replace(one, z=np.repeat(base[:1500], 5, axis=1), unseen=np.repeat(base[1500:], 5, axis=1))], 50
    )
    assert exact.removed.sum() == 40


@pytest.mark.parametrize("where", ["fitted", "unseen"])
def test_a_small_difference_that_the_weights_blow_up_stays(where: str, rng: np.random.Generator) -> None:
    one = planted(rng)
    w = one.w.copy()
    w[:, 2] = 100.0 - w[:, 0]
    w[:, 0] = 300.0  # 2 = -3 x 0: the two cancel, but for their difference
    calm = dataclasses.replace(one, w=w)
    assert lossless([calm], 10).removed.sum() == 4
    noisy = one.z if where == "fitted" else one.unseen
    noisy[:, 2] += 2e-6 * rng.normal(size=len(noisy))
    result = lossless([calm], 10)
    assert not result.removed[[0, 2]].any() and result.removed.sum() == 3
    assert_exact([calm], result)
    assert lossless([one], 10).removed.sum() == 4  # with other weights the same difference is nothing


def test_a_looser_tolerance_removes_what_a_tight_one_leaves(rng: np.random.Generator) -> None:
    one = planted(rng)
    noise = 1e-3 * rng.normal(size=len(one.z) + len(one.unseen))
    one.z[:, 7] += noise[: len(one.z)]
    one.unseen[:, 7] += noise[len(one.z) :]
    assert lossless([one], 10).removed.sum() == 3
    result = lossless([one], 10, tolerance=1e-2)
    assert result.removed.sum() == 4
    assert_exact([one], result, tolerance=1e-2)
    with pytest.raises(AssertionError):
        assert_exact([one], result, tolerance=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_random_plantings_are_made_up_for_and_no_rank_is_lost(seed: int) -> None:
    """Several sites, units of several features, copies, combinations and zeros at random."""
    rng = np.random.default_rng(seed)
    units = int(rng.integers(4, 12))
    consumers = []
    rank = 0
    free = rng.random(units) < 0.5
    free[0] = True
    recipe = rng.normal(size=(int(free.sum()), int((~free).sum()))) * (
        rng.random((int(free.sum()), int((~free).sum()))) < 0.4
    )
    for _ in range(int(rng.integers(1, 4))):
        width = int(rng.integers(1, 3))
        z = np.empty((600, width, units))
        z[:, :, free] = np.maximum(rng.normal(size=(600, width, int(free.sum()))), 0)
        z[:, :, ~free] = z[:, :, free] @ recipe
        unit = np.tile(np.arange(units), width)
        turn = rng.permutation(len(unit))
        flat = z.reshape(600, -1)[:, turn]
        consumers.append(Consumer(flat[:400], rng.normal(size=(4, len(unit))), unit[turn], flat[400:]))
        rank += np.linalg.matrix_rank(flat)
    result = lossless(consumers, units)
    assert result.removed.sum() == (~free).sum()
    assert_exact(consumers, result, tolerance=1e-6)
    removed = np.flatnonzero(result.removed).tolist()
    assert sum(np.linalg.matrix_rank(one.z[:, one.kept(removed)]) for one in consumers) == rank


# ------------------------------------------------------------------------------------------------------------ contracts


def test_inputs_are_never_changed(rng: np.random.Generator) -> None:
    posed = planted(rng).problem
    candidates, gain, least = np.ones(10, bool), np.ones(10), [(np.arange(10), 2)]
    given = [posed.gram, posed.holdout, posed.outer, posed.unit, candidates, gain, least[0][0]]
    before = [array.copy() for array in given]
    eliminate([posed], candidates, gain=gain, minimums=least, block=2)
    lossless_removals([posed], candidates, constant=candidates, minimums=least)
    fold(posed.gram, candidates)
    choose_ridge(posed, np.arange(10) < 6)
    collinear_classes(posed.gram, posed.holdout)
    for array, copy in zip(given, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_two_runs_give_the_same_bits(rng: np.random.Generator) -> None:
    posed = planted(rng).problem
    one, other = (lossless_removals([posed], np.ones(10, bool)) for _ in range(2))
    assert one.kind.tobytes() == other.kind.tobytes()
    assert one.folds[0].tobytes() == other.folds[0].tobytes()
    orders = [eliminate([posed], np.ones(10, bool)) for _ in range(2)]
    assert orders[0].order.tobytes() == orders[1].order.tobytes()
    assert orders[0].cost.tobytes() == orders[1].cost.tobytes()


def test_wide_sites_lose_features_in_the_order_of_the_plain_formula(rng: np.random.Generator) -> None:
    one = consumer(rng, list(range(300)), rows=2000, outputs=30).problem
    scale = np.sqrt(np.diagonal(one.gram))
    inverse = np.linalg.inv(one.gram / np.outer(scale, scale) + 1e-10 * np.eye(300))
    outer = one.outer * np.outer(scale, scale)
    left, order = np.ones(300, dtype=bool), []
    for _ in range(150):
        cost = np.where(left, np.diagonal(outer) / np.where(left, np.diagonal(inverse), 1.0), np.inf)
        chosen = int(np.argmin(cost))
        order.append(chosen)
        left[chosen] = False
        h = inverse[:, chosen] / inverse[chosen, chosen]
        q = outer[:, chosen] - h * outer[chosen, chosen] / 2
        inverse = inverse - np.outer(h, h) * inverse[chosen, chosen]
        outer = outer - np.outer(h, q) - np.outer(q, h)
    found = eliminate([one], np.ones(300, bool), limits=Limits(150))
    assert found.order.tolist() == order
    assert found.order.tolist() != sorted(order)
