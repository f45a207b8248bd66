"""Potentials of the uniform mapping."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semids import balance
from semids.balance import TOLERANCE, Shares, fit_potentials
from semids.errors import ShapeError


def make_costs(rows: int = 600, codewords: int = 8, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    points, centres = rng.normal(size=(rows, 6)), rng.normal(size=(codewords, 6))
    costs = ((points[:, None] - centres[None]) ** 2).sum(axis=2)
    return costs / costs.max()


def plan(costs: np.ndarray, values: np.ndarray, epsilon: float) -> np.ndarray:
    logits = (values - costs) / epsilon
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) / len(costs)


@pytest.mark.parametrize("epsilon", [1.0, 0.1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("kind", ["float64", "float32", "float16", "bfloat16"])
def test_marginals_are_met_or_the_solver_says_that_they_are_not(epsilon: float, kind: str) -> None:
    tensor = torch.from_numpy(make_costs()).to(getattr(torch, kind))
    costs = tensor.to(torch.float32).numpy() if kind == "bfloat16" else tensor.numpy()
    found = fit_potentials(costs, epsilon=epsilon, max_iterations=60)
    assert np.isfinite(found.values).all()
    shares = plan(costs.astype(np.float64), found.values.astype(np.float64), epsilon)
    error = float(np.abs(shares.sum(axis=0) - 1 / 8).sum())
    assert np.allclose(shares.sum(axis=1), 1 / len(costs))
    assert found.converged == (found.marginal_error <= TOLERANCE)
    # The evidence is honest: what the solver reports is what a float64 recomputation finds.
    assert error == pytest.approx(found.marginal_error, abs=2e-4)
    assert found.converged or epsilon <= 1e-3


def test_newton_and_sinkhorn_steps_reach_the_same_potentials(monkeypatch: pytest.MonkeyPatch) -> None:
    newton = fit_potentials(make_costs(), epsilon=0.01, max_iterations=60)
    monkeypatch.setattr(balance, "NEWTON_CODEWORDS", 0)
    sinkhorn = fit_potentials(make_costs(), epsilon=0.01, max_iterations=60)
    assert newton.converged
    assert sinkhorn.converged
    assert newton.iterations < sinkhorn.iterations / 3  # seen: 7 against 25
    assert np.abs(newton.values - sinkhorn.values).max() < 1e-4


@pytest.mark.parametrize("coarse_rows", [8, 32])
def test_where_annealing_looks_at_a_part_of_the_rows_all_of_them_decide(
    coarse_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = make_costs(rows=4000)
    whole = fit_potentials(costs, epsilon=0.01, max_iterations=60)
    monkeypatch.setattr(balance, "COARSE_ROWS_PER_CODEWORD", coarse_rows)
    part = fit_potentials(costs, epsilon=0.01, max_iterations=60)
    assert whole.converged
    assert part.converged
    assert np.abs(whole.values - part.values).max() < 2e-5  # seen: 5e-6


def test_the_standard_deviation_is_that_of_all_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = (1e3 + make_costs(rows=1000)).astype(np.float32)
    monkeypatch.setattr(balance, "BLOCK_ENTRIES", 100)
    assert balance.standard_deviation(costs) == pytest.approx(float(costs.std(dtype=np.float64)), rel=1e-5)


def test_an_iteration_limit_that_is_too_low_is_reported() -> None:
    assert not fit_potentials(make_costs(), epsilon=1e-4, max_iterations=1).converged


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(-3, 3))
def test_row_and_column_constants_change_no_assignment_balance(seed: int, shift: float) -> None:
    costs = make_costs(seed=seed).astype(np.float32)
    rng = np.random.default_rng(seed)
    moved = costs + rng.normal(size=(len(costs), 1)).astype(np.float32)
    columns = np.linspace(0, 0.1 * shift, 8, dtype=np.float32)
    plain = fit_potentials(costs, epsilon=0.01, max_iterations=60)
    rows_moved = fit_potentials(moved, epsilon=0.01, max_iterations=60)
    columns_moved = fit_potentials(costs + columns, epsilon=0.01, max_iterations=60)
    # Two converged solutions may differ by what the tolerance allows, seen up to 3e-5 of costs in [0, 1].
    assert np.abs(plain.values - rows_moved.values).max() < 2e-3
    assert np.abs(plain.values + columns - columns.mean() - columns_moved.values).max() < 2e-3


def test_potentials_balance_hard_assignments_that_nearest_leaves_skewed() -> None:
    costs = make_costs(rows=4000)
    nearest = np.bincount(costs.argmin(axis=1), minlength=8) * 8 / 4000
    found = fit_potentials(costs, epsilon=0.002, max_iterations=60)
    loads = np.bincount((costs - found.values).argmin(axis=1), minlength=8) * 8 / 4000
    assert nearest.max() > 1.3
    assert (loads.min(), loads.max()) == pytest.approx((found.load_min, found.load_max), abs=0.01)
    assert loads.min() > 0.95
    assert loads.max() < 1.05


@pytest.mark.parametrize(
    "costs", [np.ones(5), np.ones((5, 1)), np.ones((0, 4)), np.array([[1.0, np.nan]]), np.array([[np.inf, 1.0]])]
)
def test_costs_that_are_not_costs_are_refused(costs: np.ndarray) -> None:
    with pytest.raises(ShapeError, match="expected"):
        fit_potentials(costs, epsilon=0.1, max_iterations=5)


def test_a_start_that_leads_nowhere_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = make_costs(600, 16)
    # One codeword so far ahead that the others get no row: the slope says nothing of how far they have to go.
    astray = np.where(np.arange(16) == 3, 0, -1e6).astype(np.float32)
    bounds = Shares(0, 1 / 16)
    assert fit_potentials(costs, epsilon=0.01, max_iterations=60, start=astray, bounds=bounds).converged

    def never_from_zero(*given: Any, anneal: Any = balance._anneal) -> Any:
        return anneal(*given[:-1], astray)

    monkeypatch.setattr(balance, "_anneal", never_from_zero)
    assert not fit_potentials(costs, epsilon=0.01, max_iterations=60, start=astray, bounds=bounds).converged


def test_costs_in_any_layout_give_the_same_potentials_and_stay_as_they_are() -> None:
    costs = make_costs(400, 8).astype(np.float32)
    best = fit_potentials(costs, epsilon=0.05, max_iterations=60).values
    packed = np.zeros(400, dtype=[("flag", "u1"), ("costs", "f4", (8,))])
    packed["costs"] = costs
    read_only = costs.copy()
    read_only.flags.writeable = False
    layouts = [costs[::-1][::-1], np.asfortranarray(costs), packed["costs"], read_only, costs.astype(">f4")]
    for each in layouts:
        before = each.copy()
        assert np.array_equal(fit_potentials(each, epsilon=0.05, max_iterations=60).values, best)
        assert np.array_equal(each, before)
    turned = fit_potentials(costs[:, ::-1], epsilon=0.05, max_iterations=60).values[::-1]
    assert np.abs(turned - best).max() < 1e-4


def test_a_smoothing_whose_inverse_float32_does_not_hold_gives_finite_potentials() -> None:
    tiny = make_costs(100, 4).astype(np.float32) * np.float32(1e-40)
    found = fit_potentials(tiny, epsilon=1e-41, max_iterations=5)
    assert np.isfinite(found.values).all()


@pytest.mark.parametrize("seed", [0, 3, 5, 6])
def test_steps_stay_long_enough_where_a_constant_hides_how_far_the_objective_rises(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points, centres = rng.normal(size=(600, 6)), rng.normal(size=(16, 6))
    costs = ((points[:, None] - centres[None]) ** 2).sum(axis=2)
    # float32 rounds the objective by as much as the last steps raise it: only their errors tell that they are good.
    shifted = (costs / costs.std() + 3000).astype(np.float32)
    assert fit_potentials(shifted, epsilon=0.02, max_iterations=60).converged
