"""What reconstructions lose: relative MSE by depth, 10-NN recall and prefix agreement. Numbers in, numbers out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semids.arrays import Codes, Vectors, check_vectors, widen
from semids.errors import ShapeError
from semids.parallel import in_order, slices

# Numbers per block: the temporaries of a block take some tens of megabytes.
BLOCK_NUMBERS = 1 << 21


class Distortion:
    """Relative MSE by depth of one split, accumulated over chunks in O(d) memory.

    Relative MSE at depth l is Σ w‖x − x̂_l‖² / Σ w‖x − x̄‖², with x̂_l the reconstruction from the first l codes
    and x̄ the weighted mean of the split. Means and scatters of blocks are combined by Chan, Golub and LeVeque
    (1979), eq. 2.1: Σ w‖x‖² − W‖x̄‖² would cancel on data far from the origin.
    """

    def __init__(self, dimensions: int, levels: int) -> None:
        """Start with no vectors; `dimensions` is d, `levels` is L."""
        self._weight = 0.0
        self._mean = np.zeros(dimensions, dtype=np.float64)
        self._scatter = 0.0
        self._errors = np.zeros(levels, dtype=np.float64)

    def add(self, vectors: Vectors, squared_errors: NDArray[np.floating[Any]], weights: NDArray[Any]) -> None:
        """Add rows.

        Args:
            vectors: (n, d) input vectors.
            squared_errors: (n, L) ‖x − x̂_l‖² in squared units of the vectors, depth 1 first.
            weights: (n,) non-negative, such as the number of items of each content; 0 leaves a row out.

        Raises:
            ShapeError: shapes that disagree, a negative weight, or a non-finite number.
        """
        expected = (len(vectors), len(self._errors))
        if vectors.ndim != 2 or vectors.shape[1] != len(self._mean):
            raise ShapeError(f"expected vectors of shape (n, {len(self._mean)}), got {vectors.shape}")
        if squared_errors.shape != expected or weights.shape != expected[:1]:
            raise ShapeError(
                f"expected squared errors of shape {expected} and weights of shape {expected[:1]}, "
                f"got {squared_errors.shape} and {weights.shape}"
            )
        if len(weights) and weights.min() < 0:
            raise ShapeError(f"expected non-negative weights, got {weights.min()}")
        rows = max(1, BLOCK_NUMBERS // len(self._mean))
        for start in range(0, len(vectors), rows):
            block = slice(start, start + rows)
            present = weights[block] != 0
            here = block if present.all() else start + np.flatnonzero(present)
            if present.any():
                self._add_block(vectors[here], squared_errors[here], weights[here].astype(np.float64))

    def _add_block(self, vectors: Vectors, squared_errors: NDArray[Any], weights: NDArray[np.float64]) -> None:
        # Relative to the first row, equal rows give exactly 0, and float32 holds what is left of far-off data.
        offsets = np.empty(vectors.shape, np.result_type(vectors.dtype, np.float32))
        if offsets.dtype == np.float32:
            widen(vectors, out=offsets)
        else:
            offsets[...] = vectors
        origin = offsets[0].copy()
        offsets -= origin
        weight = float(weights.sum())
        mean = (weights.astype(offsets.dtype) @ offsets) / offsets.dtype.type(weight)
        offsets -= mean
        scatter = float(weights @ np.einsum("nd,nd->n", offsets, offsets))
        errors = weights @ squared_errors.astype(np.float64)
        if not (math.isfinite(scatter) and np.isfinite(errors).all()):
            raise ShapeError("expected finite vectors and squared errors, got a NaN or an infinity")
        self._errors += errors
        self._merge_scatter(weight, origin.astype(np.float64) + mean, scatter)

    def _merge_scatter(self, weight: float, mean: NDArray[np.float64], scatter: float) -> None:
        total = self._weight + weight
        if total > 0:
            difference = mean - self._mean
            between = float(difference @ difference) * self._weight * weight / total
            self._scatter += scatter + between
            self._mean += difference * (weight / total)
            self._weight = total

    def merge(self, other: Distortion) -> None:
        """Add all that another accumulator of the same d and L has seen.

        Raises:
            ShapeError: another number of dimensions or levels.
        """
        if self._mean.shape != other._mean.shape or self._errors.shape != other._errors.shape:
            raise ShapeError(
                f"expected sums over {len(self._mean)} dimensions and {len(self._errors)} levels, "
                f"got {len(other._mean)} and {len(other._errors)}"
            )
        self._errors += other._errors
        self._merge_scatter(other._weight, other._mean, other._scatter)

    @property
    def relative_mse(self) -> tuple[float, ...] | None:
        """Relative MSE at depths 1 to L, or None where it is not defined: `undefined_reason` says why."""
        return None if self._scatter == 0 else tuple((self._errors / self._scatter).tolist())

    @property
    def undefined_reason(self) -> str | None:
        """Why there is no relative MSE: no vectors, or all of them equal; None if there is one."""
        if self._weight == 0:
            return "no vectors"
        return (
            "all vectors are equal, so there is no variance to compare the errors with" if not self._scatter else None
        )


@dataclass(frozen=True)
class NeighbourFigures:
    """How far IDs and reconstructions keep an item's nearest neighbours.

    Args:
        sample: vectors among which neighbours were sought.
        queries: vectors whose neighbours were sought, evenly spaced in the sample.
        k: neighbours of each; fewer than asked if the sample is smaller.
        recall: mean share of the true k nearest that are among the k nearest of the reconstructions, in [0, 1];
            None if the sample has fewer than two vectors.
        prefix_agreement: share of true neighbours with the query's first l codes, for l = 1 to L.
        chance: the same share for two different vectors drawn at random from the sample.
    """

    sample: int
    queries: int
    k: int
    recall: float | None
    prefix_agreement: tuple[float, ...] | None
    chance: tuple[float, ...] | None


def neighbour_figures(
    vectors: Vectors, reconstructions: Vectors, codes: Codes, *, queries: int, k: int = 10
) -> NeighbourFigures:
    """Compare the cosine k nearest neighbours among vectors with those among their reconstructions.

    A query is never its own neighbour. True neighbours at equal similarity are taken in row order. Rows with
    equal codes have equal reconstructions, so all rows of an ID tie: which of them are among the k nearest is
    left to chance, and recall is its expectation over fair draws, which depends on no order of rows. With one
    ID for all, that is k / (m − 1).

    Args:
        vectors: (m, d) float, usually of distinct contents: exact duplicates make neighbours trivial.
        reconstructions: (m, d) float; a row must be a function of the row's codes, and that of an ID's first
            row stands for all of them. A zero row has similarity 0 to everything.
        codes: (m, L).
        queries: at most this many rows are queries. O(queries · m · d) time, blocks of some tens of megabytes.
        k: neighbours of a query; more makes recall higher and coarser.

    Raises:
        ShapeError: shapes disagree, vectors are not usable (see `check_vectors`), a reconstruction is not finite.
    """
    check_vectors(vectors)
    if reconstructions.shape != vectors.shape or codes.ndim != 2 or len(codes) != len(vectors):
        raise ShapeError(
            f"expected reconstructions of shape {vectors.shape} and codes of shape ({len(vectors)}, L), "
            f"got {reconstructions.shape} and {codes.shape}"
        )
    if not np.isfinite(reconstructions).all():
        raise ShapeError("expected finite reconstructions, got a NaN or an infinity")
    m = len(vectors)
    queries, k = min(queries, m), min(k, m - 1)
    if queries < 1 or k < 1:
        return NeighbourFigures(m, max(queries, 0), max(k, 0), None, None, None)
    _, first_rows, group_of_row, group_sizes = np.unique(
        codes, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    unit_vectors, unit_groups = _unit_rows(vectors), _unit_rows(reconstructions[first_rows])
    query_rows = np.arange(queries, dtype=np.int64) * m // queries

    def compare(part: slice) -> tuple[float, NDArray[np.int64]]:
        block = query_rows[part]
        similarities = unit_vectors[block] @ unit_vectors.T
        similarities[np.arange(len(block)), block] = -np.inf
        true_rows = _largest(similarities, k)
        chances = _chances_among_nearest(unit_groups, group_sizes, group_of_row[block], group_of_row[true_rows], k)
        same = codes[true_rows] == codes[block][:, None, :]
        return float(chances.sum()), np.logical_and.accumulate(same, axis=2).sum(axis=(0, 1))

    overlap, agreeing = 0.0, np.zeros(codes.shape[1], dtype=np.int64)
    for part_overlap, part_agreeing in in_order(compare, slices(queries, max(1, BLOCK_NUMBERS // m))):
        overlap += part_overlap
        agreeing += part_agreeing
    pairs = queries * k
    return NeighbourFigures(m, queries, k, overlap / pairs, tuple((agreeing / pairs).tolist()), _chance(codes))


def _chances_among_nearest(
    unit_groups: NDArray[np.float32],
    group_sizes: NDArray[np.int64],
    query_groups: NDArray[np.int64],
    neighbour_groups: NDArray[np.int64],
    k: int,
) -> NDArray[np.float64]:
    """Return the (b, k) chances that each neighbour is among the k nearest reconstructions of its query.

    Args:
        unit_groups: (G, d) unit reconstruction of each ID.
        group_sizes: (G,) rows of each ID.
        query_groups: (b,) ID of each query.
        neighbour_groups: (b, k) IDs of its true neighbours.
    """
    similarities = unit_groups[query_groups] @ unit_groups.T
    queries = np.arange(len(query_groups))
    # Exactly the query's own reconstruction: nearest of all, whatever rounding says.
    similarities[queries, query_groups] = np.inf
    # One group may have the query as its only row, so k + 1 groups always hold k other rows.
    nearest = _largest(similarities, min(k + 1, len(unit_groups)))
    sizes = group_sizes[nearest] - (nearest == query_groups[:, None])
    before = np.cumsum(sizes, axis=1) - sizes
    share = np.clip((k - before) / np.maximum(sizes, 1), 0, 1)
    found = neighbour_groups[:, :, None] == nearest[:, None, :]
    return np.where(found, share[:, None, :], 0.0).sum(axis=2)


def _largest(values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Return the (b, k) columns of the k largest of each row of (b, m) values, largest first, ties by column."""
    # argpartition picks among ties as it pleases: take all above the k-th largest, then the first ones equal to it.
    threshold = np.partition(values, values.shape[1] - k, axis=1)[:, -k, None]
    above, equal = values > threshold, values == threshold
    missing = k - np.count_nonzero(above, axis=1)
    chosen = above | (equal & (np.cumsum(equal, axis=1, dtype=np.int32) <= missing[:, None]))
    columns = np.nonzero(chosen)[1].reshape(len(values), k)
    order = np.argsort(-np.take_along_axis(values, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)


def _unit_rows(rows: Vectors) -> NDArray[np.float32]:
    # Scaled by the largest entry first: the square of 1e30 overflows float32.
    scaled = rows / np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.finfo(np.float32).tiny).astype(np.float32)
    norms = np.sqrt(np.einsum("nd,nd->n", scaled, scaled))[:, None]
    return (scaled / np.where(norms > 0, norms, 1)).astype(np.float32)


def _chance(codes: Codes) -> tuple[float, ...]:
    """Return, for depths 1 to L, the probability that two different rows share their first codes."""
    pairs = len(codes) * (len(codes) - 1)
    chances: list[float] = []
    for depth in range(1, codes.shape[1] + 1):
        counts = np.unique(codes[:, :depth], axis=0, return_counts=True)[1]
        chances.append(int((counts * (counts - 1)).sum()) / pairs)
    return tuple(chances)
