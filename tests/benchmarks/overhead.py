"""Measure what Prefect, and with `--ray` Ray, add to a sweep: the same cells without, in turns, in a process each.

Run it with `python -m tests.benchmarks.overhead CONFIG.yaml`, the configuration of a sweep; it writes
`tests/benchmarks/overhead.json` and prints a table of the contenders and one of the cells. Without Prefect, cells are
run two at a time, as a sweep runs them. Interpreters, imports, the comparison of the cells and everything that ends a
process count; the Prefect server and the Ray cluster are there already, on the same processors.
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
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from semids.config import read_values
from semids.store import read_sealed_json
from semids.text import markdown_table
from tasks.cluster import CELLS_AT_A_TIME
from tests.benchmarks.measure import Record, record_path
from tests.servers import Server, make_server, started_cluster

PART = "overhead"
WITHOUT, PREFECT, RAY = "without Prefect", "Prefect", "Prefect and Ray"
SHARD_STAGES = {"vectors-": "Import the vectors", "codes-": "Encode the vectors"}


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Run the contenders in turns, and write how long they took."""
    common = read_values(arguments.config)
    record = Record(PART, {"config": common, "cells_at_a_time": CELLS_AT_A_TIME})
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
                took = run_timed([sys.executable, "-m", *command, str(config)], server.environment)
                record.add_run(name, wall=took.wall, cpu=took.cpu)
                print(f"{name}: {took.wall:.1f} s", flush=True)
                if turn == 0:
                    figures = {"peak_rss_bytes": took.peak_rss_bytes} | shard_seconds(out) | comparison(out)
                    record.add_figures(name, figures | (lot_seconds(server) if name == RAY else {}))
                ids.add(digest_ids(out))
            if len(ids) != 1:
                raise SystemExit("the contenders gave different IDs")


@dataclass(frozen=True)
class Took:
    """What a command took: seconds that passed, those of processors, and the most memory one of its processes held."""

    wall: float
    cpu: float
    peak_rss_bytes: int


def run_timed(command: list[str], environment: Mapping[str, str]) -> Took:
    """Run a command, and measure it and the children that it waited for."""
    wall = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            raise SystemExit(said.read().decode(errors="replace"))
    return Took(time.perf_counter() - wall, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss)


def shard_seconds(out: Path) -> dict[str, list[float]]:
    """Return the seconds that each stage made of shards took, of a run folder."""
    return {
        title: sorted(
            round(read_sealed_json(path / "manifest.json")["run"]["seconds"], 2)
            for path in (out / "stages").glob(f"{prefix}*")
        )
        for prefix, title in SHARD_STAGES.items()
    }


def comparison(out: Path) -> dict[str, Any]:
    """Return the figures of the cells, where the contender compares them."""
    found = sorted((out / "results").rglob("comparison.json"))
    return {"cells": json.loads(found[0].read_bytes())} if found else {}


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
    """Return the tables of what was measured: what Prefect adds, and the cells of the sweep."""
    contenders: dict[str, Any] = json.loads(record_path(PART).read_text(encoding="utf-8"))["contenders"]
    turns = range(1, 1 + len(contenders[WITHOUT]["runs"]))
    head = ["", *(f"wall of turn {turn}, s" for turn in turns), "mean", "share of it added", "mean CPU, s"]
    baseline = statistics.mean(run["wall"] for run in contenders[WITHOUT]["runs"])
    rows: list[list[str]] = []
    for name, body in contenders.items():
        walls = [f"{run['wall']:.1f}" for run in body["runs"]]
        wall, cpu = (statistics.mean(run[clock] for run in body["runs"]) for clock in ("wall", "cpu"))
        added = f"{1 - baseline / wall:.1%}" if name != WITHOUT else ""
        rows.append([name, *walls, f"{wall:.1f}", added, f"{cpu:.1f}"])
    return markdown_table(head, rows) + "\n\n" + format_cells(contenders[PREFECT]["figures"]["cells"])


def format_cells(cells: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a row a shape: collision rates, then relative MSEs, of its mappings."""
    mappings = list(dict.fromkeys(cell["mapping"] for cell in cells))
    shapes: dict[str, dict[str, Mapping[str, Any]]] = {}
    for cell in cells:
        shapes.setdefault(cell["shape"], {})[cell["mapping"]] = cell
    head = ["shape", "capacity / contents", "floor", *mappings, *(f"MSE {mapping}" for mapping in mappings)]
    rows = [
        [
            shape,
            f"{next(iter(row.values()))['capacity_ratio']:.3g}",
            f"{next(iter(row.values()))['floor']:.4f}",
            *(f"{row[mapping][key]:.4f}" for key in ("collision_rate", "relative_mse") for mapping in mappings),
        ]
        for shape, row in shapes.items()
    ]
    return markdown_table(head, rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.overhead", description=__doc__)
    parser.add_argument("config", type=Path, help="the configuration of a sweep")
    parser.add_argument("--turns", type=int, default=3, help="how often each contender runs")
    parser.add_argument("--ray", action="store_true", help="run it on a Ray cluster of two workers, too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(arguments, Path(folder))
    print(format_overhead())


if __name__ == "__main__":
    main()
