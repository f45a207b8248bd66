"""Training: CPU time and held-out error of codebooks by semids, FAISS, scikit-learn and semantic-id."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import MiniBatchKMeans

from tests.benchmarks.measure import Contender, Record, take_turns
from tests.benchmarks.quality import SIZES, Codebooks, fit_codebooks, relative_mse, with_beam

PART = "training"
HELD_OUT_ROWS = 20_000
FAISS_ROWS = 65_536
"""FAISS keeps the residuals of every row and path, at 1,024 dimensions some 60 kB a row, and fits its codewords to
256 rows each of these whatever their number."""
SEMANTIC_ID_ROWS = 16_384
"""semantic-id fits each level in 10 starts of up to 100 steps."""
EVALUATION_BEAMS = (1, 5)


@dataclass(frozen=True)
class Fit:
    """A way to codebooks: what fits them, to how many of the first rows (None: all), and how often that is timed."""

    run: Callable[[NDArray[np.float32]], Codebooks]
    rows: int | None
    repetitions: int


def training_contenders() -> dict[str, Fit]:
    """Return who is measured, by name; semantic-id where it is installed."""
    fits = {
        "semids, default (25 steps)": Fit(partial(fit_codebooks, iterations=25), None, 1),
        "semids, 10 steps": Fit(partial(fit_codebooks, iterations=10), None, 1),
        "semids, 10 steps, fewer rows": Fit(partial(fit_codebooks, iterations=10), FAISS_ROWS, 3),
        "semids, 2 steps, fewer rows": Fit(partial(fit_codebooks, iterations=2), FAISS_ROWS, 3),
        "scikit-learn MiniBatchKMeans, default": Fit(_fit_by_scikit_learn, None, 3),
        "FAISS ResidualQuantizer, default": Fit(_fit_by_faiss, FAISS_ROWS, 1),
    }
    if importlib.util.find_spec("semantic_id"):
        fits["semantic-id RQKMeans, default"] = Fit(_fit_by_semantic_id, SEMANTIC_ID_ROWS, 1)
    return fits


def measure_training(vectors: NDArray[np.float16]) -> None:
    """Measure how long codebooks of SIZES take, and what error rows that none of them saw then have.

    The last HELD_OUT_ROWS of the (n, d) vectors are held out.
    """
    rows, held_out = vectors[:-HELD_OUT_ROWS].astype(np.float32), vectors[-HELD_OUT_ROWS:].astype(np.float32)
    fits = training_contenders()

    def finish(name: str, outcome: Codebooks) -> Mapping[str, Any]:
        figures: dict[str, Any] = {"training_rows": fits[name].rows or len(rows)}
        for beam in EVALUATION_BEAMS:
            quantizer = with_beam(outcome, beam)
            figures[f"relative_mse_beam_{beam}"] = relative_mse(quantizer, held_out, quantizer.encode(held_out))
        return figures

    facts = {"dimensions": rows.shape[1], "sizes": SIZES, "held_out_rows": HELD_OUT_ROWS}
    contenders = {
        name: Contender(lambda fit=fit: fit.run(rows[: fit.rows]), fit.repetitions) for name, fit in fits.items()
    }
    take_turns(Record(PART, facts), contenders, finish)


def _fit_by_faiss(rows: NDArray[np.float32]) -> Codebooks:
    quantizer = faiss.ResidualQuantizer(rows.shape[1], len(SIZES), 8)
    quantizer.train(rows)
    codewords = faiss.vector_to_array(quantizer.codebooks).reshape(-1, rows.shape[1])
    return tuple(np.split(codewords, np.cumsum(SIZES)[:-1]))


def _fit_by_scikit_learn(rows: NDArray[np.float32]) -> Codebooks:
    residuals = rows.copy()
    books: Codebooks = ()
    for size in SIZES:
        model = MiniBatchKMeans(size, random_state=0).fit(residuals)
        residuals -= model.cluster_centers_[model.labels_]
        books = (*books, model.cluster_centers_)
    return books


def _fit_by_semantic_id(rows: NDArray[np.float32]) -> Codebooks:
    # Installed without its dependencies, some of which only its constrained clustering needs; hence optional here.
    from semantic_id import RQKMeans

    model = RQKMeans(n_levels=len(SIZES), n_clusters=list(SIZES), random_state=0).fit(rows)
    return tuple(np.asarray(codebook, np.float32) for codebook in model.codebooks_)
