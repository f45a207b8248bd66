"""The usual uniform mapping, for comparison: a dense transport plan a level, rounded greedily.

Written from its description in the literature on semantic IDs (LC-Rec, arXiv 2311.09049, section 3.1.2, solves the
last level's uniform mapping by Sinkhorn's algorithm), with the solver of POT (Flamary et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ot
from numpy.typing import NDArray

from semids.arrays import Codes, Vectors, code_dtype

REGULARISATION = 0.05
"""Smoothing of the plan, over the mean cost. Entries stay above e^−745, where float64 underflows to 0, for costs up to
37 times the mean. A smaller one is sharper and needs more iterations; one over the largest cost is blurrier and needs
fewer."""


def assign_by_dense_sinkhorn(vectors: Vectors, codebooks: Sequence[NDArray[np.float32]]) -> Codes:
    """Give every codeword of a level the same number of rows, level by level.

    The plan of a level moves n equal rows to K equal codewords at squared distances of the residuals, by
    `ot.sinkhorn` with its defaults. Rows, the most certain first, then take their best codeword with room for them.

    Args:
        vectors: (n, d). Memory is four float64 matrices of (n, K), and one of (n, d).
        codebooks: one (K, d) a level.

    Returns:
        (n, L) codes in the smallest unsigned type; no codeword has more than ceil(n/K) rows.
    """
    residuals = vectors.astype(np.float64)
    codes = np.empty((len(vectors), len(codebooks)), code_dtype([len(codebook) for codebook in codebooks]))
    for level, codebook in enumerate(codebooks):
        costs = _squared_distances(residuals, codebook.astype(np.float64))
        costs /= costs.mean()
        codes[:, level] = _round_greedily(ot.sinkhorn([], [], costs, REGULARISATION))
        residuals -= codebook[codes[:, level]]
    return codes


def _squared_distances(rows: NDArray[np.float64], codebook: NDArray[np.float64]) -> NDArray[np.float64]:
    distances = rows @ (-2 * codebook.T)
    distances += np.einsum("nd,nd->n", rows, rows)[:, None]
    distances += np.einsum("kd,kd->k", codebook, codebook)
    return np.maximum(distances, 0, out=distances)


def _round_greedily(plan: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the (n,) codes of an (n, K) plan, each given to ceil(n/K) rows at most."""
    best = plan.argmax(axis=1)
    codes = np.empty(len(plan), np.int64)
    room = np.full(plan.shape[1], -(-len(plan) // plan.shape[1]))
    for row in np.argsort(-plan.max(axis=1), kind="stable"):
        code = best[row]
        if not room[code]:
            # A row whose entries underflowed takes any codeword with room.
            code = np.where(room > 0, plan[row], -1).argmax()
        codes[row] = code
        room[code] -= 1
    return codes
