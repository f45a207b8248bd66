"""Which items have the same content: digests sorted bucket by bucket, and tables written in a fixed layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from semids.scratch import Scratch

DIGEST_BYTES = 16
GROUP_ROWS = 65_536
GROUP_BYTES = 64 << 20
# A bucket's texts are held in memory, and compressed input unpacks to several times its size.
BUCKET_BYTES = 4 << 20
MAX_BUCKET_BITS = 8


def digest_content(data: bytes | memoryview) -> bytes:
    """Return the 16 bytes that identify a content: BLAKE2b-128 of its bytes."""
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


def digest_of_item(digest: bytes, identifier: Any) -> bytes:
    """Return the 16 bytes that identify an item's content as its own, given those that identify the content.

    Half of them are the content's: equal contents stay side by side where contents are sorted, and are embedded once.
    """
    # As text: a CSV file has no numbers, and the same ids may come as numbers from another format.
    own = blake2b(str(identifier).encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES // 2).digest()
    return digest[: DIGEST_BYTES // 2] + own


def digest_words(digests: Sequence[bytes]) -> NDArray[np.uint64]:
    """Return (n, 2) uint64 words that sort as the n digests do."""
    return np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2).astype(np.uint64)


def digest_array(words: NDArray[np.uint64]) -> Any:
    """Return the Arrow array of the n digests whose (n, 2) words are given."""
    data = words.astype(">u8").tobytes()
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(DIGEST_BYTES), len(words), [None, pa.py_buffer(data)])


def read_digests(path: Path) -> NDArray[np.uint64]:
    """Return the (n, 2) words of the digests in the column `digest` of a Parquet file, in its order."""
    column: Any = pq.read_table(path, columns=["digest"])["digest"].combine_chunks()
    whole = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    data = np.frombuffer(whole.buffers()[1], dtype=">u8", count=2 * len(whole), offset=DIGEST_BYTES * whole.offset)
    return data.reshape(-1, 2).astype(np.uint64)


@dataclass(frozen=True)
class Group:
    """The distinct contents of one bucket, in ascending order of their digests.

    Args:
        items: (m,) int64 arrival numbers of the items that have them, ascending.
        contents: (m,) int64 for each of these items the content it has, 0 to g - 1.
        words: (g, 2) uint64 digests; see `digest_words`.
        firsts: (g,) int64 arrival number of the first item with each content.
        counts: (g, splits) uint32 items of each split with each content.
        texts: (g,) Arrow strings, or None for vectors.
    """

    items: NDArray[np.int64]
    contents: NDArray[np.int64]
    words: NDArray[np.uint64]
    firsts: NDArray[np.int64]
    counts: NDArray[np.uint32]
    texts: Any

    @property
    def text_offsets(self) -> NDArray[np.int64]:
        """Where in bytes each text begins, and the last one ends: (g + 1,)."""
        offset = self.texts.offset
        return np.frombuffer(self.texts.buffers()[1], np.int64)[offset : offset + len(self.texts) + 1]


class Buckets:
    """Items routed to files by the leading bits of their content's digest, so that equal contents meet in one.

    The result does not depend on the number of buckets; memory does: it holds one bucket at a time.
    """

    def __init__(self, scratch: Scratch, input_bytes: int, *, has_texts: bool) -> None:
        """Open the buckets, a power of two of them.

        Args:
            input_bytes: size of the catalogue; one bucket for every 4 MiB of it, from 1 to 256.
        """
        self._bits = min(MAX_BUCKET_BITS, max(0, (input_bytes - 1) // BUCKET_BYTES).bit_length())
        fields = {"item": pa.int64(), "high": pa.uint64(), "low": pa.uint64(), "split": pa.uint8()}
        if has_texts:
            fields["text"] = pa.large_string()
        self._has_texts = has_texts
        self._spools = [scratch.spool(f"bucket-{bucket:03d}", fields) for bucket in range(1 << self._bits)]

    def __len__(self) -> int:
        """Return the number of buckets."""
        return len(self._spools)

    def add(
        self, first: int, digests: Sequence[bytes], splits: NDArray[np.uint8], texts: Sequence[str] | None = None
    ) -> None:
        """Route a batch of items, numbered from `first` on."""
        words = digest_words(digests)
        # In two steps: a shift by all 64 bits is undefined.
        bucket = words[:, 0] >> np.uint64(64 - MAX_BUCKET_BITS) >> np.uint64(MAX_BUCKET_BITS - self._bits)
        order = np.argsort(bucket, kind="stable")
        columns = [pa.array(column[order]) for column in (np.arange(first, first + len(words)), *words.T, splits)]
        if texts is not None:
            columns.append(pa.array(_blank_repeats(digests, texts), pa.large_string()).take(pa.array(order)))
        bounds = np.searchsorted(bucket[order], np.arange(len(self._spools) + 1, dtype=np.uint64))
        for spool, start, stop in zip(self._spools, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if stop > start:
                spool.append(*(column.slice(start, stop - start) for column in columns))

    def groups(self, split_order: Sequence[int]) -> Iterator[Group]:
        """Yield the distinct contents of each bucket; from bucket to bucket, too, digests ascend.

        Args:
            split_order: the column of `counts` for each split number that `add` was given.
        """
        for spool in self._spools:
            spool.close()
        for spool in self._spools:
            table = spool.table().combine_chunks()
            if len(table):
                yield self._group(table, np.array(split_order, dtype=np.int64))

    def _group(self, table: Any, split_order: NDArray[np.int64]) -> Group:
        items, high, low, splits = (table[name].to_numpy() for name in ("item", "high", "low", "split"))
        # Stable: among equal digests the items stay in order of arrival.
        order = np.lexsort((low, high))
        high, low = high[order], low[order]
        starts = np.flatnonzero(np.r_[True, (high[1:] != high[:-1]) | (low[1:] != low[:-1])])
        contents = np.empty(len(order), np.int64)
        contents[order] = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(order)]))
        cells = contents * len(split_order) + split_order[splits]
        counts = np.bincount(cells, minlength=len(starts) * len(split_order)).reshape(len(starts), -1)
        firsts = order[starts]
        return Group(
            items=items,
            contents=contents,
            words=np.stack([high[starts], low[starts]], axis=1),
            firsts=items[firsts],
            counts=counts.astype(np.uint32),
            texts=table["text"].combine_chunks().take(pa.array(firsts)) if self._has_texts else None,
        )


def _blank_repeats(digests: Sequence[bytes], texts: Sequence[str]) -> list[str | None]:
    """Return the texts, null where an equal one came earlier in the batch.

    A text that half of a large catalogue shares would otherwise fill one bucket beyond any memory.
    """
    seen: set[bytes] = set()
    kept: list[str | None] = []
    for digest, text in zip(digests, texts, strict=True):
        kept.append(None if digest in seen else text)
        seen.add(digest)
    return kept


class TableWriter:
    """Writes a Parquet file (zstd) whose bytes do not depend on how its rows are divided among calls.

    A row group ends with the row that brings it to 65,536 rows or 64 MiB, whichever comes first.
    """

    def __init__(self, path: Path, fields: dict[str, Any], *, dictionaries: Sequence[str] = ()) -> None:
        """Open a file; columns with few different values are best named in `dictionaries`."""
        self._schema = pa.schema(fields)
        encoded: Any = list(dictionaries) or False
        self._writer = pq.ParquetWriter(
            path, self._schema, compression="zstd", use_dictionary=encoded, write_statistics=False
        )
        self._waiting: list[Any] = []
        self._rows = 0
        self._bytes = 0

    def write(self, columns: Sequence[Any], row_bytes: NDArray[np.int64] | None = None) -> None:
        """Append rows: an Arrow array or list for each field, and the size of each row if rows may be large."""
        arrays = [
            column if isinstance(column, pa.Array) else pa.array(column, field.type)
            for column, field in zip(columns, self._schema, strict=True)
        ]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        while len(table):
            taken = min(GROUP_ROWS - self._rows, len(table))
            if row_bytes is not None:
                reached = np.searchsorted(np.cumsum(row_bytes[:taken]), GROUP_BYTES - self._bytes)
                taken = min(taken, int(reached) + 1)
                self._bytes += int(row_bytes[:taken].sum())
                row_bytes = row_bytes[taken:]
            self._waiting.append(table.slice(0, taken))
            self._rows += taken
            table = table.slice(taken)
            if self._rows == GROUP_ROWS or self._bytes >= GROUP_BYTES:
                self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.concat_tables(self._waiting).combine_chunks(), row_group_size=GROUP_ROWS)
        self._waiting, self._rows, self._bytes = [], 0, 0

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._waiting:
            self._flush()
        self._writer.close()


def content_fields(splits: Sequence[str], leading: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of contents.parquet: `leading` ones, then the number of items of each split."""
    return leading | {f"items:{split}": pa.uint32() for split in splits}


class ContentCounts:
    """Distinct contents, in all and by split, added up group by group, and what identifies each of these sets."""

    def __init__(self, splits: Sequence[str]) -> None:
        """Begin with none."""
        self.contents = 0
        self.by_split = np.zeros(len(splits), np.int64)
        self._sets = [sha256() for _ in splits]

    def add(self, words: NDArray[np.uint64], counts: NDArray[np.uint32]) -> None:
        """Add g contents: the (g, 2) words of their digests, ascending over all calls, and (g, splits) counts."""
        self.contents += len(counts)
        self.by_split += np.count_nonzero(counts, axis=0)
        for known, count in zip(self._sets, counts.T, strict=True):
            known.update(words[count > 0].tobytes())

    @property
    def set_digests(self) -> list[str]:
        """SHA-256 of the contents of each split, 64 hex digits: blind to how many items have them."""
        return [known.hexdigest() for known in self._sets]
