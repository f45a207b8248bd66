"""Data too large for memory between two passes: streams, sorted keys and memory maps in a scratch folder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from semids.errors import StorageError
from semids.stages import StageOutput


class Scratch:
    """A folder for intermediate data, and the files in it that are still being written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = contextlib.ExitStack()

    def spool(self, name: str, fields: Mapping[str, Any]) -> Spool:
        """Return a new spool of record batches with the given fields and Arrow types."""
        sink = self._files.enter_context(pa.OSFile(str(self.folder / name), "wb"))
        return Spool(self.folder / name, sink, pa.schema(fields))

    def keys(self, name: str) -> KeySpool:
        """Return a new spool of 64-bit keys."""
        return KeySpool(self.folder / name, self._files.enter_context((self.folder / name).open("wb")))

    def close(self) -> None:
        """Close every file: a deleted one would keep its disk space for as long as it is open."""
        self._files.close()


@contextlib.contextmanager
def scratch_folder(output: StageOutput, name: str) -> Generator[Scratch]:
    """Give an empty folder for intermediate data, and remove it however the context ends.

    Raises:
        StorageError: the file system refused a read or write of intermediate data.
    """
    folder = output.scratch(name)
    scratch = Scratch(folder)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield scratch
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"cannot use {folder} for intermediate data: {reason}; free some space, run again"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.close()
        shutil.rmtree(folder, ignore_errors=True)


def allocate(path: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    """Return a memory map of zeros whose disk space is already taken.

    A sparse file would instead end the interpreter with SIGBUS when the disk fills up.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with path.open("wb") as file:
        for start in range(0, size, 1 << 20):
            file.write(bytes(min(1 << 20, size - start)))
    if size == 0:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "r+", shape=shape)


class Spool:
    """Record batches kept on disk between two passes; read back batch by batch as they were appended."""

    def __init__(self, path: Path, sink: Any, schema: Any) -> None:
        """Write to `sink`, the open file at `path`; see `Scratch.spool`."""
        self._path = path
        self._sink = sink
        self._schema = schema
        self._writer = pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))

    def append(self, *columns: Any) -> None:
        """Append one batch: a list, numpy or Arrow array for each field."""
        arrays = [
            column if isinstance(column, pa.Array) else pa.array(column, field.type)
            for column, field in zip(columns, self._schema, strict=True)
        ]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))

    def close(self) -> None:
        """End writing; nothing can be appended any more."""
        self._writer.close()
        self._sink.close()

    def batches(self) -> Iterator[Any]:
        """Yield the batches, in order."""
        with pa.OSFile(str(self._path), "rb") as source, pa.ipc.open_stream(source) as reader:
            yield from reader

    def table(self) -> Any:
        """Return all batches as one table, in memory."""
        with pa.OSFile(str(self._path), "rb") as source, pa.ipc.open_stream(source) as reader:
            return reader.read_all()


class KeySpool:
    """64-bit keys kept on disk and sorted there."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Write to `file`, the open file at `path`; see `Scratch.keys`."""
        self._path = path
        self._file = file
        self._rows = 0

    def append(self, keys: NDArray[np.uint64]) -> None:
        """Append keys, (n,) uint64."""
        self._file.write(keys.tobytes())
        self._rows += len(keys)

    def sort(self) -> NDArray[np.uint64]:
        """End writing and return all keys in ascending order, memory-mapped."""
        self._file.close()
        if self._rows == 0:
            return np.empty(0, np.uint64)
        keys = np.memmap(self._path, np.uint64, "r+", shape=(self._rows,))
        keys.sort()
        return keys


def count_distinct(ascending: NDArray[np.uint64]) -> int:
    """Return how many different values an ascending array holds."""
    step = 1 << 20
    starts = range(0, len(ascending), step)
    # Each block also holds the last value of the block before it, so that no change between blocks is lost.
    changes = sum(int(np.count_nonzero(np.diff(ascending[max(0, start - 1) : start + step]))) for start in starts)
    return changes + min(1, len(ascending))
