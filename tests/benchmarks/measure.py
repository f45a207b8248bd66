"""Times of contenders that take turns, and the raw record of them with what they depend on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from semids.stages import library_versions

FOLDER = Path(__file__).parent
RIVALS = ("scikit-learn", "POT", "semantic-id")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Contender:
    """Something to measure.

    Args:
        run: does the work and returns its outcome.
        repetitions: how often it is run; 1 where a run takes minutes.
    """

    run: Callable[[], Any]
    repetitions: int


class Record:
    """The raw results of a part, in a JSON file beside this module, complete after every repetition."""

    def __init__(self, part: str, facts: Mapping[str, Any]) -> None:
        """Start anew; `facts` say what was measured on which data."""
        self._path = record_path(part)
        self._body: dict[str, Any] = {**facts, **circumstances(), "contenders": {}}

    def add_run(self, name: str, *, wall: float, cpu: float) -> None:
        """Add a repetition: seconds that passed, and seconds of all threads of this process together."""
        self._contender(name)["runs"].append({"wall": round(wall, 4), "cpu": round(cpu, 4)})
        self._save()

    def add_figures(self, name: str, figures: Mapping[str, Any]) -> None:
        """Add what a contender's outcome amounts to."""
        self._contender(name)["figures"].update(figures)
        self._save()

    def _contender(self, name: str) -> dict[str, Any]:
        return self._body["contenders"].setdefault(name, {"runs": [], "figures": {}})

    def _save(self) -> None:
        self._path.write_text(json.dumps(self._body, indent=1) + "\n", encoding="utf-8")


def record_path(part: str) -> Path:
    """Return where a part's raw results lie."""
    return FOLDER / f"{part}.json"


def take_turns(
    record: Record, contenders: Mapping[str, Contender], finish: Callable[[str, Any], Mapping[str, Any]]
) -> None:
    """Run the contenders in turns, so that noise hits all of them, and record their times.

    Args:
        finish: returns the figures of a contender's outcome; called once for each, after its first run, untimed.
    """
    for repetition in range(max(contender.repetitions for contender in contenders.values())):
        for name, contender in contenders.items():
            if repetition >= contender.repetitions:
                continue
            wall, cpu = time.perf_counter(), time.process_time()
            outcome = contender.run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            record.add_run(name, wall=wall, cpu=cpu)
            print(f"{name}: {wall:.2f} s, of CPU {cpu:.2f} s", flush=True)
            if repetition == 0:
                record.add_figures(name, finish(name, outcome))


@cache
def circumstances() -> dict[str, Any]:
    """Return the revision, versions, machine and thread limits that times depend on, as they are at the first call."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    versions = library_versions()
    for library in RIVALS:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "commit": revision.stdout.strip() or "unknown",
        "versions": versions,
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "threads": {name: os.environ.get(name, "not set") for name in THREAD_VARIABLES},
    }


def _processor() -> str:
    processors = Path("/proc/cpuinfo")
    if processors.exists():
        for line in processors.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
