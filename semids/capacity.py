"""Bounded loads: which child of its prefix each content goes to, so that no prefix holds more than its IDs allow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from semids.balance import Shares, fit_potentials, standard_deviation
from semids.errors import ShapeError, UsageError
from semids.parallel import in_order

EXACT_ENTRIES = 1 << 18
"""Largest matrix of rows × places that is assigned exactly: 512 × 512 takes some 10 ms, and time grows as its cube."""
RELATIVE_EPSILON = 0.01
"""Smoothing of prices over the standard deviation of the costs they are fitted to."""
MAX_ITERATIONS = 60
COST_BYTES = 256 << 20
"""Largest cost matrix that prices are fitted to: beyond, an evenly spaced part of the rows."""
ROWS_PER_CHILD = 256
"""Rows a child that prices are fitted to, where there are so many."""
CHUNK_ROWS = 8192


@dataclass(frozen=True)
class Bounds:
    """The least and the most distinct contents an ID may have; `most` None sets no limit."""

    least: int
    most: int | None

    def below(self, ids: int, rows: int, contents: int) -> Loads:
        """Return the loads of a prefix with `ids` IDs below it, for `rows` that stand for all `contents`."""
        part = rows / contents
        most = rows if self.most is None else min(rows, math.ceil(self.most * ids * part))
        return Loads(math.floor(self.least * ids * part), most)


@dataclass(frozen=True)
class Loads:
    """The least and the most rows that a child of a prefix may have."""

    least: int
    most: int

    def feasible(self, rows: int, children: int) -> Loads:
        """Return these loads, widened as little as `rows` over `children` need: part of the rows may lie unevenly."""
        return Loads(min(self.least, rows // children), max(self.most, -(-rows // children)))


def resolve_bounds(
    contents: int, capacity: int, *, least: int | Literal["auto"], most: int | Literal["auto"] | None
) -> Bounds:
    """Return how many of D contents an ID may have, `auto` standing for what reaches the collision floor.

    Args:
        contents: D, distinct contents.
        capacity: C, number of IDs.
        least: auto is 1 where D ≥ C, so that every ID is used, else 0.
        most: auto is ceil(D / C); None sets no limit.

    Raises:
        UsageError: so many contents do not fit, or do not suffice.
    """
    low = (1 if contents >= capacity else 0) if least == "auto" else least
    high = -(-contents // capacity) if most == "auto" else most
    if high is not None and high * capacity < contents:
        raise UsageError(
            f"expected max_contents_per_id of at least {-(-contents // capacity)} for {contents:,} distinct contents "
            f"and {capacity:,} IDs, got {high}; raise it, or take a larger shape"
        )
    if low * capacity > contents:
        raise UsageError(
            f"expected min_contents_per_id of at most {contents // capacity} for {contents:,} distinct contents and "
            f"{capacity:,} IDs, got {low}; lower it, or take a smaller shape"
        )
    if high is not None and low > high:
        raise UsageError(f"expected min_contents_per_id of at most max_contents_per_id, got {low} and {high}")
    return Bounds(low, high)


@dataclass(frozen=True)
class GroupAssignment:
    """Which child each row of a prefix goes to.

    Args:
        codes: (n,) int64 children.
        prices: (K,) float32, in the units of the costs: code = argmin(cost − price) is the rule for later rows.
        moved: rows that exact rounding put elsewhere than that rule does.
        converged: the prices met their bounds, where any were fitted; loads are within theirs either way.
    """

    codes: NDArray[np.int64]
    prices: NDArray[np.float32]
    moved: int
    converged: bool


Costs = Callable[[NDArray[np.int64]], NDArray[np.float32]]
"""Returns the (m, K) squared distances of the given rows of a group, numbered from 0."""


def assign_group(
    costs: Costs,
    rows: int,
    loads: Loads,
    *,
    start: NDArray[np.float32] | None = None,
    priced: bool = True,
    nearest: NDArray[np.int64] | None = None,
) -> GroupAssignment:
    """Give every row of a prefix a child, at close to the least cost that the loads allow.

    Nearest where that keeps the loads; exactly where rows and places are few (Crouse 2016, as SciPy has it); else by
    prices and rounding: rows leave the children that hold too many, those first that lose least, for the best child
    with room. Memory is that of 2^18 costs, of the sample that prices are fitted to (1 GiB at most), and of a few
    numbers a row.

    Args:
        rows: n, how many there are.
        start: (K,) prices to begin from, from costs close to these.
        priced: False leaves the prices of small groups at zero, where only the codes matter.
        nearest: (n,) the cheapest children, where they are known, and known not to keep the loads.

    Raises:
        ShapeError: n rows cannot be within the loads.
    """
    children = costs(np.arange(1)).shape[1]
    if not loads.least * children <= rows <= loads.most * children:
        raise ShapeError(f"expected rows for {loads.least} to {loads.most} of {children} children, got {rows}")
    prices = np.zeros(children, np.float32)
    ruled = nearest
    # Where prices were needed for costs close to these, the nearest need not be asked for first.
    if ruled is None and (start is None or not start.any()):
        ruled = cheapest_children(costs, rows, None)
        counts = np.bincount(ruled, minlength=children)
        if loads.least <= counts.min() and counts.max() <= loads.most:
            return GroupAssignment(ruled, prices, 0, converged=True)
    exact = rows * children * loads.most <= EXACT_ENTRIES
    converged = True
    if priced or not exact:
        prices, converged = _fit_prices(costs, rows, children, loads, start)
        ruled = None
    if ruled is None:
        ruled = cheapest_children(costs, rows, prices)
    if exact:
        codes = _assign_exactly(costs(np.arange(rows)), loads)
    else:
        each = np.ones(children, np.int64)
        codes = round_to_loads(
            lambda some: costs(some) - prices, ruled, least=loads.least * each, most=loads.most * each
        )
    return GroupAssignment(codes, prices, int((codes != ruled).sum()), converged)


def cheapest_children(costs: Costs, rows: int, prices: NDArray[np.float32] | None) -> NDArray[np.int64]:
    """Return the (n,) children of least priced cost."""

    def cheapest(some: NDArray[np.int64]) -> NDArray[np.int64]:
        found = costs(some)
        return (found if prices is None else found - prices).argmin(axis=1)

    # Most prefixes are small, and there are many: nothing is done for them that they do not need.
    if rows <= CHUNK_ROWS:
        return cheapest(np.arange(rows))
    return np.concatenate(list(in_order(cheapest, _chunks(np.arange(rows)))))


def _chunks(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS)]


def _fit_prices(
    costs: Costs, rows: int, children: int, loads: Loads, start: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], bool]:
    most = min(COST_BYTES // (4 * children), ROWS_PER_CHILD * children)
    sample = costs(np.arange(0, rows, -(-rows // most)))
    # A row's own constant decides nothing, and must not widen the smoothing.
    sample -= sample.mean(axis=1, keepdims=True)
    epsilon = RELATIVE_EPSILON * standard_deviation(sample) or 1.0
    bounds = Shares(loads.least / rows, min(1.0, loads.most / rows))
    found = fit_potentials(sample, epsilon=epsilon, max_iterations=MAX_ITERATIONS, start=start, bounds=bounds)
    return found.values, found.converged


def _assign_exactly(costs: NDArray[np.float32], loads: Loads) -> NDArray[np.int64]:
    """Return the (n,) children of least total cost, each child standing for `most` places, `least` of them required."""
    if loads == Loads(0, 1):
        return linear_sum_assignment(costs)[1]  # Most prefixes of the last level, and they are many.
    places = np.repeat(costs.astype(np.float64), loads.most, axis=1)
    if loads.least:
        # No exchange of rows can gain as much as a required place that is filled.
        reward = (float(costs.max()) - float(costs.min())) * (len(costs) + 1) or 1.0
        required = np.arange(places.shape[1]) % loads.most < loads.least
        places[:, required] -= reward
    assigned = linear_sum_assignment(places)[1]
    return assigned // loads.most


def round_to_loads(
    costs: Costs, codes: NDArray[np.int64], *, least: NDArray[np.int64], most: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return codes within the loads, moving from the given ones the rows that lose least.

    Args:
        costs: returns the (m, K) priced costs of the given rows.
        codes: (n,) a child each.
        least: (K,) rows that a child must have; their sum is n at most.
        most: (K,) rows that a child may have; their sum is n at least.
    """
    codes = codes.copy()
    for _ in range(2 * len(most) + 1):
        counts = np.bincount(codes, minlength=len(most))
        if (counts > most).any():
            leave, room = np.maximum(counts - most, 0), np.maximum(most - counts, 0)
        elif (counts < least).any():
            leave, room = np.maximum(counts - least, 0), np.maximum(least - counts, 0)
        else:
            return codes
        rows = np.flatnonzero(leave[codes])
        found = in_order(lambda some, room=room: _best_moves(costs(some), codes[some], room), _chunks(rows))
        targets, losses = (np.concatenate(parts) for parts in zip(*found, strict=True))
        leaving = _cheapest(losses, codes[rows], leave)
        entering = _cheapest(losses[leaving], targets[leaving], room)
        chosen = leaving[entering]
        codes[rows[chosen]] = targets[chosen]
    raise AssertionError("every pass fills a child or empties one: there are no more passes than children")


def _best_moves(
    reduced: NDArray[np.float32], codes: NDArray[np.int64], room: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the (m,) best children with room, and what going there loses over staying."""
    best = np.where(room > 0, reduced, np.inf).argmin(axis=1)
    each = np.arange(len(codes))
    return best, reduced[each, best] - reduced[each, codes]


def _cheapest(losses: NDArray[Any], groups: NDArray[np.int64], most: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the positions of the `most[g]` smallest losses of every group g."""
    order = np.lexsort((losses, groups))
    sorted_groups = groups[order]
    first = np.searchsorted(sorted_groups, sorted_groups)
    return order[np.arange(len(order)) - first < most[sorted_groups]]
