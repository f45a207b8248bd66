"""Generate vectors like a catalogue's: clusters within clusters of power-law size, a decaying spectrum, duplicates.

Run it with `python -m tests.benchmarks.vectors OUT.npy --rows 200000 --dimensions 1024`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CHUNK_ROWS = 16_384
DUPLICATES = 0.1
"""Share of rows that are overwritten with another row."""
FAMILIES, GROUPS, PRODUCTS = 30, 600, 6000
"""Clusters of each kind, one within another; rows choose a product with power-law probability and get the rest."""
POPULARITY = 0.8
"""Exponent of the power law."""


def generate_vectors(path: Path, rows: int, dimensions: int, *, seed: int = 0) -> None:
    """Write (rows, dimensions) float16 unit vectors to a `.npy` file, a chunk at a time."""
    rng = np.random.default_rng(seed)
    spectrum = 1 / np.sqrt(1 + np.arange(dimensions))
    spectrum = (spectrum / np.linalg.norm(spectrum)).astype(np.float32)

    def draw(count: int) -> NDArray[np.float32]:
        return rng.standard_normal((count, dimensions), dtype=np.float32) * spectrum

    group_of, family_of = rng.integers(0, GROUPS, PRODUCTS), rng.integers(0, FAMILIES, GROUPS)
    groups = draw(FAMILIES)[family_of] + 0.7 * draw(GROUPS)
    products = groups[group_of] + 0.5 * draw(PRODUCTS)
    popularity = 1 / np.arange(1, PRODUCTS + 1) ** POPULARITY
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, dimensions))
    for start in range(0, rows, CHUNK_ROWS):
        count = min(CHUNK_ROWS, rows - start)
        chunk = products[rng.choice(PRODUCTS, count, p=popularity / popularity.sum())] + 0.6 * draw(count)
        vectors[start : start + count] = chunk / np.linalg.norm(chunk, axis=1, keepdims=True)
    copies = round(DUPLICATES * rows)
    sources = rng.integers(0, rows, copies)
    for target, source in zip(rng.integers(0, rows, copies), sources, strict=True):
        vectors[target] = vectors[source]
    vectors.flush()


def main() -> None:
    """Generate as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--dimensions", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generate_vectors(arguments.path, arguments.rows, arguments.dimensions, seed=arguments.seed)


if __name__ == "__main__":
    main()
