"""What fewer collisions cost: the mapping capacity from one content an ID to no limit, and others beside it.

Run it with `python -m tests.benchmarks.tradeoff VECTORS.npy`; it writes `tradeoff.json` and `tradeoff.png` beside this
module and prints a table. The distinct rows are the contents; every mapping starts from the same codebooks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from semids.arrays import Codes, capacity_of, format_shape
from semids.capacity import resolve_bounds
from semids.distortion import neighbour_figures
from semids.metrics import measure_ids
from semids.prefixes import nearest_quantizer
from semids.progress import silent
from semids.quantizers.base import TrainingData, quantizer_types
from semids.quantizers.residual_kmeans import ResidualKMeansSettings
from semids.shards import ShardedArray, ShardLayout
from tests.benchmarks.dense_sinkhorn import assign_by_dense_sinkhorn
from tests.benchmarks.measure import FOLDER, circumstances

SHAPES = ((16, 16, 16), (16, 16, 16, 16))
LIMITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
SEEDS = range(5)
SETTINGS = ResidualKMeansSettings(iterations=50, restarts=10)
NEIGHBOUR_QUERIES = 2000
CAPACITY = "capacity, max"


class Contents:
    """The distinct rows of a file of vectors, as training takes them."""

    def __init__(self, path: Path, folder: Path) -> None:
        """Read (n, d) rows and put the distinct ones into a file under `folder`."""
        self.vectors = np.unique(np.load(path), axis=0)
        np.save(folder / "distinct.npy", self.vectors)
        layout = ShardLayout(*self.vectors.shape, str(self.vectors.dtype), shard_rows=len(self.vectors))
        self.data = TrainingData(ShardedArray(layout, lambda _: folder / "distinct.npy"), np.arange(layout.rows))
        self.variance = float(np.square(self.vectors - self.vectors.mean(axis=0, dtype=np.float64)).sum())

    def figures(self, codes: Codes, reconstructions: NDArray[np.float32], sizes: tuple[int, ...]) -> dict[str, float]:
        """Return what (n, L) codes and the (n, d) vectors they stand for amount to."""
        ids = measure_ids([codes], None, sizes=sizes)
        errors = np.square(self.vectors - reconstructions.astype(np.float64)).sum()
        near = neighbour_figures(
            self.vectors.astype(np.float32), reconstructions, codes, queries=min(NEIGHBOUR_QUERIES, len(codes))
        )
        assert near.recall is not None, "there are more than ten contents"
        return {
            "collision_rate": ids.collision_rate or 0.0,
            "largest_bucket": ids.largest_bucket,
            "relative_mse": float(errors) / self.variance,
            "recall": near.recall,
        }


def measure_seed(contents: Contents, sizes: tuple[int, ...], seed: int) -> dict[str, dict[str, float]]:
    """Return the figures of every contender by its name."""
    member = quantizer_types()["residual_kmeans"]
    count = len(contents.vectors)
    made: dict[str, Any] = {}
    found: dict[str, dict[str, float]] = {}

    def train(name: str, mapping: Any, most: int | None = None) -> None:
        bounds = resolve_bounds(count, capacity_of(sizes), least=0, most=most) if mapping == "capacity" else None
        quantizer = member(sizes, mapping, SETTINGS, seed=seed, bounds=bounds)
        outcomes: dict[str, Any] = {}
        for step in quantizer.training_steps():
            # All mappings start from the codebooks of the first.
            outcome = made.get(step.name) if step.name.startswith("codebook") else None
            if outcome is None:
                needed = {name: outcomes[name] for name in step.needs}
                outcome = quantizer.run_step(step, contents.data, needed, silent).tensors
            outcomes[step.name] = made[step.name] = outcome
        frozen = member.freeze(quantizer.assemble(outcomes))
        given = quantizer.given_codes(outcomes)
        codes = given if given is not None else frozen.encode(contents.vectors)
        found[name] = contents.figures(codes, frozen.decode(codes), sizes)

    train("nearest", "nearest")
    train("uniform", "uniform")
    for most in LIMITS:
        if most * capacity_of(sizes) >= count:
            train(f"{CAPACITY} {most}", "capacity", most)
    train(f"{CAPACITY} null", "capacity", None)
    books = tuple(made[f"codebook-{level}"]["codebook"] for level in range(1, len(sizes) + 1))
    codes = assign_by_dense_sinkhorn(contents.vectors.astype(np.float32), books)
    found["dense Sinkhorn"] = contents.figures(codes, nearest_quantizer(books).decode(codes), sizes)
    found["FAISS"] = _faiss_figures(contents, sizes)
    return found


def _faiss_figures(contents: Contents, sizes: tuple[int, ...]) -> dict[str, float]:
    """Return the figures of FAISS's own training and encoding, with all its defaults."""
    rows = contents.vectors.astype(np.float32)
    quantizer = faiss.ResidualQuantizer(rows.shape[1], len(sizes), (sizes[0] - 1).bit_length())
    quantizer.train(rows)
    packed = quantizer.compute_codes(rows)
    bits = np.unpackbits(packed, axis=1, bitorder="little")[:, : len(sizes) * 4].reshape(len(rows), len(sizes), 4)
    return contents.figures(bits @ np.array([1, 2, 4, 8], np.uint8), quantizer.decode(packed), sizes)


def mean_figures(seeds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the mean of every figure over the seeds, by contender."""
    return {
        name: {figure: statistics.mean(seed[name][figure] for seed in seeds) for figure in seeds[0][name]}
        for name in seeds[0]
    }


def plot(means: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Return a row of panels a shape: error, and recall, over the collision rate."""
    figure = Figure(figsize=(10, 7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for row, (shape, contenders) in enumerate(means.items()):
        for column, (figure_name, title) in enumerate((("relative_mse", "relative MSE"), ("recall", "10-NN recall"))):
            axes = figure.add_subplot(len(means), 2, 2 * row + column + 1)
            line = [name for name in contenders if name.startswith(CAPACITY)]
            xs, ys = ([contenders[name][key] for name in line] for key in ("collision_rate", figure_name))
            axes.plot(xs, ys, "-o", ms=4, lw=1.2, color="#1f6f8b", label="capacity")
            for name, x, y in zip(line, xs, ys, strict=True):
                limit = name.removeprefix(f"{CAPACITY} ")
                if limit in ("1", "2", "4", "8", "null"):
                    axes.annotate(limit, (x, y), (4, 5), textcoords="offset points", fontsize=8, color="#1f6f8b")
            for name, marker in (("nearest", "s"), ("uniform", "D"), ("dense Sinkhorn", "X"), ("FAISS", "^")):
                one = contenders[name]
                axes.plot(one["collision_rate"], one[figure_name], marker, ms=8, label=name)
            axes.set_xlabel("collision rate of distinct contents")
            axes.set_ylabel(title)
            axes.set_title(shape, fontsize=10)
            axes.grid(color="#dddddd", lw=0.6)
            axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def main() -> None:
    """Measure, write figures and plot, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.tradeoff", description=__doc__)
    parser.add_argument("vectors", type=Path)
    with tempfile.TemporaryDirectory() as folder:
        contents = Contents(parser.parse_args().vectors, Path(folder))
        seeds = {format_shape(sizes): [measure_seed(contents, sizes, seed) for seed in SEEDS] for sizes in SHAPES}
    body = {**circumstances(), "contents": len(contents.vectors), "settings": SETTINGS.model_dump(), "seeds": seeds}
    (FOLDER / "tradeoff.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    means = {shape: mean_figures(found) for shape, found in seeds.items()}
    plot(means).savefig(FOLDER / "tradeoff.png", metadata={"Software": None})
    print(
        "| shape | mapping | collision rate | largest bucket | relative MSE | 10-NN recall |\n|---|---|--:|--:|--:|--:|"
    )
    for shape, contenders in means.items():
        for name, one in contenders.items():
            print(
                f"| {shape} | {name} | {one['collision_rate']:.4f} | {one['largest_bucket']:.0f} "
                f"| {one['relative_mse']:.4f} | {one['recall']:.4f} |"
            )


if __name__ == "__main__":
    main()
