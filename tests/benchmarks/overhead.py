"""Measure what Prefect, and with `--ray` Ray, add to a sweep: the same cells without, in turns, in a process each.

Run it with `python -m tests.benchmarks.overhead VECTORS.npy`; it writes `tests/benchmarks/overhead.json` and prints a
table. Without Prefect, cells are run two at a time, as a sweep runs them. Interpreters, imports, the comparison of the
cells and everything that ends a process count; the Prefect server and the Ray cluster are there already, on the same
processors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from semids.store import read_sealed_json
from tasks.cluster import CELLS_AT_A_TIME
from tests.benchmarks.measure import Record, record_path
from tests.servers import Server, make_server, started_cluster

PART = "overhead"
WITHOUT, PREFECT, RAY = "without Prefect", "Prefect", "Prefect and Ray"
SHARD_STAGES = {"vectors-": "Import the vectors", "codes-": "Encode the vectors"}


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Run the contenders in turns, and write how long they took."""
    common = {
        "catalogue": {"path": str(arguments.vectors.resolve())},
        "shapes": arguments.shapes,
        "mappings": arguments.mappings,
    }
    record = Record(PART, common | {"catalogue": arguments.vectors.name, "cells_at_a_time": CELLS_AT_A_TIME})
    server = make_server(folder)
    # Its idle processes take a part of the processors, too.
    cluster = started_cluster(workers=2) if arguments.ray else nullcontext("")
    with server.running(), cluster as address:
        contenders: list[tuple[str, list[str], dict[str, str]]] = [
            (WITHOUT, ["tests.benchmarks.without_prefect", str(CELLS_AT_A_TIME)], {}),
            (PREFECT, ["flows.sweep"], {}),
        ]
        if arguments.ray:
            contenders.append((RAY, ["flows.sweep"], {"ray": address}))
        for turn in range(arguments.turns):
            ids: set[str] = set()
            # Each is first in turn: what ran before leaves files in memory, and the processors warm.
            first = turn % len(contenders)
            for name, command, changes in contenders[first:] + contenders[:first]:
                out = folder / f"{name} {turn}"
                config = folder / f"{name} {turn}.yaml"
                config.write_text(yaml.safe_dump(common | changes | {"out": str(out)}))
                wall, cpu = run_timed([sys.executable, "-m", *command, str(config)], server.environment)
                record.add_run(name, wall=wall, cpu=cpu)
                print(f"{name}: {wall:.1f} s", flush=True)
                if turn == 0:
                    record.add_figures(name, shard_seconds(out) | (lot_seconds(server) if name == RAY else {}))
                ids.add(digest_ids(out))
            if len(ids) != 1:
                raise SystemExit("the contenders gave different IDs")


def run_timed(command: list[str], environment: Mapping[str, str]) -> tuple[float, float]:
    """Run a command; return the seconds that passed, and those of processors in it and its children."""
    wall, before = time.perf_counter(), os.times()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    after = os.times()
    if ended.returncode:
        raise SystemExit(ended.stderr)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - wall, cpu


def shard_seconds(out: Path) -> dict[str, list[float]]:
    """Return the seconds that each stage made of shards took, of a run folder."""
    return {
        title: sorted(
            round(read_sealed_json(path / "manifest.json")["run"]["seconds"], 2)
            for path in (out / "stages").glob(f"{prefix}*")
        )
        for prefix, title in SHARD_STAGES.items()
    }


def lot_seconds(server: Server) -> dict[str, list[float]]:
    """Return the seconds of the task runs that made lots of shards, as the server has them."""
    runs = server.post("task_runs/filter", {"task_runs": {"name": {"like_": ", lot "}}, "limit": 200})
    took: dict[str, list[float]] = {}
    for run in runs:
        seconds = datetime.fromisoformat(run["end_time"]) - datetime.fromisoformat(run["start_time"])
        took.setdefault(f"lot: {run['name'].partition(',')[0]}", []).append(round(seconds.total_seconds(), 2))
    return took


def digest_ids(out: Path) -> str:
    """Return the digest of the IDs of all cells."""
    found = sorted((out / "results").rglob("semantic_ids.parquet"))
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in found)).hexdigest()


def format_overhead() -> str:
    """Return the table of what was measured."""
    contenders: dict[str, Any] = json.loads(record_path(PART).read_text(encoding="utf-8"))["contenders"]
    turns = range(1, 1 + len(contenders[WITHOUT]["runs"]))
    head = ["", *(f"wall of turn {turn}, s" for turn in turns), "mean", "share of it added", "mean CPU, s"]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    baseline = statistics.mean(run["wall"] for run in contenders[WITHOUT]["runs"])
    for name, body in contenders.items():
        walls = [f"{run['wall']:.1f}" for run in body["runs"]]
        wall, cpu = (statistics.mean(run[clock] for run in body["runs"]) for clock in ("wall", "cpu"))
        added = f"{1 - baseline / wall:.1%}" if name != WITHOUT else ""
        lines.append([name, *walls, f"{wall:.1f}", added, f"{cpu:.1f}"])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.overhead", description=__doc__)
    parser.add_argument("vectors", type=Path, help="an .npy of vectors")
    parser.add_argument("--shapes", nargs="+", default=["256x256x256", "128x128x128x128"], help="what to sweep")
    parser.add_argument("--mappings", nargs="+", default=["nearest", "capacity"], help="under which")
    parser.add_argument("--turns", type=int, default=3, help="how often each contender runs")
    parser.add_argument("--ray", action="store_true", help="run it on a Ray cluster of two workers, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))
    print(format_overhead())


if __name__ == "__main__":
    main()
