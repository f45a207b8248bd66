"""Codes within bounds at every depth: prefix by prefix from the first level down, and codebooks re-fitted to them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, eye_array

from semids.arrays import Codes, capacity_of, code_dtype, widen
from semids.capacity import Bounds, Costs, GroupAssignment, assign_group
from semids.parallel import in_order, thread_count
from semids.residual import PriceTable, ResidualCodebooks, prefix_numbers

BLOCK_BYTES = 256 << 20
"""Costs of small groups that are held at a time; those of a larger group are computed a part at a time, each time."""
READ_ROWS = 8192
"""Vectors read at a time."""
SUM_BYTES = 64 << 20
"""Vectors that a thread sums at a time in float32."""
DENSE_CODEWORDS = 3072
"""Codewords of all levels up to which their pairs are one dense matrix of float64, whose products take a quarter of the
time of a sparse one's. Solving it outright would lead codewords astray by what float32 rounds off their sums, a
thousandfold in directions that no row tells apart; conjugate gradients end before that."""
RELATIVE_RESIDUAL = 1e-4
"""What conjugate gradients leave, over what they begin with: 1e-2 leaves 1e-6 of the error of an exact solution."""
MOST_ITERATIONS = 100
RIDGE = 1e-3
"""Pull of a codeword to where it was, in rows: it settles codewords that no row has, and sums that codebooks share."""

Result = TypeVar("Result")

Take = Callable[[NDArray[np.int64]], NDArray[Any]]
"""Returns the (m, d) vectors of the given rows."""


@dataclass(frozen=True)
class BoundedLevel:
    """Codes of one level, of which every prefix is within its bounds, and how they came about.

    Args:
        codes: (n,), in the smallest unsigned type of the shape.
        prices: with them, later rows get close to the same loads.
        moved: rows that rounding put elsewhere than the prices alone would.
        converged: all prices met their bounds before rounding.
    """

    codes: Codes
    prices: PriceTable
    moved: int
    converged: bool


def assign_level(
    take: Take,
    quantizer: ResidualCodebooks,
    before: Codes,
    bounds: Bounds,
    *,
    contents: int,
    start: PriceTable | None = None,
    priced: bool = True,
    done: Callable[[int], None] = lambda rows: None,
) -> BoundedLevel:
    """Give every row a code on the next level so that no prefix has more or fewer rows than its IDs may.

    Within a prefix, rows are assigned as `capacity.assign_group` does. A prefix was given no more rows than the IDs
    below it may have, so its children have room. Prefixes do not depend on one another.

    Args:
        before: (n, l) codes of the levels above: the level assigned is the one after them.
        contents: how many contents the rows stand for; bounds are scaled to the part of them that they are.
        start: prices to begin from, from codebooks close to these.
        priced: False leaves the prices of small groups at zero.
        done: called with the number of rows that have their code.
    """
    rows, level = before.shape
    sizes = quantizer.sizes
    loads = bounds.below(capacity_of(sizes[level + 1 :]), rows, contents)
    codes = np.zeros(rows, dtype=code_dtype(sizes))
    found: dict[int, NDArray[np.float32]] = {}
    moved, finished, converged = 0, 0, True
    prefixes = prefix_numbers(before, sizes)
    # The last level's prices would serve no one: an ID that is free now is taken later.
    is_last = level == len(sizes) - 1

    def assign(group: Group) -> GroupAssignment:
        feasible = loads.feasible(len(group.rows), sizes[level])
        prices = start.find(int(prefixes[group.rows[0]])) if start is not None else None
        return assign_group(group.costs, len(group.rows), feasible, start=prices, priced=priced and not is_last)

    for groups in groups_of(take, quantizer, before, prefixes):
        for group, outcome in zip(groups, over_groups(assign, groups), strict=True):
            codes[group.rows] = outcome.codes
            moved += outcome.moved
            converged &= outcome.converged
            if outcome.prices.any() and not is_last:
                found[int(prefixes[group.rows[0]])] = outcome.prices
            finished += len(group.rows)
            done(finished)
    return BoundedLevel(codes, _table(found, sizes[level]), moved, converged)


@dataclass(frozen=True)
class BoundedCodes:
    """(n, L) codes of which every prefix is within its bounds, and the levels they were found by."""

    codes: Codes
    levels: tuple[BoundedLevel, ...]

    @property
    def prices(self) -> tuple[PriceTable, ...]:
        """The prices of every level."""
        return tuple(level.prices for level in self.levels)


def assign_within_bounds(
    take: Take,
    codebooks: Sequence[NDArray[np.float32]],
    bounds: Bounds,
    *,
    rows: int,
    contents: int,
    start: Sequence[PriceTable] | None = None,
    priced: bool = True,
) -> BoundedCodes:
    """Give every row a code on every level, as `assign_level` does, from the first level down."""
    quantizer = nearest_quantizer(codebooks)
    codes = np.zeros((rows, len(codebooks)), dtype=code_dtype(quantizer.sizes))
    levels: list[BoundedLevel] = []
    for level in range(len(codebooks)):
        before = start[level] if start is not None else None
        found = assign_level(take, quantizer, codes[:, :level], bounds, contents=contents, start=before, priced=priced)
        codes[:, level] = found.codes
        levels.append(found)
    return BoundedCodes(codes, tuple(levels))


def nearest_quantizer(codebooks: Sequence[NDArray[np.float32]]) -> ResidualCodebooks:
    """Return the codebooks under the nearest mapping."""
    return ResidualCodebooks(tuple(codebooks), tuple(np.zeros(len(book), np.float32) for book in codebooks))


def _table(found: dict[int, NDArray[np.float32]], size: int) -> PriceTable:
    prefixes = sorted(found)
    values = np.array([found[prefix] for prefix in prefixes], dtype=np.float32).reshape(len(prefixes), size)
    return PriceTable(np.array(prefixes, dtype=np.int64), values)


@dataclass(frozen=True)
class Group:
    """The rows of a prefix, ascending, and what returns the (m, K) costs of some of them, numbered from 0."""

    rows: NDArray[np.int64]
    costs: Costs


def groups_of(
    take: Take, quantizer: ResidualCodebooks, before: Codes, prefixes: NDArray[np.int64]
) -> Iterator[list[Group]]:
    """Yield the rows of each prefix with their costs on the level after it: as many prefixes at once as memory holds.

    Args:
        before: (n, l) codes of the levels above.
        prefixes: (n,) their numbers.
    """

    def costs_of(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return read_costs(take, quantizer, before, rows)

    block_rows = max(1, BLOCK_BYTES // (4 * quantizer.sizes[before.shape[1]]))
    order = np.argsort(prefixes, kind="stable")
    starts = np.flatnonzero(np.diff(prefixes[order], prepend=-1))
    ends = np.append(starts[1:], len(order))
    first = 0
    while first < len(starts):
        # As many whole groups as fit; a larger one alone, a part at a time.
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + block_rows, side="right")))
        block = order[starts[first] : ends[last - 1]]
        if len(block) > block_rows:
            yield [Group(block, lambda some, block=block: costs_of(block[some]))]
        else:
            # Where the groups begin and end within the block.
            marks = [int(mark) for mark in (*(starts[first:last] - starts[first]), len(block))]
            dense = costs_of(block)
            yield [Group(block[start:end], dense[start:end].__getitem__) for start, end in itertools.pairwise(marks)]
        first = last


def over_groups(work: Callable[[Group], Result], groups: Sequence[Group]) -> Iterator[Result]:
    """Return `work(group)` for every group, in their order."""
    # Few groups are large ones, each of which keeps all threads busy.
    return in_order(work, groups) if len(groups) >= thread_count() else map(work, groups)


def read_costs(take: Take, quantizer: ResidualCodebooks, before: Codes, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the (m, K) costs of the given rows on the level after the (n, l) codes before it, as `costs` has them."""
    level = before.shape[1]
    costs = np.empty((len(rows), quantizer.sizes[level]), np.float32)
    # Ascending: vectors that are not in memory are read in one sweep over the disk, whatever prefixes they are under.
    ascending = np.argsort(rows, kind="stable")

    def read(places: NDArray[np.int64]) -> None:
        some = rows[places]
        costs[places] = quantizer.costs(take(some), before[some], level)

    for _ in in_order(read, [ascending[start : start + READ_ROWS] for start in range(0, len(rows), READ_ROWS)]):
        pass
    return costs


def refit_jointly(
    take: Take,
    codes: Codes,
    codebooks: Sequence[NDArray[np.float32]],
    *,
    weights: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], ...]:
    """Return the codebooks of all levels that reconstruct the rows best, given their (n, L) codes.

    Least squares over all codewords at once (the codebook update of additive quantization, Babenko and Lempitsky
    2014, section 3.2), with a small pull to where they were. Time is O(nL²d) at most, memory that of the pairs of
    codewords that occur, or of (ΣK, ΣK) where that is small, and of a few (ΣK, d) arrays.

    Args:
        weights: (n,) float32, how often each row counts; None is once.
    """
    gram, sums = _normal_equations(take, codes, codebooks, weights)
    start = np.concatenate(codebooks).astype(np.float64)
    solved = _solve_by_conjugate_gradients(gram.toarray() if len(sums) <= DENSE_CODEWORDS else gram, sums, start)
    ends = np.cumsum([len(book) for book in codebooks])
    return tuple(np.split(solved.astype(np.float32), ends[:-1]))


def _solve_by_conjugate_gradients(
    gram: csr_array | NDArray[np.float64], sums: NDArray[np.float64], start: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return X of gram · X = sums, column by column (Hestenes and Stiefel 1952, scaled by the diagonal)."""
    scale = gram.diagonal()[:, None]
    solved, left = start, sums - gram @ start
    direction = left / scale
    slope = np.einsum("kd,kd->d", left, direction)
    enough = RELATIVE_RESIDUAL**2 * slope
    for _ in range(MOST_ITERATIONS):
        if (slope <= enough).all():
            break
        product = gram @ direction
        # A column that is solved stays: its slope and its steps are zero.
        step = slope / np.maximum(np.einsum("kd,kd->d", direction, product), np.finfo(np.float64).tiny)
        solved = solved + step * direction
        left -= step * product
        scaled = left / scale
        before, slope = slope, np.einsum("kd,kd->d", left, scaled)
        direction = scaled + slope / np.maximum(before, np.finfo(np.float64).tiny) * direction
    return solved


def refit_last(
    take: Take,
    codes: Codes,
    codebooks: Sequence[NDArray[np.float32]],
    *,
    weights: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], ...]:
    """Return the codebooks with the last moved to where it reconstructs the rows best; the others stay.

    Args:
        weights: (n,) float32, how often each row counts; None is once.
    """
    gram, sums = _normal_equations(take, codes, codebooks, weights)
    last = len(sums) - len(codebooks[-1])
    left = sums[last:] - gram[last:, :last] @ np.concatenate(codebooks[:-1])
    return *codebooks[:-1], (left / gram.diagonal()[last:, None]).astype(np.float32)


def _normal_equations(
    take: Take,
    codes: Codes,
    codebooks: Sequence[NDArray[np.float32]],
    weights: NDArray[np.float32] | None,
) -> tuple[csr_array, NDArray[np.float64]]:
    """Return the (ΣK, ΣK) products of the codewords' indicators, and their (ΣK, d) products with the vectors."""
    offsets = np.cumsum([0, *(len(codebook) for codebook in codebooks)])
    total, levels = int(offsets[-1]), len(codebooks)

    def indicators(block: slice, values: NDArray[np.float32]) -> csr_array:
        columns = (codes[block].astype(np.int64) + offsets[:-1]).ravel()
        ends = np.arange(len(values) + 1) * levels
        return csr_array((np.repeat(values, levels), columns, ends), shape=(len(values), total))

    def products(block: slice) -> tuple[csr_array, NDArray[np.float32]]:
        ones = np.ones(block.stop - block.start, np.float32)
        chosen = indicators(block, ones)
        counted = chosen if weights is None else indicators(block, weights[block])
        vectors = take(np.arange(block.start, block.stop))
        if vectors.dtype != np.float32:
            vectors = widen(vectors, out=np.empty(vectors.shape, np.float32))
        return counted.T @ chosen, counted.T @ vectors

    gram = RIDGE * csr_array(eye_array(total, dtype=np.float64))
    sums = RIDGE * np.concatenate(codebooks).astype(np.float64)
    step = max(1, SUM_BYTES // (4 * codebooks[0].shape[1]))
    blocks = [slice(start, min(start + step, len(codes))) for start in range(0, len(codes), step)]
    for counts, of_vectors in in_order(products, blocks):
        # float32 within a block, float64 from block to block: a codeword of a large catalogue sums 100,000 rows.
        gram = gram + counts
        sums += of_vectors
    return gram, sums
