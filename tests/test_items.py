"""Catalogues in: every format, every bad input of rows 11, 12, 13, 20, 21 and 22 of the reliability table."""

import gzip
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from semids import contents, intake, items, readers, vector_items
from semids.errors import DataError, ShapeError, StorageError, UsageError
from semids.items import (
    CatalogueSettings,
    Template,
    VectorSource,
    catalogue_digest,
    is_vectors,
    scan_texts,
    scan_vectors,
)
from semids.progress import silent
from semids.scratch import Scratch
from semids.stages import Stage, StageOutput, StageReader, run_stage

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


@pytest.fixture
def scan(tmp_path):
    """Scan a catalogue in a fresh stage folder and check that no intermediate data is left."""
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


# Formats


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".csv", ".csv.gz", ".csv.zst"])
def test_every_format_and_compression_gives_the_same_files(scan, tmp_path, suffix):
    options = {"split_column": "split", "brand_column": "brand", "category_column": "category"}
    expected = scan(write_parquet(tmp_path / "items.parquet", ROWS), **options)
    data = (
        pl.DataFrame(ROWS).write_csv().encode()
        if suffix.startswith(".csv")
        else "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    )
    path = tmp_path / f"items{suffix}"
    path.write_bytes(compress(data, path.suffix))
    found = scan(path, **options)
    assert found.summary == expected.summary
    assert found.files == expected.files


def test_the_summary_counts_items_contents_products_and_duplicates(scan, tmp_path):
    result = scan(
        write_parquet(tmp_path / "items.parquet", ROWS),
        split_column="split",
        brand_column="brand",
        category_column="category",
    )
    assert result.summary == {
        "kind": "texts",
        "dimensions": None,
        "dtype": None,
        "rows": 5,
        "items": 5,
        "distinct_contents": 4,
        "duplicates": 1,
        "quarantined": {},
        "splits": {
            "test": {"items": 2, "distinct_contents": 2, "distinct_products": 1},
            "train": {"items": 3, "distinct_contents": 3, "distinct_products": 3},
        },
    }


def test_contents_are_the_sorted_digests_with_their_counts_and_items_refer_to_them(scan, tmp_path):
    result = scan(write_parquet(tmp_path / "items.parquet", ROWS), split_column="split")
    digests = sorted({hashlib.blake2b(row["text"].encode(), digest_size=16).digest() for row in ROWS})
    assert result.contents["digest"].to_list() == digests
    assert result.contents.columns == ["digest", "text", "items:test", "items:train"]
    assert result.contents.schema["items:test"] == pl.UInt32
    by_text = {row["text"]: row for row in result.contents.to_dicts()}
    assert (by_text["red mug"]["items:train"], by_text["red mug"]["items:test"]) == (1, 1)
    assert result.items.schema == {"item_id": pl.String, "split": pl.String, "content_id": pl.UInt32}
    assert result.items["item_id"].to_list() == ["a", "b", "c", "d", "e"]
    assert result.contents["text"].gather(result.items["content_id"]).to_list() == [row["text"] for row in ROWS]


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.uint64()])
def test_whole_number_ids_become_int64(scan, tmp_path, kind):
    rows = [{"item_id": number, "text": f"t{number}"} for number in (7, 3)]
    schema = pa.schema({"item_id": kind, "text": pa.string()})
    parquet = scan(write_parquet(tmp_path / "items.parquet", rows, schema))
    assert parquet.items["item_id"].to_list() == [7, 3]
    assert parquet.items.schema["item_id"] == pl.Int64
    assert scan(write_jsonl(tmp_path / "items.jsonl", rows)).files == parquet.files


def test_csv_ids_stay_strings_with_their_leading_zeros(scan, tmp_path):
    (tmp_path / "items.csv").write_text("item_id,text\n007,a\n7,b\n")
    assert scan(tmp_path / "items.csv").items["item_id"].to_list() == ["007", "7"]


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_are_read_past(scan, tmp_path):
    (tmp_path / "items.csv").write_bytes(b"\xef\xbb\xbfitem_id,text\r\n1,a\r\n\r\n2,b\r\n")
    (tmp_path / "items.jsonl").write_bytes(b'\xef\xbb\xbf{"item_id": "1", "text": "a"}\r\n\n{"item_id":"2","text":"b"}')
    assert scan(tmp_path / "items.csv").files == scan(tmp_path / "items.jsonl").files


def test_dictionary_encoded_and_large_strings_read_like_plain_ones(scan, tmp_path):
    plain = pa.Table.from_pylist(ROWS)
    expected = scan(write_parquet(tmp_path / "plain.parquet", ROWS), split_column="split")
    for name, kind in (("dictionary", pa.dictionary(pa.int32(), pa.string())), ("large", pa.large_string())):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({column: plain[column].cast(kind) for column in plain.column_names}), path)
        assert scan(path, split_column="split").files == expected.files


# Independence of arrival


def many_rows(count):
    return [{"item_id": f"i{row}", "text": f"text {row * 7 % (count * 3 // 4)}"} for row in range(count)]


def test_contents_do_not_depend_on_row_order(scan, tmp_path):
    rows = many_rows(400)
    forwards = scan(write_jsonl(tmp_path / "forwards.jsonl", rows))
    backwards = scan(write_jsonl(tmp_path / "backwards.jsonl", rows[::-1]))
    assert forwards.files["contents.parquet"] == backwards.files["contents.parquet"]
    assert forwards.items.sort("item_id").equals(backwards.items.sort("item_id"))


def test_outputs_do_not_depend_on_the_number_of_files(scan, tmp_path):
    rows = many_rows(400)
    whole = scan(write_jsonl(tmp_path / "whole.jsonl", rows))
    parts = tmp_path / "parts"
    parts.mkdir()
    for part in range(4):
        write_jsonl(parts / f"{part}.jsonl", rows[part * 100 : part * 100 + 100])
    (parts / "README.md").write_text("passed over")
    write_jsonl(parts / "_hidden.jsonl", rows)
    assert scan(parts).files == whole.files
    assert scan(parts / "[0-3].jsonl").files == whole.files


@pytest.mark.parametrize("bucket_bytes", [1, 1000])
@pytest.mark.parametrize("batch_rows", [1, 37])
def test_outputs_do_not_depend_on_buckets_and_batches(scan, tmp_path, monkeypatch, bucket_bytes, batch_rows):
    texts = write_jsonl(tmp_path / "items.jsonl", many_rows(150))
    vectors = tmp_path / "vectors.npy"
    np.save(vectors, np.random.default_rng(0).integers(1, 3, (150, 6)).astype(np.float32))
    expected = scan(texts).files, scan(vectors).files
    monkeypatch.setattr(contents, "BUCKET_BYTES", bucket_bytes)
    monkeypatch.setattr(vector_items, "BATCH_ROWS", batch_rows)
    monkeypatch.setattr(readers, "BATCH_BYTES", batch_rows * 30)
    assert (scan(texts).files, scan(vectors).files) == expected


def test_row_groups_are_cut_alike_whatever_the_buckets(scan, tmp_path, monkeypatch):
    monkeypatch.setattr(contents, "GROUP_ROWS", 50)
    monkeypatch.setattr(contents, "GROUP_BYTES", 300)
    path = write_jsonl(tmp_path / "items.jsonl", many_rows(500))
    one = scan(path)
    monkeypatch.setattr(contents, "BUCKET_BYTES", 100)
    many = scan(path)
    assert one.files == many.files
    assert one.contents.equals(many.contents)


def test_pages_of_long_texts_are_cut_alike_whatever_the_buckets(scan, tmp_path, monkeypatch):
    path = texts_of(tmp_path / "items.jsonl", [f"{row} " * 400 for row in range(2500)])
    one = scan(path)
    monkeypatch.setattr(contents, "BUCKET_BYTES", 30_000)
    assert scan(path).files == one.files


@pytest.mark.parametrize("equal_bytes", [0, 8, 12])
def test_digests_that_share_their_leading_bytes_are_still_told_apart(scan, tmp_path, monkeypatch, equal_bytes):
    rows = many_rows(300)
    path = write_jsonl(tmp_path / "items.jsonl", rows)
    whole = contents.digest_content
    monkeypatch.setattr(items, "digest_content", lambda data: b"\x55" * equal_bytes + whole(data)[equal_bytes:])
    monkeypatch.setattr(contents, "BUCKET_BYTES", 100)
    result = scan(path)
    assert result.summary["distinct_contents"] == len({row["text"] for row in rows})
    assert result.contents["text"].gather(result.items["content_id"]).to_list() == [row["text"] for row in rows]
    assert result.contents["digest"].is_sorted()


def test_a_text_that_most_items_share_is_held_once(tmp_path):
    buckets = contents.Buckets(Scratch(tmp_path), 1, has_texts=True)
    digest = contents.digest_content(b"same")
    for batch in range(3):
        buckets.add(batch * 1000, [digest] * 1000, np.zeros(1000, np.uint8), ["same"] * 1000)
    (group,) = buckets.groups([0])
    assert (group.counts.tolist(), group.texts.to_pylist()) == ([[3000]], ["same"])
    held = buckets._spools[0].table()["text"]
    assert held.null_count == 2997


# Templates


def test_a_line_with_a_missing_part_drops_out(scan, tmp_path):
    rows = [
        {"item_id": 1, "title": " mug ", "brand": "X", "year": 2008, "sold": True},
        {"item_id": 2, "title": "cup", "brand": " \t", "year": None, "sold": False},
        {"item_id": 3, "title": "pot", "brand": None, "year": 1999, "sold": None},
    ]
    result = scan(
        write_parquet(tmp_path / "items.parquet", rows),
        template="{title}\nBrand: {brand}, {year}\nFor sale {{really}}\nsold: {sold}",
    )
    texts = result.contents["text"].gather(result.items["content_id"]).to_list()
    assert texts == [
        "mug\nBrand: X, 2008\nFor sale {really}\nsold: true",
        "cup\nFor sale {really}\nsold: false",
        "pot\nFor sale {really}",
    ]


def test_an_item_of_which_only_fixed_lines_are_left_has_no_text(scan, tmp_path):
    rows = [{"item_id": 1, "title": "mug"}, {"item_id": 2, "title": None}]
    path = write_parquet(tmp_path / "items.parquet", rows)
    result = scan(path, template="Product\n{title}", max_quarantine_fraction=0.5)
    assert result.quarantine.to_dicts() == [{"row": 1, "item_id": 2, "reason": "no text"}]


VALUES = st.dictionaries(st.sampled_from("abc"), st.none() | st.text(" \txyé{}\n", max_size=4))


@given(
    lines=st.lists(st.lists(st.sampled_from(["{a}", "{b}", "{c}", "{{", " - "]), max_size=4), max_size=5), values=VALUES
)
@settings(max_examples=200, deadline=None)
def test_rendering_keeps_exactly_the_lines_whose_parts_are_there(lines, values):
    pattern = "\n".join("".join(line) for line in lines)
    values = {name: values.get(name) for name in "abc"}
    present = {name: value.strip() for name, value in values.items() if value and value.strip()}
    named = [{part[1] for part in line if len(part) == 3 and part != " - "} for line in lines or [[]]]
    if not any(named):
        with pytest.raises(UsageError, match="names a column in braces"):
            Template(pattern)
        return
    kept = [("".join(line), names) for line, names in zip(lines, named, strict=True) if names <= present.keys()]
    expected = "\n".join(line.format(**present) for line, _ in kept) if any(names for _, names in kept) else ""
    assert Template(pattern).render(values) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{title", "expected '}'"),
        ("{}", "only a column's name"),
        ("{title!r}", "only a column's name"),
        ("{title:>10}", "only a column's name"),
        ("no braces", "names a column in braces"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused_at_once(template, message):
    with pytest.raises(ValidationError, match=message):
        CatalogueSettings(path="x", template=template)


# Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": " "}, "got a blank"),
        ({"path": "a\0b"}, "without NUL characters"),
        ({"text_column": "a", "template": "{a}"}, "text_column and template contradict each other"),
        ({"text_column": "a", "vector_column": "v"}, "text_column and vector_column contradict each other"),
        ({"brand_column": "brand"}, "brand_column and category_column go together"),
        ({"split_column": " "}, "in split_column, got a blank"),
        ({"train_split": ""}, "name of the training split, got a blank"),
        ({"max_quarantine_fraction": 1.5}, "less than or equal to 1"),
        ({"textcolumn": "a"}, "Extra inputs are not permitted"),
    ],
)
def test_contradictory_settings_are_refused_at_construction(options, message):
    with pytest.raises(ValidationError, match=message):
        CatalogueSettings(**({"path": "items.parquet"} | options))


def test_every_field_explains_itself():
    fields = CatalogueSettings.model_fields.values()
    assert all(field.description and field.description.endswith(".") for field in fields)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id_column": "sku"}, "no column 'sku' in .*, but 'brand', 'category', 'item_id', 'split', 'text'"),
        ({"text_column": "titel"}, "no column 'titel'"),
        ({"template": "{text}\n{colour}"}, "no column 'colour'"),
        ({"split_column": "fold"}, "no column 'fold'"),
        ({"vector_column": "text"}, "expected lists of float16, 32 or 64 in 'text', got the type string"),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(scan, tmp_path, suffix, options, message):
    path = tmp_path / f"items{suffix}"
    if suffix == ".parquet":
        write_parquet(path, ROWS)
    elif suffix == ".jsonl":
        write_jsonl(path, ROWS)
    else:
        path.write_text(pl.DataFrame(ROWS).write_csv())
    if "vector_column" in options and suffix != ".parquet":
        message = "vectors are read from .npy or Parquet files"
    with pytest.raises(UsageError, match=message):
        scan(path, **options)


def test_a_column_that_one_of_the_files_lacks_is_refused(scan, tmp_path):
    write_parquet(tmp_path / "p" / "1.parquet", [{"item_id": 1, "text": "a", "extra": 1}])
    write_parquet(tmp_path / "p" / "2.parquet", [{"item_id": 2, "text": "b"}])
    assert scan(tmp_path / "p").summary["items"] == 2
    with pytest.raises(UsageError, match=r"no column 'extra' in all of .*, but 'item_id', 'text'"):
        scan(tmp_path / "p", template="{text}{extra}")


def test_a_catalogue_with_nothing_obvious_to_embed_asks_for_it(scan, tmp_path):
    path = write_parquet(tmp_path / "items.parquet", [{"item_id": 1, "title": "a"}])
    with pytest.raises(UsageError, match=r"cannot tell which of the columns 'item_id', 'title' to embed; give text_"):
        scan(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing-*.parquet", "no catalogue file matches"),
        ("missing.parquet", "no catalogue file matches"),
        ("~/items.parquet", "~ stands for nothing here"),
        ("x" * 5000, "expected a path or glob"),
        ("items.xlsx", "cannot tell the format of 'items.xlsx'"),
        ("items.parquet.gz", "cannot tell the format"),
        ("mixed", "mixes CSV and JSONL files"),
        ("empty", "no catalogue file matches"),
    ],
)
def test_a_path_that_leads_to_no_catalogue_is_refused(scan, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    for file in ("items.xlsx", "items.parquet.gz"):
        Path(file).write_bytes(b"x")
    for folder in ("mixed", "empty"):
        Path(folder).mkdir()
    write_jsonl(Path("mixed/a.jsonl"), ROWS)
    Path("mixed/b.csv").write_text("item_id,text\n1,a\n")
    with pytest.raises(UsageError, match=message):
        scan(name)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (pa.float64(), 1.0, "whole numbers or strings in 'item_id', got the type value"),
        (pa.binary(), b"x", "whole numbers or strings in 'item_id', got the type binary"),
        (pa.list_(pa.string()), ["x"], "whole numbers or strings in 'item_id', got the type list"),
    ],
)
def test_ids_of_another_type_are_refused(scan, tmp_path, kind, value, message):
    schema = pa.schema({"item_id": kind, "text": pa.string()})
    path = write_parquet(tmp_path / "items.parquet", [{"item_id": value, "text": "a"}], schema)
    with pytest.raises(UsageError, match=message):
        scan(path)


def test_a_list_of_texts_is_refused_in_parquet_and_jsonl(scan, tmp_path):
    rows = [{"item_id": 1, "text": ["a", "b"]}]
    for path in (write_parquet(tmp_path / "items.parquet", rows), write_jsonl(tmp_path / "items.jsonl", rows)):
        with pytest.raises(UsageError, match="expected text or numbers in 'text', got the type list"):
            scan(path)
    late = write_jsonl(tmp_path / "late.jsonl", [{"item_id": 1, "text": "a"}, {"item_id": 2, "text": ["b"]}])
    with pytest.raises(DataError, match="line 2: expected text or a number in 'text', got a list"):
        scan(late)


@pytest.mark.parametrize(("first", "second"), [(1, "2"), ("1", 2), (1, 2.0), (1, True), (1, 1 << 63)])
def test_ids_of_mixed_types_are_refused(scan, tmp_path, first, second):
    path = write_jsonl(tmp_path / "items.jsonl", [{"item_id": first, "text": "a"}, {"item_id": second, "text": "b"}])
    with pytest.raises(DataError, match=r"as in the rows before, got .* in row 1; write all ids as strings"):
        scan(path)


def test_files_whose_ids_differ_in_type_are_refused(scan, tmp_path):
    write_parquet(tmp_path / "p" / "1.parquet", [{"item_id": 1, "text": "a"}])
    write_parquet(tmp_path / "p" / "2.parquet", [{"item_id": "2", "text": "b"}])
    with pytest.raises(UsageError, match=r"are of the type integer in .* but string in"):
        scan(tmp_path / "p")


# Quarantine


BAD_TEXTS = [
    ("null", None, "no text"),
    ("empty", "", "no text"),
    ("blank", " \t\n\u3000", "no text"),
    ("NUL", "a\0b", "control character in text"),
    ("escape", "\x1b[31mred", "control character in text"),
    ("C1", "a\x9bb", "control character in text"),
    ("surrogate", "a\ud800b", "lone surrogate in text"),
    ("10 MB", "é" * 5_000_000, "text over 1 MiB"),
]


@pytest.mark.parametrize(("text", "reason"), [bad[1:] for bad in BAD_TEXTS], ids=[bad[0] for bad in BAD_TEXTS])
def test_an_unusable_text_is_quarantined_with_its_id_row_and_reason(scan, tmp_path, text, reason):
    """Guard: `items._encode`."""
    path = texts_of(tmp_path / "items.jsonl", ["first", text, "third"])
    result = scan(path, max_quarantine_fraction=0.4)
    assert result.quarantine.to_dicts() == [{"row": 1, "item_id": 1, "reason": reason}]
    assert result.items["item_id"].to_list() == [0, 2]
    assert result.summary["quarantined"] == {reason: 1}
    assert result.summary["rows"] == 3


def test_parquet_and_jsonl_quarantine_the_same_texts(scan, tmp_path):
    texts = ["good", *(text for name, text, _ in BAD_TEXTS if name != "surrogate"), "fine\tand\r\ngood"]
    rows = [{"item_id": row, "text": text} for row, text in enumerate(texts)]
    options = {"max_quarantine_fraction": 1.0}
    parquet = scan(write_parquet(tmp_path / "items.parquet", rows), **options)
    assert parquet.files == scan(write_jsonl(tmp_path / "items.jsonl", rows), **options).files
    assert parquet.summary["items"] == 2


def test_a_10_mb_csv_field_is_quarantined_like_any_other(scan, tmp_path):
    """Guard: `readers.LONGEST_CSV_FIELD`; the csv module gives up at 128 KiB."""
    (tmp_path / "items.csv").write_text(f"item_id,text\n1,{'x' * 10_000_000}\n2,b\n3,{'y' * 500_000}\n")
    result = scan(tmp_path / "items.csv", max_quarantine_fraction=0.5)
    assert result.quarantine.to_dicts() == [{"row": 0, "item_id": "1", "reason": "text over 1 MiB"}]


@pytest.mark.parametrize(
    "text", ["<script>", "![](http://x)", "a|b", "=cmd()", "'; --", "é\u202e", "../../x", "x" * (1 << 20)]
)
def test_harmless_or_hostile_but_valid_text_is_kept_as_it_is(scan, tmp_path, text):
    assert scan(texts_of(tmp_path / "items.jsonl", [text])).contents["text"].to_list() == [text]


@pytest.mark.parametrize(
    ("identifier", "stored", "reason"),
    [
        (None, None, "missing id"),
        ("", "", "missing id"),
        (" \t", " \t", "missing id"),
        ("a\0b", "a\0b", "control character in id"),
        ("a\udfffb", "a\\udfffb", "lone surrogate in id"),
        ("x" * 2000, "x" * 1024, "id over 1 KiB"),
    ],
)
def test_an_unusable_id_is_quarantined(scan, tmp_path, identifier, stored, reason):
    """Guard: `Intake._id_fault`."""
    rows = [{"item_id": "a", "text": "first"}, {"item_id": identifier, "text": "second"}]
    result = scan(write_jsonl(tmp_path / "items.jsonl", rows), max_quarantine_fraction=0.5)
    assert result.quarantine.to_dicts() == [{"row": 1, "item_id": stored, "reason": reason}]


def test_ids_like_paths_are_inert(scan, tmp_path):
    ids = ["../../x", "~", "/etc/passwd", "x" * 300, "a/b"]
    before = sorted(tmp_path.iterdir())
    path = write_jsonl(tmp_path / "items.jsonl", [{"item_id": name, "text": name} for name in ids])
    assert scan(path).items["item_id"].to_list() == ids
    assert sorted(tmp_path.iterdir()) == sorted([*before, path, tmp_path / "stage-0"])


@pytest.mark.parametrize("split", [None, "", " "])
def test_an_item_without_a_split_is_quarantined(scan, tmp_path, split):
    rows = [{"item_id": 1, "text": "a", "split": "train"}, {"item_id": 2, "text": "b", "split": split}]
    result = scan(write_jsonl(tmp_path / "items.jsonl", rows), split_column="split", max_quarantine_fraction=0.5)
    assert result.summary["quarantined"] == {"missing split": 1}


def test_more_unusable_items_than_allowed_end_the_run_with_counts_and_first_ids(scan, tmp_path):
    """Guard: the first comparison in `Intake.judge`."""
    texts = [f"t{row}" for row in range(97)] + ["", "", "a\0"]
    path = texts_of(tmp_path / "items.jsonl", texts)
    message = (
        r"3 of 100 items are unusable \(1 × control character in text, 2 × no text\), first 97 \(row 97\), "
        r"98 \(row 98\), 99 \(row 99\); at most a part of 0.02 may be"
    )
    with pytest.raises(DataError, match=message):
        scan(path, max_quarantine_fraction=0.02)
    assert not list(tmp_path.glob("stage-*/*.parquet"))
    assert scan(path, max_quarantine_fraction=0.03).summary["items"] == 97


def test_a_catalogue_without_a_usable_item_is_refused(scan, tmp_path):
    with pytest.raises(DataError, match="none of 2 items is usable"):
        scan(texts_of(tmp_path / "blank.jsonl", ["", " "]), max_quarantine_fraction=1)
    write_parquet(tmp_path / "none.parquet", [], pa.schema({"item_id": pa.int64(), "text": pa.string()}))
    with pytest.raises(DataError, match="expected items, got none in 1 Parquet file"):
        scan(tmp_path / "none.parquet")
    (tmp_path / "none.csv").write_text("item_id,text\n")
    with pytest.raises(DataError, match="expected items, got none in 1 CSV file"):
        scan(tmp_path / "none.csv")


# Splits


def test_a_training_split_without_items_is_refused_with_the_splits_there_are(scan, tmp_path):
    path = write_parquet(tmp_path / "items.parquet", ROWS)
    with pytest.raises(UsageError, match="in the training split 'training'; the splits are 'test', 'train'"):
        scan(path, split_column="split", train_split="training")


def test_without_a_split_column_every_item_is_in_the_training_split(scan, tmp_path):
    result = scan(write_parquet(tmp_path / "items.parquet", ROWS), train_split="all")
    assert result.items["split"].unique().to_list() == ["all"]
    assert list(result.summary["splits"]) == ["all"]


def test_17_splits_are_refused_and_16_are_not(scan, tmp_path):
    rows = [{"item_id": row, "text": f"t{row}", "split": f"s{row:02d}"} for row in range(16)]
    result = scan(write_jsonl(tmp_path / "16.jsonl", rows[::-1]), split_column="split", train_split="s00")
    assert list(result.summary["splits"]) == sorted(row["split"] for row in rows)
    rows.append({"item_id": 16, "text": "t", "split": "s16"})
    with pytest.raises(UsageError, match="at most 16 splits, but 'split' also holds 's16'; is it the right column"):
        scan(write_jsonl(tmp_path / "17.jsonl", rows), split_column="split", train_split="s00")


def test_a_split_name_with_control_characters_is_refused(scan, tmp_path):
    path = write_jsonl(tmp_path / "items.jsonl", [{"item_id": 1, "text": "a", "split": "tr\x1bain"}])
    with pytest.raises(DataError, match="expected plain text in 'split'"):
        scan(path, split_column="split")


# Duplicate ids


@pytest.mark.parametrize("ids", [["a", "b", "a", "c", "b"], [1, 2, 1, 3, 2]])
def test_duplicate_ids_are_refused_and_named_over_splits_and_files(scan, tmp_path, ids):
    """Guard: `Intake._check_unique`."""
    parts = tmp_path / "parts"
    parts.mkdir()
    for row, name in enumerate(ids):
        split = "test" if row % 2 else "train"
        write_jsonl(parts / f"{row}.jsonl", [{"item_id": name, "text": f"t{row}", "split": split}])
    message = f"got 2 repeats in 'item_id', among them {ids[0]!r}, {ids[1]!r}; drop the repeats"
    with pytest.raises(DataError, match=message):
        scan(parts, split_column="split")


def test_ids_whose_hashes_are_equal_are_compared_themselves(scan, tmp_path, monkeypatch):
    monkeypatch.setattr(intake, "hash_ids", lambda ids: np.zeros(len(ids), np.uint64))
    rows = many_rows(50)
    assert scan(write_jsonl(tmp_path / "items.jsonl", rows)).summary["items"] == 50
    with pytest.raises(DataError, match="among them 'i7'"):
        scan(write_jsonl(tmp_path / "repeat.jsonl", [*rows, rows[7]]))


@pytest.mark.parametrize("suspects", [1, 2, 1000])
def test_a_real_repeat_is_found_among_any_number_of_suspects(scan, tmp_path, monkeypatch, suspects):
    monkeypatch.setattr(intake, "SUSPECTS", suspects)
    rows = many_rows(60)
    with pytest.raises(DataError, match="got 60 repeats"):
        scan(write_jsonl(tmp_path / "items.jsonl", rows + rows))


# Damaged files


def test_files_that_are_not_utf8_are_refused_by_name(scan, tmp_path):
    (tmp_path / "items.csv").write_bytes("item_id,text\n1,café\n".encode("latin-1"))
    (tmp_path / "items.jsonl").write_bytes('{"item_id": 1, "text": "café"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"items\.csv is not UTF-8 .*iconv"):
        scan(tmp_path / "items.csv")
    with pytest.raises(DataError, match=r"items\.jsonl, line 1: not UTF-8 .*iconv"):
        scan(tmp_path / "items.jsonl")
    data = pa.array([b"ok", b"caf\xe9"]).view(pa.string())
    pq.write_table(pa.table({"item_id": [1, 2], "text": data}), tmp_path / "items.parquet")
    with pytest.raises(DataError, match=r"items\.parquet is not UTF-8"):
        scan(tmp_path / "items.parquet")


@pytest.mark.parametrize("cut", [3, 20, 40])
def test_a_jsonl_file_cut_within_its_last_line_is_refused_by_line(scan, tmp_path, cut):
    data = write_jsonl(tmp_path / "items.jsonl", ROWS).read_bytes()
    (tmp_path / "items.jsonl").write_bytes(data[:-cut])
    with pytest.raises(DataError, match=r"items\.jsonl, line 5: not JSON .* the file was cut off: copy or export"):
        scan(tmp_path / "items.jsonl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'item_id,text\n1,a\n2,"never closed\n3,b\n',
            r"line 4: not CSV \(unexpected end of data\); a quote is not closed",
        ),
        ("item_id,text,brand\n1,a,x\n2,b", "line 3: expected 3 fields, got 2; if it is the last line the file was cut"),
        ('item_id,text\n1,"a"b\n', "line 2: not CSV"),
        ("", "is empty: expected a first line that names the columns"),
        ("item_id,text,text\n1,a,b\n", "names the column 'text' twice"),
    ],
)
def test_a_csv_file_that_is_cut_off_or_malformed_is_refused_by_line(scan, tmp_path, text, message):
    """Guards: `strict` in `readers._open_csv`, and the number of fields."""
    (tmp_path / "items.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        scan(tmp_path / "items.csv")


@pytest.mark.parametrize("line", ["[1, 2]", '"text"', "3", "{'item_id': 1}", "[" * 100_000])
def test_a_jsonl_line_that_is_no_object_is_refused(scan, tmp_path, line):
    path = write_jsonl(tmp_path / "items.jsonl", ROWS)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"line 6: (expected an object|not JSON)"):
        scan(tmp_path / "items.jsonl")


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.9])
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl.gz", ".csv.gz", ".jsonl.zst"])
def test_a_truncated_binary_file_is_refused_by_name(scan, tmp_path, suffix, keep):
    """Guards: `readers.reading`, and the size in `readers._open_stream`."""
    path = tmp_path / f"items{suffix}"
    rows = many_rows(2000)
    if suffix == ".parquet":
        write_parquet(path, rows)
    else:
        text = pl.DataFrame(rows).write_csv() if "csv" in suffix else "\n".join(map(json.dumps, rows))
        path.write_bytes(compress(text.encode(), path.suffix))
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(DataError, match=r"items\..* cannot be read .*cut off, damaged.*copy or export it again"):
        scan(path)


def test_a_gz_file_with_a_changed_byte_is_refused(scan, tmp_path):
    text = "\n".join(map(json.dumps, many_rows(2000)))
    data = bytearray(gzip.compress(text.encode()))
    data[len(data) // 2] ^= 0xFF
    (tmp_path / "items.jsonl.gz").write_bytes(data)
    with pytest.raises(DataError, match=r"items\.jsonl\.gz"):
        scan(tmp_path / "items.jsonl.gz")


def test_a_file_the_system_will_not_read_is_a_storage_error(scan, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "items.jsonl", ROWS)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(readers.pa, "input_stream", refuse)
    with pytest.raises(StorageError, match=r"cannot read .*items\.jsonl: Permission denied"):
        scan(path)


def open_files():
    return {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}  # noqa: PTH115


@pytest.mark.skipif(sys.platform != "linux", reason="open files are listed in /proc")
def test_a_refused_catalogue_leaves_no_file_open(scan, tmp_path):
    """Guard: `Scratch.close`; a deleted file that is open keeps its disk space, gigabytes in a large catalogue."""
    rows = many_rows(50)
    with pytest.raises(DataError, match="got 1 repeats") as caught:
        scan(write_jsonl(tmp_path / "items.jsonl", [*rows, rows[0]]))
    # The traceback is still alive, and with it the memory map of the sorted ids; nothing else may be.
    left = {name.split("/")[-1] for name in open_files() if ".tmp-" in name}
    assert (caught.type, left - {"ids (deleted)"}) == (DataError, set())


def test_a_full_disk_names_the_scratch_folder_and_leaves_nothing(scan, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "items.jsonl", ROWS)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(items, "allocate", refuse)
    with pytest.raises(StorageError, match=r"\.tmp-buckets for intermediate data: No space left on device"):
        scan(path)


# Vectors


def fixed(vectors, dtype=None):
    return pa.array([list(row) for row in vectors], pa.list_(dtype or pa.float32(), len(vectors[0])))


def test_vectors_are_numbered_by_first_appearance_with_the_row_that_holds_them(scan, tmp_path):
    np.save(tmp_path / "v.npy", np.array([[2, 0], [1, 1], [2, 0], [0, 3], [1, 1]], np.float32))
    result = scan(tmp_path / "v.npy")
    assert result.items.to_dict(as_series=False) == {
        "item_id": [0, 1, 2, 3, 4],
        "split": ["train"] * 5,
        "content_id": [0, 1, 0, 2, 1],
    }
    assert result.contents["row"].to_list() == [0, 1, 3]
    assert result.contents["items:train"].to_list() == [2, 2, 1]
    assert result.contents["digest"][2] == hashlib.blake2b(np.float32([0, 3]).tobytes(), digest_size=16).digest()
    assert (result.summary["dimensions"], result.summary["dtype"]) == (2, "float32")


@pytest.mark.parametrize(
    ("stored", "returned"), [("float16", "float16"), ("float32", "float32"), ("float64", "float32")]
)
def test_npy_and_parquet_vectors_give_the_same_result(scan, tmp_path, stored, returned):
    vectors = np.random.default_rng(0).integers(1, 4, (60, 3)).astype(stored)
    np.save(tmp_path / "c.npy", vectors)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(vectors))
    np.save(tmp_path / "big-endian.npy", vectors.astype(vectors.dtype.newbyteorder(">")))
    ids = pa.array(range(60), pa.int64())
    kind = pa.from_numpy_dtype(vectors.dtype)
    pq.write_table(pa.table({"item_id": ids, "v": fixed(vectors, kind)}), tmp_path / "fixed.parquet", row_group_size=7)
    lists = pa.array(list(vectors), pa.list_(kind))
    pq.write_table(pa.table({"item_id": ids, "v": lists}), tmp_path / "list.parquet")
    expected = scan(tmp_path / "c.npy")
    assert expected.summary["dtype"] == returned
    for name in ("fortran.npy", "big-endian.npy", "fixed.parquet", "list.parquet"):
        result = scan(tmp_path / name)
        assert (result.summary, result.files) == (expected.summary, expected.files), name


def test_a_parquet_vector_column_is_found_and_its_items_keep_ids_splits_and_products(scan, tmp_path):
    table = pa.table(
        {
            "item_id": ["a", "b", "c"],
            "text": ["x", "y", "z"],
            "split": ["train", "test", "test"],
            "brand": ["X", "X", "Y"],
            "category": ["k", "k", None],
            "vector": fixed([[1, 0], [1, 0], [0, 1]]),
        }
    )
    pq.write_table(table, tmp_path / "items.parquet")
    columns = {"split_column": "split", "brand_column": "brand", "category_column": "category"}
    result = scan(tmp_path / "items.parquet", **columns)
    assert result.summary["splits"] == {
        "test": {"items": 2, "distinct_contents": 2, "distinct_products": 1},
        "train": {"items": 1, "distinct_contents": 1, "distinct_products": 1},
    }
    assert result.contents["items:test"].to_list() == [1, 1]
    assert not is_vectors(CatalogueSettings(path=str(tmp_path / "items.parquet"), text_column="text"))
    pq.write_table(table.append_column("other", table["vector"]), tmp_path / "two.parquet")
    assert not is_vectors(CatalogueSettings(path=str(tmp_path / "two.parquet")))
    assert scan(tmp_path / "two.parquet", vector_column="other", **columns).files == result.files


@pytest.mark.parametrize(
    ("value", "dtype", "reason"),
    [
        (np.nan, "float32", "missing or non-finite vector"),
        (np.inf, "float16", "missing or non-finite vector"),
        (1e300, "float64", "missing or non-finite vector"),
        (0, "float32", "zero vector"),
        (1e20, "float32", r"vector with a norm outside [1e-12, 1e+12]"),
        (1e-25, "float32", r"vector with a norm outside [1e-12, 1e+12]"),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.filterwarnings("error")
def test_an_unusable_vector_is_quarantined(scan, tmp_path, suffix, value, dtype, reason):
    """Guard: `arrays.unusable_rows` as `vector_items._faults` asks it."""
    vectors = np.ones((10, 4), dtype)
    vectors[3, :] = 0
    vectors[3, 1] = value
    path = tmp_path / f"v{suffix}"
    if suffix == ".npy":
        np.save(path, vectors)
    else:
        pq.write_table(pa.table({"item_id": range(10), "v": fixed(vectors, pa.from_numpy_dtype(vectors.dtype))}), path)
    result = scan(path, max_quarantine_fraction=0.1)
    assert result.quarantine.to_dicts() == [{"row": 3, "item_id": 3, "reason": reason}]
    assert result.summary["items"] == 9
    with pytest.raises(DataError, match=r"1 of 10 items are unusable \(1 × .*, first 3 \(row 3\)"):
        scan(path)


def test_missing_vectors_and_missing_numbers_are_quarantined(scan, tmp_path):
    rows = [[1.0, 2.0], None, [3.0, None], [4.0, 5.0]]
    for name, kind in (("fixed", pa.list_(pa.float32(), 2)), ("list", pa.list_(pa.float32()))):
        pq.write_table(pa.table({"item_id": range(4), "v": pa.array(rows, kind)}), tmp_path / f"{name}.parquet")
        result = scan(tmp_path / f"{name}.parquet", max_quarantine_fraction=0.5)
        assert result.quarantine["row"].to_list() == [1, 2]
        assert result.contents["row"].to_list() == [0, 3]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((3, 2), np.int64), "expected float16, 32 or 64 in .*, got int64"),
        (np.ones((3, 2), np.complex64), "expected float16, 32 or 64 in .*, got complex64"),
        (np.ones(3, np.float32), r"expected vectors of shape \(n, d\) in .*, got \(3,\)"),
        (np.ones((3, 2, 2), np.float32), r"expected vectors of shape \(n, d\) in .*, got \(3, 2, 2\)"),
        (np.ones((3, 0), np.float32), r"expected vectors of shape \(n, d\) in .*, got \(3, 0\)"),
    ],
)
def test_an_npy_file_of_the_wrong_type_or_shape_is_refused(scan, tmp_path, array, message):
    np.save(tmp_path / "v.npy", array)
    with pytest.raises(ShapeError, match=message):
        scan(tmp_path / "v.npy")


def test_a_file_without_a_list_in_the_vector_column_is_refused(scan, tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    pq.write_table(pa.table({"item_id": [1], "v": fixed([[1, 2]])}), parts / "0.parquet")
    pq.write_table(pa.table({"item_id": [2], "v": ["1 2"]}), parts / "1.parquet")
    with pytest.raises(ShapeError, match=r"expected lists of float16, 32 or 64 in 'v' of .*1\.parquet, got string"):
        scan(parts)


def test_vectors_of_unequal_lengths_are_refused(scan, tmp_path):
    """Guards: `_ParquetPart._to_rows` within a file, `VectorSource` between files."""
    ragged = pa.array([[1.0, 2.0], [1.0, 2.0, 3.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"item_id": [1, 2], "v": ragged}), tmp_path / "ragged.parquet")
    with pytest.raises(ShapeError, match=r"expected 2 dimensions in 'v' of .*, got 3 in row 1"):
        scan(tmp_path / "ragged.parquet")
    parts = tmp_path / "parts"
    parts.mkdir()
    np.save(parts / "0.npy", np.ones((2, 3), np.float32))
    for other, got in ((np.ones((2, 4), np.float32), "4 of float32"), (np.ones((2, 3), np.float16), "3 of float16")):
        np.save(parts / "1.npy", other)
        with pytest.raises(ShapeError, match=f"expected 3 dimensions of float32 as in .*0.npy, got {got} in .*1.npy"):
            scan(parts)


class Planted:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_planted_in_an_npy_file_is_not_executed(scan, tmp_path):
    """Guard: `open_memmap`, which has no unpickling in it, in place of `np.load`."""
    marker = tmp_path / "executed"
    np.save(tmp_path / "v.npy", np.array([[Planted(marker)]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"v\.npy holds Python objects \(pickle\), which are never loaded"):
        scan(tmp_path / "v.npy")
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Planted(marker)))
    with pytest.raises(DataError, match=r"raw\.npy cannot be read"):
        scan(tmp_path / "raw.npy")
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 20, 500])
def test_a_truncated_npy_file_is_refused(scan, tmp_path, keep):
    np.save(tmp_path / "v.npy", np.ones((100, 4), np.float32))
    (tmp_path / "v.npy").write_bytes((tmp_path / "v.npy").read_bytes()[:keep])
    with pytest.raises(DataError, match=r"v\.npy cannot be read .*copy or export it again"):
        scan(tmp_path / "v.npy")


def test_empty_vector_catalogues_are_refused(scan, tmp_path):
    np.save(tmp_path / "v.npy", np.ones((0, 4), np.float32))
    with pytest.raises(DataError, match="expected items, got none"):
        scan(tmp_path / "v.npy")
    schema = pa.schema({"item_id": pa.int64(), "v": pa.list_(pa.float32())})
    with pytest.raises(DataError, match="expected vectors, got none"):
        scan(write_parquet(tmp_path / "v.parquet", [], schema))


@pytest.mark.parametrize(
    "options", [{"text_column": "t"}, {"template": "{t}"}, {"vector_column": "v"}, {"split_column": "s"}]
)
def test_columns_of_an_npy_file_are_refused(scan, tmp_path, options):
    np.save(tmp_path / "v.npy", np.ones((2, 2), np.float32))
    with pytest.raises(UsageError, match=f".npy files have no columns, got {next(iter(options))}"):
        scan(tmp_path / "v.npy", **options)


def test_the_wrong_scan_for_a_catalogue_says_so(tmp_path):
    np.save(tmp_path / "v.npy", np.ones((2, 2), np.float32))
    output = StageOutput(tmp_path / "stage", "0" * 64, silent)
    with pytest.raises(UsageError, match=r"expected texts in .*, got vectors"):
        scan_texts(CatalogueSettings(path=str(tmp_path / "v.npy")), output)
    with pytest.raises(UsageError, match=r"expected vectors in .*, got texts"):
        scan_vectors(CatalogueSettings(path=str(texts_of(tmp_path / "t.jsonl", ["a"]))), output)


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_a_vector_source_reads_any_rows_of_any_number_of_files(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(vector_items, "BATCH_ROWS", 5)
    vectors = np.random.default_rng(1).standard_normal((50, 4)).astype(np.float32)
    for part, rows in enumerate(np.split(vectors, [20, 20, 21])):
        path = tmp_path / f"{part}{suffix}"
        if suffix == ".npy":
            np.save(path, rows)
        else:
            column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), 4)
            pq.write_table(
                pa.table({"item_id": [f"{part}-{row}" for row in range(len(rows))], "v": column}),
                path,
                row_group_size=7,
            )
    source = VectorSource(CatalogueSettings(path=str(tmp_path)))
    assert (source.rows, source.dimensions, source.dtype) == (50, 4, np.float32)
    np.testing.assert_array_equal(source.take(0, 50), vectors)
    rng = np.random.default_rng(2)
    for _ in range(30):
        rows = np.sort(rng.choice(50, rng.integers(0, 20), replace=False))
        np.testing.assert_array_equal(source.rows_at(rows), vectors[rows])
        start, stop = sorted(rng.integers(0, 51, 2).tolist())
        np.testing.assert_array_equal(source.take(start, stop), vectors[start:stop])


def test_a_parquet_file_read_forwards_is_decoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_items, "BATCH_ROWS", 10)
    pq.write_table(
        pa.table({"item_id": range(100), "v": fixed(np.ones((100, 2)))}), tmp_path / "v.parquet", row_group_size=30
    )
    source = VectorSource(CatalogueSettings(path=str(tmp_path / "v.parquet")))
    (part,) = source._parts
    decoded = []
    to_rows = part._to_rows
    monkeypatch.setattr(part, "_to_rows", lambda column, row: decoded.append(len(column)) or to_rows(column, row))
    for start in range(0, 100, 9):
        source.take(start, min(start + 9, 100))
    assert sum(decoded) == 100


# Stage, fingerprint, progress


def test_moving_a_catalogue_does_not_change_its_digest_and_editing_it_does(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("1.jsonl", "2.jsonl"):
        write_jsonl(tmp_path / "a" / name, ROWS[: int(name[0])])
    before = catalogue_digest(CatalogueSettings(path=str(tmp_path / "a")))
    (tmp_path / "a").rename(tmp_path / "b")
    os.utime(tmp_path / "b" / "1.jsonl", (0, 0))
    after = catalogue_digest(CatalogueSettings(path=str(tmp_path / "b")))
    assert before == after
    assert after["count"] == len(after["sha256"]) == 2
    write_jsonl(tmp_path / "b" / "2.jsonl", ROWS)
    assert catalogue_digest(CatalogueSettings(path=str(tmp_path / "b"))) != before


def test_scanning_runs_as_a_stage_and_leaves_only_its_three_files(tmp_path):
    chosen = CatalogueSettings(path=str(write_parquet(tmp_path / "items.parquet", ROWS)))
    stage = Stage("items", "Read", catalogue_digest(chosen), lambda output: scan_texts(chosen, output))
    reader = StageReader(run_stage(tmp_path / "run", stage).path)
    names = sorted(path.name for path in reader.folder.iterdir())
    assert names == ["contents.parquet", "items.parquet", "manifest.json", "quarantine.parquet"]
    assert reader.summary["items"] == 5


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_progress_rises_to_its_total(scan, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(readers, "BATCH_BYTES", 100)
    path = (write_parquet if suffix == ".parquet" else write_jsonl)(tmp_path / f"items{suffix}", many_rows(30))
    heard = {}
    scan(path, progress=lambda step, done, total, unit: heard.setdefault(step, []).append((done, total, unit)))
    assert set(heard) == {"read catalogue", "find equal texts"}
    for calls in heard.values():
        assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
        assert calls[-1] == (30, 30, "items")


# Memory and real data


def peak_anonymous_bytes(path, folder):
    """Return the largest anonymous memory of a child that scans the catalogue, in bytes."""
    program = """
import sys, threading, time
from pathlib import Path
from semids import contents
from semids.items import CatalogueSettings, scan_texts
from semids.stages import StageOutput
contents.BUCKET_BYTES = 1 << 18  # so that both sizes fill whole buckets
peak = 0
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
def listen(*_):
    global peak
    peak = max(peak, anonymous())
scan_texts(CatalogueSettings(path=sys.argv[1]), StageOutput(Path(sys.argv[2]), "0" * 64, listen))
print(peak)
"""
    done = subprocess.run([sys.executable, "-c", program, path, folder], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_memory_at_8_times_the_items_is_at_most_a_tenth_more(tmp_path):
    """Guard: `contents.BUCKET_BYTES`, and the spools in `scratch`."""
    rng = np.random.default_rng(0)
    words = pa.array([f"word{number}" for number in range(5000)])
    peaks = []
    for rows in (100_000, 800_000):
        columns = [words.take(pa.array(rng.integers(0, 5000, rows))) for _ in range(6)]
        text = pc.binary_join_element_wise(*columns, " ")
        path = tmp_path / f"{rows}.parquet"
        pq.write_table(
            pa.table({"item_id": pa.array(range(rows), pa.int64()), "text": text}), path, row_group_size=50_000
        )
        peaks.append(peak_anonymous_bytes(path, tmp_path / f"stage-{rows}"))

    assert peaks[1] <= 1.1 * peaks[0], peaks  # 1.01


def test_real_catalogues_have_their_known_numbers_of_distinct_contents(scan, real_data):
    texts = scan(real_data / "industrial_items.parquet", template="{title}\n{description}")
    vectors = scan(real_data / "industrial_minilm_f16.npy")
    assert (texts.summary["items"], texts.summary["distinct_contents"]) == (3686, 3675)
    assert (vectors.summary["items"], vectors.summary["distinct_contents"]) == (3686, 3675)
    books = scan(real_data / "goodbooks_items.parquet", template="{title}\nBy {authors}\n{year}")
    assert (books.summary["items"], books.summary["quarantined"]) == (10_000, {})
