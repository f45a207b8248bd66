"""Row arrays too large for one file: `.npy` shards, each with a sealed sidecar as its commit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semids.errors import CorruptionError, UsageError
from semids.parallel import in_order
from semids.parser import open_npy
from semids.progress import Progress
from semids.store import FileRecord, check_file, commit, commit_sealed_json, read_sealed_json

SHARD_ROWS = 65_536
COMPUTED = "computed"
EVERY = slice(None)


@dataclass(frozen=True)
class ShardLayout:
    """The plan of a sharded array: `rows` rows of `columns` numbers of `dtype`, `shard_rows` to a file."""

    rows: int
    columns: int
    dtype: str
    shard_rows: int = SHARD_ROWS

    @property
    def shards(self) -> int:
        """Number of files."""
        return count_shards(self.rows, self.shard_rows)

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return self.columns * np.dtype(self.dtype).itemsize

    def bounds(self, shard: int) -> tuple[int, int]:
        """Return the [start, stop) rows of a shard."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)


def count_shards(rows: int, shard_rows: int = SHARD_ROWS) -> int:
    """Return how many files hold so many rows."""
    return -(-rows // shard_rows)


def shard_name(name: str, shard: int) -> str:
    """Return the file name of a shard, for example `vectors-00012.npy`."""
    return f"{name}-{shard:05d}.npy"


def write_shards(
    folder: Path,
    name: str,
    layout: ShardLayout,
    produce: Callable[[int, int], NDArray[Any]],
    *,
    fingerprint: str,
    origin: str = COMPUTED,
    progress: Progress,
    lot: slice = EVERY,
) -> dict[str, FileRecord]:
    """Write a sharded array into `folder`, keeping the shards that an interrupted run finished.

    Args:
        produce: called with the [start, stop) rows of each missing shard; returns them, (stop - start, columns).
        fingerprint: of the step that writes; a shard of another step is written again.
        origin: where the rows come from, if not computed by the step itself; one array never mixes two.
        lot: which shards, of the list of them.

    Returns:
        The record of every `.npy` file written or kept, by file name.

    Raises:
        UsageError: `folder` holds shards of another origin; see `check_origin`.
        CorruptionError: a finished shard was changed.
    """
    check_origin(folder, fingerprint, origin)
    records: dict[str, FileRecord] = {}
    for shard in range(layout.shards)[lot]:
        start, stop = layout.bounds(shard)
        path = folder / shard_name(name, shard)
        sidecar = path.with_suffix(".json")
        body: dict[str, Any] = {"rows": stop - start, "columns": layout.columns, "dtype": layout.dtype}
        body |= {"fingerprint": fingerprint, "origin": origin}
        record = _finished_shard(path, body)
        if record is None:
            array = np.ascontiguousarray(produce(start, stop), dtype=layout.dtype)
            if array.shape != (stop - start, layout.columns):
                raise AssertionError(f"expected shard of shape {(stop - start, layout.columns)}, got {array.shape}")
            # An older sidecar beside a newer shard would look like corruption to a run that starts between the two.
            sidecar.unlink(missing_ok=True)
            record = commit(path, lambda temporary, array=array: _save(temporary, array))
            commit_sealed_json(sidecar, body | vars(record))
        records[path.name] = record
        progress(name, stop, layout.rows, "rows")
    return records


def check_origin(folder: Path, fingerprint: str, origin: str) -> None:
    """Refuse to go on with a step whose finished shards came from elsewhere.

    Raises:
        UsageError: a shard of the step is of another origin. Nothing was changed.
    """
    for sidecar in sorted(folder.glob("*-[0-9]*.json")):
        body = read_sealed_json(sidecar)
        if body["fingerprint"] == fingerprint and body["origin"] != origin:
            raise UsageError(
                f"{sidecar.with_suffix('.npy')} was {body['origin']}, and its array is unfinished or has lost a part; "
                "repeat that run to complete it, or delete the folder to begin anew"
            )


def _save(path: Path, array: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _finished_shard(path: Path, expected: dict[str, Any]) -> FileRecord | None:
    sidecar = path.with_suffix(".json")
    if not sidecar.exists() or not path.exists():
        return None
    body = read_sealed_json(sidecar)
    if body["fingerprint"] != expected["fingerprint"]:
        return None
    if any(body[key] != value for key, value in expected.items()):
        return None
    record = FileRecord(body["bytes"], body["sha256"])
    check_file(path, record)
    return record


class ShardedArray:
    """A sharded array that was committed: read by rows or in chunks, memory-mapped, digests checked first."""

    def __init__(self, layout: ShardLayout, shard_path: Callable[[int], Path]) -> None:
        """Open an array.

        Args:
            shard_path: returns the path of a shard, once its digest is known to be right.
        """
        self.layout = layout
        self._shard_path = shard_path
        self._mapped: dict[int, NDArray[Any]] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.layout.rows, self.layout.columns

    def path(self, shard: int) -> Path:
        """Return the path of a shard's file, whose digest is right.

        Raises:
            CorruptionError: the file is not the array that was committed.
        """
        return self._shard_path(shard)

    def shard(self, shard: int) -> NDArray[Any]:
        """Return a shard's rows, memory-mapped read-only.

        Raises:
            CorruptionError: the file is not the array that was committed.
        """
        if shard in self._mapped:
            return self._mapped[shard]
        path = self._shard_path(shard)
        start, stop = self.layout.bounds(shard)
        try:
            array: NDArray[Any] = open_npy(path)
        except ValueError as error:
            raise CorruptionError(f"{path}: expected an array of numbers: {error}") from error
        if array.shape != (stop - start, self.layout.columns) or array.dtype != np.dtype(self.layout.dtype):
            raise CorruptionError(f"{path}: expected {(stop - start, self.layout.columns)}, got {array.shape}")
        # A map holds no memory of its own, and opening it anew for each of many groups of rows would take longer.
        self._mapped[shard] = array
        return array

    def chunks(self, rows: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield (first row, rows) from first to last, at most `rows` rows each and never across shards."""
        for shard in range(self.layout.shards):
            start, _ = self.layout.bounds(shard)
            array = self.shard(shard)
            for offset in range(0, len(array), rows):
                yield start + offset, array[offset : offset + rows]

    def take(self, rows: NDArray[np.int64], *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return the given rows, (len(rows), columns), as an array in memory. Fastest when sorted.

        Args:
            out: where they are put, if given: as large, and of the same dtype.

        Raises:
            IndexError: there is no such row.
        """
        taken = np.empty((len(rows), self.layout.columns), dtype=self.layout.dtype) if out is None else out
        if not len(rows):
            return taken
        if rows.min() < 0 or rows.max() >= self.layout.rows:
            raise IndexError(f"expected rows from 0 to {self.layout.rows - 1}, got {rows.min()} to {rows.max()}")
        if (rows[1:] < rows[:-1]).any():
            order = np.argsort(rows, kind="stable")
            taken[order] = self.take(rows[order])
            return taken
        shards = rows // self.layout.shard_rows
        starts = [0, *(np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist(), len(rows)]
        new = [shard for shard in shards[starts[:-1]].tolist() if shard not in self._mapped]
        if len(new) > 1:
            # Their digests are checked, by all threads.
            for _ in in_order(self.shard, new):
                pass
        for start, stop in itertools.pairwise(starts):
            shard = int(shards[start])
            places = rows[start:stop] - shard * self.layout.shard_rows
            # Checked above: `clip` only keeps NumPy from going through another array.
            np.take(self.shard(shard), places, axis=0, out=taken[start:stop], mode="clip")
        return taken
