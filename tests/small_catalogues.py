"""Small catalogues of every format, and what a scan of one leaves: shared by the tests of the intake."""

import gzip
import json

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from semids.items import (
    CatalogueSettings,
    is_vectors,
    scan_texts,
    scan_vectors,
)
from semids.progress import silent
from semids.stages import StageOutput

ROWS = [
    {"item_id": "a", "text": "red mug", "split": "train", "brand": "X", "category": "kitchen"},
    {"item_id": "b", "text": 'blue mug\nwith a handle, "big"', "split": "train", "brand": "Y", "category": "kitchen"},
    {"item_id": "c", "text": "red mug", "split": "test", "brand": "X", "category": "kitchen"},
    {"item_id": "d", "text": "élan — 茶碗 🍵", "split": "test", "brand": None, "category": "kitchen"},
    {"item_id": "e", "text": "hammer", "split": "train", "brand": "X", "category": "tools"},
]


class Result:
    """The outputs of one scan, read back."""

    def __init__(self, folder, summary, files):
        self.summary = summary
        self.files = {name: record.sha256 for name, record in files.items()}
        self.items = pl.read_parquet(folder / "items.parquet")
        self.contents = pl.read_parquet(folder / "contents.parquet")
        self.quarantine = pl.read_parquet(folder / "quarantine.parquet")


def without_digests(summary):
    """Return a summary of counts alone."""
    splits = {
        name: {key: value for key, value in split.items() if key != "contents_digest"}
        for name, split in summary["splits"].items()
    }
    return {key: value for key, value in summary.items() if key != "contents_digest"} | {"splits": splits}


def write_parquet(path, rows, schema=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_of(path, texts):
    return write_jsonl(path, [{"item_id": row, "text": text} for row, text in enumerate(texts)])


def compress(data, suffix):
    if suffix == ".gz":
        return gzip.compress(data)
    if suffix == ".zst":
        return pa.compress(data, codec="zstd", asbytes=True)
    return data


def many_rows(count):
    return [{"item_id": f"i{row}", "text": f"text {row * 7 % (count * 3 // 4)}"} for row in range(count)]


def scanner(tmp_path):
    """Return a function that scans a catalogue in a fresh stage folder and checks that no scratch data is left."""
    runs = iter(range(1000))

    def run(path, **options):
        folder = tmp_path / f"stage-{next(runs)}"
        output = StageOutput(folder, "0" * 64, options.pop("progress", silent))
        chosen = CatalogueSettings(path=str(path), **options)
        try:
            summary = (scan_vectors if is_vectors(chosen) else scan_texts)(chosen, output)
        finally:
            assert not list(folder.glob(".tmp-*"))
        return Result(folder, summary, output.files)

    return run
