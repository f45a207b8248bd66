"""Bounded loads of one prefix: against exact solutions, and within bounds whatever comes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from semids import capacity
from semids.balance import Shares, fit_potentials
from semids.capacity import Bounds, GroupAssignment, Loads, assign_group, resolve_bounds, round_to_loads
from semids.errors import ShapeError, UsageError


def make_costs(rows: int, children: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    points, centres = rng.normal(size=(rows, 5)), rng.normal(size=(children, 5))
    return ((points[:, None] - centres[None]) ** 2).sum(axis=2).astype(np.float32)


def assign(costs: np.ndarray, loads: Loads, **options: object) -> GroupAssignment:
    return assign_group(lambda some: costs[some], len(costs), loads, **options)  # type: ignore[arg-type]


def cost_of(costs: np.ndarray, codes: np.ndarray) -> float:
    return float(costs[np.arange(len(costs)), codes].sum(dtype=np.float64))


def least_cost(costs: np.ndarray, loads: Loads) -> float:
    """The least cost of any assignment within the loads, by linear programming (its optimum is integral)."""
    rows, children = costs.shape
    each_row = np.kron(np.eye(rows), np.ones(children))
    each_child = np.tile(np.eye(children), rows)
    bounds = np.concatenate([np.full(children, float(loads.most)), np.full(children, -float(loads.least))])
    solved = linprog(
        costs.astype(np.float64).ravel(),
        A_ub=np.concatenate([each_child, -each_child]),
        b_ub=bounds,
        A_eq=each_row,
        b_eq=np.ones(rows),
    )
    return float(solved.fun)


CASES = [(60, 8, 0, 8), (60, 8, 7, 8), (60, 8, 3, 20), (40, 40, 0, 1), (36, 40, 0, 1), (50, 40, 1, 2), (60, 4, 15, 15)]


@pytest.mark.parametrize(("rows", "children", "least", "most"), CASES)
def test_small_groups_are_assigned_at_the_least_cost(rows: int, children: int, least: int, most: int) -> None:
    costs, loads = make_costs(rows, children, seed=rows), Loads(least, most)
    assert cost_of(costs, assign(costs, loads).codes) == pytest.approx(least_cost(costs, loads), rel=1e-6)


@pytest.mark.parametrize(("rows", "children", "least", "most"), CASES)
def test_prices_and_rounding_come_close_to_the_least_cost(
    rows: int, children: int, least: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "EXACT_ENTRIES", 0)
    costs, loads = make_costs(rows, children, seed=rows), Loads(least, most)
    found = assign(costs, loads)
    counts = np.bincount(found.codes, minlength=children)
    assert least <= counts.min()
    assert counts.max() <= most
    assert cost_of(costs, found.codes) <= 1.02 * least_cost(costs, loads)  # seen: 1.009
    assert found.moved < 0.1 * rows  # seen: 0.025


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_loads_are_kept_whatever_the_costs(data: st.DataObject) -> None:
    children = data.draw(st.integers(2, 12))
    rows = data.draw(st.integers(1, 80))
    least = data.draw(st.integers(0, rows // children))
    most = data.draw(st.integers(-(-rows // children), rows))
    costs = make_costs(rows, children, seed=rows)
    if data.draw(st.booleans()):
        costs[:] = costs[0]  # equal rows: every choice is a tie
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capacity, "EXACT_ENTRIES", data.draw(st.sampled_from([0, 1 << 18])))
        patch.setattr(capacity, "CHUNK_ROWS", 7)
        found = assign(costs, Loads(least, most), priced=data.draw(st.booleans()))
    counts = np.bincount(found.codes, minlength=children)
    assert least <= counts.min()
    assert counts.max() <= most


def test_where_nearest_keeps_the_loads_it_is_nearest_and_free() -> None:
    costs = make_costs(100, 5, seed=0)
    found = assign(costs, Loads(0, 100))
    assert np.array_equal(found.codes, costs.argmin(axis=1))
    assert not found.prices.any()
    assert found.moved == 0


def test_prices_press_only_where_a_bound_does_and_lead_later_rows_to_the_same_loads() -> None:
    costs = make_costs(4000, 8, seed=1)
    counts = np.bincount(costs[:2000].argmin(axis=1), minlength=8)
    most = int(0.7 * counts.max())
    found = assign(costs[:2000], Loads(0, most))
    assert found.converged
    assert (found.prices <= 0).all()
    assert 2 <= np.count_nonzero(found.prices) < 8
    later = np.bincount((costs[2000:] - found.prices).argmin(axis=1), minlength=8)
    assert later.max() <= 1.1 * most  # seen: 1.005
    assert np.bincount(costs[2000:].argmin(axis=1), minlength=8).max() > 1.3 * most  # seen: 1.43


def test_rounding_moves_the_rows_that_lose_least() -> None:
    costs = np.array([[0, 9], [0, 1], [0, 5], [9, 0]], np.float32)
    limits = {"least": np.array([0, 0]), "most": np.array([2, 2])}
    codes = round_to_loads(lambda some: costs[some], np.array([0, 0, 0, 1]), **limits)
    assert codes.tolist() == [0, 1, 0, 1]


def test_rows_that_cannot_be_within_the_loads_are_refused() -> None:
    costs = make_costs(10, 4, seed=0)
    for loads in (Loads(0, 2), Loads(3, 10)):
        with pytest.raises(ShapeError, match=r"expected rows for \d+ to \d+ of 4 children, got 10"):
            assign(costs, loads)


@pytest.mark.parametrize(
    ("contents", "ids", "least", "most", "bounds"),
    [
        (3675, 4096, "auto", "auto", Bounds(0, 1)),
        (4096, 4096, "auto", "auto", Bounds(1, 1)),
        (4097, 4096, "auto", "auto", Bounds(1, 2)),
        (3675, 1728, "auto", "auto", Bounds(1, 3)),
        (3675, 4096, 0, None, Bounds(0, None)),
        (3675, 1728, 2, 5, Bounds(2, 5)),
    ],
)
def test_bounds_are_those_that_reach_the_floor(
    contents: int, ids: int, least: int, most: int | None, bounds: Bounds
) -> None:
    assert resolve_bounds(contents, ids, least=least, most=most) == bounds  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("contents", "ids", "least", "most", "message"),
    [
        (3675, 1728, 0, 2, "max_contents_per_id of at least 3 for 3,675 distinct contents and 1,728 IDs, got 2"),
        (3675, 4096, 1, "auto", "min_contents_per_id of at most 0 for 3,675 distinct contents and 4,096 IDs, got 1"),
        (9000, 1000, 9, 9, None),
    ],
)
def test_bounds_that_cannot_be_met_are_refused_with_the_numbers(
    contents: int, ids: int, least: int, most: int, message: str | None
) -> None:
    if message is None:
        assert resolve_bounds(contents, ids, least=least, most=most) == Bounds(9, 9)
        return
    with pytest.raises(UsageError, match=message):
        resolve_bounds(contents, ids, least=least, most=most)


def test_bounded_shares_converge_with_either_kind_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = make_costs(600, 8, seed=3)
    newton = fit_potentials(costs, epsilon=0.05, max_iterations=60, bounds=Shares(0.1, 0.14))
    monkeypatch.setattr("semids.balance.NEWTON_CODEWORDS", 0)
    sinkhorn = fit_potentials(costs, epsilon=0.05, max_iterations=60, bounds=Shares(0.1, 0.14))
    for found in (newton, sinkhorn):
        assert found.converged
        logits = (found.values - costs) / 0.05
        plan = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = (plan / plan.sum(axis=1, keepdims=True)).mean(axis=0)
        assert shares.min() >= 0.1 - 1e-4
        assert shares.max() <= 0.14 + 1e-4
        slack = (shares > 0.1 + 1e-3) & (shares < 0.14 - 1e-3)
        assert not found.values[slack].any()
