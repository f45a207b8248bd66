"""Catalogues that are refused or quarantined: rows 11, 12, 13, 20, 21 and 22 of the reliability table."""

import gzip
import json
import os
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_catalogues import ROWS, compress, many_rows, texts_of, write_jsonl, write_parquet

from semids import intake, readers
from semids.errors import DataError, StorageError, UsageError


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

    monkeypatch.setattr(readers.pa, "OSFile", refuse)
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
