"""What an RQ-VAE's codes are worth beside those of residual k-means, on vectors of one's own, over several seeds.

    python -m tests.benchmarks.rqvae_quality VECTORS.npy --shape 256x256x256 --seeds 3

`re-assigned` keeps the codes of the mapping nearest and gives those of the last level again, so that under no prefix
two contents share one as long as there are enough: what LC-Rec does to items that collide.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from semids.arrays import parse_shape
from semids.capacity import Bounds
from semids.cli import main as semids
from semids.metrics import measure_ids
from semids.pipeline import multiplicities, read_quantizer
from semids.prefixes import assign_level, nearest_quantizer
from semids.quantizers._rqvae_frozen import FrozenRqvae
from semids.quantizers.base import MAPPINGS
from semids.results import published_reports
from semids.stages import StageReader, reference
from tests.benchmarks.measure import circumstances, record_path

PART = "rqvae_quality"
QUANTIZERS = ("rqvae", "residual_kmeans")
RE_ASSIGNED = "re-assigned"


def main() -> None:
    """Measure as the command line asks, write the raw figures, and print their means with standard deviations."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.rqvae_quality", description=__doc__)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("--shape", default="256x256x256")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    facts = {"vectors": arguments.vectors.name, "shape": arguments.shape, **circumstances()}
    for seed in range(arguments.seeds):
        for quantizer in QUANTIZERS:
            with tempfile.TemporaryDirectory() as folder:
                rows += _figures_of(arguments.vectors, arguments.shape, quantizer, seed, Path(folder))
            record_path(PART).write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(_table(rows))


def _figures_of(vectors: Path, shape: str, quantizer: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    common = [str(vectors), "--shape", shape, "--quantizer", quantizer, "--seed", str(seed), "--out", str(folder)]
    for mapping in MAPPINGS:
        assert semids(["tokenize", *common, "--mapping", mapping]) == 0
    rows: list[dict[str, Any]] = []
    for report in published_reports(folder):
        ids = report.overall.ids
        assert report.neighbours is not None
        row = {
            "quantizer": quantizer,
            "seed": seed,
            "mapping": report.mapping,
            "collision_rate": ids.collision_rate,
            "floor": ids.floor,
            "excess_collisions": ids.excess_collisions,
            "codes_used": [level.codes_used for level in ids.levels],
            "perplexity": [level.perplexity for level in ids.levels],
            "relative_mse": list(report.overall.relative_mse or ())[-1],
            "recall": report.neighbours.recall,
            "seconds": sum(report.timings.values()),
        }
        rows.append(row)
    if quantizer == "rqvae":
        rows.append({"quantizer": quantizer, "seed": seed, "mapping": RE_ASSIGNED, **_re_assign(folder)})
    return rows


def _re_assign(folder: Path) -> dict[str, Any]:
    """Return the figures of nearest codes whose last level is given again within prefixes."""
    (model,) = folder.glob("results/*/*-nearest-rqvae*/model")
    frozen = read_quantizer(reference(model.resolve()))
    assert isinstance(frozen, FrozenRqvae)
    (vectors,) = folder.glob("stages/vectors-*")
    (items,) = folder.glob("stages/items-*")
    rows = StageReader(vectors).array("vectors").shard(0)
    latents = frozen.encoder.apply(rows)
    codes = frozen.encode(rows)
    found = assign_level(
        lambda some: latents[some],
        nearest_quantizer(frozen.codebooks.codebooks),
        codes[:, :-1],
        Bounds(0, 1),
        contents=len(rows),
    )
    moved = float((found.codes != codes[:, -1]).mean())
    codes = np.column_stack([codes[:, :-1], found.codes])
    weights = np.stack(list(multiplicities(reference(items)).values())).sum(axis=0, dtype=np.uint32)
    ids = measure_ids([codes], [weights], sizes=parse_shape(StageReader(model).summary["shape"]))
    error = (frozen.squared_errors(rows, codes)[:, -1] * weights).sum()
    mean = np.average(rows.astype(np.float64), axis=0, weights=weights)
    return {
        "collision_rate": ids.collision_rate,
        "floor": ids.floor,
        "excess_collisions": ids.excess_collisions,
        "codes_used": [level.codes_used for level in ids.levels],
        "relative_mse": float(error / (((rows - mean) ** 2).sum(axis=1) * weights).sum()),
        "moved": moved,
    }


def _table(rows: list[dict[str, Any]]) -> str:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["quantizer"], row["mapping"]].append(row)
    head = [
        "quantizer",
        "mapping",
        "collision rate",
        "excess, most",
        "codes used, fewest",
        "relative MSE",
        "10-NN recall",
        "time",
    ]
    lines = [head, ["---", "---", *["--:"] * (len(head) - 2)]]
    for (quantizer, mapping), each in groups.items():
        used = np.array([row["codes_used"] for row in each]).min(axis=0)
        lines.append(
            [
                quantizer,
                mapping,
                _spread([row["collision_rate"] for row in each]),
                f"{max(row['excess_collisions'] for row in each):,}",
                "/".join(map(str, used)),
                _spread([row["relative_mse"] for row in each]),
                _spread([row["recall"] for row in each if "recall" in row]),
                f"{statistics.mean([row['seconds'] for row in each]):.0f} s" if "seconds" in each[0] else "",
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0:.4f}"


if __name__ == "__main__":
    main()
