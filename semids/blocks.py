"""Prefixes in blocks, as many as memory holds at once: their costs, and what is kept of blocks that are done."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from semids.arrays import Codes
from semids.capacity import Costs
from semids.parallel import in_order, thread_count
from semids.residual import PriceTable, ResidualCodebooks
from semids.store import FileRecord, check_file, commit, commit_sealed_json, read_sealed_json

BLOCK_BYTES = 256 << 20
"""Costs of small groups that are held at a time; those of a larger group are computed a part at a time, each time."""
READ_ROWS = 8192
"""Vectors read at a time."""

Result = TypeVar("Result")

Take = Callable[[NDArray[np.int64]], NDArray[Any]]
"""Returns the (m, d) vectors of the given rows."""


@dataclass(frozen=True)
class Group:
    """The rows of a prefix, ascending, and what returns the (m, K) costs of some of them, numbered from 0."""

    rows: NDArray[np.int64]
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

    def groups(self, dense: NDArray[np.float32] | None) -> list[Group]:
        """Return the prefixes one by one, given what `read` returned."""
        if dense is None:
            return [Group(self.rows, self.costs)]
        marks = [*self.starts.tolist(), len(self.rows)]
        return [Group(self.rows[a:b], dense[a:b].__getitem__) for a, b in itertools.pairwise(marks)]


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


@dataclass(frozen=True)
class PlacedBlock:
    """What came of a block.

    Args:
        codes: (m,) of its rows, in their order, in the smallest unsigned type.
        prices: of its prefixes, where there are any.
        moved: rows that rounding put elsewhere than the prices alone would.
        converged: all prices met their bounds before rounding.
    """

    codes: Codes
    prices: PriceTable
    moved: int
    converged: bool


class KeptBlocks:
    """Blocks that are done, in a folder: for a killed run to go on from, and for machines that share the folder."""

    def __init__(self, folder: Path | None) -> None:
        """Use a folder; None keeps nothing."""
        self._folder = folder

    def find(self, number: int) -> PlacedBlock | None:
        """Return a block that is done.

        Raises:
            CorruptionError: it was changed after it was written.
        """
        sealed = self._path(number, "json")
        if sealed is None or not sealed.exists():
            return None
        facts = read_sealed_json(sealed)
        path = sealed.with_suffix(".safetensors")
        check_file(path, FileRecord(**facts["record"]))
        tensors = load_file(path)
        prices = PriceTable(tensors["prefixes"], tensors["values"])
        return PlacedBlock(tensors["codes"], prices, facts["moved"], facts["converged"])

    def keep(self, number: int, block: PlacedBlock) -> None:
        """Commit a block.

        Raises:
            StorageError: the file system refused.
        """
        sealed = self._path(number, "json")
        if sealed is None:
            return
        tensors = {"codes": block.codes, "prefixes": block.prices.prefixes, "values": block.prices.values}
        record = commit(sealed.with_suffix(".safetensors"), lambda path: save_file(tensors, path))
        commit_sealed_json(sealed, {"record": vars(record), "moved": block.moved, "converged": block.converged})

    def _path(self, number: int, suffix: str) -> Path | None:
        return self._folder / f"block-{number:05d}.{suffix}" if self._folder is not None else None
