"""Encoding: the same vectors with the same codebooks by semids, FAISS and scikit-learn, beside the bare product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans

from semids.arrays import Codes
from tests.benchmarks.measure import Contender, Record, take_turns
from tests.benchmarks.quality import SIZES, Codebooks, relative_mse, with_beam

PART = "encode"
ROWS = 40_000
BEAMS = (1, 5)
REPETITIONS = 7
TIE = 1e-5
"""Relative difference of two costs below which either may be the smaller in float32."""
PRODUCT = "matrix product alone"


def measure_encoding(vectors: NDArray[np.float16], codebooks: Codebooks) -> None:
    """Measure how fast the first ROWS of (n, d) vectors get their codes, and whether these are FAISS's."""
    rows = vectors[:ROWS].astype(np.float32)
    stacked = np.ascontiguousarray(np.concatenate(codebooks).T)
    product = np.empty((len(rows), stacked.shape[1]), np.float32)
    runs: dict[str, Callable[[], Any]] = {PRODUCT: lambda: np.matmul(rows, stacked, out=product)}
    for beam in BEAMS:
        quantizer = with_beam(codebooks, beam)
        runs[f"semids, beam {beam}"] = lambda quantizer=quantizer: quantizer.assign(rows)
        for look_up in (False, True):
            rival = _faiss_with(codebooks, beam, look_up=look_up)
            name = f"FAISS, {'use_beam_LUT=1' if look_up else 'default'}, beam {beam}"
            runs[name] = lambda rival=rival: rival.compute_codes(rows)
    models = [_scikit_learn_with(codebook) for codebook in codebooks]
    runs["scikit-learn MiniBatchKMeans.predict"] = lambda: _predict_residuals(models, rows)

    reference = {beam: _faiss_with(codebooks, beam, look_up=False).compute_codes(rows) for beam in BEAMS}

    def finish(name: str, outcome: Any) -> Mapping[str, Any]:
        if name == PRODUCT:
            return {}
        beam = int(name[-1]) if "beam " in name else 1
        error = relative_mse(with_beam(codebooks, beam), rows, outcome)
        return {"relative_mse": error, **_compare(codebooks, rows, outcome, reference[beam], greedy=beam == 1)}

    facts = {"rows": ROWS, "dimensions": rows.shape[1], "sizes": SIZES, "training_rows": len(vectors)}
    contenders = {name: Contender(run, REPETITIONS) for name, run in runs.items()}
    take_turns(Record(PART, facts), contenders, finish)


def _faiss_with(codebooks: Codebooks, beam: int, *, look_up: bool) -> faiss.ResidualQuantizer:
    """Return FAISS's residual quantizer with the given codebooks."""
    quantizer = faiss.ResidualQuantizer(codebooks[0].shape[1], len(SIZES), 8)
    quantizer.max_beam_size = beam
    faiss.copy_array_to_vector(np.concatenate(codebooks).ravel(), quantizer.codebooks)
    quantizer.is_trained = True
    if look_up:
        quantizer.use_beam_LUT = 1
        quantizer.compute_codebook_tables()
    return quantizer


def _scikit_learn_with(codebook: NDArray[np.float32]) -> MiniBatchKMeans:
    """Return a fitted model whose centres are the codebook."""
    model = MiniBatchKMeans(len(codebook), init=codebook, n_init=1).partial_fit(codebook)
    model.cluster_centers_ = codebook
    return model


def _predict_residuals(models: list[MiniBatchKMeans], rows: NDArray[np.float32]) -> Codes:
    residuals = rows.copy()
    codes = np.empty((len(rows), len(models)), np.uint8)
    for level, model in enumerate(models):
        codes[:, level] = model.predict(residuals)
        residuals -= model.cluster_centers_[codes[:, level]]
    return codes


def _compare(
    codebooks: Codebooks, rows: NDArray[np.float32], codes: Codes, reference: Codes, *, greedy: bool
) -> dict[str, int]:
    """Count the rows whose codes differ, and those of them whose costs do.

    Args:
        greedy: codes are final level by level, so the costs that count are those on the first level that differs;
            a beam chooses by those of the last.
    """
    different = np.flatnonzero((codes != reference).any(axis=1))
    decisive = (codes != reference)[different].argmax(axis=1) if greedy else np.full(len(different), len(SIZES) - 1)
    costs = [_squared_errors(codebooks, rows[different], each[different], decisive) for each in (codes, reference)]
    beyond = int((np.abs(costs[0] - costs[1]) > TIE * costs[1]).sum())
    return {"rows_unlike_faiss": len(different), "rows_unlike_faiss_beyond_ties": beyond}


def _squared_errors(
    codebooks: Codebooks, rows: NDArray[np.float32], codes: Codes, last: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the (n,) squared errors of reconstructions up to each row's last level, without rounding to float32."""
    residuals = rows.astype(np.float64)
    for level, codebook in enumerate(codebooks):
        residuals -= np.where((level <= last)[:, None], codebook[codes[:, level]], 0)
    return np.einsum("nd,nd->n", residuals, residuals)
