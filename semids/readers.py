"""Catalogue files: found, told apart by their names, and read in batches of plain Python values."""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import itertools
import json
import zlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from semids.errors import DataError, SemidsError, StorageError, UsageError

FORMATS = {".parquet": "Parquet", ".jsonl": "JSONL", ".ndjson": "JSONL", ".csv": "CSV", ".npy": "npy"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = ".parquet, .npy, or .jsonl, .ndjson or .csv, plain or with .gz or .zst"
BATCH_ROWS = 32_768
BATCH_BYTES = 32 << 20
# JSONL has no header: a column is known if one of a file's first lines has it.
PEEKED_LINES = 1000
# csv gives up on fields above 128 KiB; too long a text is for the caller to name and quarantine.
LONGEST_CSV_FIELD = (1 << 31) - 1

Columns = dict[str, list[Any]]
"""Equally long lists of Python values, by column name."""


def find_files(pattern: str) -> tuple[str, tuple[Path, ...]]:
    """Return the format (Parquet, JSONL, CSV or npy) and the sorted files of a file, folder or glob.

    A folder is searched at every depth; in it, files of other kinds and names that start with `.` or `_` are
    passed over.

    Raises:
        UsageError: nothing matches, a format cannot be told from a file's name, or formats are mixed.
    """
    try:
        files = _match_files(pattern)
    except (OSError, ValueError) as error:
        raise UsageError(f"expected a path or glob of catalogue files, got {pattern[:80]!r}: {error}") from error
    if not files:
        hint = " (~ stands for nothing here: write the whole path)" if pattern.startswith("~") else ""
        raise UsageError(f"no catalogue file matches {pattern!r}{hint}; give a file, folder or glob of {SUFFIXES}")
    formats = {path: _format_of(path) for path in files}
    unknown = [path.name for path, found in formats.items() if found is None]
    if unknown:
        raise UsageError(f"cannot tell the format of {unknown[0]!r} from its name; expected {SUFFIXES}")
    distinct = sorted({found for found in formats.values() if found})
    if len(distinct) > 1:
        raise UsageError(f"{pattern!r} mixes {' and '.join(distinct)} files; give a glob that matches one format")
    return distinct[0], tuple(files)


def _match_files(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = [(found.relative_to(path).parts, found) for found in path.rglob("*") if found.is_file()]
        found = [found for parts, found in inside if _format_of(found) and not any(part[0] in "._" for part in parts)]
    else:
        found = [found for name in glob.glob(pattern, recursive=True) if (found := Path(name)).is_file()]  # noqa: PTH207
    return sorted(found, key=lambda path: path.as_posix())


def _format_of(path: Path) -> str | None:
    if path.suffix.lower() not in COMPRESSIONS:
        return FORMATS.get(path.suffix.lower())
    inner = FORMATS.get(Path(path.stem).suffix.lower())
    return inner if inner in ("JSONL", "CSV") else None


@contextlib.contextmanager
def reading(path: Path) -> Generator[None]:
    """Turn what goes wrong in the context into errors that name `path` and say what to do.

    Raises:
        StorageError: the file system refused.
        DataError: the file is damaged, cut off, or not what its name says.
    """
    try:
        yield
    except SemidsError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 ({error.reason}: {error.object[error.start : error.start + 4]!r}); "
            "convert it, for example with iconv -t UTF-8"
        ) from error
    except (OSError, EOFError, ValueError, pa.ArrowException, csv.Error, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise StorageError(f"cannot read {path}: {error.strerror}; run again once it can be read") from error
        raise DataError(
            f"{path} cannot be read ({str(error).splitlines()[0]}): it is cut off, damaged, "
            "or not what its name says; copy or export it again"
        ) from error


def read_kinds(path: Path, file_format: str) -> dict[str, str]:
    """Return the kind of each column of a file: string, integer, value, vector, unknown (all null), or its type.

    A value is a number, boolean, date or time that has one way to be written as text.

    Raises:
        DataError: the file is damaged, has no header, or names a column twice.
    """
    with reading(path):
        if file_format == "Parquet":
            with open_parquet(path) as file:
                schema = file.schema_arrow
            names, kinds = list(schema.names), [_kind_of_type(column.type) for column in schema]
        elif file_format == "CSV":
            with pa.OSFile(str(path)) as file, _open_csv(path, file) as rows:
                names = next(rows, [])
            if not names:
                raise DataError(f"{path} is empty: expected a first line that names the columns")
            kinds = ["string"] * len(names)
        else:
            found: dict[str, str] = {}
            with pa.OSFile(str(path)) as file:
                records = [record for _, record, _ in itertools.islice(_records(path, file), PEEKED_LINES)]
            for record in records:
                for name, value in record.items():
                    if found.get(name, "unknown") == "unknown":
                        found[name] = _kind_of_value(value)
            names, kinds = list(found), list(found.values())
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"{path} names the column {repeated[0]!r} twice; rename one of them")
    return dict(zip(names, kinds, strict=True))


def _kind_of_type(kind: Any) -> str:
    types = pa.types
    if types.is_dictionary(kind):
        return _kind_of_type(kind.value_type)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return "string"
    if types.is_integer(kind):
        return "integer"
    if is_list(kind) and types.is_floating(kind.value_type):
        return "vector"
    if types.is_null(kind):
        return "unknown"
    plain = (types.is_floating, types.is_boolean, types.is_decimal, types.is_temporal)
    return "value" if any(check(kind) for check in plain) else str(kind)


def is_list(kind: Any) -> bool:
    """True for Arrow's list, large list and fixed-size list types."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _kind_of_value(value: Any) -> str:
    kinds = {type(None): "unknown", str: "string", int: "integer", float: "value", bool: "value"}
    return kinds.get(type(value), type(value).__name__)


def read_batches(
    path: Path, file_format: str, columns: Sequence[str], *, max_rows: int
) -> Iterator[tuple[Columns, int]]:
    """Yield the named columns of a Parquet, JSONL or CSV file in order, about 32 MiB or `max_rows` rows at a time.

    Missing values are None; in CSV, where nothing else can say so, an empty field is one. Beside each batch stands how
    many bytes of the file have been read, about: buffers are ahead of the rows.

    Raises:
        StorageError: the file system refused.
        DataError: the file is damaged or cut off. Names the file, and the line where there is one.
    """
    with reading(path):
        size = path.stat().st_size
        if file_format == "Parquet":
            yield from _parquet_batches(path, size, columns, max_rows)
        else:
            with pa.OSFile(str(path)) as file:
                rows = _csv_rows(path, file, columns) if file_format == "CSV" else _jsonl_rows(path, file, columns)
                for gathered in _gather(rows, columns, max_rows):
                    # Rows that are exhausted have closed it, which is before the last batch.
                    yield gathered, size if file.closed else file.tell()


def open_parquet(path: Path) -> Any:
    """Open a Parquet file so that a column is read through a 1 MiB buffer rather than a row group at once."""
    return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)


def _parquet_batches(path: Path, size: int, columns: Sequence[str], max_rows: int) -> Iterator[tuple[Columns, int]]:
    with open_parquet(path) as file:
        metadata = file.metadata
        in_bytes = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
        row_bytes = max(1, in_bytes // max(1, metadata.num_rows))
        rows = max(1, min(max_rows, BATCH_BYTES // row_bytes))
        done = 0
        for batch in file.iter_batches(batch_size=rows, columns=list(columns)):
            done += batch.num_rows
            yield {name: batch.column(name).to_pylist() for name in columns}, size * done // metadata.num_rows


def _gather(rows: Iterator[tuple[list[Any], int]], columns: Sequence[str], max_rows: int) -> Iterator[Columns]:
    gathered: list[list[Any]] = []
    size = 0
    for values, length in rows:
        gathered.append(values)
        size += length
        if len(gathered) == max_rows or size >= BATCH_BYTES:
            yield dict(zip(columns, map(list, zip(*gathered, strict=True)), strict=True))
            gathered, size = [], 0
    if gathered:
        yield dict(zip(columns, map(list, zip(*gathered, strict=True)), strict=True))


def _open_stream(path: Path, file: pa.NativeFile) -> io.BufferedReader:
    """Return the bytes of an open file, decompressed as its name tells."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression and file.size() == 0:
        raise EOFError(f"0 bytes are no {compression} stream")
    return io.BufferedReader(pa.CompressedInputStream(file, compression) if compression else file, 1 << 20)


def _records(path: Path, file: pa.NativeFile) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Yield (line number, object, length in bytes) of each line of a JSONL file that is not blank."""
    with _open_stream(path, file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                record: Any = json.loads(text)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not UTF-8 ({error.reason}); convert it, for example with iconv -t UTF-8"
                ) from error
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number}: not JSON ({error}); if it is the last line the file was cut off: "
                    "copy or export it again"
                ) from error
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number}: expected an object, got {type(record).__name__}")
            yield number, record, len(line)


def _jsonl_rows(path: Path, file: pa.NativeFile, columns: Sequence[str]) -> Iterator[tuple[list[Any], int]]:
    for number, record, length in _records(path, file):
        values = [record.get(name) for name in columns]
        for name, value in zip(columns, values, strict=True):
            if isinstance(value, list | dict):
                raise DataError(
                    f"{path}, line {number}: expected text or a number in {name!r}, got a {type(value).__name__}; "
                    "flatten it to text first"
                )
        yield values, length


@contextlib.contextmanager
def _open_csv(path: Path, file: pa.NativeFile) -> Generator[Any]:
    csv.field_size_limit(LONGEST_CSV_FIELD)
    with io.TextIOWrapper(_open_stream(path, file), encoding="utf-8-sig", newline="") as text:
        # strict: otherwise a quote that is never closed swallows the rest of the file without a word.
        yield csv.reader(text, strict=True)


def _csv_rows(path: Path, file: pa.NativeFile, columns: Sequence[str]) -> Iterator[tuple[list[Any], int]]:
    with _open_csv(path, file) as rows:
        header = next(rows)
        places = [header.index(name) for name in columns]
        try:
            for row in rows:
                if len(row) != len(header):
                    if not row:
                        continue
                    raise DataError(
                        f"{path}, line {rows.line_num}: expected {len(header)} fields, got {len(row)}; if it is the "
                        "last line the file was cut off: copy or export it again"
                    )
                yield [row[place] or None for place in places], sum(map(len, row))
        except csv.Error as error:
            raise DataError(
                f"{path}, line {rows.line_num}: not CSV ({error}); a quote is not closed or the file was cut off: "
                "copy or export it again"
            ) from error
