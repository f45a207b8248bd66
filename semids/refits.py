"""Codebooks moved to where they reconstruct rows best whose codes are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, eye_array

from semids.arrays import Codes, widen
from semids.blocks import Take
from semids.parallel import in_order, slices

SUM_BYTES = 64 << 20
"""Vectors that a thread sums at a time in float32."""
DENSE_CODEWORDS = 3072
"""Codewords of all levels up to which their pairs are one dense matrix of float32, whose products take an eighth of the
time of a sparse one's. Solving it outright would lead codewords astray by what float32 rounds off their sums, a
thousandfold in directions that no row tells apart; conjugate gradients end before that."""
RELATIVE_RESIDUAL = 1e-2
"""Slope that conjugate gradients leave, over the one that they begin with: it adds 1e-6 to the error of codebooks that
were fitted before."""
ROUNDING = 1e-6
"""The same over the slope of codewords that are zero, at least: less is what float32 rounds off the sums."""
MOST_ITERATIONS = 100
SOLVED_COLUMNS = 64
"""Dimensions that a thread solves for at a time."""
RIDGE = 1e-3
"""Pull of a codeword to where it was, in rows: it settles codewords that no row has, and sums that codebooks share."""


def refit_jointly(
    take: Take,
    codes: Codes,
    codebooks: Sequence[NDArray[np.float32]],
    *,
    weights: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], ...]:
    """Return the codebooks of all levels that reconstruct the rows best, given their (n, L) codes.

    Least squares over all codewords at once (the codebook update of additive quantization, Babenko and Lempitsky
    2014, section 3.2), with a small pull to where they were. Time is O(nL²d) at most, memory that of the pairs of
    codewords that occur, or of (ΣK, ΣK) where that is small, and of a few (ΣK, d) arrays.

    Args:
        weights: (n,) float32, how often each row counts; None is once.
    """
    gram, sums = _normal_equations(take, codes, codebooks, weights)
    start = np.concatenate(codebooks).astype(np.float64)
    pairs: csr_array | NDArray[np.float32] = gram
    if len(sums) <= DENSE_CODEWORDS:
        pairs, sums, start = gram.astype(np.float32).toarray(), sums.astype(np.float32), start.astype(np.float32)

    def solve(columns: slice) -> NDArray[np.float32]:
        solved = _solve_by_conjugate_gradients(pairs, sums[:, columns].copy(), start[:, columns].copy())
        return solved.astype(np.float32)

    solved = np.concatenate(list(in_order(solve, slices(sums.shape[1], SOLVED_COLUMNS))), axis=1)
    ends = np.cumsum([len(book) for book in codebooks])
    return tuple(np.split(solved, ends[:-1]))


def _solve_by_conjugate_gradients(
    gram: csr_array | NDArray[Any], sums: NDArray[Any], start: NDArray[Any]
) -> NDArray[Any]:
    """Return X of gram · X = sums, column by column (Hestenes and Stiefel 1952, scaled by the diagonal)."""
    scale = gram.diagonal()[:, None]
    solved, left = start, sums - gram @ start
    direction = left / scale
    slope = np.einsum("kd,kd->d", left, direction)
    # No less than what rounding leaves of the sums: below it, codewords move where no row pulls.
    enough = np.maximum(RELATIVE_RESIDUAL**2 * slope, ROUNDING**2 * np.einsum("kd,kd->d", sums, sums / scale))
    tiny = np.finfo(slope.dtype).tiny
    for _ in range(MOST_ITERATIONS):
        if (slope <= enough).all():
            break
        product = gram @ direction
        # A column that is solved stays: its slope and its steps are zero.
        step = slope / np.maximum(np.einsum("kd,kd->d", direction, product), tiny)
        solved = solved + step * direction
        left -= step * product
        scaled = left / scale
        before, slope = slope, np.einsum("kd,kd->d", left, scaled)
        direction = scaled + slope / np.maximum(before, tiny) * direction
    return solved


def refit_last(
    take: Take,
    codes: Codes,
    codebooks: Sequence[NDArray[np.float32]],
    *,
    weights: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], ...]:
    """Return the codebooks with the last moved to where it reconstructs the rows best; the others stay.

    Args:
        weights: (n,) float32, how often each row counts; None is once.
    """
    gram, sums = _normal_equations(take, codes, codebooks, weights)
    last = len(sums) - len(codebooks[-1])
    left = sums[last:] - gram[last:, :last] @ np.concatenate(codebooks[:-1])
    return *codebooks[:-1], (left / gram.diagonal()[last:, None]).astype(np.float32)


def _normal_equations(
    take: Take,
    codes: Codes,
    codebooks: Sequence[NDArray[np.float32]],
    weights: NDArray[np.float32] | None,
) -> tuple[csr_array, NDArray[np.float64]]:
    """Return the (ΣK, ΣK) products of the codewords' indicators, and their (ΣK, d) products with the vectors."""
    offsets = np.cumsum([0, *(len(codebook) for codebook in codebooks)])
    total, levels = int(offsets[-1]), len(codebooks)

    def indicators(block: slice, values: NDArray[np.float32]) -> csr_array:
        columns = (codes[block].astype(np.int64) + offsets[:-1]).ravel()
        ends = np.arange(len(values) + 1) * levels
        return csr_array((np.repeat(values, levels), columns, ends), shape=(len(values), total))

    def products(block: slice) -> tuple[csr_array, NDArray[np.float32]]:
        ones = np.ones(block.stop - block.start, np.float32)
        chosen = indicators(block, ones)
        counted = chosen if weights is None else indicators(block, weights[block])
        vectors = take(np.arange(block.start, block.stop))
        if vectors.dtype != np.float32:
            vectors = widen(vectors, out=np.empty(vectors.shape, np.float32))
        return counted.T @ chosen, counted.T @ vectors

    gram = RIDGE * csr_array(eye_array(total, dtype=np.float64))
    sums = RIDGE * np.concatenate(codebooks).astype(np.float64)
    step = max(1, SUM_BYTES // (4 * codebooks[0].shape[1]))
    for counts, of_vectors in in_order(products, slices(len(codes), step)):
        # float32 within a block, float64 from block to block: a codeword of a large catalogue sums 100,000 rows.
        gram = gram + counts
        sums += of_vectors
    return gram, sums
