"""Compare what `semids plan` predicts with what the runs take, stage by stage.

Run it with `python -m tests.benchmarks.plan VECTORS.npy --out FOLDER`, VECTORS of 200,000 x 1,024 from
`tests.benchmarks.vectors` and FOLDER one that may be deleted; it plans and runs each case in processes of their own
(cases share what they have in common), writes `plan.json` beside this module and prints a table of the stages that
take over 2 s.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semids.reporting import compare_stage
from semids.store import read_sealed_json
from semids.text import plain_table
from tests.benchmarks.measure import FOLDER, circumstances

LONG_S = 2.0
"""Shorter stages are not worth a prediction."""
NARROW_ROWS, NARROW_DIMENSIONS = 50_000, 256
CASES = (
    ("128x128x128", "nearest"),
    ("128x128x128", "uniform"),
    ("128x128x128", "capacity"),
    ("64x64x64", "capacity"),
)


def semids(*arguments: object) -> None:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "semids.cli", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def compare(name: str, arguments: Sequence[object], out: Path) -> list[dict[str, Any]]:
    """Plan and run one case; return what was predicted of each stage that no case before it left, and what it took."""
    before = set(out.glob("stages/*/manifest.json")) | set(out.glob("plans/*.json"))
    semids("plan", *arguments, "--out", out)
    semids("tokenize", *arguments, "--out", out)
    (plan_file,) = set(out.glob("plans/*.json")) - before
    manifests = [read_sealed_json(path) for path in set(out.glob("stages/*/manifest.json")) - before]
    took = {manifest["title"]: manifest for manifest in manifests}
    stages: list[dict[str, Any]] = []
    for stage in read_sealed_json(plan_file)["stages"]:
        if stage["seconds"] is None:
            continue
        stages.append({"case": name, **compare_stage(stage, took[stage["title"]])})
    return stages


def narrow(vectors: Path, path: Path) -> Path:
    """Write the first components of the first rows of a file, as unit vectors."""
    rows = np.load(vectors, mmap_mode="r")[:NARROW_ROWS, :NARROW_DIMENSIONS].astype(np.float32)
    np.save(path, (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))
    return path


def row_of(stage: dict[str, Any]) -> list[str]:
    """Return the cells of a stage's row: times in s, memory and disk in MB."""
    seconds, took = stage["predicted_seconds"], stage["seconds"]
    memory, peak = stage["predicted_memory_bytes"], stage["peak_bytes"]
    disk, wrote = stage["predicted_disk_bytes"], stage["written_bytes"]
    return [
        stage["case"],
        stage["stage"],
        f"{seconds:.1f}",
        f"{took:.1f}",
        f"{seconds / took:.2f}",
        f"{memory / 1e6:,.0f}",
        f"{peak / 1e6:,.0f}",
        f"{memory / peak:.2f}",
        f"{disk / 1e6:,.1f}",
        f"{wrote / 1e6:,.1f}",
    ]


def main() -> None:
    """Compare all cases, write the raw figures, and print the stages that take long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vectors", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parsed = parser.parse_args()
    shutil.rmtree(parsed.out, ignore_errors=True)
    parsed.out.mkdir(parents=True)
    semids("sample", parsed.out / "sample.parquet")
    slim = narrow(parsed.vectors, parsed.out / "narrow.npy")
    text = (parsed.out / "sample.parquet", "--template", r"{title}\nBrand: {brand}\n{description}")
    cases = {f"{shape} {mapping}": (parsed.vectors, "--shape", shape, "--mapping", mapping) for shape, mapping in CASES}
    cases |= {"50k x 256, 64x64x64 nearest": (slim, "--shape", "64x64x64")}
    cases |= {"texts, 16x16x16 capacity": (*text, "--shape", "16x16x16", "--mapping", "capacity")}
    stages: list[dict[str, Any]] = []
    for name, arguments in cases.items():
        stages += compare(name, arguments, parsed.out / f"run-{Path(str(arguments[0])).stem}")
        print(name, flush=True)
        (FOLDER / "plan.json").write_text(json.dumps({**circumstances(), "stages": stages}, indent=1) + "\n")
    headings = ["case", "stage", "predicted s", "took s", "ratio", "predicted MB", "peak MB", "ratio"]
    rows = [row_of(stage) for stage in stages if stage["seconds"] > LONG_S]
    print(plain_table([*headings, "predicted disk MB", "wrote MB"], rows, left=[0, 1]))


if __name__ == "__main__":
    main()
