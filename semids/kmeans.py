"""Codebooks from a sample: k-means from spread starts, by FAISS or a CUDA device, with degenerate cases settled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from semids.arrays import Vectors
from semids.centroids import move_codewords
from semids.device import STEP_BYTES, DeviceLloyd, accelerator
from semids.errors import ShapeError, UsageError
from semids.memory import device_free_bytes
from semids.parallel import in_order, slices
from semids.starts import HostRows, StartRows, choose_starts, start_rows

ROWS_PER_CODEWORD = 1024
"""Training rows a codeword: 256, FAISS's habit, costs 2 % of error; more than 1,024 gains under 0.5 %."""
SAMPLE_BYTES = 4 << 30
"""Largest training sample: 1,024 rows a codeword for up to 1,024 codewords of 1,024 dimensions, or 256 of 4,096."""
PARTS, LEAST_PART_ROWS, MOST_PART_ROWS = 64, 256, 4096
"""Parts of the rows that threads search, and the fewest and the most rows of one."""


@dataclass(frozen=True)
class CodebookFit:
    """A level's codebook and how its fit went.

    Args:
        codebook: (K, d) float32 codewords.
        mean_squared_error: mean squared distance of the training rows, each counted once, to their codeword before
            the last Lloyd step moved it, in squared units of the vectors; without weights no less than to the codebook.
        distinct_codewords: below K when the rows have fewer distinct values than the codebook has codewords.
    """

    codebook: NDArray[np.float32]
    mean_squared_error: float
    distinct_codewords: int


def training_budget(size: int, dimensions: int) -> int:
    """Return how many rows of so many dimensions, as float32, codebooks of `size` codewords are fitted to."""
    return min(ROWS_PER_CODEWORD * size, SAMPLE_BYTES // (np.dtype(np.float32).itemsize * dimensions))


def sample_rows(rows: int, size: int, *, seed: int | np.random.Generator) -> NDArray[np.int64]:
    """Return min(rows, size) different row numbers below `rows`, sorted, drawn by `seed`; int64."""
    if size >= rows:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, size, replace=False, shuffle=False))


@dataclass(frozen=True)
class Lloyd:
    """How codewords are looked for.

    Args:
        iterations: Lloyd steps of each start; 2 leave 3 % more error than 10, beyond 50 gains little.
        restarts: independent starts of which the one with the lowest error is kept.
    """

    iterations: int
    restarts: int


def fit_codebook(
    rows: Vectors,
    size: int,
    lloyd: Lloyd,
    *,
    rng: np.random.Generator,
    weights: NDArray[np.float32] | None = None,
    done: Callable[[int], None] = lambda steps: None,
) -> CodebookFit:
    """Find `size` codewords that lie close to the rows (Lloyd 1982): by FAISS, or on a CUDA device with room for them.

    Rows with at most `size` distinct values become the codebook themselves; the places left over repeat
    the first codeword, which no nearest-codeword search prefers to its first copy.

    Args:
        rows: (n, d) float32.
        size: K, number of codewords.
        lloyd: how many steps and starts.
        rng: draws what each start begins from.
        weights: (n,) float32, how often each row counts; None is once.
        done: called with the number of Lloyd steps taken, of iterations × restarts in all.

    Raises:
        ShapeError: rows are not finite, or their squared lengths are not.
        UsageError: FAISS is not installed, and there is no CUDA device.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    # FAISS finds no codeword for others, and says nothing.
    unusable = np.count_nonzero(~np.isfinite(np.einsum("nd,nd->n", rows, rows)))
    if unusable:
        raise ShapeError(
            f"expected rows to train on whose squared lengths are finite, got {unusable} of {len(rows)} that are not: "
            "scale the vectors down or, where an encoder is trained, lower its learning rate"
        )
    distinct = distinct_rows(rows, at_most=size)
    if distinct is not None:
        codebook = np.concatenate([distinct, np.repeat(distinct[:1], size - len(distinct), axis=0)])
        return CodebookFit(codebook, 0.0, len(distinct))
    stepper = lloyd_stepper(rows, size, weights)
    least, codebook = np.inf, np.empty((0, rows.shape[1]), np.float32)
    for restart in range(lloyd.restarts):
        centroids, error = rows[draw_starts(stepper, rows, size, rng=rng)], np.inf
        for iteration in range(lloyd.iterations):
            centroids, error = stepper.step(centroids)
            done(restart * lloyd.iterations + iteration + 1)
        if restart == 0 or error < least:
            least, codebook = error, centroids
    return CodebookFit(codebook, least, size)


class LloydStepper(Protocol):
    """Takes Lloyd steps on some rows."""

    def select(self, numbers: NDArray[np.int64]) -> StartRows:
        """Return some of the rows, to choose starts among."""
        ...

    def step(self, centroids: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """Return the moved centroids, and the mean squared distance of the rows to those they were moved from."""
        ...


def lloyd_stepper(rows: NDArray[np.float32], size: int, weights: NDArray[np.float32] | None = None) -> LloydStepper:
    """Return what takes Lloyd steps of `size` codewords on (n, d) rows, on a CUDA device if it has room for them.

    Args:
        weights: (n,) float32, how often each row counts; None is once.

    Raises:
        UsageError: FAISS is not installed, and no CUDA device has room.
    """
    device, room = accelerator(), device_free_bytes()
    if device is None or (room is not None and rows.nbytes + STEP_BYTES > room):
        return _FaissLloyd(rows, size, weights)
    return DeviceLloyd(rows, size, weights, device)


def draw_starts(
    stepper: LloydStepper, rows: NDArray[np.float32], size: int, *, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return the numbers of the rows that codewords start from, (size,).

    Args:
        stepper: of the rows.
        rows: (n, d).
        size: K, number of codewords.
        rng: draws them.
    """
    seen = sample_rows(len(rows), start_rows(size, rows.shape[1]), seed=rng)
    return seen[choose_starts(stepper.select(seen), size, rng=rng)]


def part_rows(rows: int) -> int:
    """Return how many of so many rows a thread searches at a time: the same however many threads there are."""
    return min(max(rows // PARTS, LEAST_PART_ROWS), MOST_PART_ROWS)


class _FaissLloyd:
    """Lloyd steps on rows in memory, whose bytes are the same for any number of threads.

    Those of `faiss.Kmeans` are not: they depend on how its threads share a product. Here each thread has FAISS search
    parts of the rows, one product in one thread each, which took no longer where it was measured.

    Args:
        rows: (n, d) float32.
        size: codewords.
        weights: (n,) float32, or None.
    """

    def __init__(self, rows: NDArray[np.float32], size: int, weights: NDArray[np.float32] | None) -> None:
        self._faiss, self._rows, self._size = _import_faiss(), rows, size
        self._weights = np.ones(len(rows), np.float32) if weights is None else weights

    def select(self, numbers: NDArray[np.int64]) -> StartRows:
        """Return some of the rows, to choose starts among."""
        return HostRows(self._rows[numbers], self._weights[numbers])

    def step(self, centroids: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """Return the moved centroids, and the mean squared distance of the rows to those they were moved from."""
        sums, weights, errors = np.zeros(centroids.shape), np.zeros(self._size), np.zeros(self._size)
        distance = 0.0
        parts = slices(len(self._rows), part_rows(len(self._rows)))
        for part, (distances, codes, part_sums) in zip(
            parts, in_order(partial(self._search, centroids), parts), strict=True
        ):
            sums += part_sums
            weights += np.bincount(codes, self._weights[part], minlength=self._size)
            errors += np.bincount(codes, self._weights[part] * distances, minlength=self._size)
            distance += float(distances.sum(dtype=np.float64))
        return move_codewords(centroids, sums, weights, errors), distance / len(self._rows)

    def _search(
        self, centroids: NDArray[np.float32], part: slice
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
        """Return the (n,) squared distances of rows to their codewords, these, and the (K, d) weighted sums."""
        rows = self._rows[part]
        # The number is one for each thread; this may be the caller's own, which gets its back.
        threads = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(1)
        try:
            distances, codes = self._faiss.knn(rows, centroids, 1)
        finally:
            self._faiss.omp_set_num_threads(threads)
        places = (self._weights[part], codes[:, 0], np.arange(len(rows) + 1))
        return distances[:, 0], codes[:, 0], csr_array(places, shape=(len(rows), self._size)).T @ rows


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
        raise UsageError(
            "training codebooks needs FAISS or a CUDA device: install semids[cpu] or semids[gpu], never both"
        ) from error
    return faiss
