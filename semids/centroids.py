"""Codewords moved to the means of the rows nearest to them, wherever those were summed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def move_codewords(
    codewords: NDArray[np.float32], sums: NDArray[np.float64], counts: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Return the (K, d) means of what each codeword's rows sum up to; spoils the counts.

    A codeword that has no row takes its place beside the one of the most weight, as FAISS splits clusters (Johnson et
    al. 2019): the two move apart by a thousandth, and share its weight.

    Args:
        codewords: (K, d), where they were.
        sums: (K, d), of the rows nearest to each, each times its weight.
        counts: (K,), of these weights.
    """
    moved = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1e-30)[:, None], codewords).astype(np.float32)
    apart = np.where(np.arange(moved.shape[1]) % 2 == 0, 1 + 1 / 1024, 1 - 1 / 1024).astype(np.float32)
    for empty in np.flatnonzero(counts == 0):
        largest = int(counts.argmax())
        moved[empty] = moved[largest] * apart
        moved[largest] *= 2 - apart
        counts[empty] = counts[largest] = counts[largest] / 2
    return moved
