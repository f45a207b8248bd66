"""Prefixes in blocks, as many as memory holds at once: their costs, and what is kept of blocks that are done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from semids.arrays import Codes
from semids.capacity import Costs
from semids.errors import CorruptionError
from semids.parallel import in_order, thread_count
from semids.residual import PriceTable, ResidualCodebooks
from semids.shards import EVERY
from semids.store import FileRecord, check_file, commit, commit_sealed_json, read_sealed_json

BLOCK_BYTES = 256 << 20
"""Costs of small groups that are held at a time; those of a larger group are computed a part at a time, each time."""
READ_ROWS = 8192
"""Vectors read at a time."""

log = logging.getLogger("semids")

Result = TypeVar("Result")

Take = Callable[[NDArray[np.int64]], NDArray[Any]]
"""Returns the (m, d) vectors of the given rows."""


@dataclass(frozen=True)
class Group:
    """A prefix.

    Args:
        rows: its rows, ascending.
        first: where in its block they begin.
        costs: returns the (m, K) costs of some of them, numbered from 0.
    """

    rows: NDArray[np.int64]
    first: int
    costs: Costs


@dataclass(frozen=True)
class Block:
    """Whole prefixes, as many as memory holds at once, or a larger one alone.

    Args:
        rows: (m,) rows, prefix by prefix, ascending within one.
        starts: (g,) where among them each prefix begins.
        costs: returns the (k, K) costs of some of them, numbered from 0.
        is_large: the costs of all of them are more than memory holds.
    """

    rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    costs: Costs
    is_large: bool

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of rows of each prefix, (g,)."""
        return np.diff(self.starts, append=len(self.rows))

    def read(self) -> NDArray[np.float32] | None:
        """Return the (m, K) costs of all rows, or None of a prefix that is too large."""
        return None if self.is_large else self.costs(np.arange(len(self.rows)))

    def groups(self, dense: NDArray[np.float32] | None, places: NDArray[np.int64] | None = None) -> list[Group]:
        """Return the prefixes one by one, given what `read` returned; those at some places, or all."""
        if dense is None:
            return [Group(self.rows, 0, self.costs)]
        bounds = np.stack([self.starts, self.starts + self.lengths], axis=1)
        chosen = bounds if places is None else bounds[places]
        return [Group(self.rows[a:b], a, dense[a:b].__getitem__) for a, b in chosen.tolist()]


def count_blocks(rows: int, size: int) -> int:
    """Return about how many blocks the prefixes of so many rows make, before a level of `size` codewords."""
    return -(-rows // _block_rows(size))


def _block_rows(size: int) -> int:
    return max(1, BLOCK_BYTES // (4 * size))


def blocks_of(take: Take, quantizer: ResidualCodebooks, before: Codes, prefixes: NDArray[np.int64]) -> list[Block]:
    """Return the rows of each prefix, whole prefixes in blocks, to be assigned on the level after it.

    Args:
        before: (n, l) codes of the levels above.
        prefixes: (n,) their numbers.
    """
    block_rows = _block_rows(quantizer.sizes[before.shape[1]])
    order = np.argsort(prefixes, kind="stable")
    starts = np.flatnonzero(np.diff(prefixes[order], prepend=-1))
    ends = np.append(starts[1:], len(order))
    blocks: list[Block] = []
    first = 0
    while first < len(starts):
        # As many whole groups as fit; a larger one alone, a part at a time.
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + block_rows, side="right")))
        rows = order[starts[first] : ends[last - 1]]
        costs = _costs_of(take, quantizer, before, rows)
        blocks.append(Block(rows, starts[first:last] - starts[first], costs, len(rows) > block_rows))
        first = last
    return blocks


def _costs_of(take: Take, quantizer: ResidualCodebooks, before: Codes, rows: NDArray[np.int64]) -> Costs:
    return lambda some: read_costs(take, quantizer, before, rows[some])


def over_groups(work: Callable[[Group], Result], groups: Sequence[Group]) -> Iterator[Result]:
    """Return `work(group)` for every group, in their order."""
    # Where there are fewer groups than threads, each keeps all threads busy by itself.
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


@dataclass(frozen=True)
class Placement:
    """Codes of rows on one level, of which every prefix is within its bounds, and how they came about.

    Args:
        codes: (n,) of the rows of a block, in its order, or of all rows, in the smallest unsigned type.
        prices: with them, later rows get close to the same loads.
        moved: rows that rounding put elsewhere than the prices alone would.
        converged: all prices met their bounds before rounding.
    """

    codes: Codes
    prices: PriceTable
    moved: int
    converged: bool


class KeptBlocks:
    """Blocks that are done, in a folder: for a killed run to go on from, and for machines that share the folder.

    Args:
        folder: None keeps nothing.
        lot: which blocks are to be placed, of the list of them.
    """

    def __init__(self, folder: Path | None = None, lot: slice = EVERY) -> None:
        self._folder = folder
        self.lot = lot

    def find(self, number: int, rows: int) -> Placement | None:
        """Return a block of so many rows that is done; one that was changed after it was written is not."""
        sealed = self._path(number)
        if sealed is None or not sealed.exists():
            return None
        path = sealed.with_suffix(".safetensors")
        try:
            facts = read_sealed_json(sealed)
            check_file(path, FileRecord(**facts["record"]))
            tensors = load_file(path)
        except (CorruptionError, SafetensorError) as error:
            log.warning("a block of prefixes cannot be used, and is placed again: %s", error)
            return None
        prices = PriceTable(tensors["prefixes"], tensors["values"])
        found = Placement(tensors["codes"], prices, facts["moved"], facts["converged"])
        return found if len(found.codes) == rows else None

    def keep(self, number: int, block: Placement) -> None:
        """Commit a block.

        Raises:
            StorageError: the file system refused.
        """
        sealed = self._path(number)
        if sealed is None:
            return
        tensors = {"codes": block.codes, "prefixes": block.prices.prefixes, "values": block.prices.values}
        # An older seal beside newer tensors would look like corruption to a run that starts between the two.
        sealed.unlink(missing_ok=True)
        record = commit(sealed.with_suffix(".safetensors"), lambda path: save_file(tensors, path))
        commit_sealed_json(sealed, {"record": vars(record), "moved": block.moved, "converged": block.converged})

    def _path(self, number: int) -> Path | None:
        return self._folder / f"block-{number:05d}.json" if self._folder is not None else None
