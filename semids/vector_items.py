"""Catalogues of finished embeddings: read by rows without loading them, checked, and deduplicated."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from semids.arrays import LARGEST_NORM, SMALLEST_NORM, Vectors, unusable_rows
from semids.catalogue import Catalogue, CatalogueSettings, open_catalogue
from semids.contents import (
    Buckets,
    ContentCounts,
    TableWriter,
    content_fields,
    digest_array,
    digest_content,
    digest_of_item,
    digest_words,
)
from semids.errors import DataError, ShapeError, UsageError
from semids.intake import Intake, commit_items
from semids.parser import open_npy
from semids.readers import BATCH_BYTES, BATCH_ROWS, Columns, is_list, open_parquet, reading
from semids.scratch import Scratch, Spool, allocate, scratch_folder
from semids.stages import StageOutput

# What a bucket holds of an item, with room to sort it.
ROW_BYTES = 64
NOT_FINITE = "missing or non-finite vector"
STORED_AS = {"float16": np.float16, "float32": np.float32, "float64": np.float32}


class _Part(Protocol):
    """The vectors of one file."""

    rows: int
    dimensions: int
    dtype: np.dtype[Any]

    def gather(self, rows: NDArray[np.int64]) -> Vectors:
        """Return the given rows of the file, ascending, in its own dtype."""
        ...


class VectorSource:
    """The vectors of a catalogue as one array, in sorted file order, read by rows and never loaded whole.

    `rows` counts all of the catalogue's rows, quarantined and repeated ones too; `dtype` is what rows are returned
    in: float16 stays, float32 stays, float64 becomes float32.
    """

    def __init__(self, settings: CatalogueSettings) -> None:
        """Open the files.

        Raises:
            UsageError: the catalogue holds no vectors; see `open_catalogue`.
            ShapeError: vectors are not floating point, or differ in dimensions or type.
            DataError: a file is damaged, or holds Python objects.
        """
        catalogue = open_catalogue(settings)
        if not catalogue.is_vectors:
            raise UsageError(f"expected vectors in {settings.path!r}, got texts; give vector_column or .npy files")
        column = catalogue.vector_column
        self._parts: list[_Part] = [
            _open_npy(path) if column is None else _ParquetPart(path, column) for path in catalogue.files
        ]
        self._starts = np.cumsum([0, *(part.rows for part in self._parts)])
        filled = [(path, part) for path, part in zip(catalogue.files, self._parts, strict=True) if part.dimensions]
        if not filled:
            raise DataError(f"expected vectors, got none in {settings.path!r}")
        first_path, first = filled[0]
        for path, part in filled[1:]:
            if (part.dimensions, part.dtype) != (first.dimensions, first.dtype):
                raise ShapeError(
                    f"expected {first.dimensions} dimensions of {first.dtype} as in {first_path}, "
                    f"got {part.dimensions} of {part.dtype} in {path}; embed them with one model"
                )
        self.rows = int(self._starts[-1])
        self.dimensions = first.dimensions
        self.dtype: np.dtype[Any] = np.dtype(STORED_AS[first.dtype.name])

    def take(self, start: int, stop: int) -> Vectors:
        """Return rows [start, stop), (stop - start, d), in memory."""
        return self.rows_at(np.arange(start, stop))

    def rows_at(self, rows: NDArray[np.int64]) -> Vectors:
        """Return the given rows, (len(rows), d), in memory; a missing vector is a row of NaN.

        Args:
            rows: ascending. Fastest when calls ascend, too: a Parquet file is then read once.

        Raises:
            ShapeError: a Parquet list is not as long as the others.
        """
        taken = np.empty((len(rows), self.dimensions), self.dtype)
        bounds = np.searchsorted(rows, self._starts)
        for part, offset, start, stop in zip(self._parts, self._starts, bounds[:-1], bounds[1:], strict=False):
            if stop > start:
                # A float64 beyond float32's range becomes infinite here, and is quarantined as such.
                with np.errstate(over="ignore"):
                    taken[start:stop] = part.gather(rows[start:stop] - offset)
        return taken


class _NpyPart:
    def __init__(self, array: Vectors) -> None:
        self._array = array
        self.rows, self.dimensions = array.shape
        self.dtype = array.dtype.newbyteorder("=")

    def gather(self, rows: NDArray[np.int64]) -> Vectors:
        return self._array[rows]


def _open_npy(path: Path) -> _NpyPart:
    try:
        with reading(path):
            array: NDArray[Any] = open_npy(path)
    except DataError as error:
        if "Python objects" in str(error):
            raise DataError(
                f"{path} holds Python objects (pickle), which are never loaded; save it as floats"
            ) from error
        raise
    if array.ndim != 2 or array.shape[1] == 0:
        raise ShapeError(f"expected vectors of shape (n, d) in {path}, got {array.shape}")
    if array.dtype.name not in STORED_AS:
        raise ShapeError(f"expected float16, 32 or 64 in {path}, got {array.dtype}; convert it")
    return _NpyPart(array)


class _ParquetPart:
    """A list column of one file, decoded forwards in blocks of about 32 MiB."""

    def __init__(self, path: Path, column: str) -> None:
        self._path = path
        self._column = column
        with reading(path):
            self._file = open_parquet(path)
            metadata = self._file.metadata
            groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            kind = self._file.schema_arrow.field(column).type
        if not is_list(kind) or not pa.types.is_floating(kind.value_type):
            raise ShapeError(f"expected lists of float16, 32 or 64 in {column!r} of {path}, got {kind}; convert it")
        self._group_starts = np.cumsum([0, *groups])
        self.rows = int(self._group_starts[-1])
        self.dtype: np.dtype[Any] = np.dtype(kind.value_type.to_pandas_dtype())
        self.dimensions = kind.list_size if pa.types.is_fixed_size_list(kind) else self._find_dimensions()
        self._block_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, self.dimensions * self.dtype.itemsize)))
        self._blocks: Iterator[Vectors] = iter(())
        self._block: Vectors = np.empty((0, self.dimensions), self.dtype)
        self._next = 0

    def _find_dimensions(self) -> int:
        with reading(self._path):
            for batch in self._file.iter_batches(batch_size=1024, columns=[self._column]):
                lengths = batch.column(0).value_lengths().drop_null()
                if len(lengths):
                    return int(lengths[0].as_py())
        return 0

    def gather(self, rows: NDArray[np.int64]) -> Vectors:
        gathered = np.empty((len(rows), self.dimensions), self.dtype)
        done = 0
        while done < len(rows):
            self._seek(int(rows[done]))
            first = self._next - len(self._block)
            stop = int(np.searchsorted(rows, self._next))
            gathered[done:stop] = self._block[rows[done:stop] - first]
            done = stop
        return gathered

    def _seek(self, row: int) -> None:
        """Decode forwards until the current block holds `row`, starting again only at its row group."""
        if self._next - len(self._block) <= row < self._next:
            return
        group = int(np.searchsorted(self._group_starts, row, side="right")) - 1
        if row < self._next or self._group_starts[group] > self._next:
            self._blocks = self._decode(group)
            self._next = int(self._group_starts[group])
        elif self._next == 0:
            self._blocks = self._decode(0)
        while row >= self._next:
            self._block = next(self._blocks)
            self._next += len(self._block)

    def _decode(self, first_group: int) -> Iterator[Vectors]:
        groups = list(range(first_group, len(self._group_starts) - 1))
        row = int(self._group_starts[first_group])
        with reading(self._path):
            for batch in self._file.iter_batches(
                batch_size=self._block_rows, row_groups=groups, columns=[self._column]
            ):
                yield self._to_rows(batch.column(0), row)
                row += len(batch)

    def _to_rows(self, column: Any, first_row: int) -> Vectors:
        present = column.is_valid().to_numpy(zero_copy_only=False)
        if is_list(column.type) and not pa.types.is_fixed_size_list(column.type):
            lengths = column.value_lengths().fill_null(self.dimensions).to_numpy()
            ragged = np.flatnonzero(lengths != self.dimensions)
            if ragged.size:
                raise ShapeError(
                    f"expected {self.dimensions} dimensions in {self._column!r} of {self._path}, "
                    f"got {lengths[ragged[0]]} in row {first_row + int(ragged[0])}; embed them with one model"
                )
        rows = np.full((len(column), self.dimensions), np.nan, self.dtype)
        rows[present] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.dimensions)
        return rows


def scan_vectors(settings: CatalogueSettings, output: StageOutput) -> dict[str, Any]:
    """Commit items.parquet, contents.parquet and quarantine.parquet of a catalogue of vectors; return their figures.

    A content is a vector's bytes as they are stored; contents are numbered in order of first appearance, and the
    `row` of each is the first row of the catalogue that holds it. See `items.scan_texts` for the files.

    Raises:
        ShapeError: vectors are not floating point, ragged, or of unequal dimensions.
        DataError, UsageError, StorageError: as `items.scan_texts` does.
    """
    source = VectorSource(settings)
    catalogue = open_catalogue(settings)
    with scratch_folder(output, "buckets") as scratch:
        intake = Intake(catalogue, scratch)
        buckets = Buckets(scratch, source.rows * ROW_BYTES, has_texts=False)
        seen = scratch.spool("seen", {"row": pa.uint64(), "high": pa.uint64(), "low": pa.uint64()})
        block_rows = max(1, min(BATCH_ROWS, BATCH_BYTES // (source.dimensions * 4)))
        for first_row, columns in _id_batches(catalogue, source.rows, block_rows):
            count = len(columns[settings.id_column])
            vectors = source.take(first_row, first_row + count)
            usable = intake.take(first_row, columns, _faults(vectors))
            if usable.places:
                digests = _digest_rows(vectors[usable.places])
                if settings.duplicates == "split":
                    ids = columns[settings.id_column]
                    digests = list(map(digest_of_item, digests, [ids[place] for place in usable.places]))
                buckets.add(usable.first, digests, usable.splits)
                seen.append(np.array(usable.places, np.uint64) + np.uint64(first_row), *digest_words(digests).T)
            output.progress("read catalogue", first_row + count, source.rows, "items")
        seen.close()
        intake.judge()
        counts, contents_digest = _commit_in_order(intake, buckets, seen, scratch, output)
        intake.commit_quarantine(output)
        return intake.summarize(counts) | {
            "kind": "vectors",
            "contents_digest": contents_digest,
            "dimensions": source.dimensions,
            "dtype": source.dtype.name,
        }


def _id_batches(catalogue: Catalogue, rows: int, block_rows: int) -> Iterator[tuple[int, Columns]]:
    if catalogue.format != "npy":
        yield from ((first_row, columns) for first_row, columns, _ in catalogue.batches(max_rows=block_rows))
        return
    for start in range(0, rows, block_rows):
        yield start, {catalogue.settings.id_column: list(range(start, min(start + block_rows, rows)))}


def _faults(vectors: Vectors) -> list[str | None]:
    faults: list[str | None] = [None] * len(vectors)
    for row in unusable_rows(vectors).tolist():
        vector = vectors[row].astype(np.float64)
        if not np.isfinite(vector).all():
            faults[row] = NOT_FINITE
        elif not vector.any():
            faults[row] = "zero vector"
        else:
            faults[row] = f"vector with a norm outside [{SMALLEST_NORM:g}, {LARGEST_NORM:g}]"
    return faults


def _digest_rows(vectors: Vectors) -> list[bytes]:
    data = memoryview(vectors.tobytes())
    width = vectors.shape[1] * vectors.itemsize
    return [digest_content(data[start : start + width]) for start in range(0, len(data), width)]


def _commit_in_order(
    intake: Intake, buckets: Buckets, seen: Spool, scratch: Scratch, output: StageOutput
) -> tuple[ContentCounts, str]:
    """Commit items and contents, contents in order of their first item; return their counts and digest in order."""
    counts = ContentCounts(intake.splits)
    in_order = sha256()
    first_of = allocate(scratch.folder / "first_of", np.int64, (intake.items,))
    count_at = allocate(scratch.folder / "count_at", np.uint32, (intake.items, len(intake.splits)))
    done = 0
    for group in buckets.groups(intake.split_order):
        first_of[group.items] = group.firsts[group.contents]
        count_at[group.firsts] = group.counts
        counts.add(group.words, group.counts)
        done += len(group.items)
        output.progress("find equal vectors", done, intake.items, "items")
    content_ids = allocate(scratch.folder / "content_ids", np.uint32, (intake.items,))

    def write_contents(path: Path) -> None:
        fields = content_fields(intake.splits, {"digest": pa.binary(16), "row": pa.uint64()})
        item = content = 0
        with TableWriter(path, fields) as writer:
            for batch in seen.batches():
                rows, high, low = (column.to_numpy() for column in batch.columns)
                here = np.arange(item, item + len(batch))
                new = first_of[here] == here
                content_ids[here[new]] = np.arange(content, content + int(new.sum()))
                # The first item of a content comes before the others, so its number is known by now.
                content_ids[here] = content_ids[first_of[here]]
                words = np.stack([high[new], low[new]], axis=1)
                in_order.update(words.tobytes())
                writer.write([digest_array(words), rows[new], *count_at[here[new]].T])
                item += len(batch)
                content += int(new.sum())

    output.commit("contents.parquet", write_contents)
    commit_items(intake, content_ids, output)
    return counts, in_order.hexdigest()
