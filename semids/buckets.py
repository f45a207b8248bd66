"""Counts items per ID and per prefix, of tens of millions of IDs, by one in-place sort of packed keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semids.arrays import WORD_BITS, Codes, pack_codes, word_layout

# Keys per block of the scan: its temporaries take about 100 MB.
SCAN_ROWS = 1 << 20
GROWTH = 1.25
# Upper edges of the histogram's bins: every number of items up to 16, then powers of two.
BIN_EDGES = np.array([*range(1, 17), *(1 << bit for bit in range(5, 63))], dtype=np.int64)


@dataclass(frozen=True)
class BucketFigures:
    """What the IDs of a set of items share.

    Args:
        unique_prefixes: distinct prefixes of 1 to L codes; the last is the number of distinct IDs.
        colliding_items: items whose ID another item has.
        largest_items: items on the ID that has the most; 0 if there are none.
        largest_contents: contents on the ID that has the most of them.
        histogram: (fewest items, most items, IDs, items of those IDs) of each bin that is not empty.
    """

    unique_prefixes: tuple[int, ...]
    colliding_items: int
    largest_items: int
    largest_contents: int
    histogram: tuple[tuple[int, int, int, int], ...]


class BucketTally:
    """Collects one key a content, then sorts them once for the figures of every depth.

    A key is the content's packed codes followed by its number of items and one bit that marks a content. Where
    codes leave at least two bits of a word, all of that is the word: 8 bytes a content and an in-place sort.
    A content with more items than its bits can count takes further keys without the mark: up to one key an item
    if codes take 62 bits. Longer codes take several words, and the sort then needs a permutation beside them.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        """Start with no items; `sizes` are codebook sizes, (L,), that bound every code."""
        self._sizes = tuple(sizes)
        layout = word_layout(sizes)
        last_word = layout[-1][0]
        used = sum((size - 1).bit_length() for size, (word, _) in zip(sizes, layout, strict=True) if word == last_word)
        self._own_word = used > WORD_BITS - 2
        self._count_bits = WORD_BITS if self._own_word else WORD_BITS - used
        self._places = [
            (word, shift if self._own_word or word < last_word else shift + self._count_bits) for word, shift in layout
        ]
        # uint64 and int64 do not mix, so one bit of a full word stays free.
        self._largest_count = (1 << min(self._count_bits - 1, WORD_BITS - 2)) - 1
        self._columns = [np.empty(0, dtype=np.uint64) for _ in range(last_word + 1 + self._own_word)]
        self._rows = 0

    def add(self, codes: Codes, counts: NDArray[np.int64]) -> None:
        """Add contents: (n, L) codes inside their codebooks and the (n,) positive number of items of each."""
        packed = pack_codes(codes, self._sizes)
        self._append(packed, np.minimum(counts, self._largest_count), is_content=True)
        large = np.flatnonzero(counts > self._largest_count)
        if len(large):
            rest = counts[large] - self._largest_count
            parts = -(-rest // self._largest_count)
            last = np.cumsum(parts) - 1
            part_counts = np.full(int(parts.sum()), self._largest_count, dtype=np.int64)
            part_counts[last] = rest - (parts - 1) * self._largest_count
            self._append(np.repeat(packed[large], parts, axis=0), part_counts, is_content=False)

    def _append(self, packed: NDArray[np.uint64], counts: NDArray[np.int64], *, is_content: bool) -> None:
        stop = self._rows + len(packed)
        marked = (counts.astype(np.uint64) << np.uint64(1)) | np.uint64(is_content)
        for word, column in enumerate(self._columns):
            if stop > len(column):
                # realloc moves pages rather than bytes on Linux; nothing else refers to a column.
                column.resize(max(stop, int(len(column) * GROWTH)), refcheck=False)
            if word < packed.shape[1]:
                column[self._rows : stop] = packed[:, word]
        if self._own_word:
            self._columns[-1][self._rows : stop] = marked
        else:
            self._columns[-1][self._rows : stop] = (packed[:, -1] << np.uint64(self._count_bits)) | marked
        self._rows = stop

    def finish(self) -> BucketFigures:
        """Sort what was added and return its figures; the tally is used up."""
        for column in self._columns:
            column.resize(self._rows, refcheck=False)
        if len(self._columns) == 1:
            self._columns[0].sort()
        else:
            order = np.lexsort(self._columns[::-1])
            for word in range(len(self._columns)):
                self._columns[word] = self._columns[word][order]
        return self._scan()

    def _scan(self) -> BucketFigures:
        """Walk the sorted keys in blocks; a run of equal IDs may cross from one block to the next."""
        prefixes = np.zeros(len(self._sizes), dtype=np.int64)
        histogram = np.zeros((2, len(BIN_EDGES)), dtype=np.int64)
        largest = np.zeros(2, dtype=np.int64)
        open_run = np.zeros((2, 1), dtype=np.int64)
        for start in range(0, self._rows, SCAN_ROWS):
            changed = self._changes(start, min(start + SCAN_ROWS, self._rows), prefixes)
            field = self._columns[-1][start : start + len(changed)]
            if not self._own_word:
                field = field & np.uint64((1 << self._count_bits) - 1)
            values = np.stack([field >> np.uint64(1), field & np.uint64(1)]).astype(np.int64)
            starts = np.flatnonzero(changed)
            # Sums of [0, first start), which belong to the open run, then of each run that starts here.
            runs = (
                np.concatenate([open_run, np.add.reduceat(values, starts, axis=1)], axis=1) if len(starts) else open_run
            )
            runs[:, 0] += values[:, : starts[0] if len(starts) else None].sum(axis=1)
            _record(runs[:, :-1], histogram, largest)
            open_run = runs[:, -1:]
        _record(open_run, histogram, largest)
        return BucketFigures(
            unique_prefixes=tuple(prefixes.tolist()),
            colliding_items=int(histogram[1, 1:].sum()),
            largest_items=int(largest[0]),
            largest_contents=int(largest[1]),
            histogram=tuple(
                (int(BIN_EDGES[index - 1]) + 1 if index else 1, int(BIN_EDGES[index]), *histogram[:, index].tolist())
                for index in np.flatnonzero(histogram[0])
            ),
        )

    def _changes(self, start: int, stop: int, prefixes: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return where IDs in [start, stop) differ from the one before; add the new prefixes of each depth."""
        changed = np.zeros(stop - start, dtype=np.bool_)
        word = -1
        differing = np.empty(0, dtype=np.uint64)
        for level, (level_word, shift) in enumerate(self._places):
            if level_word != word:
                word = level_word
                column = self._columns[word]
                differing = column[start:stop].copy()
                differing[1:] ^= column[start : stop - 1]
                # Nothing comes before the first key: let every bit differ.
                differing[0] = differing[0] ^ column[start - 1] if start else ~np.uint64(0)
            # Codes up to this level differ if a bit at or above its place does.
            changed |= differing >= np.uint64(1 << shift)
            prefixes[level] += int(np.count_nonzero(changed))
        return changed


def _record(runs: NDArray[np.int64], histogram: NDArray[np.int64], largest: NDArray[np.int64]) -> None:
    """Add finished runs, (2, r) items and contents of an ID each, to the histogram of IDs and items."""
    items = runs[0][runs[0] > 0]
    bins = np.searchsorted(BIN_EDGES, items)
    histogram[0] += np.bincount(bins, minlength=len(BIN_EDGES))
    histogram[1] += np.bincount(bins, weights=items, minlength=len(BIN_EDGES)).astype(np.int64)
    if len(items):
        np.maximum(largest, runs.max(axis=1), out=largest)
