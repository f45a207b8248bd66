"""What `semids status` says of a run folder, and that asking disturbs nobody."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from small_runs import ROOT, WarmParent, copy_run, published

from semids import locks
from semids.cli import main
from semids.locks import look_at_lock, read_table
from semids.status import RunStatus, read_status
from semids.store import commit_sealed_json, read_sealed_json, run_lock

pytestmark = pytest.mark.xdist_group("warm-parent")

KILLED = -9
RQVAE = {"layers": [8], "e_dim": 4, "batch_size": 40, "epochs": 6, "warmup_epochs": 2, "eval_step": 2}
WORKER = """
import sys
from pathlib import Path
from semids.progress import silent
from semids.stages import Stage, run_stage
from semids.store import run_lock

def build(output):
    output.commit_bytes("part.bin", b"x" * 1000)
    print("ready", flush=True)
    sys.stdin.readline()
    return {}

folder = Path(sys.argv[1])
with run_lock(folder):
    run_stage(folder, Stage("long", "A long stage", {}, build), silent)
"""
STARTER = """
import sys
from pathlib import Path
from semids.store import run_lock

print("ready", flush=True)
for _ in range(int(sys.argv[2])):
    with run_lock(Path(sys.argv[1])):
        pass
print("done", flush=True)
"""


def tokenize(vectors: Path, out: Path) -> list[str]:
    sets = [part for name, value in RQVAE.items() for part in ("--set", f"options.rqvae.{name}={value}")]
    return ["tokenize", str(vectors), "--shape", "8x6", "--quantizer", "rqvae", "--out", str(out), *sets]


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "vectors.npy"
    np.save(path, np.random.default_rng(0).normal(size=(190, 10)).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def made(warm_parent: WarmParent, vectors: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run and the events of its making."""
    folder = tmp_path_factory.mktemp("made") / "run"
    outcome = warm_parent.run(tokenize(vectors, folder), checkpoint_every=3, shard_rows=64, plots=False)
    assert outcome.code == 0, outcome.said
    return folder, outcome.events


@pytest.fixture
def run(made: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return copy_run(made[0], tmp_path / "run")


def start(code: str, *arguments: Any) -> subprocess.Popen[str]:
    """Start a process and wait until it says that it is ready."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        pytest.fail(process.communicate()[1])
    return process


def states(found: RunStatus) -> dict[str, str]:
    return {stage.title: stage.state for stage in found.stages}


def test_a_finished_run_is_shown_done_with_its_figures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.lstat().st_mtime_ns for path in run.rglob("*")}
    assert main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    found = read_status(run)
    assert {path: path.lstat().st_mtime_ns for path in run.rglob("*")} == before
    assert found.lock.state == "free"
    assert set(states(found).values()) == {"done"}
    assert {"Import the vectors", "Train the RQ-VAE", "Write the report"} <= states(found).keys()
    for stage in found.stages:
        manifest = read_sealed_json(run / "stages" / stage.folder / "manifest.json")
        assert stage.seconds == manifest["run"]["seconds"]
        assert stage.peak_bytes == manifest["run"]["peak_rss_bytes"]
        assert stage.bytes == sum(record["bytes"] for record in manifest["files"].values())
        assert stage.title in said
    (cell,) = found.cells
    ids = pl.read_parquet(published(run) / "semantic_ids.parquet")
    assert cell.collision_rate == pytest.approx(1 - len(ids.select("c0", "c1").unique()) / len(ids))
    assert cell.floor == pytest.approx(1 - 48 / len(ids))
    assert f"{cell.collision_rate:.4f}" in said
    assert said.endswith("Nothing is running, and every stage that was begun is done: there is nothing to do.\n")


def test_a_killed_run_is_dead_and_resumable_and_then_done(
    warm_parent: WarmParent, vectors: Path, made: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """Guards: the checkpoint's epoch, the shards counted by their sidecars, and the free lock."""
    shards = [
        number for number, event in enumerate(made[1]) if event.startswith("_fill") and "vectors-00002.npy" in event
    ]
    saved = [number for number, event in enumerate(made[1]) if event.startswith("_fill") and "checkpoint-" in event]
    orders: dict[str, Any] = {"checkpoint_every": 3, "shard_rows": 64, "plots": False}
    arguments = tokenize(vectors, tmp_path / "run")
    assert warm_parent.run(arguments, kill_at=shards[0], kill="before", **orders).code == KILLED
    found = read_status(tmp_path / "run")
    assert states(found) == {"Read the catalogue": "done", "vectors": "interrupted"}
    assert found.stages[-1].shards == {"vectors": (2, 3)}
    assert "vectors 2 of 3 shards" in found.describe()
    assert "its run ended without finishing" in found.describe()
    said = "Nothing is running. 1 stage is unfinished: run the same command again, and it goes on there."
    assert found.advice() == said
    # The resumed run writes less before it trains.
    again = warm_parent.run(arguments, kill_at=saved[-1] - shards[0], kill="before", **orders)
    assert again.code == KILLED
    found = read_status(tmp_path / "run")
    (unfinished,) = [stage for stage in found.stages if stage.state == "interrupted"]
    sealed = sorted((tmp_path / "run" / "stages" / unfinished.folder).glob(".kept-*/checkpoint-*.json"))[-1]
    assert unfinished.epoch == read_sealed_json(sealed)["state"]["epoch"] > 0
    assert unfinished.bytes > sealed.stat().st_size
    assert f"checkpoint after epoch {unfinished.epoch}" in found.describe()
    assert warm_parent.run(arguments, **orders).code == 0
    assert set(states(read_status(tmp_path / "run")).values()) == {"done"}


def test_a_run_under_way_is_shown_with_its_owner_and_dead_once_it_is_killed(tmp_path: Path) -> None:
    """Guard: the kernel's table of locks, for the folder and for the stage."""
    worker = start(WORKER, tmp_path)
    found = read_status(tmp_path)
    assert (found.lock.state, found.lock.process) == ("held", worker.pid)
    assert found.lock.owner is not None
    assert (found.lock.owner.process, found.lock.owner.host) == (worker.pid, socket.gethostname())
    assert states(found) == {"long": "running"}
    assert f"in use by process {worker.pid} on " in found.describe()
    assert found.advice() == "A run is under way, 1 stage under way: wait for it to end."
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    found = read_status(tmp_path)
    assert (found.lock.state, states(found)) == ("free", {"long": "interrupted"})
    assert f"it was last by process {worker.pid} on " in found.describe()
    worker = start(WORKER, tmp_path)
    worker.communicate("\n")
    assert states(read_status(tmp_path)) == {"A long stage": "done"}


def test_asking_never_makes_a_starting_run_fail(tmp_path: Path) -> None:
    """Guard: no lock is taken to look at one; with a shared lock for a microsecond, some of these starts fail."""
    (tmp_path / "stages").mkdir()
    starter = start(STARTER, tmp_path, 5_000)
    asked = 0
    while starter.poll() is None:
        read_status(tmp_path)
        asked += 1
    assert starter.returncode == 0, starter.communicate()[1]
    assert asked >= 20


def test_a_run_that_has_just_begun_is_not_named_after_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    with run_lock(tmp_path):
        lock = tmp_path / ".lock"
        lock.write_text(f"process 1 on {socket.gethostname()} (semids, since 2020-01-01 00:00:00)")
        assert look_at_lock(lock, read_table()).describe_owner() == f"process {os.getpid()}"


def test_what_the_table_does_not_show_is_not_called_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = start(WORKER, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(locks, "TABLE", tmp_path / "no table")
        found = read_status(tmp_path)
        assert (found.lock.state, states(found)) == ("unknown", {"long": "unknown"})
        os.kill(worker.pid, signal.SIGKILL)
        worker.communicate()
        assert read_status(tmp_path).lock.state == "free"
    (tmp_path / ".lock").write_text("process 1 on another-machine (semids, since 2020-01-01 00:00:00)")
    assert read_status(tmp_path).lock.state == "unknown"
    assert "whether it still runs cannot be told from here" in read_status(tmp_path).describe()


@pytest.mark.parametrize("json_asked", [False, True])
def test_a_damaged_manifest_is_named_and_the_rest_is_shown(
    json_asked: bool, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = next((run / "stages").glob("codes-*/manifest.json"))
    manifest.write_bytes(manifest.read_bytes().replace(b"codes", b"c0des", 1))
    assert main(["status", str(run), *(["--json"] if json_asked else [])]) == 65
    said = capsys.readouterr()
    assert str(manifest) in said.err
    assert "Train the RQ-VAE" in said.out
    if json_asked:
        values = json.loads(said.out)
        assert [stage["folder"] for stage in values["stages"] if stage["state"] == "damaged"] == [manifest.parent.name]
        assert len(values["results"]) == 1
        assert any(str(manifest) in fault for fault in values["faults"])
    else:
        assert "DAMAGED" in said.out


def test_a_sealed_manifest_of_something_else_is_damage_and_a_missing_file_is_not(run: Path) -> None:
    commit_sealed_json(next((run / "stages").glob("codes-*/manifest.json")), {"files": 7})
    next((run / "stages").glob("ids-*/tokens.json")).unlink()
    found = read_status(run)
    by_name = {stage.folder.partition("-")[0]: stage.state for stage in found.stages}
    assert (by_name["codes"], by_name["ids"], by_name["model"]) == ("damaged", "incomplete", "done")
    assert len(found.faults) == 1


def test_a_folder_without_stages_is_not_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 64
    assert "is not a run folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_hostile_names_move_no_cursor(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\x1b]0;evil\x07\u202e"
    (run / ".lock").write_text(f"process 1 on {evil} ({evil}, since now)")
    (run / "stages" / f"{evil}-0123456789abcdef").mkdir()
    (run / "stages" / f"{evil}-0123456789abcdef" / f"{evil}-00001.json").write_text("{}")
    model = next((run / "stages").glob("model-*/manifest.json"))
    commit_sealed_json(model, {**read_sealed_json(model), "title": f"Model {evil}"})
    shutil.copytree(published(run), published(run).parent / evil, symlinks=True)
    (published_codes := next((run / "stages").glob("codes-*/manifest.json"))).write_text("{}")
    evil_run = run.rename(run.with_name(f"run {evil}"))
    assert main(["status", str(evil_run)]) == 65
    said = capsys.readouterr()
    assert "Model \ufffd" in said.out
    assert published_codes.name in said.err
    for character in set(evil) - set("[2J]0;evil"):
        assert character not in said.out + said.err


def test_a_hundred_stages_are_told_of_at_once(run: Path) -> None:
    sources = sorted((run / "stages").glob("[!.]*"))
    for number in range(100):
        source = sources[number % len(sources)]
        shutil.copytree(source, source.with_name(f"{source.name.rpartition('-')[0]}-{number:016x}"))
    # Processor time: others may be at work. 0.07 s when this was written.
    started = time.process_time()
    assert len(read_status(run).stages) == 100 + len(sources)
    assert time.process_time() - started < 1


def test_asking_imports_neither_torch_nor_prefect_nor_faiss(run: Path) -> None:
    code = f"""
import sys
from semids.cli import main
code = main(["status", {str(run)!r}])
print(*[name for name in ("torch", "prefect", "faiss", "transformers") if name in sys.modules], "end", code)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "end 0", done.stderr
