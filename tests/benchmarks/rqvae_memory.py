"""What training an RQ-VAE holds in memory at N and 8 N rows, streamed from their files.

    python -m tests.benchmarks.rqvae_memory VECTORS.npy

The first eighth of the rows, and all of them; each in a process of its own. The figure is the most anonymous memory of
the training stage, as its manifest has it: pages of mapped files are given back when others need the room.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from semids.store import read_sealed_json
from tests.benchmarks.measure import circumstances, record_path

PART = "rqvae_memory"
TIMES = 8
SHAPE = "96x96x96"
"""Small enough that both catalogues fill the sample that k-means starts from."""
SETTINGS = {"batch_size": 4096, "epochs": 2, "warmup_epochs": 1, "eval_step": 1, "kmeans_iters": 5}


def main() -> None:
    """Measure both, write the raw figures, and print them."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.rqvae_memory", description=__doc__)
    parser.add_argument("vectors", type=Path)
    path: Path = parser.parse_args().vectors
    rows = np.load(path, mmap_mode="r")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / "part.npy"
        np.save(part, rows[: len(rows) // TIMES])
        for vectors in (part, path):
            found.append(_train(vectors, Path(folder) / f"run-{vectors.stem}"))
            print(found[-1], flush=True)
    ratio = found[1]["peak_bytes"] / found[0]["peak_bytes"]
    facts = {"dimensions": rows.shape[1], "shape": SHAPE, "settings": SETTINGS, **circumstances()}
    record_path(PART).write_text(json.dumps({**facts, "runs": found, "ratio": ratio}, indent=1) + "\n")
    print(f"{TIMES} times the rows take {ratio:.3f} times the memory")


def _train(vectors: Path, out: Path) -> dict[str, Any]:
    sets = [part for name, value in SETTINGS.items() for part in ("--set", f"options.rqvae.{name}={value}")]
    command = ["tokenize", str(vectors), "--shape", SHAPE, "--quantizer", "rqvae", "--out", str(out), *sets]
    subprocess.run([sys.executable, "-m", "semids.cli", *command], check=True, stdout=subprocess.DEVNULL)
    (stage,) = out.glob("stages/train-network-*")
    manifest = read_sealed_json(stage / "manifest.json")
    run, summary = manifest["run"], manifest["summary"]
    return {"rows": summary["rows"], "peak_bytes": run["peak_rss_bytes"], "seconds": run["seconds"]}


if __name__ == "__main__":
    main()
