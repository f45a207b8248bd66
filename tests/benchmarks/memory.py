"""Measure what encoding and mapping take, in memory and time, at N and 5 N rows of 1,024 dimensions.

Run it with `python -m tests.benchmarks.memory --small 200k.npy --large 1m.npy` (made by `tests.benchmarks.vectors`);
it writes `tests/benchmarks/memory.json` and prints a table. Training comes first and is not measured: the stages after
it run again, in a process of their own under a limit on its data, while its anonymous memory is sampled.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from semids.store import read_sealed_json
from tests.benchmarks.measure import circumstances

DATA_LIMIT = 3 << 30
"""RLIMIT_DATA of the measured runs: it counts what libraries reserve and never touch, some 1.5 GB, too."""
INTERVAL_S = 0.02
ENCODED_SHAPE = "256x256x256"
RATIO = 1.73
"""Capacity over contents of the mapped shapes, the same at both sizes."""
MAPPED = ("train-placed-", "train-bounded-", "train-settled-")
AFTER_TRAINING = ("train-placed-", "model-", "codes-", "ids-", "report-")


def mapped_shape(contents: int) -> str:
    """Return three nearly equal codebook sizes whose product is RATIO × contents."""
    size = round((RATIO * contents) ** (1 / 3))
    return f"{size}x{size}x{round(RATIO * contents / size**2)}"


def arguments(vectors: Path, shape: str, mapping: str, out: Path) -> list[str]:
    """Return the command line of a run with little training."""
    few = ["options.residual_kmeans.iterations=5"]
    sets = [part for value in few for part in ("--set", value)]
    return [
        "-m",
        "semids.cli",
        "tokenize",
        str(vectors),
        "--shape",
        shape,
        "--mapping",
        mapping,
        *sets,
        "--out",
        str(out),
    ]


def stages(out: Path, prefixes: tuple[str, ...]) -> Iterator[Path]:
    """Yield the folders of a run's stages with one of the prefixes."""
    for prefix in prefixes:
        yield from sorted((out / "stages").glob(f"{prefix}*"))


def run_measured(command: list[str]) -> dict[str, float]:
    """Run a command under DATA_LIMIT; return its wall and CPU seconds and its most anonymous memory, in bytes."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (DATA_LIMIT, DATA_LIMIT))

    started = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    most = 0
    with subprocess.Popen([sys.executable, *command], preexec_fn=limit, stdout=subprocess.DEVNULL) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon:"):
                    most = max(most, int(line.split()[1]) * 1024)
            time.sleep(INTERVAL_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": time.perf_counter() - started, "cpu_s": cpu, "anonymous_bytes": most}


def measure(vectors: Path, folder: Path) -> dict[str, Any]:
    """Return what encoding under the nearest mapping and mapping under capacity take for the rows of a file."""
    rows = len(np.load(vectors, mmap_mode="r"))
    measured: dict[str, Any] = {"rows": rows}
    # The catalogue's contents are known after the first run.
    nearest = folder / f"nearest-{rows}"
    for mapping, out in (("nearest", nearest), ("capacity", folder / f"capacity-{rows}")):
        if mapping == "nearest":
            shape = ENCODED_SHAPE
        else:
            (items,) = stages(nearest, ("items-",))
            shape = mapped_shape(read_sealed_json(items / "manifest.json")["summary"]["distinct_contents"])
        command = arguments(vectors, shape, mapping, out)
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        seconds = {
            path.name[:-17]: read_sealed_json(path / "manifest.json")["run"]["seconds"] for path in stages(out, MAPPED)
        }
        for stage in stages(out, AFTER_TRAINING):
            shutil.rmtree(stage)
        found = run_measured(command)
        (codes,) = stages(out, ("codes-",))
        seconds["codes"] = read_sealed_json(codes / "manifest.json")["run"]["seconds"]
        measured[mapping] = {"shape": shape, **found, "stage_seconds": seconds}
    return measured


def exponent(small: float, large: float, rows: tuple[int, int]) -> float:
    """Return p of time ~ rows^p."""
    return math.log(large / small) / math.log(rows[1] / rows[0])


def main() -> None:
    """Measure, write the raw figures, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=Path, required=True)
    parser.add_argument("--large", type=Path, required=True)
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=parsed.large.parent) as folder:
        small, large = measure(parsed.small, Path(folder)), measure(parsed.large, Path(folder))
    rows = (small["rows"], large["rows"])
    mapping = [
        sum(size["capacity"]["stage_seconds"].values()) - size["capacity"]["stage_seconds"]["codes"]
        for size in (small, large)
    ]
    result: dict[str, Any] = {
        "small": small,
        "large": large,
        "encoding_exponent": exponent(*(size["nearest"]["stage_seconds"]["codes"] for size in (small, large)), rows),
        "mapping_exponent": exponent(*mapping, rows),
        "data_limit": DATA_LIMIT,
        **circumstances(),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print("| | rows | shape | anonymous memory | stages |\n|---|--:|---|--:|---|")
    for size in (small, large):
        for name in ("nearest", "capacity"):
            one = size[name]
            parts = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in one["stage_seconds"].items())
            memory = f"{one['anonymous_bytes'] / 1e6:,.0f} MB"
            print(f"| {name} | {size['rows']:,} | {one['shape']} | {memory} | {parts} |")
    powers = f"{result['encoding_exponent']:.2f} (encoding), {result['mapping_exponent']:.2f} (mapping)"
    print(f"\nTime grows as rows to the power of {powers}.")


if __name__ == "__main__":
    main()
