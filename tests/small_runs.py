"""Whole runs of a small catalogue through a tiny transformer: what the tests of reliability share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from semids import pipeline, shards
from semids.shards import ShardLayout
from semids.store import read_sealed_json
from semids.verification import verify_run

SHARD_ROWS = 32
"""Rows of a shard in these runs: 140 distinct texts then lie in 5 shards."""
SHAPE = "8x6x4"
TIMEOUT_S = 60
ROOT = Path(__file__).parent.parent
_WORDS = [
    "red",
    "blue",
    "leather",
    "cotton",
    "steel",
    "bottle",
    "shoe",
    "lamp",
    "chair",
    "cable",
    "phone",
    "cover",
    "desk",
    "large",
    "small",
    "pro",
    "mini",
    "kids",
]


def write_catalogue(path: Path, *, items: int = 160, changes: Mapping[int, Mapping[str, Any]] | None = None) -> Path:
    """Write a JSONL catalogue, every eighth text a repetition of an earlier one, a quarter of the items for testing.

    Args:
        changes: by row, what to put in place of the row's own values.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    for number in range(items):
        repeated = number % 8 == 7
        words = rows[number // 2]["text"] if repeated else f"{' '.join(rng.choice(_WORDS, 4))} {number}"
        row = {"item_id": f"item-{number}", "text": words, "title": words[::-1], "brand": words.split()[0]}
        row |= {"category": words.split()[1], "split": "test" if number % 4 == 3 else "train"}
        rows.append(row | dict((changes or {}).get(number, {})))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokenize_arguments(catalogue: Path, model: Path, out: Path, **options: Any) -> list[str]:
    """Return the command line of a run; `options` replaces or adds to those of every run here."""
    chosen = {"shape": SHAPE, "split-column": "split", "brand-column": "brand", "category-column": "category"}
    chosen |= {"model": model, "out": out} | {name.replace("_", "-"): value for name, value in options.items()}
    flags = [part for name, value in chosen.items() if value is not None for part in (f"--{name}", str(value))]
    return ["tokenize", str(catalogue), *flags, "--set", "options.residual_kmeans.iterations=5"]


def use_small_shards(rows: int = SHARD_ROWS) -> None:
    """Make every sharded array of this process consist of files of `rows` rows."""

    def small_layout(*arguments: Any, **named: Any) -> ShardLayout:
        return ShardLayout(*arguments, **({"shard_rows": rows} | named if len(arguments) < 4 else named))

    pipeline.ShardLayout = small_layout  # type: ignore[assignment,misc]
    shards.SHARD_ROWS = rows


def published(run: Path) -> Path:
    """Return the one folder of results that a run shows."""
    (folder,) = (run / "results").glob("*/*/")
    return folder


def stage_folders(run: Path) -> dict[str, Path]:
    """Return the folders of a run's finished stages by name of the folder."""
    return {path.parent.name: path.parent for path in sorted((run / "stages").glob("*/manifest.json"))}


def committed_files(run: Path) -> list[Path]:
    """Return every file that a run committed."""
    return sorted(path for path in (run / "stages").glob("[!.]*/*") if not path.name.startswith("."))


def check_same(run: Path, undisturbed: Path) -> None:
    """Compare a run with the undisturbed one: IDs byte by byte, every other output but the report's times by digest."""
    for name in ("semantic_ids.parquet", "tokens.json", "vocabulary.json", "report.json", "report.md"):
        assert (published(run) / name).exists()
    for name in ("semantic_ids.parquet", "tokens.json", "vocabulary.json"):
        assert (published(run) / name).read_bytes() == (published(undisturbed) / name).read_bytes()
    digests = [
        {name: read_sealed_json(path / "manifest.json")["digest"] for name, path in stage_folders(folder).items()}
        for folder in (run, undisturbed)
    ]
    assert digests[0].keys() == digests[1].keys()
    assert all(digests[0][name] == digests[1][name] for name in digests[0] if not name.startswith("report-"))
    assert verify_run(run).faults == []
    assert list(run.rglob(".tmp-*")) == []


@dataclass
class Outcome:
    """How a run in a child of the warm parent ended: its exit code, minus a signal's number, and what it said."""

    code: int
    said: str
    events: list[str] = field(default_factory=list[str])


class WarmParent:
    """A process that has imported everything and forks a child for each run; see `warm_parent.py`."""

    def __init__(self, folder: Path) -> None:
        self.model = folder / "model"
        self._said = folder / "said.txt"
        self._events = folder / "events.txt"
        # Threads do not survive a fork: none may exist in the parent.
        alone = {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "POLARS_MAX_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process = subprocess.Popen(
            [sys.executable, "tests/warm_parent.py", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **alone, "PYTHONPATH": str(ROOT)},
        )

    def run(self, arguments: Sequence[str], **orders: Any) -> Outcome:
        """Run the command line in a child; `orders` are those of `warm_parent.obey`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._events.unlink(missing_ok=True)
        request = {"arguments": [str(part) for part in arguments], "said": str(self._said), "events": str(self._events)}
        self._process.stdin.write(json.dumps(request | orders) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        events = self._events.read_text().splitlines() if self._events.exists() else []
        return Outcome(code, self._said.read_text(errors="replace"), events)

    def close(self) -> None:
        """End the parent."""
        self._process.communicate(timeout=TIMEOUT_S)


def copy_run(run: Path, to: Path) -> Path:
    """Copy a run folder with its times."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to, symlinks=True)
    return to
