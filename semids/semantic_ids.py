"""Codes to semantic IDs: a row an item, tokens for a language model, and the vocabulary they need."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from semids.arrays import Codes, check_codes, pack_codes
from semids.errors import CodesError, UsageError

BATCH_ROWS = 1 << 16
LETTERS = string.ascii_lowercase
NEEDS_ESCAPE = r"[^ !#-\[\]-~]"
"""What JSON in ASCII does not write as it is: quotes, backslashes, control and other than ASCII characters."""


def token(level: int, code: int) -> str:
    """Return the token of a code: `<a_12>` for code 12 of level 0, `<b_7>` for code 7 of level 1."""
    return f"<{LETTERS[level]}_{code}>"


def vocabulary(sizes: Sequence[int], suffixes: int = 0) -> list[str]:
    """Return every token that IDs of these codebook sizes can hold, level by level, to add to a tokenizer.

    Args:
        suffixes: number of suffix values, 0 for IDs without suffix; their tokens come last.

    Raises:
        UsageError: more levels (a suffix counts as one) than there are letters.
    """
    columns = [*sizes, suffixes] if suffixes else list(sizes)
    if len(columns) > len(LETTERS):
        raise UsageError(f"expected at most {len(LETTERS)} levels (one letter each), got {len(columns)}")
    return [token(level, code) for level, size in enumerate(columns) for code in range(size)]


def number_equal_ids(
    item_ids: pl.Series, content_ids: NDArray[np.uint32], codes: Codes, sizes: Sequence[int]
) -> NDArray[np.uint32]:
    """Return the (n,) suffixes that make IDs unique: 0, 1, … within equal codes, by content, then item id.

    An item whose codes nobody shares has suffix 0 (Rajput et al. 2023, section 3.1). The order of rows
    and of files changes nothing.

    Args:
        content_ids: (D,)-index of each item's content, (n,) uint32.
        codes: (n, L) codes of the items.
    """
    packed = pack_codes(codes, sizes)
    words = [f"word_{index}" for index in range(packed.shape[1])]
    frame = pl.DataFrame({word: packed[:, index] for index, word in enumerate(words)}).with_columns(
        pl.Series("content", content_ids),
        item_ids.rename("item"),
        pl.int_range(pl.len(), dtype=pl.UInt32).alias("row"),
    )
    # Most IDs of a good mapping are alone: only the others have to be put in order.
    crowded = frame.filter(pl.len().over(words) > 1).sort(*words, "content", "item")
    numbered = crowded.select("row", (pl.int_range(pl.len(), dtype=pl.UInt32).over(words)).alias("suffix"))
    suffixes = np.zeros(len(codes), dtype=np.uint32)
    suffixes[numbered["row"].to_numpy()] = numbered["suffix"].to_numpy()
    return suffixes


def item_codes(items: Path, codes: Codes) -> Iterator[tuple[pa.Array, NDArray[np.uint32], Codes]]:
    """Yield (item ids, content ids, codes) of the items of an `items.parquet`, batch by batch, in its order.

    Args:
        codes: (D, L) codes by content id.
    """
    with pq.ParquetFile(items) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=["item_id", "content_id"]):
            content_ids = batch.column("content_id").to_numpy()
            yield batch.column("item_id"), content_ids, codes[content_ids]


def write_ids(
    path: Path,
    items: Path,
    codes: Codes,
    suffixes: NDArray[np.uint32] | None,
    *,
    told: Callable[[int], None] = lambda items: None,
) -> None:
    """Write the IDs as Parquet: `item_id, c0 … c(L-1)` and, where given, `suffix`, in the order of the items.

    Args:
        told: called with the number of items that are written.
    """
    writer: pq.ParquetWriter | None = None
    done = 0
    try:
        for item_ids, _, batch in item_codes(items, codes):
            columns: dict[str, Any] = {"item_id": item_ids}
            columns |= {f"c{level}": np.ascontiguousarray(batch[:, level]) for level in range(batch.shape[1])}
            if suffixes is not None:
                columns["suffix"] = suffixes[done : done + len(batch)]
            done += len(batch)
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
            writer.write_table(table)
            told(done)
    finally:
        if writer is not None:
            writer.close()


def write_tokens(
    path: Path,
    items: Path,
    codes: Codes,
    suffixes: NDArray[np.uint32] | None,
    *,
    told: Callable[[int], None] = lambda items: None,
) -> None:
    """Write the IDs as the JSON of LC-Rec and MiniOneRec: `{"item": ["<a_1>", "<b_7>", …], …}`, an item a line.

    Args:
        told: called with the number of items that are written.
    """
    done = 0
    with path.open("w", encoding="utf-8") as file:
        separator = "{\n"
        for item_ids, _, batch in item_codes(items, codes):
            rest = [] if suffixes is None else [suffixes[done : done + len(batch)]]
            done += len(batch)
            file.write(separator + _token_lines(item_ids, [*batch.T, *rest]))
            separator = ",\n"
            told(done)
        file.write("\n}\n")


def _token_lines(item_ids: pa.Array, columns: Sequence[NDArray[Any]]) -> str:
    """Return the lines of some items, given an Arrow array of their ids, and their codes and suffixes by column."""
    names = pl.Series(values=item_ids).cast(pl.String)
    frame = pl.DataFrame({f"c{level}": np.ascontiguousarray(column) for level, column in enumerate(columns)})
    tokens = ", ".join(f'"<{LETTERS[level]}_{{}}>"' for level in range(len(columns)))
    line = pl.format(f"{{}}: [{tokens}]", _json_strings(names), *frame.columns)
    # A missing id would leave its item out.
    return frame.select(line.str.join(",\n", ignore_nulls=False)).item()


def _json_strings(texts: pl.Series) -> pl.Series:
    """Return texts as JSON strings of ASCII characters; those with something to escape are taken one by one."""
    special = texts.str.contains(NEEDS_ESCAPE).arg_true()
    return ('"' + texts + '"').scatter(special, [json.dumps(text) for text in texts.gather(special)])


def read_code_columns(path: Path, sizes: Sequence[int] | None) -> Codes:
    """Return the (n, L) codes of a Parquet file with columns `c0, c1, …`, as published indexes have them.

    Raises:
        UsageError: no such file, or no such columns.
        CodesError: a code outside its codebook, or more or fewer columns than sizes.
    """
    try:
        frame = pl.read_parquet(path, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UsageError(f"cannot read {path} as Parquet: {error}") from error
    names = [f"c{level}" for level in range(len(LETTERS)) if f"c{level}" in frame.columns]
    if not names or names[-1] != f"c{len(names) - 1}":
        raise UsageError(f"{path}: expected code columns c0, c1, …, got {', '.join(frame.columns)}")
    if sizes is not None and len(sizes) != len(names):
        raise UsageError(
            f"{path} has {len(names)} columns of codes, got a shape of {len(sizes)} levels: give their own"
        )
    wrong = [name for name in names if not frame.schema[name].is_integer() or frame[name].null_count()]
    if wrong:
        raise UsageError(f"{path}: expected integer codes without nulls, got others in {', '.join(wrong)}")
    try:
        # numpy would make floats of signed and unsigned 64 bits together.
        mixed = pl.UInt64 in frame.schema.values()
        codes = frame.select(pl.col(names).cast(pl.Int64) if mixed else pl.col(names)).to_numpy()
    except pl.exceptions.InvalidOperationError as error:
        raise CodesError(f"{path}: expected codes, got numbers of 63 bits and more") from error
    return check_codes(codes, sizes if sizes is not None else [int(codes.max(initial=0)) + 1] * len(names))
