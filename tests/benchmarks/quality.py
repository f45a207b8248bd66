"""Codebooks for the benchmarks, and what the codes of some vectors amount to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semids.arrays import Codes, Vectors
from semids.distortion import Distortion
from semids.kmeans import Lloyd, fit_codebook
from semids.metrics import measure_ids
from semids.prefixes import nearest_quantizer
from semids.residual import ResidualCodebooks

SIZES = (256, 256, 256)
CHUNK_ROWS = 8192
"""Rows whose errors are computed at a time."""

Codebooks = tuple[NDArray[np.float32], ...]


def fit_codebooks(rows: NDArray[np.float32], *, iterations: int) -> Codebooks:
    """Return codebooks of SIZES, each fitted to what those before it leave of all (n, d) rows."""
    books: Codebooks = ()
    for level, size in enumerate(SIZES):
        residuals = nearest_quantizer(books).residuals(rows) if books else rows
        rng = np.random.default_rng((0, level))
        books = (*books, fit_codebook(residuals, size, Lloyd(iterations, restarts=1), rng=rng).codebook)
    return books


def with_beam(codebooks: Codebooks, beam: int) -> ResidualCodebooks:
    """Return the codebooks under the nearest mapping, searched with a beam."""
    return ResidualCodebooks(codebooks, nearest_quantizer(codebooks).potentials, (), beam)


def relative_mse(quantizer: ResidualCodebooks, vectors: Vectors, codes: Codes) -> float:
    """Return Σ‖x − x̂‖² / Σ‖x − x̄‖² of the (n, d) vectors and their (n, L) codes."""
    distortion = Distortion(quantizer.dimensions, len(quantizer.sizes))
    for start in range(0, len(vectors), CHUNK_ROWS):
        chunk = vectors[start : start + CHUNK_ROWS].astype(np.float32)
        errors = quantizer.squared_errors(chunk, codes[start : start + CHUNK_ROWS])
        distortion.add(chunk, errors, np.ones(len(chunk)))
    errors_by_depth = distortion.relative_mse
    assert errors_by_depth is not None, "the vectors of a benchmark are not all equal"
    return errors_by_depth[-1]


def id_figures(codebooks: Sequence[NDArray[np.float32]], vectors: Vectors, codes: Codes) -> dict[str, Any]:
    """Return the error of the codes, and how the items, one a row, share their IDs."""
    figures = measure_ids([codes], None, sizes=SIZES)
    return {
        "relative_mse": relative_mse(nearest_quantizer(codebooks), vectors, codes),
        "unique_ids": figures.unique_ids,
        "collision_rate": figures.collision_rate,
        "largest_bucket": figures.largest_bucket,
        "level_loads": [[level.load_min, level.load_max] for level in figures.levels],
    }
