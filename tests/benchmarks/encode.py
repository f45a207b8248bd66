"""Encode the same vectors with the same codebooks, here and with FAISS, side by side.

Run it with `python -m tests.benchmarks.encode`; it writes `tests/benchmarks/encode.json` and prints a table.
Repetitions are interleaved, so that a noisy machine is noisy for everyone; medians are compared.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from semids.kmeans import fit_codebook, sample_rows
from semids.residual import ResidualCodebooks
from semids.stages import library_versions

ROWS, DIMENSIONS, SIZES = 100_000, 384, (256, 256, 256)
REPETITIONS = 7
TRAINING_ROWS = 20_000


def catalogue_like_vectors() -> NDArray[np.float32]:
    """Return (ROWS, DIMENSIONS) unit vectors: groups of Zipf-distributed size within groups, a decaying spectrum."""
    rng = np.random.default_rng(0)
    spectrum = 1 / np.sqrt(1 + np.arange(DIMENSIONS))
    vectors = rng.normal(size=(ROWS, DIMENSIONS)).astype(np.float32)
    for groups, weight in ((40, 1.5), (1000, 1.0)):
        shares = 1 / np.arange(1, groups + 1)
        centres = weight * rng.normal(size=(groups, DIMENSIONS)).astype(np.float32)
        vectors += centres[rng.choice(groups, ROWS, p=shares / shares.sum())]
    vectors *= spectrum
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def train(vectors: NDArray[np.float32]) -> ResidualCodebooks:
    """Return codebooks of SIZES, fitted to a sample."""
    sample = vectors[sample_rows(len(vectors), TRAINING_ROWS, seed=0)]
    books: list[NDArray[np.float32]] = []
    residuals = sample
    for size in SIZES:
        books.append(fit_codebook(residuals, size, iterations=10, restarts=1, seed=0).codebook)
        quantizer = ResidualCodebooks(tuple(books), tuple(np.zeros(len(book), np.float32) for book in books))
        residuals = quantizer.residuals(sample)
    return quantizer


def faiss_with(books: ResidualCodebooks, *, look_up_tables: bool) -> faiss.ResidualQuantizer:
    """Return FAISS's residual quantizer at beam 1 with the given codebooks."""
    quantizer = faiss.ResidualQuantizer(DIMENSIONS, len(SIZES), 8)
    quantizer.max_beam_size = 1
    faiss.copy_array_to_vector(np.concatenate(books.codebooks).ravel(), quantizer.codebooks)
    quantizer.is_trained = True
    if look_up_tables:
        quantizer.use_beam_LUT = 1
        quantizer.compute_codebook_tables()
    return quantizer


def main() -> None:
    """Measure, write the raw times, and print the table."""
    vectors = catalogue_like_vectors()
    books = train(vectors)
    stacked = np.ascontiguousarray(np.concatenate(books.codebooks).T)
    product = np.empty((2048, stacked.shape[1]), np.float32)

    def multiply() -> None:
        for start in range(0, ROWS - 2047, 2048):
            np.matmul(vectors[start : start + 2048], stacked, out=product)

    default, tables = (faiss_with(books, look_up_tables=flag) for flag in (False, True))
    contenders: dict[str, Callable[[], object]] = {
        "matrix product alone": multiply,
        "semids": lambda: books.assign(vectors),
        "FAISS, default": lambda: default.compute_codes(vectors),
        "FAISS, use_beam_LUT=1": lambda: tables.compute_codes(vectors),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(REPETITIONS):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    different = int((books.assign(vectors) != default.compute_codes(vectors)).any(axis=1).sum())
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    revision = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    result = {
        "rows": ROWS,
        "dimensions": DIMENSIONS,
        "shape": "x".join(map(str, SIZES)),
        "commit": revision,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "versions": library_versions(),
        "seconds": seconds,
        "rows_with_other_codes_than_faiss": different,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"| encoding {ROWS:,} × {DIMENSIONS}, {result['shape']}, beam 1 | median | over semids |\n|---|--:|--:|")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} s | {median / medians['semids']:.2f} |")
    print(f"\nRows with other codes than FAISS's: {different} of {ROWS:,}.")


if __name__ == "__main__":
    main()
