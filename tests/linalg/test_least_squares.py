"""Weights by least squares, against solving the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest

from lindep_onnx.linalg.least_squares import RIDGES, NormalEquations, Rows, Weights, fitted, unconstrained


def problem(seed: int, *, groups: int = 1, count: int = 20_000, noise: float = 0.1) -> tuple[Rows, Weights]:
    """Rows that are correlated and no means of zero, what they should give, and weights to start from."""
    rng = np.random.default_rng(seed)
    patches = (rng.normal(size=(groups, count, 6)) @ rng.normal(size=(6, 6)) + 1.0).astype(np.float32)
    truth = np.random.default_rng(1).normal(size=(groups, 6, 3))
    target = patches @ truth + 2.0 + noise * rng.normal(size=(groups, count, 3))
    return Rows(patches, target), Weights(truth + 0.3, np.zeros((groups, 1, 3)))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("ridge", [1e-12, 1e-2])
def test_the_solution_is_that_of_the_rows_with_a_row_for_each_ridge(groups: int, free: bool, ridge: float) -> None:
    rows, prior = problem(0, groups=groups)
    found = unconstrained(NormalEquations.of(rows, prior, free), ridge)
    for group in range(groups):
        p, t = rows.patches[group].astype(np.float64), rows.target[group]
        size = p.std(0) if free else np.sqrt((p**2).mean(0))
        pulls = np.sqrt(ridge * len(p)) * np.diag(size)
        design = np.vstack([np.hstack([p, np.ones((len(p), int(free)))]), np.hstack([pulls, np.zeros((6, int(free)))])])
        want = np.linalg.lstsq(design, np.vstack([t, pulls @ prior.matrix[group]]), rcond=None)[0]
        np.testing.assert_allclose(found.matrix[group], want[:6], rtol=1e-4, atol=1e-6)  # products in float32
        np.testing.assert_allclose(found.constant[group, 0], want[6] if free else np.zeros(3), rtol=1e-5)
        assert np.abs(found.matrix[group] - prior.matrix[group]).max() > 0.1


def test_the_ridge_is_the_one_that_errs_least_on_unseen_rows() -> None:
    (fit, prior), (unseen, _) = problem(0, count=8, noise=3.0), problem(5, count=500)
    prior = Weights(prior.matrix - 0.3, np.full((1, 1, 3), 2.0))  # the truth, which noise can only spoil
    spoilt = Weights(prior.matrix + 0.05, prior.constant)
    best, before, after = fitted(fit, unseen, spoilt, free=True)
    errors = [unconstrained(NormalEquations.of(fit, spoilt, True), ridge).error(unseen) for ridge in RIDGES]
    assert before == spoilt.error(unseen) and after == best.error(unseen) == min([before, *errors])
    assert fitted(fit, unseen, prior, free=True)[0] is prior


def test_a_solver_may_ask_for_more_than_the_least_squares() -> None:
    rows, prior = problem(0)

    def rounded(equations: NormalEquations, ridge: float) -> Weights:
        found = unconstrained(equations, ridge)
        return Weights(found.matrix.round(1), found.constant)

    best, before, after = fitted(rows, problem(5)[0], prior, free=True, solver=rounded)
    np.testing.assert_array_equal(best.matrix, best.matrix.round(1))
    assert after < before


@pytest.mark.parametrize("value", [7.0, 0.1, 1e4 / 3])
def test_what_never_varies_keeps_its_weight(value: float) -> None:
    rows, prior = problem(0)
    rows.patches[:, :, 2] = value
    found = unconstrained(NormalEquations.of(rows, prior, True), 1e-6)
    np.testing.assert_array_equal(found.matrix[:, 2], prior.matrix[:, 2])
    assert (found.matrix[:, 1] != prior.matrix[:, 1]).all()
