"""Codes within bounds at every depth: prefix by prefix from the first level down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semids.arrays import Codes, capacity_of, code_dtype
from semids.blocks import READ_ROWS, Block, Group, KeptBlocks, Placement, Take, blocks_of, over_groups
from semids.capacity import Bounds, GroupAssignment, Loads, assign_group
from semids.parallel import in_order
from semids.residual import PriceTable, ResidualCodebooks, prefix_numbers


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
    kept: KeptBlocks = KeptBlocks(),  # noqa: B008
) -> Placement:
    """Give every row a code on the next level so that no prefix has more or fewer rows than its IDs may.

    Within a prefix, rows are assigned as `capacity.assign_group` does. A prefix was given no more rows than the IDs
    below it may have, so its children have room. Prefixes do not depend on one another.

    Args:
        before: (n, l) codes of the levels above: the level assigned is the one after them.
        contents: how many contents the rows stand for; bounds are scaled to the part of them that they are.
        start: prices to begin from, from codebooks close to these.
        priced: False leaves the prices of small groups at zero.
        done: called with the number of rows that have their code.
        kept: blocks of prefixes that are done, and where the others are kept; the codes of rows of blocks that are not
            of its lot are 0.
    """
    rows, level = before.shape
    sizes = quantizer.sizes
    loads = bounds.below(capacity_of(sizes[level + 1 :]), rows, contents)
    # The last level's prices would serve no one: an ID that is free now is taken later.
    is_last = level == len(sizes) - 1
    placer = _Placer(prefix_numbers(before, sizes), loads, sizes[level], start, priced and not is_last, not is_last)
    codes = np.zeros(rows, dtype=code_dtype(sizes))
    tables: list[PriceTable] = []
    moved, finished, converged = 0, 0, True
    blocks = blocks_of(take, quantizer, before, placer.prefixes)
    for number in range(len(blocks))[kept.lot]:
        block = blocks[number]
        placed = kept.find(number, len(block.rows))
        if placed is None:
            placed = placer.place(block, lambda rows, before=finished: done(before + rows))
            kept.keep(number, placed)
        codes[block.rows] = placed.codes
        tables.append(placed.prices)
        moved += placed.moved
        converged &= placed.converged
        finished += len(block.rows)
        done(finished)
    return Placement(codes, _concatenate(tables, sizes[level]), moved, converged)


@dataclass(frozen=True)
class _Placer:
    """Gives the rows of prefixes their codes, block by block.

    Args:
        prefixes: (n,) the number of each row's prefix.
        loads: of a child of a prefix.
        children: how many a prefix has.
        start: prices to begin from.
        priced: small groups get prices, too.
        keeps_prices: False where prices serve no one.
    """

    prefixes: NDArray[np.int64]
    loads: Loads
    children: int
    start: PriceTable | None
    priced: bool
    keeps_prices: bool

    def place(self, block: Block, done: Callable[[int], None]) -> Placement:
        """Return the codes of a block's rows; `done` is called with how many have theirs."""
        dense = block.read()
        codes = np.zeros(len(block.rows), np.int64)
        found: dict[int, NDArray[np.float32]] = {}
        moved, finished, converged = 0, 0, True
        nearest: NDArray[np.int64] | None = None
        left: NDArray[np.int64] | None = None
        if dense is not None and len(block.starts) > 1:
            # Most prefixes are small and need no more than their nearest codewords: all of them at once.
            nearest, fits = _nearest_within(dense, block.lengths, self.loads)
            if self.start is not None:
                fits &= ~np.isin(self.prefixes[block.rows[block.starts]], self.start.prefixes)
            left, finished, codes = np.flatnonzero(~fits), int(block.lengths[fits].sum()), nearest.copy()
        groups = block.groups(dense, left)
        outcomes = over_groups(lambda group: self._assign(group, nearest), groups)
        for group, outcome in zip(groups, outcomes, strict=True):
            codes[group.first : group.first + len(group.rows)] = outcome.codes
            moved += outcome.moved
            converged &= outcome.converged
            if self.keeps_prices and outcome.prices.any():
                found[int(self.prefixes[group.rows[0]])] = outcome.prices
            finished += len(group.rows)
            done(finished)
        table = _table(found, self.children)
        return Placement(codes.astype(code_dtype((self.children,))), table, moved, converged)

    def _assign(self, group: Group, nearest: NDArray[np.int64] | None) -> GroupAssignment:
        """Assign a group, given the nearest codewords of the block's rows, or None where they are not known."""
        rows = len(group.rows)
        prices = self.start.find(int(self.prefixes[group.rows[0]])) if self.start is not None else None
        feasible = self.loads.feasible(rows, self.children)
        unfit = nearest[group.first : group.first + rows] if nearest is not None and prices is None else None
        return assign_group(group.costs, rows, feasible, start=prices, priced=self.priced, nearest=unfit)


def _nearest_within(
    dense: NDArray[np.float32], lengths: NDArray[np.int64], loads: Loads
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the (m,) nearest codewords of (m, K) costs, and for each group of rows whether they keep its loads."""
    children = dense.shape[1]
    parts = [dense[first : first + READ_ROWS] for first in range(0, len(dense), READ_ROWS)]
    nearest = np.concatenate(list(in_order(lambda part: part.argmin(axis=1), parts)))
    # As `Loads.feasible` has them.
    least, most = np.minimum(loads.least, lengths // children), np.maximum(loads.most, -(-lengths // children))
    cells, counts = np.unique(np.repeat(np.arange(len(lengths)), lengths) * children + nearest, return_counts=True)
    groups = cells // children
    fits = (least == 0) | (np.bincount(groups[counts >= least[groups]], minlength=len(least)) == children)
    fits[groups[counts > most[groups]]] = False
    return nearest, fits


@dataclass(frozen=True)
class BoundedCodes:
    """(n, L) codes of which every prefix is within its bounds, and the levels they were found by."""

    codes: Codes
    levels: tuple[Placement, ...]

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
    levels: list[Placement] = []
    for level in range(len(codebooks)):
        before = start[level] if start is not None else None
        found = assign_level(take, quantizer, codes[:, :level], bounds, contents=contents, start=before, priced=priced)
        codes[:, level] = found.codes
        levels.append(found)
    return BoundedCodes(codes, tuple(levels))


def nearest_quantizer(codebooks: Sequence[NDArray[np.float32]]) -> ResidualCodebooks:
    """Return the codebooks under the nearest mapping."""
    return ResidualCodebooks(tuple(codebooks), tuple(np.zeros(len(book), np.float32) for book in codebooks))


def _concatenate(tables: Sequence[PriceTable], size: int) -> PriceTable:
    """Return one table of those of blocks, whose prefixes ascend from one to the next."""
    prefixes = [np.empty(0, np.int64), *(table.prefixes for table in tables)]
    values = [np.empty((0, size), np.float32), *(table.values for table in tables)]
    return PriceTable(np.concatenate(prefixes), np.concatenate(values))


def _table(found: dict[int, NDArray[np.float32]], size: int) -> PriceTable:
    prefixes = sorted(found)
    values = np.array([found[prefix] for prefix in prefixes], dtype=np.float32).reshape(len(prefixes), size)
    return PriceTable(np.array(prefixes, dtype=np.int64), values)
