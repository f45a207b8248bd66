"""Intake of a catalogue's rows: what is usable is numbered in order of arrival, the rest is quarantined."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from semids.catalogue import Catalogue
from semids.contents import ContentCounts, TableWriter
from semids.errors import DataError, UsageError
from semids.readers import Columns
from semids.scratch import KeySpool, Scratch, count_distinct
from semids.stages import StageOutput

CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
SURROGATE = re.compile(r"[\ud800-\udfff]")
LONGEST_ID = 1024
MAX_SPLITS = 16
NAMED = 5
# Ids of this many equal hashes are held in memory at once while it is found out which are really equal.
SUSPECTS = 100_000


def as_text(value: Any) -> str | None:
    """Return a value of a catalogue as text: None and NaN are missing, true and false in lower case."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return None if value != value else str(value)


def is_missing(text: str | None) -> bool:
    """True for None and for a text of white space alone."""
    return text is None or not text.strip()


@dataclass(frozen=True)
class Usable:
    """The usable rows of a batch.

    Args:
        places: where they are in the batch, ascending.
        first: arrival number of the first of them; the others follow.
        splits: (len(places),) uint8 split numbers, in order of first appearance.
    """

    places: list[int]
    first: int
    splits: NDArray[np.uint8]


class Intake:
    """Takes rows batch by batch, spools the usable items and the quarantined rows, then passes judgement.

    Args:
        catalogue: what is read, and the columns that name ids, splits, brands and categories.
        scratch: where the spools are kept.
    """

    def __init__(self, catalogue: Catalogue, scratch: Scratch) -> None:
        self._settings = catalogue.settings
        self._files = f"{len(catalogue.files)} {catalogue.format} file{'s' * (len(catalogue.files) > 1)}"
        self._has_integers = catalogue.id_kind == "integer"
        self._id_type = pa.int64() if self._has_integers else pa.string()
        self._scratch = scratch
        self._usable = scratch.spool("items", {"item_id": self._id_type, "split": pa.uint8()})
        self._refused = scratch.spool(
            "quarantine", {"row": pa.uint64(), "item_id": self._id_type, "reason": pa.string()}
        )
        self._keys = scratch.keys("ids")
        self._products: list[KeySpool] = []
        self._numbers: dict[str, int] = {}
        self._first_refused: list[str] = []
        self._items: Counter[int] = Counter()
        self.quarantined: Counter[str] = Counter()

    @property
    def items(self) -> int:
        """Number of usable items so far."""
        return self._items.total()

    @property
    def splits(self) -> list[str]:
        """Names of the splits that have items, sorted."""
        return sorted(self._numbers)

    @property
    def split_order(self) -> list[int]:
        """For each split number its place in `splits`."""
        return [self.splits.index(name) for name in self._numbers]

    def take(self, first_row: int, columns: Columns, faults: Sequence[str | None]) -> Usable:
        """Take a batch of rows.

        Args:
            first_row: number of the batch's first row, from 0 over the whole catalogue.
            faults: what is wrong with each row's content, or None.

        Raises:
            DataError: an id is not of the type of the others.
            UsageError: there are more than 16 splits.
        """
        ids = columns[self._settings.id_column]
        names = self._split_names(columns, len(ids))
        places: list[int] = []
        splits: list[int] = []
        refused: list[tuple[int, Any, str]] = []
        for place, (identifier, name, fault) in enumerate(zip(ids, names, faults, strict=True)):
            reason = self._id_fault(identifier, first_row + place) or fault
            if reason is None and name is not None and not is_missing(name):
                places.append(place)
                splits.append(self._number_of(name))
            else:
                refused.append((first_row + place, _printable(identifier), reason or "missing split"))
        if refused:
            self._refused.append(*map(list, zip(*refused, strict=True)))
            self.quarantined.update(reason for _, _, reason in refused)
            self._first_refused += [f"{identifier!r} (row {row})" for row, identifier, _ in refused[:NAMED]]
        kept = Usable(places, self.items, np.array(splits, np.uint8))
        if places:
            self._keep([ids[place] for place in places], kept, columns)
        return kept

    def _split_names(self, columns: Columns, rows: int) -> Sequence[str | None]:
        column = self._settings.split_column
        return [self._settings.train_split] * rows if column is None else [as_text(value) for value in columns[column]]

    def _number_of(self, name: str) -> int:
        number = self._numbers.get(name)
        if number is None:
            if CONTROL.search(name) or SURROGATE.search(name):
                raise DataError(
                    f"expected plain text in {self._settings.split_column!r}, got {name!r}; rename the split"
                )
            if len(self._numbers) == MAX_SPLITS:
                raise UsageError(
                    f"expected at most {MAX_SPLITS} splits, but {self._settings.split_column!r} also holds "
                    f"{name[:80]!r}; is it the right column?"
                )
            number = self._numbers[name] = len(self._numbers)
            self._products.append(self._scratch.keys(f"products-{number}"))
        return number

    def _id_fault(self, identifier: Any, row: int) -> str | None:
        if identifier is None:
            return "missing id"
        if self._has_integers:
            if type(identifier) is not int or not -(1 << 63) <= identifier < 1 << 63:
                raise DataError(
                    f"expected whole numbers of 64 bits in {self._settings.id_column!r}, as in the rows before, "
                    f"got {identifier!r} in row {row}; write all ids as strings"
                )
            return None
        if not isinstance(identifier, str):
            raise DataError(
                f"expected strings in {self._settings.id_column!r}, as in the rows before, got {identifier!r} "
                f"in row {row}; write all ids as strings"
            )
        if not identifier.strip():
            return "missing id"
        if SURROGATE.search(identifier):
            return "lone surrogate in id"
        if CONTROL.search(identifier):
            return "control character in id"
        return "id over 1 KiB" if len(identifier.encode()) > LONGEST_ID else None

    def _keep(self, ids: list[Any], kept: Usable, columns: Columns) -> None:
        self._usable.append(ids, kept.splits)
        self._items.update(kept.splits.tolist())
        self._keys.append(hash_ids(pa.array(ids, self._id_type)))
        brand, category = self._settings.brand_column, self._settings.category_column
        if brand is None or category is None:
            return
        keys: list[list[bytes]] = [[] for _ in self._products]
        for place, split in zip(kept.places, kept.splits.tolist(), strict=True):
            pair = as_text(columns[brand][place]), as_text(columns[category][place])
            if not any(map(is_missing, pair)):
                # A 64-bit hash: among a million products two are taken for one in 1 of 10^7 catalogues.
                keys[split].append(blake2b(repr(pair).encode(), digest_size=8).digest())
        for spool, found in zip(self._products, keys, strict=True):
            spool.append(np.frombuffer(b"".join(found), np.uint64))

    def judge(self) -> None:
        """End the intake, and raise unless there is enough of one usable catalogue to go on with.

        Raises:
            DataError: no rows, too many quarantined ones, no usable one, or an id that occurs twice.
            UsageError: the training split has no items.
        """
        self._usable.close()
        self._refused.close()
        settings, refused = self._settings, self.quarantined.total()
        rows = self.items + refused
        if rows == 0:
            raise DataError(f"expected items, got none in {self._files} of {settings.path!r}")
        reasons = ", ".join(f"{count} × {reason}" for reason, count in sorted(self.quarantined.items()))
        named = ", ".join(self._first_refused[:NAMED])
        if refused > settings.max_quarantine_fraction * rows:
            raise DataError(
                f"{refused} of {rows} items are unusable ({reasons}), first {named}; at most a part of "
                f"{settings.max_quarantine_fraction:g} may be: repair them, or raise max_quarantine_fraction"
            )
        if self.items == 0:
            raise DataError(f"none of {rows} items is usable ({reasons}), first {named}; repair them")
        if settings.train_split not in self._numbers:
            raise UsageError(
                f"no item is in the training split {settings.train_split!r}; the splits are "
                f"{', '.join(map(repr, self.splits))}: set train_split to one of them"
            )
        self._check_unique()

    def _check_unique(self) -> None:
        keys = self._keys.sort()
        repeats = len(keys) - count_distinct(keys)
        if repeats == 0:
            return
        suspects = np.unique(keys[1:][keys[1:] == keys[:-1]])
        for start in range(0, len(suspects), SUSPECTS):
            found = self._find_repeated(suspects[start : start + SUSPECTS])
            if found:
                raise DataError(
                    f"expected every id once over all splits and files, got {repeats} repeats in "
                    f"{self._settings.id_column!r}, among them {', '.join(map(repr, found))}; drop the repeats"
                )

    def _find_repeated(self, suspects: NDArray[np.uint64]) -> list[Any]:
        """Return up to 5 ids that really occur twice, in order of arrival, among those with the given hashes."""
        seen: set[Any] = set()
        repeated: dict[Any, None] = {}
        for batch in self._usable.batches():
            ids = batch.column(0)
            for place in np.flatnonzero(np.isin(hash_ids(ids), suspects)).tolist():
                identifier = ids[place].as_py()
                if identifier in seen:
                    repeated[identifier] = None
                    if len(repeated) == NAMED:
                        return list(repeated)
                seen.add(identifier)
        return list(repeated)

    def usable_batches(self) -> Iterator[tuple[Any, NDArray[np.uint8]]]:
        """Yield the usable items in order of arrival, as (Arrow array of ids, split numbers)."""
        for batch in self._usable.batches():
            yield batch.column(0), batch.column(1).to_numpy()

    def commit_quarantine(self, output: StageOutput) -> None:
        """Commit quarantine.parquet: row, item_id and reason of every row that was set aside."""

        def write(path: Path) -> None:
            fields = {"row": pa.uint64(), "item_id": self._id_type, "reason": pa.string()}
            with TableWriter(path, fields, dictionaries=("reason",)) as writer:
                for batch in self._refused.batches():
                    writer.write(batch.columns)

        output.commit("quarantine.parquet", write)

    def item_fields(self) -> dict[str, Any]:
        """Return the fields of items.parquet."""
        return {"item_id": self._id_type, "split": pa.string(), "content_id": pa.uint32()}

    def summarize(self, counts: ContentCounts) -> dict[str, Any]:
        """Return the part of a summary that texts and vectors share."""
        has_products = self._settings.brand_column is not None
        splits: dict[str, dict[str, Any]] = {}
        found = zip(self.splits, counts.by_split.tolist(), counts.set_digests, strict=True)
        for name, distinct, digest in found:
            number = self._numbers[name]
            products = count_distinct(self._products[number].sort()) if has_products else None
            splits[name] = {
                "items": self._items[number],
                "distinct_contents": distinct,
                "distinct_products": products,
                "contents_digest": digest,
            }
        return {
            "rows": self.items + self.quarantined.total(),
            "items": self.items,
            "distinct_contents": counts.contents,
            "duplicates": self.items - counts.contents,
            "quarantined": dict(sorted(self.quarantined.items())),
            "splits": splits,
        }


def commit_items(intake: Intake, content_ids: NDArray[np.uint32], output: StageOutput) -> None:
    """Commit items.parquet: id, split and content of every usable item, in order of arrival."""

    def write(path: Path) -> None:
        names = pa.array(intake.splits, pa.string()).take(pa.array(intake.split_order))
        start = 0
        with TableWriter(path, intake.item_fields(), dictionaries=("split",)) as writer:
            for ids, splits in intake.usable_batches():
                writer.write([ids, names.take(pa.array(splits)), content_ids[start : start + len(ids)]])
                start += len(ids)

    output.commit("items.parquet", write)


def hash_ids(ids: Any) -> NDArray[np.uint64]:
    """Return a (n,) uint64 key of each id in an Arrow array: equal for equal ids; a number is its own key."""
    if pa.types.is_int64(ids.type):
        return ids.to_numpy().view(np.uint64)
    series: Any = pl.from_arrow(ids)
    return series.hash().to_numpy()


def _printable(identifier: Any) -> Any:
    """Return an id as it can be stored: without lone surrogates and at most 1 KiB long."""
    if not isinstance(identifier, str):
        return identifier
    return identifier[:LONGEST_ID].encode("utf-8", "backslashreplace").decode()
