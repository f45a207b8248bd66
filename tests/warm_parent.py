"""A process that imports once what a run needs and forks a child for each line of JSON on its standard input.

    python tests/warm_parent.py FOLDER    (started by small_runs.WarmParent)

FOLDER is where the model of its warming-up is written.
"""

from __future__ import annotations

import functools
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

import semids
from semids import calibration, cli, fingerprints, reporting, stages, store
from semids.embedders.transformer import TransformerEmbedder
from semids.metrics import measure_ids
from semids.plots import plot_report
from semids.quantizers import _rqvae_decoder, _rqvae_state, _rqvae_train
from tests import small_runs, tiny_models

STEPS = (
    (store, "_fill"),
    (store, "_flush"),
    (store, "_rename"),
    (Path, "symlink_to"),
    (Path, "replace"),
    (_rqvae_train._Trainer, "_take_step"),
    (_rqvae_decoder._DecoderFit, "take_step"),
)


def warm_up(folder: Path) -> None:
    """Do once, without threads, what a run imports or caches when it first does it."""
    import faiss
    import pyarrow.compute  # noqa: F401

    tqdm.tqdm.monitor_interval = 0  # no thread that watches bars
    model = tiny_models.build_bert(folder / "model")
    embedder = TransformerEmbedder(TransformerEmbedder.settings_type(model=str(model)))
    embedder.load()
    embedder.embed(["red shoe", "blue shoe"])
    faiss.knn(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), 1)
    plot_report(measure_ids([np.array([[0, 1]])], None, sizes=(2, 2)))
    for module in pkgutil.walk_packages(semids.__path__, "semids."):
        for name in fingerprints._source(module.name).statements:
            fingerprints._definition(module.name, name)
    # The same in every child, and a third of the time of a run as small as these.
    stages.library_versions = reporting.library_versions = functools.cache(stages.library_versions)
    calibration.available_bytes = functools.cache(calibration.available_bytes)
    stages.library_versions()
    calibration.available_bytes()
    assert threading.active_count() == 1, "threads do not survive a fork"


def obey(orders: dict[str, Any]) -> int:
    """Run a command line as asked and return its exit code.

    Orders: `arguments`; `checkpoint_every`, training steps of an RQ-VAE between two checkpoints; `shard_rows`; `plots`,
    false to write zeros in their place; `events`, a file to which every step of the commit helper, every link and every
    training step is written; `kill_at` and `kill`: the number of the event at which to die, and whether `before` it,
    `half` way through a write, or `after` it; `copied` and `copies`: the run folder, and one that gets a copy of it as
    it is before each event that begins a stage, or the results, by the number of the event; `image`, `cuts` and
    `cut_after`: a file, and a folder that gets a copy of it after each of these events; `flush_files`, false to flush
    folders alone.
    """
    small_runs.use_small_shards(orders.get("shard_rows", small_runs.SHARD_ROWS))
    if not orders.get("plots", True):
        reporting.plot_report = lambda figures: dict.fromkeys(("prefixes", "buckets", "loads"), bytes(5000))
        reporting.plot_training = lambda note: bytes(5000)
    if not orders.get("flush_files", True):
        flush = store._flush
        store._flush = lambda path: flush(path) if path.is_dir() else None
    if "checkpoint_every" in orders:
        save_every(orders["checkpoint_every"])
    log = os.open(orders["events"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    steps = 0
    inside = False
    place = Path()

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def step(*arguments: Any) -> Any:
            nonlocal steps, inside, place
            if inside:  # `_rename` replaces: one step, not two
                return original(*arguments)
            number, steps = steps, steps + 1
            subject = arguments[1] if name == "_rename" else arguments[0]
            if "copies" in orders and name in ("_fill", "symlink_to") and subject.parent != place:
                place = subject.parent
                shutil.copytree(orders["copied"], Path(orders["copies"]) / str(number), symlinks=True)
            os.write(log, f"{name} {subject}\n".encode())
            kill = orders.get("kill") if number == orders.get("kill_at") else None
            if kill == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            inside = True
            try:
                result = original(*arguments)
            finally:
                inside = False
            if number in orders.get("cut_after", ()):
                copy = Path(orders["cuts"]) / str(number)
                subprocess.run(["cp", "--sparse=always", orders["image"], copy], check=True)
            if kill == "half":
                os.truncate(arguments[0], arguments[0].stat().st_size // 2)
            if kill is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, step)

    for owner, name in STEPS:
        watch(owner, name)
    return cli.main(orders["arguments"])


def save_every(steps: int) -> None:
    """Let the training of an RQ-VAE save its state after so many steps, whatever time they took."""
    passed = 0

    def save_now_and_then(checkpoints: Any, training: Any) -> None:
        nonlocal passed
        passed += 1
        if passed % steps == 0:
            checkpoints.save(training)

    _rqvae_state.Checkpoints.save_now_and_then = save_now_and_then  # type: ignore[method-assign]


def fork(work: Callable[[], int], said: Path) -> int:
    """Do the work in a child and return its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            signal.alarm(small_runs.TIMEOUT_S)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    warm_up(Path(sys.argv[1]))
    for line in sys.stdin:
        request = json.loads(line)
        print(fork(lambda request=request: obey(request), Path(request["said"])), flush=True)
