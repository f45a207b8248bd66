"""Catalogue in: texts are rendered, checked, split and deduplicated; finished embeddings likewise.

The files below this one each do one part: `readers` formats, `catalogue` what the user says of it, `intake`
quarantine and ids, `contents` equal contents, `vector_items` embeddings.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from semids.catalogue import Catalogue, CatalogueSettings, Template, catalogue_digest, is_vectors, open_catalogue
from semids.contents import (
    Buckets,
    ContentCounts,
    TableWriter,
    content_fields,
    digest_array,
    digest_content,
    digest_of_item,
)
from semids.errors import UsageError
from semids.intake import CONTROL, Intake, as_text, commit_items
from semids.readers import Columns
from semids.scratch import allocate, scratch_folder
from semids.stages import StageOutput
from semids.vector_items import VectorSource, scan_vectors

__all__ = [
    "CatalogueSettings",
    "Template",
    "VectorSource",
    "catalogue_digest",
    "is_vectors",
    "open_catalogue",
    "scan_texts",
    "scan_vectors",
]

LONGEST_TEXT = 1 << 20


def scan_texts(settings: CatalogueSettings, output: StageOutput) -> dict[str, Any]:
    """Commit a catalogue of texts as items, contents and quarantine, and return its figures as JSON.

    items.parquet, in order of arrival: item_id (int64 or string; always a string in CSV, which has no types),
    split, content_id (uint32). contents.parquet, row i being content i: digest (16 bytes, BLAKE2b of the text's
    UTF-8), text, and `items:<split>` (uint32), the number of items of each split. Contents are sorted by digest, so
    that their numbers depend neither on the order of items nor on the files. quarantine.parquet: row (from 0 over
    all files), item_id, reason.

    Memory grows with neither items nor contents: about 32 MiB of input at a time, then a 256th of all texts.

    Raises:
        UsageError: the settings do not fit the files, or the training split is empty.
        DataError: a file is damaged, an id occurs twice, too many items are unusable, or all are.
        StorageError: the file system refused a read or a write.
    """
    catalogue = open_catalogue(settings)
    if catalogue.is_vectors:
        raise UsageError(f"expected texts in {settings.path!r}, got vectors; give text_column or template")
    with scratch_folder(output, "buckets") as scratch:
        intake = Intake(catalogue, scratch)
        buckets = Buckets(scratch, catalogue.input_bytes, has_texts=True)
        _read(catalogue, intake, buckets, output)
        intake.judge()
        counts = ContentCounts(intake.splits)
        in_order = sha256()
        content_ids = allocate(scratch.folder / "content_ids", np.uint32, (intake.items,))

        def write_contents(path: Path) -> None:
            fields = content_fields(intake.splits, {"digest": pa.binary(16), "text": pa.large_string()})
            done = 0
            with TableWriter(path, fields) as writer:
                for group in buckets.groups(intake.split_order):
                    content_ids[group.items] = counts.contents + group.contents
                    counts.add(group.words, group.counts)
                    in_order.update(group.words.tobytes())
                    sizes = np.diff(group.text_offsets)
                    writer.write([digest_array(group.words), group.texts, *group.counts.T], sizes)
                    done += len(group.items)
                    output.progress("find equal texts", done, intake.items, "items")

        output.commit("contents.parquet", write_contents)
        commit_items(intake, content_ids, output)
        intake.commit_quarantine(output)
        return intake.summarize(counts) | {
            "kind": "texts",
            "contents_digest": in_order.hexdigest(),
            "dimensions": None,
            "dtype": None,
        }


def _read(catalogue: Catalogue, intake: Intake, buckets: Buckets, output: StageOutput) -> None:
    total = catalogue.input_bytes
    for first_row, columns, done in catalogue.batches():
        texts = _render(catalogue, columns)
        faults: list[str | None] = []
        digests: list[bytes] = []
        for text in texts:
            data, fault = _encode(text)
            faults.append(fault)
            digests.append(digest_content(data))
        if catalogue.settings.duplicates == "split":
            digests = list(map(digest_of_item, digests, columns[catalogue.settings.id_column]))
        usable = intake.take(first_row, columns, faults)
        if usable.places:
            kept = [digests[place] for place in usable.places]
            buckets.add(usable.first, kept, usable.splits, [texts[place] for place in usable.places])
        output.progress("read catalogue", min(done, total - 1), total, "bytes")
    output.progress("read catalogue", total, total, "bytes")


def _render(catalogue: Catalogue, columns: Columns) -> list[str]:
    template = catalogue.template
    if template is None:
        return [as_text(value) or "" for value in columns[catalogue.text_column or ""]]
    parts = [map(as_text, columns[name]) for name in template.columns]
    return [template.render(dict(zip(template.columns, values, strict=True))) for values in zip(*parts, strict=True)]


def _encode(text: str) -> tuple[bytes, str | None]:
    """Return a text's UTF-8 and None, or no bytes and what is wrong with it."""
    if not text.strip():
        return b"", "no text"
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return b"", "lone surrogate in text"
    if len(data) > LONGEST_TEXT:
        return b"", "text over 1 MiB"
    if CONTROL.search(text):
        return b"", "control character in text"
    return data, None
