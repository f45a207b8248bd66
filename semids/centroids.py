"""Codewords moved to the means of the rows nearest to them, wherever those were summed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def move_codewords(
    codewords: NDArray[np.float32],
    sums: NDArray[np.float64],
    weights: NDArray[np.float64],
    errors: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Return the (K, d) means of what each codeword's rows sum up to.

    A codeword without rows takes its place beside the one whose rows have the largest error: the two move apart by a
    thousandth, as where FAISS splits clusters (Johnson et al. 2019), and share it. One whose rows are all the same has
    no error, and nothing to split.

    Args:
        codewords: (K, d), where they were.
        sums: (K, d), of the rows nearest to each, each times its weight.
        weights: (K,), of these rows.
        errors: (K,), their squared distances, each times the row's weight.
    """
    means = sums / np.maximum(weights, np.finfo(np.float64).tiny)[:, None]
    moved = np.where(weights[:, None] > 0, means, codewords).astype(np.float32)
    apart = np.where(np.arange(moved.shape[1]) % 2 == 0, 1 + 1 / 1024, 1 - 1 / 1024).astype(np.float32)
    left = errors.copy()
    for empty in np.flatnonzero(weights == 0):
        worst = int(left.argmax())
        if left[worst] == 0:
            break
        moved[empty] = moved[worst] * apart
        moved[worst] *= 2 - apart
        left[empty] = left[worst] = left[worst] / 2
    return moved
