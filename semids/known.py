"""Contents that have their ID already, by digest: what later items are looked up in before the rule is asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from semids.arrays import Codes
from semids.contents import GROUP_ROWS, digest_array, read_digests

KNOWN = "known.parquet"


def later_file(number: int) -> str:
    """Return the name of the file of the contents that got their IDs after the model was made, lot by lot from 1."""
    return f"known-{number:05d}.parquet"


def known_files(names: Iterable[str]) -> list[str]:
    """Return those of a model's files that hold known contents."""
    return sorted(name for name in names if name == KNOWN or name.startswith("known-"))


def write_known(path: Path, words: NDArray[np.uint64], codes: Codes) -> None:
    """Write `digest` (16 bytes, ascending) and the columns `c0, c1, …` of the codes of contents.

    Args:
        words: (m, 2) digests, as `contents.read_digests` returns them.
        codes: (m, L) codes of the same contents.
    """
    order = np.lexsort((words[:, 1], words[:, 0]))
    columns = [digest_array(words[order]), *(pa.array(column) for column in codes[order].T)]
    names = ["digest", *(f"c{level}" for level in range(codes.shape[1]))]
    table = pa.Table.from_arrays(columns, names=names)
    pq.write_table(table, path, compression="zstd", row_group_size=GROUP_ROWS, use_dictionary=False)


class KnownCodes:
    """The codes of known contents, held in memory: 16 bytes and L codes a content.

    Args:
        codes: (m, L), of all of them.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read what `write_known` wrote, in one file or several without common contents."""
        words = np.concatenate([read_digests(path) for path in paths])
        tables = [pq.read_table(path) for path in paths]
        codes = [np.stack([table[name].to_numpy() for name in table.column_names[1:]], axis=1) for table in tables]
        order = np.lexsort((words[:, 1], words[:, 0])) if len(paths) > 1 else slice(None)
        self._words, self.codes = words[order], np.concatenate(codes)[order]

    def find(self, words: NDArray[np.uint64]) -> tuple[Codes, NDArray[np.bool_]]:
        """Return the (n, L) codes of the contents whose (n, 2) digest words are given, and which of them are known."""
        places = np.searchsorted(self._words[:, 0], words[:, 0])
        found = np.zeros(len(words), dtype=bool)
        pending = np.arange(len(words))
        # Several contents may share the first 8 bytes of their digest.
        while len(pending):
            inside = places[pending] < len(self._words)
            pending = pending[inside]
            here = self._words[places[pending]]
            found[pending] = (here == words[pending]).all(axis=1)
            pending = pending[(here[:, 0] == words[pending, 0]) & ~found[pending]]
            places[pending] += 1
        codes = np.zeros((len(words), self.codes.shape[1]), dtype=self.codes.dtype)
        codes[found] = self.codes[places[found]]
        return codes, found
