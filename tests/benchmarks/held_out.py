"""What a model does with contents it has not seen: loads, error, and IDs of their own.

Run it with `python -m tests.benchmarks.held_out VECTORS.npy`; it trains on four fifths of the rows under the mapping
capacity, encodes the rest with and without unique IDs, writes `held_out.json` beside this module and prints a table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from semids.arrays import Codes, parse_shape
from semids.cli import main as semids
from semids.encoding import read_known
from semids.pipeline import read_quantizer
from semids.stages import reference
from tests.benchmarks.measure import FOLDER, circumstances

SHAPE = "128x128x128"
DRAWS = 200


def total_variation(loads: NDArray[np.floating[Any]], others: NDArray[np.floating[Any]]) -> float:
    """Return the distance of two (K,) loads as distributions, in [0, 1]."""
    return float(np.abs(loads / loads.sum() - others / others.sum()).sum() / 2)


def measure_loads(training: Codes, later: Codes, sizes: tuple[int, ...]) -> list[dict[str, float]]:
    """Return for every level how far later loads are from training's, and how far random draws from these are."""
    rng = np.random.default_rng(0)
    figures: list[dict[str, float]] = []
    for level, size in enumerate(sizes):
        loads = np.bincount(training[:, level], minlength=size).astype(float)
        draws = rng.multinomial(len(later), loads / loads.sum(), DRAWS).astype(float)
        drawn = float(np.mean([total_variation(draw, loads) for draw in draws]))
        found = total_variation(np.bincount(later[:, level], minlength=size).astype(float), loads)
        figures.append({"later": found, "drawn": drawn, "ratio": found / drawn})
    return figures


def published(out: Path) -> Path:
    """Return the one folder of results of a run."""
    (folder,) = (out / "results").glob("*/*/")
    return folder


def run(*arguments: object) -> None:
    """Run the command line.

    Raises:
        SystemExit: it did not end well.
    """
    code = semids([str(argument) for argument in arguments])
    if code:
        raise SystemExit(code)


def read_codes(out: Path) -> Codes:
    """Return the (n, L) codes of a run's items."""
    frame = pl.read_parquet(published(out) / "semantic_ids.parquet")
    return frame.select(pl.col("^c[0-9]+$")).to_numpy()


def error_of(out: Path) -> float:
    """Return the relative MSE that a run reports at full depth."""
    return json.loads((published(out) / "report.json").read_text())["relative_mse"][-1]


def measure(path: Path, folder: Path) -> dict[str, Any]:
    """Return the figures for a file of vectors, of which the last fifth of the rows comes later."""
    vectors = np.load(path, mmap_mode="r")
    kept = len(vectors) * 4 // 5
    for name, part in (("train", vectors[:kept]), ("later", vectors[kept:])):
        np.save(folder / f"{name}.npy", part)
    sizes = parse_shape(SHAPE)
    sets = ["options.residual_kmeans.iterations=10"]
    options = [part for value in sets for part in ("--set", value)]
    run(
        "tokenize", folder / "train.npy", "--shape", SHAPE, "--mapping", "capacity", *options, "--out", folder / "train"
    )
    model = published(folder / "train") / "model"
    run("encode", model, folder / "later.npy", "--out", folder / "ruled")
    run("encode", model, folder / "later.npy", "--unique", "--out", folder / "unique")

    known = read_known(reference(model.resolve()))
    assert known is not None, "the mapping capacity knows its contents"
    training_rows = {row.tobytes(): index for index, row in enumerate(vectors[:kept])}
    source = np.array([training_rows.get(row.tobytes(), -1) for row in vectors[kept:]])
    trained, ruled, unique = (read_codes(folder / name) for name in ("train", "ruled", "unique"))
    quantizer = read_quantizer(reference(model.resolve()))
    by_rule = np.concatenate([quantizer.encode(part) for part in np.array_split(vectors[:kept], 16)])
    new, seen = source < 0, source >= 0
    _, first = np.unique(vectors[kept:][new].view(f"V{vectors.shape[1] * 2}").ravel(), return_index=True)
    fresh = unique[new][first]
    given = {row.tobytes() for row in np.ascontiguousarray(known.codes)}
    return {
        "rows": len(vectors),
        "new_contents": len(first),
        "loads": measure_loads(known.codes, ruled[new][first], sizes),
        "relative_mse": {name: error_of(folder / name) for name in ("train", "ruled", "unique")},
        "known_contents_moved": int((ruled[seen] != trained[source[seen]]).any(axis=1).sum())
        + int((unique[seen] != trained[source[seen]]).any(axis=1).sum()),
        "known_items_later": int(seen.sum()),
        "unique_ids_among_new": len(np.unique(fresh, axis=0)),
        "new_ids_given_before": sum(row.tobytes() in given for row in np.ascontiguousarray(fresh)),
        "share_of_training_items_off_the_rule": [
            float((by_rule[:, :depth] != trained[:, :depth]).any(axis=1).mean()) for depth in range(1, len(sizes) + 1)
        ],
        "share_of_new_off_the_rule": float((unique[new] != ruled[new]).any(axis=1).mean()),
    }


def main() -> None:
    """Measure, write the figures, and print them."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.held_out", description=__doc__)
    parser.add_argument("vectors", type=Path)
    path = parser.parse_args().vectors
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        found = measure(path, Path(folder))
    (FOLDER / "held_out.json").write_text(json.dumps({**circumstances(), **found}, indent=1) + "\n", encoding="utf-8")
    print("| level | total variation of later loads | of random draws | ratio |\n|---|--:|--:|--:|")
    for level, figures in enumerate(found["loads"], start=1):
        print(f"| {level} | {figures['later']:.4f} | {figures['drawn']:.4f} | {figures['ratio']:.2f} |")
    print(json.dumps({name: value for name, value in found.items() if name != "loads"}, indent=1))


if __name__ == "__main__":
    main()
