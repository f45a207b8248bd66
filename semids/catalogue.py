"""What a user says of a catalogue, checked against the files before any work starts."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from semids.errors import UsageError
from semids.readers import BATCH_ROWS, Columns, find_files, read_batches, read_kinds
from semids.settings import OptionalText, Settings
from semids.store import digest_file

TEXT_COLUMN = "text"


class CatalogueSettings(Settings):
    """Where the items are, and which of their columns are used for what."""

    model_config = ConfigDict(title="Catalogue")
    form_order = ("path", "template", "text_column", "vector_column")

    path: str = Field(title="Files")
    """File, folder or glob of Parquet, JSONL or CSV files (the latter two also .gz or .zst), or of .npy vectors; or a
    URL of such, as s3://bucket/items/*.parquet, which are copied to the run folder first."""
    id_column: str = Field(default="item_id", title="Item ID column")
    """Column of whole numbers or strings that names each item once; the items of .npy files are named by their row."""
    text_column: OptionalText = None
    """Column whose text is embedded; use either this or the template."""
    template: OptionalText = None
    """Text built from columns in braces, such as {title}, on lines that drop out when a column they name is missing."""
    vector_column: OptionalText = None
    """Parquet column of finished embeddings, used instead of a text."""
    split_column: OptionalText = None
    """Column that says which split an item belongs to (16 at most); without it all items are in the training split."""
    brand_column: OptionalText = None
    """Column of the brand, used with the category column to count products."""
    category_column: OptionalText = None
    """Column of the category, used with the brand column to count products."""
    train_split: str = Field(default="train", title="Training split")
    """Name of the split that codebooks are trained on."""
    duplicates: Literal["share", "split"] = "share"
    """What items with equal content get. share: one ID, since no code that follows from content can differ. split: each
    counts as a content of its own, which the mapping capacity places apart; the others still give them equal codes."""
    max_quarantine_fraction: float = Field(default=0.01, ge=0, le=1, title="Unusable items allowed (fraction)")
    """Largest part of the items, from 0 to 1, that may be unusable and set aside before the run is refused."""

    @field_validator("path")
    @classmethod
    def _check_path(cls, path: str) -> str:
        if not path.strip():
            raise ValueError("expected the path of a catalogue, got a blank")
        if "\0" in path:
            raise ValueError(f"expected a path without NUL characters, got {path!r}")
        return path

    @field_validator("template")
    @classmethod
    def _check_template(cls, template: str | None) -> str | None:
        if template is not None:
            try:
                Template(template)
            except UsageError as error:
                raise ValueError(str(error)) from error
        return template

    @field_validator("train_split")
    @classmethod
    def _check_train_split(cls, split: str) -> str:
        if not split.strip():
            raise ValueError("expected the name of the training split, got a blank")
        return split

    @model_validator(mode="after")
    def _check_combination(self) -> CatalogueSettings:
        columns = ("id", "text", "vector", "split", "brand", "category")
        for name in (f"{column}_column" for column in columns):
            value: str | None = getattr(self, name)
            if value is not None and not value.strip():
                raise ValueError(f"expected the name of a column in {name}, got a blank; leave it out instead")
        given = [name for name in ("text_column", "template", "vector_column") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: an item has one content; give one of them")
        if (self.brand_column is None) != (self.category_column is None):
            raise ValueError("brand_column and category_column go together: a product is a brand × a category")
        return self


class Template:
    """A text pattern such as `{title}\\nBrand: {brand}`: lines with a missing part drop out."""

    def __init__(self, pattern: str) -> None:
        """Parse a pattern; a doubled brace stands for itself.

        Raises:
            UsageError: braces do not match, hold more than a column's name, or there are none.
        """
        self._lines: list[list[tuple[str, str | None]]] = []
        for line in pattern.split("\n"):
            try:
                parts = list(string.Formatter().parse(line))
            except ValueError as error:
                raise UsageError(f"expected a template such as {{title}}, got {pattern!r}: {error}") from error
            for _, name, specification, conversion in parts:
                if name is not None and (not name.strip() or specification or conversion):
                    raise UsageError(f"expected only a column's name in the braces of the template, got {line!r}")
            self._lines.append([(literal, name) for literal, name, _, _ in parts])
        self.columns: tuple[str, ...] = tuple(dict.fromkeys(name for line in self._lines for _, name in line if name))
        """The columns that the pattern names, in order of first use."""
        if not self.columns:
            raise UsageError(f"expected a template that names a column in braces, such as {{title}}, got {pattern!r}")

    def render(self, values: Mapping[str, str | None]) -> str:
        """Return an item's text, or "" if no line that names a column is left.

        Args:
            values: by column; None, and what is blank once surrounding white space is off, is missing.
        """
        lines: list[str] = []
        named = False
        for line in self._lines:
            text = ""
            for literal, name in line:
                text += literal
                if name is not None:
                    value = (values[name] or "").strip()
                    if not value:
                        break
                    text += value
            else:
                lines.append(text)
                named = named or any(name is not None for _, name in line)
        return "\n".join(lines) if named else ""


@dataclass(frozen=True)
class Catalogue:
    """A catalogue whose files and columns are known to fit what was said of them.

    Exactly one of template, text_column and vector_column is not None, but for .npy files, which have none.
    """

    settings: CatalogueSettings
    format: str
    files: tuple[Path, ...]
    id_kind: str
    """`integer` or `string`."""
    template: Template | None = None
    text_column: str | None = None
    vector_column: str | None = None

    @property
    def is_vectors(self) -> bool:
        """True if the items are embeddings already."""
        return self.format == "npy" or self.vector_column is not None

    @property
    def input_bytes(self) -> int:
        """Size of all files on disk, in bytes."""
        return sum(path.stat().st_size for path in self.files)

    def batches(self, *, max_rows: int = BATCH_ROWS) -> Iterator[tuple[int, Columns, int]]:
        """Yield (first row, columns, bytes read so far) over all files but .npy ones: columns in use except vectors."""
        settings = self.settings
        texts = self.template.columns if self.template else (self.text_column,)
        groups = (settings.split_column, settings.brand_column, settings.category_column)
        names = tuple(dict.fromkeys(name for name in (settings.id_column, *texts, *groups) if name))
        row = before = 0
        for path in self.files:
            for columns, done in read_batches(path, self.format, names, max_rows=max_rows):
                yield row, columns, before + done
                row += len(columns[settings.id_column])
            before += path.stat().st_size


def open_catalogue(settings: CatalogueSettings) -> Catalogue:
    """Return the catalogue, once its files are found and every column is known to be there and of a usable type.

    Raises:
        UsageError: no file, mixed formats, a missing column (names those that exist), or a column of the wrong type.
        DataError: a file is damaged.
    """
    file_format, files = find_files(settings.path)
    if file_format == "npy":
        return _open_npy(settings, files)
    kinds = _common_kinds(files, file_format, settings.id_column)
    content = _find_content(settings, file_format, kinds)
    groups = [settings.split_column, settings.brand_column, settings.category_column]
    texts = [*content.template.columns] if content.template else [content.text_column]
    for name in (settings.id_column, content.vector_column, *texts, *groups):
        if name is not None and name not in kinds:
            scope = " all of" if len(files) > 1 else ""
            hint = "; one that comes late must be null on the first line" if file_format == "JSONL" else ""
            raise UsageError(f"no column {name!r} in{scope} {settings.path!r}, but {_listed(kinds)}{hint}")
    id_kind = kinds[settings.id_column]
    if id_kind not in ("integer", "string", "unknown"):
        raise UsageError(f"expected whole numbers or strings in {settings.id_column!r}, got the type {id_kind}")
    if content.vector_column is not None and kinds[content.vector_column] != "vector":
        found = kinds[content.vector_column]
        raise UsageError(f"expected lists of float16, 32 or 64 in {content.vector_column!r}, got the type {found}")
    for name in (*texts, *groups):
        if name is not None and kinds[name] not in ("string", "integer", "value", "unknown"):
            raise UsageError(f"expected text or numbers in {name!r}, got the type {kinds[name]}; flatten it first")
    return Catalogue(
        settings=settings,
        format=file_format,
        files=files,
        id_kind="string" if id_kind == "unknown" else id_kind,
        template=content.template,
        text_column=content.text_column,
        vector_column=content.vector_column,
    )


@dataclass(frozen=True)
class _Content:
    template: Template | None = None
    text_column: str | None = None
    vector_column: str | None = None


def _find_content(settings: CatalogueSettings, file_format: str, kinds: dict[str, str]) -> _Content:
    if settings.vector_column is not None and file_format != "Parquet":
        raise UsageError(f"vectors are read from .npy or Parquet files, got vector_column with {file_format}")
    if settings.template is not None:
        return _Content(template=Template(settings.template))
    if settings.text_column is not None or settings.vector_column is not None:
        return _Content(text_column=settings.text_column, vector_column=settings.vector_column)
    vectors = [name for name, kind in kinds.items() if kind == "vector"]
    if len(vectors) == 1:
        return _Content(vector_column=vectors[0])
    if TEXT_COLUMN in kinds:
        return _Content(text_column=TEXT_COLUMN)
    raise UsageError(
        f"cannot tell which of the columns {_listed(kinds)} to embed; give text_column, a template such as "
        "'{title}\\nBrand: {brand}', or vector_column for finished embeddings"
    )


def _common_kinds(files: tuple[Path, ...], file_format: str, id_column: str) -> dict[str, str]:
    """Return the kinds of the columns that every file has, or any JSONL file: there a missing key is a null."""
    merged = read_kinds(files[0], file_format)
    for path in files[1:]:
        kinds = read_kinds(path, file_format)
        if file_format == "JSONL":
            merged |= {name: kind for name, kind in kinds.items() if merged.get(name, "unknown") == "unknown"}
            continue
        known, found = merged.get(id_column, "unknown"), kinds.get(id_column, "unknown")
        if known != found and "unknown" not in (known, found):
            raise UsageError(
                f"the ids in {id_column!r} are of the type {known} in {files[0]} but {found} in {path}; convert one"
            )
        merged = {name: kinds[name] if kind == "unknown" else kind for name, kind in merged.items() if name in kinds}
    return merged


def _open_npy(settings: CatalogueSettings, files: tuple[Path, ...]) -> Catalogue:
    names = ("text_column", "template", "vector_column", "split_column", "brand_column")
    given = [name for name in names if getattr(settings, name) is not None]
    if given:
        raise UsageError(
            f".npy files have no columns, got {', '.join(given)}; leave out what names one, or use Parquet"
        )
    return Catalogue(settings=settings, format="npy", files=files, id_kind="integer")


def _listed(names: Any) -> str:
    shown = sorted(names)
    return ", ".join(repr(name) for name in shown[:30]) + (f" and {len(shown) - 30} more" if len(shown) > 30 else "")


def is_vectors(settings: CatalogueSettings) -> bool:
    """True if the catalogue holds embeddings rather than texts; see `open_catalogue` for what it raises."""
    return open_catalogue(settings).is_vectors


def catalogue_digest(settings: CatalogueSettings) -> dict[str, Any]:
    """Return what identifies the input in a fingerprint: the SHA-256 of each file, in sorted file order.

    Neither names nor times are in it: moving a catalogue changes nothing.

    Raises:
        UsageError: no file matches, or formats are mixed.
        StorageError: a file cannot be read.
    """
    _, files = find_files(settings.path)
    return {"count": len(files), "sha256": [digest_file(path) for path in files]}
