"""Several processes that train one RQ-VAE, started as torchrun starts them."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from test_rqvae_training import Array, job_of, save_after_every_step, silently

from semids.errors import DataError, ProcessError
from semids.quantizers._rqvae_outcome import freeze_training
from semids.quantizers._rqvae_processes import train_together
from semids.quantizers._rqvae_train import train

pytestmark = pytest.mark.slow

LONG: dict[str, Any] = {"epochs": 40, "patience": 0, "sk_epsilons": (0.0, 0.05), "sk_iters": 20, "batch_size": 101}
SHORT: dict[str, Any] = {"epochs": 12, "patience": 0}


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> Array:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(30, 10))
    rows = centres[rng.integers(0, 30, 531)] + 0.3 * rng.normal(size=(531, 10))
    return Array(rows.astype(np.float32), tmp_path_factory.mktemp("array"))


def test_two_processes_lose_what_one_does(array: Array, tmp_path: Path) -> None:
    """Batches of 101 rows and a last one of 1: neither divides evenly, and one rank has none of the last.

    An epoch has 5 steps and its loss is their mean: the 40 epochs are the first 200 steps.
    """
    _, alone = freeze_training(train(job_of(array, **LONG), silently))
    told: list[tuple[str, int, int]] = []
    tensors, together = train_together(job_of(array, tmp_path, **LONG), lambda *given: told.append(given), 2)
    np.testing.assert_allclose(np.array(together["losses"]), np.array(alone["losses"]), atol=1e-4)  # seen: 2e-6
    assert together["revived"] == alone["revived"]
    assert told[-1][1:] == (40 * 504, 40 * 504)
    assert set(tensors) >= {"encoder_weight_1", "decoder_bias_2", "codebook_2", "mean"}
    # A second call, as after a kill between the end of the training and that of the step, finds all epochs done.
    again, _ = train_together(job_of(array, tmp_path, **LONG), silently, 2)
    assert {name: value.tobytes() for name, value in again.items()} == {n: v.tobytes() for n, v in tensors.items()}


def test_processes_go_on_where_one_process_was_interrupted(
    array: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_after_every_step(monkeypatch)

    def give_up(what: str, done: int, total: int) -> None:
        if what == "train" and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(job_of(array, tmp_path, **SHORT), give_up)
    begun: list[int] = []
    _, together = train_together(job_of(array, tmp_path, **SHORT), lambda what, done, total: begun.append(done), 2)
    assert begun[0] > 504 * SHORT["epochs"] / 2
    _, alone = freeze_training(train(job_of(array, **SHORT), silently))
    np.testing.assert_allclose(np.array(together["losses"]), np.array(alone["losses"]), atol=1e-4)


def test_a_process_that_dies_ends_the_training_which_then_goes_on(array: Array, tmp_path: Path) -> None:
    whole, _ = train_together(job_of(array, tmp_path / "whole", **SHORT), silently, 2)
    killed = threading.Event()

    def kill(what: str, done: int, total: int) -> None:
        if what == "train" and not killed.is_set():
            killed.set()
            (victim,) = [
                child for child in psutil.Process().children(recursive=True) if child.environ().get("LOCAL_RANK") == "1"
            ]
            victim.send_signal(signal.SIGKILL)

    message = r"process 2 of 2 that train the RQ-VAE ended by signal 9; run again: training goes on from its last"
    with pytest.raises(ProcessError, match=message):
        train_together(job_of(array, tmp_path / "killed", **SHORT | {"epochs": 500}), kill, 2)
    assert killed.is_set()
    again, _ = train_together(job_of(array, tmp_path / "killed", **SHORT), silently, 2)
    assert {name: value.tobytes() for name, value in again.items()} == {n: v.tobytes() for n, v in whole.items()}


def test_a_loss_that_is_no_number_comes_through(array: Array, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the loss of epoch 1, step 2 is no number"):
        train_together(job_of(array, tmp_path, optimizer="SGD", lr=1e30, warmup_epochs=0), silently, 2)


@pytest.mark.parametrize("moment", ["as soon as both are there", "while they train"])
def test_processes_end_with_the_one_that_started_them(moment: str, array: Array, tmp_path: Path) -> None:
    """Guard: `_rqvae_processes._die_with`; without it, orphans go on writing checkpoints."""
    begun, pipe = [], os.pipe()

    def watch(what: str, done: int, total: int) -> None:
        if what == "train" and not begun:
            begun.append(done)
            os.write(pipe[1], b"training")

    parent = os.fork()
    if parent == 0:
        try:
            train_together(job_of(array, tmp_path, epochs=5000, warmup_epochs=2, patience=0), watch, 2)
        finally:
            os._exit(0)
    if moment == "while they train":
        assert os.read(pipe[0], 100) == b"training"
    ranks: list[psutil.Process] = []
    while len(ranks) < 2:
        children = psutil.Process(parent).children(recursive=True)
        ranks = [child for child in children if "LOCAL_RANK" in environment_of(child)]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Return a process's environment; none where it has just ended or not yet begun."""
    try:
        return process.environ()
    except psutil.Error:
        return {}
