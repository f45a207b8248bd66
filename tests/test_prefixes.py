"""Codes within bounds at every depth, and codebooks re-fitted to them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semids import capacity, prefixes
from semids.arrays import capacity_of
from semids.capacity import Bounds, resolve_bounds
from semids.prefixes import assign_within_bounds, refit_jointly
from semids.residual import PriceTable, ResidualCodebooks


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
        patch.setattr(prefixes, "BLOCK_BYTES", data.draw(st.sampled_from([4, 400, 1 << 20])))
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


def test_refitted_codebooks_are_the_least_squares_solution(vectors: np.ndarray) -> None:
    sizes = (6, 5, 4)
    books = make_codebooks(sizes, 24)
    codes = np.stack([np.random.default_rng(n).integers(0, size, len(vectors)) for n, size in enumerate(sizes)], axis=1)
    fitted = refit_jointly(lambda some: vectors[some], codes.astype(np.uint8), books)
    indicators = np.concatenate([np.eye(size)[codes[:, n]] for n, size in enumerate(sizes)], axis=1)
    best = indicators @ np.linalg.lstsq(indicators, vectors.astype(np.float64), rcond=None)[0]
    ours = sum(book[codes[:, n]] for n, book in enumerate(fitted))
    assert np.abs(ours - best).max() < 1e-5


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
