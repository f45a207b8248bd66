"""Codes within bounds at every depth, and codebooks re-fitted to them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semids import blocks, capacity, pipeline, prefixes
from semids.arrays import capacity_of
from semids.blocks import KeptBlocks, Placement
from semids.capacity import Bounds, Loads, resolve_bounds
from semids.config import BuildConfig, make_config
from semids.prefixes import assign_within_bounds
from semids.quantizers import _bounded
from semids.refits import refit_jointly
from semids.residual import PriceTable, ResidualCodebooks
from semids.shards import EVERY
from semids.stages import Ref, Stage, make_shards, run_stage


def make_codebooks(sizes: tuple[int, ...], dimensions: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple((rng.normal(size=(size, dimensions)) / 3 / 2**n).astype(np.float32) for n, size in enumerate(sizes))


def loads_by_prefix(codes: np.ndarray, depth: int) -> np.ndarray:
    return np.unique(codes[:, :depth], axis=0, return_counts=True)[1]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_prefix_is_within_its_bounds_and_the_floor_is_reached(data: st.DataObject) -> None:
    sizes = tuple(data.draw(st.lists(st.integers(2, 7), min_size=1, max_size=4)))
    rows = data.draw(st.integers(1, 200))
    vectors = np.random.default_rng(rows).normal(size=(rows, 6)).astype(np.float32)
    bounds = resolve_bounds(rows, capacity_of(sizes), least="auto", most="auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capacity, "EXACT_ENTRIES", data.draw(st.sampled_from([0, 100, 1 << 18])))
        patch.setattr(blocks, "BLOCK_BYTES", data.draw(st.sampled_from([4, 400, 1 << 20])))
        found = assign_within_bounds(
            lambda some: vectors[some], make_codebooks(sizes, 6), bounds, rows=rows, contents=rows
        )
    assert bounds.most is not None
    for depth in range(1, len(sizes) + 1):
        ids = capacity_of(sizes[depth:])
        loads = loads_by_prefix(found.codes, depth)
        assert loads.max() <= bounds.most * ids
        assert bounds.least == 0 or (len(loads) == capacity_of(sizes[:depth]) and loads.min() >= bounds.least * ids)
    assert len(loads_by_prefix(found.codes, len(sizes))) == min(rows, capacity_of(sizes))


def test_without_bounds_codes_are_those_of_the_nearest_mapping(vectors: np.ndarray) -> None:
    books = make_codebooks((16, 8, 4), 24)
    found = assign_within_bounds(
        lambda some: vectors[some], books, Bounds(0, None), rows=len(vectors), contents=len(vectors)
    )
    nearest = ResidualCodebooks(books, tuple(np.zeros(len(book), np.float32) for book in books))
    assert np.array_equal(found.codes, nearest.encode(vectors))
    assert [level.moved for level in found.levels] == [0, 0, 0]
    assert all(len(table.prefixes) == 0 for table in found.prices)


@pytest.mark.parametrize("product_bytes", [1 << 30, 0])
def test_the_frozen_rule_differs_from_the_exact_codes_only_where_rounding_moved_rows(
    product_bytes: int, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("semids.residual.PRODUCT_BYTES", product_bytes)
    books = make_codebooks((12, 12, 16), 24)
    found = assign_within_bounds(
        lambda some: vectors[some], books, Bounds(0, 1), rows=len(vectors), contents=len(vectors)
    )
    frozen = ResidualCodebooks(books, tuple(np.zeros(len(book), np.float32) for book in books), found.prices)
    ruled = frozen.encode(vectors)
    first = (ruled[:, 0] != found.codes[:, 0]).sum()
    assert first == found.levels[0].moved
    same_first = ruled[:, 0] == found.codes[:, 0]
    assert (ruled[same_first, 1] != found.codes[same_first, 1]).sum() <= found.levels[1].moved
    # Where prices were left out, the first level would hold far more than its IDs allow.
    bare = ResidualCodebooks(books, frozen.potentials).encode(vectors)
    limit = 12 * 16
    assert np.bincount(bare[:, 0]).max() > 1.5 * limit
    assert np.bincount(ruled[:, 0]).max() <= 1.05 * limit


def test_a_part_of_the_rows_has_its_part_of_the_bounds(vectors: np.ndarray) -> None:
    books = make_codebooks((8, 8), 24)
    found = assign_within_bounds(
        lambda some: vectors[some], books, Bounds(0, 80), rows=len(vectors), contents=2 * len(vectors)
    )
    assert np.bincount(found.codes[:, 0]).max() <= 80 * 8 / 2
    assert loads_by_prefix(found.codes, 2).max() <= 40


def test_refitted_codebooks_are_the_least_squares_solution(
    vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("semids.refits.SOLVED_COLUMNS", 7)
    sizes = (6, 5, 4)
    books = make_codebooks(sizes, 24)
    codes = np.stack([np.random.default_rng(n).integers(0, size, len(vectors)) for n, size in enumerate(sizes)], axis=1)
    fitted = refit_jointly(lambda some: vectors[some], codes.astype(np.uint8), books)
    indicators = np.concatenate([np.eye(size)[codes[:, n]] for n, size in enumerate(sizes)], axis=1)
    best = indicators @ np.linalg.lstsq(indicators, vectors.astype(np.float64), rcond=None)[0]
    before, after = (sum(book[codes[:, n]] for n, book in enumerate(each)) for each in (books, fitted))
    excess = [float(np.square(vectors - each).sum() - np.square(vectors - best).sum()) for each in (before, after)]
    # Conjugate gradients end at a hundredth of the slope that they begin with: a ten-thousandth of the error.
    assert 0 <= excess[1] <= 1e-4 * excess[0]


def test_a_codeword_that_no_row_has_stays_where_it_was(vectors: np.ndarray) -> None:
    books = make_codebooks((4, 4), 24)
    codes = np.zeros((len(vectors), 2), np.uint8)
    codes[::2, 0] = 1
    fitted = refit_jointly(lambda some: vectors[some], codes, books)
    assert np.allclose(fitted[0][2:], books[0][2:], atol=1e-6)
    assert np.allclose(fitted[1][1:], books[1][1:], atol=1e-6)


def test_prices_are_found_by_their_prefix() -> None:
    table = PriceTable(np.array([3, 7]), np.array([[1, 2], [3, 4]], np.float32))
    assert table.find(7) is not None
    assert table.find(7).tolist() == [3, 4]  # type: ignore[union-attr]
    assert table.find(4) is None
    assert table.find(9) is None
    costs = np.zeros((4, 2), np.float32)
    table.subtract(costs, np.array([7, 0, 3, 9]))
    assert costs.tolist() == [[-3, -4], [0, 0], [-1, -2], [0, 0]]


def level_of(vectors: np.ndarray, folder: Path | None = None, lot: slice = EVERY) -> Placement:
    """The second level of two, in blocks of a few prefixes each; the loads of some of them are beyond their bounds."""
    books = make_codebooks((40, 8), 24)
    quantizer = prefixes.nearest_quantizer(books)
    before = quantizer.assign(vectors)[:, :1].astype(np.uint8)
    bounds = Bounds(0, int(np.bincount(before[:, 0]).max()) // 8 + 1)
    return prefixes.assign_level(
        lambda some: vectors[some], quantizer, before, bounds, contents=len(vectors), kept=KeptBlocks(folder, lot)
    )


def equal_levels(one: Placement, other: Placement) -> bool:
    tables = [(level.codes, level.prices.prefixes, level.prices.values) for level in (one, other)]
    same = all(np.array_equal(left, right) for left, right in zip(*tables, strict=True))
    return same and (one.moved, one.converged) == (other.moved, other.converged)


def test_small_prefixes_are_placed_together_as_they_are_one_by_one(
    vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = level_of(vectors)
    assert together.moved

    def none_fits(dense: np.ndarray, lengths: np.ndarray, loads: Loads) -> tuple[np.ndarray, np.ndarray]:
        return dense.argmin(axis=1), np.zeros(len(lengths), np.bool_)

    real = prefixes._nearest_within
    shares: list[float] = []

    def watched(dense: np.ndarray, lengths: np.ndarray, loads: Loads) -> tuple[np.ndarray, np.ndarray]:
        nearest, fits = real(dense, lengths, loads)
        shares.append(fits.mean())
        return nearest, fits

    monkeypatch.setattr(prefixes, "_nearest_within", watched)
    level_of(vectors)
    assert 0 < np.mean(shares) < 1
    monkeypatch.setattr(prefixes, "_nearest_within", none_fits)
    assert equal_levels(level_of(vectors), together)


def test_blocks_that_are_done_are_not_placed_again_but_where_they_are_damaged(
    vectors: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4 * 8 * 60)
    whole = level_of(vectors)
    assert equal_levels(level_of(vectors, tmp_path / "one"), whole)
    for lot in range(3):
        level_of(vectors, tmp_path / "lots", slice(lot, None, 3))
    assert len(list((tmp_path / "lots").glob("*.json"))) > 6
    placed: list[int] = []
    place = prefixes._Placer.place

    def watched(placer: Any, block: Any, done: Any) -> Any:
        placed.append(len(block.rows))
        return place(placer, block, done)

    monkeypatch.setattr(prefixes._Placer, "place", watched)
    assert equal_levels(level_of(vectors, tmp_path / "lots"), whole)
    assert placed == []
    damaged = tmp_path / "lots" / "block-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    (tmp_path / "lots" / "block-00004.json").unlink()
    assert equal_levels(level_of(vectors, tmp_path / "lots"), whole)
    assert len(placed) == 2
    assert "a block of prefixes cannot be used, and is placed again: " in caplog.text
    assert equal_levels(level_of(vectors, tmp_path / "lots"), whole)
    assert len(placed) == 2


def test_a_level_made_in_lots_is_the_level_made_at_once(
    vectors: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As machines that share the folder make it: each a lot, and one of them the whole, of what the lots left."""
    np.save(tmp_path / "vectors.npy", vectors)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4 * 16 * 100)
    kept: dict[str, int] = {}
    place = prefixes._Placer.place

    def build(name: str, *, lots: int) -> Ref:
        config = make_config(
            BuildConfig,
            {
                "catalogue": {"path": str(tmp_path / "vectors.npy")},
                "shape": "8x16x32",
                "mapping": "capacity",
                "options": {"residual_kmeans": {"restarts": 1, "iterations": 2}},
                "out": str(tmp_path / name),
            },
            source="the test",
        )
        out = Path(config.out)

        def run(stage: Stage) -> Ref:
            if not lots or stage.shards == 1 or "placed" not in stage.name:
                return run_stage(out, stage)
            for lot in range(lots):
                make_shards(out, stage, lot=lot, lots=lots)
            (folder,) = out.glob(f"stages/{stage.name}-*")
            kept[stage.name] = len(list(folder.glob(".kept-training/block-*.json")))
            prefixes._Placer.place = None
            try:
                return run_stage(out, stage)
            finally:
                prefixes._Placer.place = place
                assert not list(folder.glob(".kept-*"))

        items = run(pipeline.scan_catalogue(config))
        return pipeline.train_quantizer(config, items, run(pipeline.make_vectors(config, items)), run)

    alone, shared = build("alone", lots=0), build("shared", lots=3)
    assert alone.digest == shared.digest
    assert set(kept) == {"train-placed-2", "train-placed-3"}
    assert min(kept.values()) > 3


def test_coarse_rounds_see_whole_prefixes_and_never_few_of_them() -> None:
    many = np.random.default_rng(4).integers(0, 4000, 100_000)
    part = _bounded._part_of_prefixes(many, seed=0)
    assert not isinstance(part, slice)
    assert 20_000 < len(part) <= 25_000
    assert len(np.flatnonzero(np.isin(many, many[part]))) == len(part)
    # A quarter of these rows would be those of one prefix or two.
    assert _bounded._part_of_prefixes(np.arange(100_000) % 7, seed=0) == EVERY
    assert _bounded._part_of_prefixes(many[:50], seed=0) == EVERY
