"""Later contents get IDs that no other has, near to what the frozen rule asks for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import clustered_vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import published

from semids.arrays import capacity_of
from semids.cli import main
from semids.errors import ShapeError, UsageError
from semids.free_ids import find_free_ids
from semids.residual import PriceTable, ResidualCodebooks
from semids.store import read_sealed_json


def make_quantizer(sizes: tuple[int, ...], *, seed: int, price: float = 0.0) -> ResidualCodebooks:
    rng = np.random.default_rng(seed)
    books = tuple(rng.normal(size=(size, 5)).astype(np.float32) / 2**level for level, size in enumerate(sizes))
    zeros = tuple(np.zeros(size, np.float32) for size in sizes)
    first = PriceTable(np.array([0]), price * rng.normal(size=(1, sizes[0])).astype(np.float32))
    rest = [PriceTable(np.zeros(0, np.int64), np.zeros((0, size), np.float32)) for size in sizes[1:]]
    return ResidualCodebooks(books, zeros, (first, *rest))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_row_gets_an_id_of_its_own_and_its_first_choice_where_it_is_free(data: st.DataObject) -> None:
    sizes = tuple(data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=3)))
    capacity = capacity_of(sizes)
    taken_count = data.draw(st.integers(0, capacity))
    rows = data.draw(st.integers(0, capacity - taken_count))
    rng = np.random.default_rng(capacity + rows)
    everything = np.stack(np.unravel_index(np.arange(capacity), sizes), axis=1).astype(np.uint8)
    taken = everything[rng.permutation(capacity)[:taken_count]]
    taken = np.concatenate([taken, taken[:3]])  # an ID that several contents share
    vectors = rng.normal(size=(rows, 5)).astype(np.float32)
    quantizer = make_quantizer(sizes, seed=rows, price=data.draw(st.sampled_from([0.0, 0.3])))
    found = find_free_ids(lambda some: vectors[some], quantizer, taken, rows=rows)
    given_ids = {tuple(code) for code in taken.tolist()}
    new_ids = [tuple(code) for code in found.tolist()]
    assert len(set(new_ids)) == rows
    assert not given_ids & set(new_ids)
    ruled = [tuple(code) for code in quantizer.assign(vectors).tolist()]
    for row, wanted in enumerate(ruled):
        if wanted not in given_ids and ruled.count(wanted) == 1:
            assert new_ids[row] == wanted


def test_a_row_whose_id_is_taken_stays_under_its_prefix_while_there_is_room() -> None:
    quantizer = make_quantizer((3, 4), seed=1)
    vectors = np.random.default_rng(1).normal(size=(1, 5)).astype(np.float32)
    first, last = quantizer.encode(vectors)[0]
    distances = ((vectors[0] - quantizer.codebooks[0][first] - quantizer.codebooks[1]) ** 2).sum(axis=1)
    order = np.argsort(distances)
    assert order[0] == last
    for taken in range(1, 4):
        given_codes = np.array([[first, code] for code in order[:taken]], np.uint8)
        assert find_free_ids(lambda some: vectors[some], quantizer, given_codes, rows=1).tolist() == [
            [first, order[taken]]
        ]
    full = np.array([[first, code] for code in range(4)], np.uint8)
    assert find_free_ids(lambda some: vectors[some], quantizer, full, rows=1)[0, 0] != first


def test_more_rows_than_free_ids_are_refused() -> None:
    vectors, taken = np.ones((3, 5), np.float32), np.array([[0, 0], [0, 1], [0, 2], [1, 2], [1, 2]], np.uint8)
    with pytest.raises(UsageError, match="a free ID for each of 3 new contents, got 2 free of 6"):
        find_free_ids(lambda some: vectors[some], make_quantizer((2, 3), seed=0), taken, rows=3)


def test_vectors_of_another_width_are_refused() -> None:
    vectors = np.ones((3, 7), np.float32)
    with pytest.raises(ShapeError, match="the quantizer was trained on another embedder"):
        find_free_ids(lambda some: vectors[some], make_quantizer((2, 3), seed=0), np.zeros((1, 2), np.uint8), rows=3)


def ids_of(run: Path) -> list[tuple[int, ...]]:
    return pl.read_parquet(published(run) / "semantic_ids.parquet").select("c0", "c1").rows()


def test_lot_after_lot_gets_new_ids_and_none_is_moved(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lots = np.split(clustered_vectors(230, 12), [100, 150, 200])
    for number, lot in enumerate(lots):
        np.save(
            tmp_path / f"{number}.npy", np.concatenate([lot, lots[0][:5], lots[1][:5]])[: 10_000 if number else 100]
        )
    shape = ["--shape", "16x14", "--mapping", "capacity"]
    assert main(["tokenize", str(tmp_path / "0.npy"), *shape, "--out", str(tmp_path / "run0")]) == 0
    for number in (1, 2):
        model = published(tmp_path / f"run{number - 1}") / "model"
        before = {path.name: path.read_bytes() for path in model.resolve().iterdir()}
        arguments = ["encode", str(model), str(tmp_path / f"{number}.npy"), "--unique"]
        assert main([*arguments, "--out", str(tmp_path / f"run{number}")]) == 0
        assert {path.name: path.read_bytes() for path in model.resolve().iterdir()} == before
    first, second, third = (ids_of(tmp_path / f"run{number}") for number in range(3))
    assert len(set(first)) == 100
    assert len({*first, *second[:50], *third[:50]}) == 200
    assert second[50:55] == third[50:55] == first[:5]
    assert third[55:60] == second[:5]
    model = published(tmp_path / "run2") / "model"
    assert sorted(path.name for path in model.resolve().glob("known*")) == [
        "known-00001.parquet",
        "known-00002.parquet",
        "known.parquet",
    ]
    assert read_sealed_json(model / "manifest.json")["stage"] == "model"
    # 24 of 224 IDs are left: refused before anything is encoded.
    capsys.readouterr()
    assert main(["encode", str(model), str(tmp_path / "3.npy"), "--unique", "--out", str(tmp_path / "run3")]) == 64
    assert "a free ID for each of 30 new contents, got 24 free of 224" in capsys.readouterr().err
    assert not list((tmp_path / "run3" / "stages").glob("vectors-*"))
    # Without the flag they get what the rule gives, and may share.
    assert main(["encode", str(model), str(tmp_path / "3.npy"), "--out", str(tmp_path / "run3")]) == 0
    assert json.loads((published(tmp_path / "run3") / "report.json").read_text())["items"] == 40


def test_a_model_that_does_not_know_its_ids_gives_no_unique_ones(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    np.save(tmp_path / "items.npy", clustered_vectors(100, 12))
    assert main(["tokenize", str(tmp_path / "items.npy"), "--shape", "8x4", "--out", str(tmp_path / "run")]) == 0
    model = str(published(tmp_path / "run") / "model")
    assert main(["encode", model, str(tmp_path / "items.npy"), "--unique", "--out", str(tmp_path / "new")]) == 64
    assert "expected a model of the mapping capacity" in capsys.readouterr().err
