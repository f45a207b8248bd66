"""Measure semids side by side with others, and print the README's tables.

`python -m tests.benchmarks` runs all parts on 200,000 generated vectors of 1,024 dimensions, writes the raw results
beside this module and prints the tables; `python -m tests.benchmarks encode` runs one of them, and
`python -m tests.benchmarks table` only prints again what was measured. Needs `pip install semids[cpu,bench]`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from tests.benchmarks import encode, mapping, rqvae, training
from tests.benchmarks.measure import circumstances
from tests.benchmarks.quality import fit_codebooks
from tests.benchmarks.tables import format_part
from tests.benchmarks.vectors import generate_vectors

PARTS = (encode.PART, training.PART, mapping.PART, rqvae.PART)
ROWS, DIMENSIONS = 200_000, 1024


def main() -> None:
    """Measure and print as the command line asks."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("part", nargs="?", choices=("all", *PARTS, "table"), default="all")
    parser.add_argument("--vectors", type=Path, help="where the vectors are, or are generated and left (.npy)")
    arguments = parser.parse_args()
    parts = PARTS if arguments.part in ("all", "table") else (arguments.part,)
    if arguments.part != "table":
        with tempfile.TemporaryDirectory() as folder:
            _measure(parts, arguments.vectors or Path(folder) / "vectors.npy")
    print("\n\n".join(format_part(part) for part in parts))


def _measure(parts: tuple[str, ...], path: Path) -> None:
    circumstances()  # The revision that is imported, whatever is committed while it runs.
    if not path.exists():
        generate_vectors(path, ROWS, DIMENSIONS)
    vectors = np.load(path)
    if rqvae.PART in parts:
        with tempfile.TemporaryDirectory() as folder:
            rqvae.measure_rqvae(vectors, Path(folder))
    if training.PART in parts:
        training.measure_training(vectors)
    if {encode.PART, mapping.PART} & set(parts):
        codebooks = fit_codebooks(vectors.astype(np.float32), iterations=10)
        if encode.PART in parts:
            encode.measure_encoding(vectors, codebooks)
        if mapping.PART in parts:
            mapping.measure_mappings(vectors, codebooks)


if __name__ == "__main__":
    main()
