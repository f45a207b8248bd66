"""Codes within bounds at every depth: prefix by prefix from the first level down, and codebooks re-fitted to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from semids.arrays import Codes, capacity_of, code_dtype, widen
from semids.capacity import Bounds, assign_group
from semids.residual import PriceTable, ResidualCodebooks

BLOCK_BYTES = 256 << 20
"""Costs of small groups that are held at a time; those of a larger group are computed a part at a time, each time."""
READ_ROWS = 8192
"""Vectors read at a time."""
SUM_ROWS = 1 << 16
"""Vectors summed at a time in float32."""
RIDGE = 1e-3
"""Pull of a codeword to where it was, in rows: it settles codewords that no row has, and sums that codebooks share."""

Take = Callable[[NDArray[np.int64]], NDArray[Any]]
"""Returns the (m, d) vectors of the given rows."""


@dataclass(frozen=True)
class BoundedCodes:
    """Codes of which every prefix is within its bounds, and how they came about.

    Args:
        codes: (n, L), in the smallest unsigned type.
        prices: a table a level: with them, later rows get close to the same loads.
        moved: for each level, the rows that rounding put elsewhere than the prices alone would.
        converged: all prices met their bounds before rounding.
    """

    codes: Codes
    prices: tuple[PriceTable, ...]
    moved: tuple[int, ...]
    converged: bool


def assign_within_bounds(
    take: Take,
    codebooks: Sequence[NDArray[np.float32]],
    bounds: Bounds,
    *,
    rows: int,
    contents: int,
    start: Sequence[PriceTable] | None = None,
    priced: bool = True,
    done: Callable[[int, int], None] = lambda level, rows: None,
) -> BoundedCodes:
    """Give every row a code on every level so that no prefix has more or fewer rows than its IDs may.

    From the first level down: a prefix has been given no more rows than the IDs below it may have, so its children
    always have room. Within a prefix, rows are assigned as `capacity.assign_group` does.

    Args:
        codebooks: one (K_l, d) float32 array a level.
        rows: n.
        contents: how many contents the rows stand for; bounds are scaled to the part of them that they are.
        start: prices to begin from, from codebooks close to these.
        priced: False leaves the prices of small groups at zero.
        done: called with the level, from 1, and the rows that have its code.
    """
    sizes = [len(codebook) for codebook in codebooks]
    codes = np.zeros((rows, len(sizes)), dtype=code_dtype(sizes))
    prefixes = np.zeros(rows, dtype=np.int64)
    tables: list[PriceTable] = []
    moved: list[int] = []
    converged = True
    quantizer = ResidualCodebooks(tuple(codebooks), tuple(np.zeros(size, np.float32) for size in sizes))
    for level, codebook in enumerate(codebooks):
        loads = bounds.below(capacity_of(sizes[level + 1 :]), rows, contents)
        found: dict[int, NDArray[np.float32]] = {}
        moved.append(0)
        finished = 0
        for group, costs in _groups(take, quantizer, codes, prefixes, level):
            prefix = int(prefixes[group[0]])
            feasible = loads.feasible(len(group), len(codebook))
            before = start[level].find(prefix) if start is not None else None
            # The last level's prices would serve no one: an ID that is free now is taken later.
            wanted = priced and level < len(sizes) - 1
            outcome = assign_group(costs, len(group), feasible, start=before, priced=wanted)
            codes[group, level] = outcome.codes
            moved[level] += outcome.moved
            converged &= outcome.converged
            if outcome.prices.any() and level < len(sizes) - 1:
                found[prefix] = outcome.prices
            finished += len(group)
            done(level + 1, finished)
        tables.append(_table(found, len(codebook)))
        prefixes = prefixes * len(codebook) + codes[:, level]
    return BoundedCodes(codes, tuple(tables), tuple(moved), converged)


def _table(found: dict[int, NDArray[np.float32]], size: int) -> PriceTable:
    prefixes = sorted(found)
    values = np.array([found[prefix] for prefix in prefixes], dtype=np.float32).reshape(len(prefixes), size)
    return PriceTable(np.array(prefixes, dtype=np.int64), values)


def _groups(
    take: Take, quantizer: ResidualCodebooks, codes: Codes, prefixes: NDArray[np.int64], level: int
) -> Iterator[tuple[NDArray[np.int64], Callable[[NDArray[np.int64]], NDArray[np.float32]]]]:
    """Yield the rows of each prefix, ascending, and what returns their costs on the level."""

    def costs_of(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        costs = np.empty((len(rows), quantizer.sizes[level]), np.float32)
        for start in range(0, len(rows), READ_ROWS):
            some = rows[start : start + READ_ROWS]
            costs[start : start + READ_ROWS] = quantizer.costs(take(some), codes[some], level)
        return costs

    block_rows = max(1, BLOCK_BYTES // (4 * quantizer.sizes[level]))
    order = np.argsort(prefixes, kind="stable")
    starts = np.flatnonzero(np.diff(prefixes[order], prepend=-1))
    ends = np.append(starts[1:], len(order))
    first = 0
    while first < len(starts):
        # As many whole groups as fit; a larger one alone, a part at a time.
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + block_rows, side="right")))
        block = order[starts[first] : ends[last - 1]]
        dense = costs_of(block) if len(block) <= block_rows else None
        for start, end in zip(starts[first:last], ends[first:last], strict=True):
            group = order[start:end]
            if dense is None:
                yield group, lambda some, group=group: costs_of(group[some])
            else:
                part = dense[start - starts[first] : end - starts[first]]
                yield group, lambda some, part=part: part[some]
        first = last


def refit_jointly(
    take: Take, codes: Codes, codebooks: Sequence[NDArray[np.float32]]
) -> tuple[NDArray[np.float32], ...]:
    """Return the codebooks of all levels that reconstruct the rows best, given their codes.

    Least squares over all codewords at once (the codebook update of additive quantization, Babenko and Lempitsky
    2014, section 3.2), with a small pull to where they were. Time is O(nLd), memory that of all codewords' products.
    """
    sizes = [len(codebook) for codebook in codebooks]
    offsets = np.cumsum([0, *sizes])
    rows, total = len(codes), int(offsets[-1])
    gram = np.zeros((total, total))
    for a in range(len(sizes)):
        for b in range(len(sizes)):
            pairs = codes[:, a].astype(np.int64) * sizes[b] + codes[:, b]
            counts = np.bincount(pairs, minlength=sizes[a] * sizes[b]).reshape(sizes[a], sizes[b])
            gram[offsets[a] : offsets[a + 1], offsets[b] : offsets[b + 1]] = counts
    current = np.concatenate(codebooks).astype(np.float64)
    sums = RIDGE * current
    for start in range(0, rows, SUM_ROWS):
        block = np.arange(start, min(start + SUM_ROWS, rows))
        chosen = csr_array(
            (
                np.ones(len(block) * len(sizes), np.float32),
                (codes[block].astype(np.int64) + offsets[:-1]).ravel(),
                np.arange(len(block) + 1) * len(sizes),
            ),
            shape=(len(block), total),
        )
        vectors = take(block)
        # float32 within a block, float64 from block to block: a codeword of a large catalogue sums 100,000 rows.
        sums += chosen.T @ widen(vectors, out=np.empty(vectors.shape, np.float32))
    solved = np.linalg.solve(gram + RIDGE * np.eye(total), sums).astype(np.float32)
    return tuple(solved[offsets[level] : offsets[level + 1]] for level in range(len(sizes)))
