"""Catalogues of finished embeddings: read by rows, checked, deduplicated."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_catalogues import texts_of, without_digests, write_parquet

from semids import vector_items
from semids.errors import DataError, ShapeError, UsageError
from semids.items import (
    CatalogueSettings,
    VectorSource,
    is_vectors,
    scan_texts,
    scan_vectors,
)
from semids.progress import silent
from semids.stages import StageOutput


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
    assert without_digests(result.summary)["splits"] == {
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
