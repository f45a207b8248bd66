"""Catalogues in: every format, templates, deduplication, progress and memory."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from small_catalogues import ROWS, compress, many_rows, texts_of, without_digests, write_jsonl, write_parquet

from semids import contents, items, readers, vector_items
from semids.errors import StorageError, UsageError
from semids.items import (
    CatalogueSettings,
    Template,
    catalogue_digest,
    scan_texts,
)
from semids.scratch import Scratch
from semids.stages import Stage, StageReader, run_stage

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


def test_digests_identify_the_contents_and_those_of_each_split(scan, tmp_path):
    result = scan(write_parquet(tmp_path / "items.parquet", ROWS), split_column="split")

    def digest_of(digests):
        words = np.frombuffer(b"".join(digests), ">u8").astype("<u8")
        return hashlib.sha256(words.tobytes()).hexdigest()

    assert result.summary["contents_digest"] == digest_of(result.contents["digest"].to_list())
    for split, figures in result.summary["splits"].items():
        here = result.contents.filter(pl.col(f"items:{split}") > 0)["digest"].to_list()
        assert figures["contents_digest"] == digest_of(sorted(here))


def test_the_summary_counts_items_contents_products_and_duplicates(scan, tmp_path):
    result = scan(
        write_parquet(tmp_path / "items.parquet", ROWS),
        split_column="split",
        brand_column="brand",
        category_column="category",
    )
    assert without_digests(result.summary) == {
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


def test_a_full_disk_names_the_scratch_folder_and_leaves_nothing(scan, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "items.jsonl", ROWS)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(items, "allocate", refuse)
    with pytest.raises(StorageError, match=r"\.tmp-buckets for intermediate data: No space left on device"):
        scan(path)
