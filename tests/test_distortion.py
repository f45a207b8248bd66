"""Distortion and neighbours of codes against brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from semids.distortion import Distortion, neighbour_figures
from semids.errors import ShapeError


def relative_mse(
    vectors: NDArray[Any], errors: NDArray[Any], weights: NDArray[Any], *, chunk: int
) -> tuple[float, ...] | None:
    distortion = Distortion(vectors.shape[1], errors.shape[1])
    for start in range(0, len(vectors), chunk):
        distortion.add(*(array[start : start + chunk] for array in (vectors, errors, weights)))
    return distortion.relative_mse


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_relative_mse_equals_the_definition_far_from_the_origin_too(offset: float, chunk: int) -> None:
    generator = np.random.default_rng(0)
    vectors = (generator.standard_normal((1000, 16)) + offset).astype(np.float32)
    vectors[500:] += 3
    errors = generator.random((1000, 3))
    weights = generator.integers(0, 5, 1000).astype(np.uint32)
    repeated = np.repeat(vectors.astype(np.float64), weights, axis=0)
    expected = np.repeat(errors, weights, axis=0).sum(axis=0) / ((repeated - repeated.mean(axis=0)) ** 2).sum()
    assert relative_mse(vectors, errors, weights, chunk=chunk) == pytest.approx(expected, rel=1e-5)


def test_half_precision_vectors_give_the_same_relative_mse() -> None:
    generator = np.random.default_rng(1)
    vectors = generator.standard_normal((500, 8)).astype(np.float16)
    errors, weights = generator.random((500, 2)), np.ones(500, dtype=np.uint32)
    expected = relative_mse(vectors.astype(np.float64), errors, weights, chunk=500)
    assert relative_mse(vectors, errors, weights, chunk=50) == pytest.approx(expected, rel=1e-5)


def test_merged_distortion_equals_that_of_all_rows() -> None:
    generator = np.random.default_rng(2)
    vectors, errors = generator.standard_normal((300, 4)).astype(np.float32), generator.random((300, 2))
    weights = np.ones(300, dtype=np.uint32)
    parts = [Distortion(4, 2) for _ in range(3)]
    for part, rows in zip(parts, np.split(np.arange(300), [10, 200]), strict=True):
        part.add(vectors[rows], errors[rows], weights[rows])
    total = Distortion(4, 2)
    for part in parts:
        total.merge(part)
    assert total.relative_mse == pytest.approx(relative_mse(vectors, errors, weights, chunk=300))
    with pytest.raises(ShapeError, match="expected sums over 4 dimensions and 2 levels, got 4 and 3"):
        total.merge(Distortion(4, 3))


def test_constant_data_has_no_relative_mse_and_says_so() -> None:
    vectors = np.tile(np.random.default_rng(0).standard_normal(32).astype(np.float32), (1000, 1))
    distortion = Distortion(32, 2)
    assert (distortion.relative_mse, distortion.undefined_reason) == (None, "no vectors")
    for start in range(0, 1000, 300):
        rows = slice(start, start + 300)
        distortion.add(vectors[rows], np.ones((1000, 2))[rows], np.arange(1000)[rows])
    assert distortion.relative_mse is None
    assert "all vectors are equal" in str(distortion.undefined_reason)
    distortion.add(vectors[:1] + 1, np.ones((1, 2)), np.ones(1))
    assert distortion.relative_mse is not None
    assert distortion.undefined_reason is None


def test_distortion_refuses_rows_that_do_not_fit() -> None:
    distortion = Distortion(4, 2)
    vectors, errors, weights = np.zeros((3, 4), np.float32), np.zeros((3, 2)), np.ones(3)
    with pytest.raises(ShapeError, match=r"expected vectors of shape \(n, 4\), got \(3, 5\)"):
        distortion.add(np.zeros((3, 5), np.float32), errors, weights)
    with pytest.raises(ShapeError, match=r"expected squared errors of shape \(3, 2\)"):
        distortion.add(vectors, errors[:, :1], weights)
    with pytest.raises(ShapeError, match="a NaN or an infinity"):
        distortion.add(vectors, errors, np.array([1, np.nan, 1]))
    with pytest.raises(ShapeError, match="non-negative weights"):
        distortion.add(vectors, errors, -weights)
    with pytest.raises(ShapeError, match="NaN"):
        distortion.add(vectors, errors * np.nan, weights)


def brute_force_neighbours(
    vectors: NDArray[Any], reconstructions: NDArray[Any], codes: NDArray[Any], queries: NDArray[Any], k: int
) -> tuple[float, list[float]]:
    """Recall and prefix agreement by sorting, each tie between reconstructions of equal codes shared out."""
    recalls: list[float] = []
    agreement = np.zeros(codes.shape[1])
    ids = [tuple(row) for row in codes.tolist()]

    def cosines(rows: NDArray[Any], query: int) -> NDArray[Any]:
        rows = rows.astype(np.float64)
        return rows @ rows[query] / np.linalg.norm(rows, axis=1) / np.linalg.norm(rows[query])

    for query in queries.tolist():
        others = [row for row in range(len(vectors)) if row != query]
        true, found = cosines(vectors, query), cosines(reconstructions, query)
        nearest = sorted(others, key=lambda row, true=true: (-true[row], row))[:k]
        left, overlap = k, 0.0
        for identifier in sorted(set(ids), key=lambda entry, found=found: -found[ids.index(entry)]):
            members = [row for row in others if ids[row] == identifier]
            if members and left:
                share = min(1.0, left / len(members))
                overlap += share * len(set(members) & set(nearest))
                left -= min(left, len(members))
        recalls.append(overlap / k)
        for depth in range(codes.shape[1]):
            agreement[depth] += sum(ids[row][: depth + 1] == ids[query][: depth + 1] for row in nearest) / k
    return float(np.mean(recalls)), (agreement / len(queries)).tolist()


@pytest.mark.parametrize("codebook", [2, 4, 30])
def test_neighbour_figures_equal_brute_force(codebook: int) -> None:
    generator = np.random.default_rng(codebook)
    codes = generator.integers(0, codebook, (120, 2)).astype(np.uint8)
    codebooks = generator.standard_normal((2, codebook, 6))
    reconstructions = (codebooks[0][codes[:, 0]] + 0.5 * codebooks[1][codes[:, 1]]).astype(np.float32)
    vectors = (reconstructions + 0.4 * generator.standard_normal((120, 6))).astype(np.float32)
    figures = neighbour_figures(vectors, reconstructions, codes, queries=40, k=5)
    queries = np.arange(40) * 120 // 40
    recall, agreement = brute_force_neighbours(vectors, reconstructions, codes, queries, 5)
    assert (figures.sample, figures.queries, figures.k) == (120, 40, 5)
    assert figures.recall == pytest.approx(recall)
    assert figures.prefix_agreement == pytest.approx(agreement)
    ids = codes.tolist()
    pairs = [(a, b) for a in range(120) for b in range(120) if a != b]
    chance = [sum(ids[a][:depth] == ids[b][:depth] for a, b in pairs) / len(pairs) for depth in (1, 2)]
    assert figures.chance == pytest.approx(chance)


def test_recall_is_one_for_perfect_reconstructions_and_chance_for_one_id() -> None:
    vectors = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    own = np.stack([np.arange(300) // 20, np.arange(300) % 20], axis=1).astype(np.uint16)
    assert neighbour_figures(vectors, vectors, own, queries=300).recall == 1
    one = neighbour_figures(vectors, np.ones_like(vectors), np.zeros((300, 2), np.uint8), queries=300)
    assert one.recall == pytest.approx(10 / 299)
    assert one.prefix_agreement == one.chance == (1.0, 1.0)


def test_recall_does_not_depend_on_the_order_of_rows_or_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    vectors = generator.standard_normal((200, 6)).astype(np.float32)
    codes = generator.integers(0, 3, (200, 2)).astype(np.uint8)
    reconstructions = generator.standard_normal((9, 6)).astype(np.float32)[codes[:, 0] * 3 + codes[:, 1]]
    order = generator.permutation(200)
    figures = neighbour_figures(vectors, reconstructions, codes, queries=200)
    shuffled = neighbour_figures(vectors[order], reconstructions[order], codes[order], queries=200)
    assert shuffled.recall == pytest.approx(figures.recall)
    assert shuffled.prefix_agreement == pytest.approx(figures.prefix_agreement)
    monkeypatch.setattr("semids.distortion.BLOCK_NUMBERS", 1000)
    assert neighbour_figures(vectors, reconstructions, codes, queries=200).recall == pytest.approx(figures.recall)


def test_small_samples_have_fewer_neighbours_and_one_vector_has_none() -> None:
    vectors = np.eye(4, dtype=np.float32)
    codes = np.arange(4, dtype=np.uint8)[:, None]
    assert neighbour_figures(vectors, vectors, codes, queries=10) == neighbour_figures(
        vectors, vectors, codes, queries=4
    )
    assert neighbour_figures(vectors, vectors, codes, queries=10).k == 3
    single = neighbour_figures(vectors[:1], vectors[:1], codes[:1], queries=10)
    assert (single.k, single.recall, single.prefix_agreement) == (0, None, None)


def test_zero_and_enormous_reconstructions_have_finite_figures() -> None:
    vectors = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    reconstructions = vectors * np.float32(1e30)
    reconstructions[:5] = 0
    codes = np.arange(30, dtype=np.uint8)[:, None]
    codes[:5] = 0
    recall = neighbour_figures(vectors, reconstructions, codes, queries=30).recall
    assert recall is not None
    assert 0 < recall < 1
    with pytest.raises(ShapeError, match="expected finite reconstructions"):
        neighbour_figures(vectors, vectors * np.nan, codes, queries=3)
    with pytest.raises(ShapeError, match=r"expected reconstructions of shape \(30, 4\)"):
        neighbour_figures(vectors, vectors[:, :2], codes, queries=3)
