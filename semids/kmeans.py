"""Codebooks from a sample: k-means as FAISS runs it, with the degenerate cases settled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semids.arrays import Vectors
from semids.errors import UsageError

ROWS_PER_CODEWORD = 1024
"""Training rows a codeword: 256, FAISS's habit, costs 2 % of error; more than 1,024 gains under 0.5 %."""
SAMPLE_BYTES = 4 << 30
"""Largest training sample: 1,024 rows a codeword for up to 1,024 codewords of 1,024 dimensions, or 256 of 4,096."""

# What FAISS adds to its seed for every restart of its own.
RESTART_SEED = 15_486_557


@dataclass(frozen=True)
class CodebookFit:
    """A level's codebook and how its fit went.

    Args:
        codebook: (K, d) float32 codewords.
        mean_squared_error: mean squared distance of the training rows to their codeword before the last Lloyd step
            moved it, in squared units of the vectors: no less than that to the codebook.
        distinct_codewords: below K when the rows have fewer distinct values than the codebook has codewords.
    """

    codebook: NDArray[np.float32]
    mean_squared_error: float
    distinct_codewords: int


def training_budget(size: int, dimensions: int) -> int:
    """Return how many rows of so many dimensions, as float32, codebooks of `size` codewords are fitted to."""
    return min(ROWS_PER_CODEWORD * size, SAMPLE_BYTES // (np.dtype(np.float32).itemsize * dimensions))


def sample_rows(rows: int, size: int, *, seed: int) -> NDArray[np.int64]:
    """Return min(rows, size) different row numbers below `rows`, sorted, drawn by `seed`; int64."""
    if size >= rows:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, size, replace=False, shuffle=False))


def fit_codebook(
    rows: Vectors,
    size: int,
    *,
    iterations: int,
    restarts: int,
    seed: int,
    done: Callable[[int], None] = lambda steps: None,
) -> CodebookFit:
    """Find `size` codewords that lie close to the rows (Lloyd 1982, as `faiss.Kmeans` runs it).

    Rows with at most `size` distinct values become the codebook themselves; the places left over repeat
    the first codeword, which no nearest-codeword search prefers to its first copy.

    Args:
        rows: (n, d) float32.
        iterations: Lloyd steps of each restart; 1 leaves codewords near random rows, beyond 50 gains little.
        restarts: independent starts of which the one with the lowest error is kept.
        done: called with the number of Lloyd steps taken, of iterations × restarts in all.

    Raises:
        ShapeError: the rows are not 2-D, not floating point, or not finite.
        UsageError: FAISS is not installed.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    distinct = distinct_rows(rows, at_most=size)
    if distinct is not None:
        codebook = np.concatenate([distinct, np.repeat(distinct[:1], size - len(distinct), axis=0)])
        return CodebookFit(codebook, 0.0, len(distinct))
    faiss = _import_faiss()
    least, codebook = np.inf, np.empty((0, rows.shape[1]), np.float32)
    for restart in range(restarts):
        centroids: NDArray[np.float32] | None = None
        objective = np.inf
        # One step a call, so that each can be told of; FAISS takes the same steps in one call.
        for iteration in range(iterations):
            kmeans = faiss.Kmeans(
                rows.shape[1],
                size,
                niter=1,
                seed=(seed + restart * RESTART_SEED) % (1 << 31),
                # The caller has drawn the sample: FAISS must neither thin it nor warn that it is small.
                max_points_per_centroid=len(rows),
                min_points_per_centroid=1,
            )
            objective = float(kmeans.train(rows, init_centroids=centroids))
            centroids = np.array(kmeans.centroids)
            done(restart * iterations + iteration + 1)
        if centroids is not None and (restart == 0 or objective < least):
            least, codebook = objective, centroids
    return CodebookFit(codebook, least / len(rows), size)


def distinct_rows(rows: NDArray[np.float32], *, at_most: int) -> NDArray[np.float32] | None:
    """Return the distinct rows, sorted, if there are at most `at_most` of them; otherwise None."""
    # A prefix almost always settles the question, and sorting the whole sample would cost more than k-means.
    for end in (4 * at_most, len(rows)):
        distinct: NDArray[np.float32] = np.unique(rows[:end], axis=0)
        if len(distinct) > at_most:
            return None
    return distinct


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise UsageError("training codebooks needs FAISS: install semids[cpu] or semids[gpu], never both") from error
    return faiss
