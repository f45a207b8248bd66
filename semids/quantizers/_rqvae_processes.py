"""An RQ-VAE trained by several processes of one machine, as torchrun starts them.

    python -m semids.quantizers._rqvae_processes JOB.json    (started by `train_together`)

The started process launches the ranks and watches them; rank 0 writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from safetensors.numpy import load_file, save_file

from semids.errors import DataError, ProcessError, SemidsError
from semids.parallel import thread_count
from semids.quantizers._ranks import Ranks
from semids.quantizers._rqvae_outcome import freeze_training
from semids.quantizers._rqvae_train import Job, Told, train
from semids.quantizers.base import Tensors
from semids.quantizers.rqvae import RqvaeSettings
from semids.shards import ShardedArray, ShardLayout
from semids.store import commit, commit_bytes, commit_sealed_json, read_sealed_json, wait_for_lock

JOB, ROWS, TENSORS, OUTCOME, FAILURE = "job.json", "rows.npy", "outcome.safetensors", "outcome.json", "failure.json"
LAUNCHER = "SEMIDS_LAUNCHER"
"""Variable that tells ranks the process that started them."""
LONGEST_SILENCE = timedelta(hours=12)
"""How long ranks wait for one another: rank 0 fits the first codebooks alone."""
HEARTBEAT_S = 0.5


def train_together(job: Job, told: Told, processes: int) -> tuple[Tensors, dict[str, Any]]:
    """Return what `freeze_training(train(job, told))` does, trained by several processes.

    Raises:
        ProcessError: a process died. Checkpoints stay, and the next call goes on from the last.
        DataError: as `train` does.
    """
    if job.folder is None:
        raise AssertionError("processes meet in a folder")
    folder = job.folder
    for name in (OUTCOME, FAILURE):
        (folder / name).unlink(missing_ok=True)
    commit(folder / ROWS, lambda path: _save_rows(path, job.rows))
    described = {
        "sizes": list(job.sizes),
        "settings": job.settings.model_dump(mode="json"),
        "seed": job.seed,
        "layout": vars(job.vectors.layout),
        # Looked up here, where digests are checked; the ranks only read.
        "shards": [str(job.vectors.path(shard)) for shard in range(job.vectors.layout.shards)],
        "processes": processes,
        "parent": os.getpid(),
    }
    commit_bytes(folder / JOB, json.dumps(described).encode())
    threads = str(max(1, thread_count() // processes))
    # Ranks of one machine meet on its own address, which needs no name service.
    loopback = "lo" if sys.platform == "linux" else "lo0"
    environment = {"GLOO_SOCKET_IFNAME": loopback} | dict(os.environ) | {"OMP_NUM_THREADS": threads}
    command = [sys.executable, "-m", __name__, str(folder / JOB)]
    # In a session of its own: an interrupt from the keyboard is this process's to handle.
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as launcher:
        assert launcher.stdout is not None
        try:
            for line in launcher.stdout:
                _tell(line, told)
        finally:
            # An interrupt leaves nobody behind that would go on writing.
            launcher.terminate()
    if (folder / OUTCOME).exists():
        return load_file(folder / TENSORS), read_sealed_json(folder / OUTCOME)
    failure = read_sealed_json(folder / FAILURE) if (folder / FAILURE).exists() else {}
    if failure.get("kind") == "DataError":
        raise DataError(failure["message"])
    ended = f"the processes that train the RQ-VAE ended with {launcher.returncode} and left no message"
    raise ProcessError(f"{failure.get('message', ended)}; run again: training goes on from its last checkpoint")


def _save_rows(path: Path, rows: Any) -> None:
    with path.open("wb") as file:
        np.save(file, rows, allow_pickle=False)


def _tell(line: str, told: Told) -> None:
    try:
        what, done, total = json.loads(line)
    except ValueError:
        return  # What a library printed.
    told(what, done, total)


def launch(path: Path) -> None:
    """Start the ranks of a job and wait for them; say in a file which one failed, and how."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    job = json.loads(path.read_bytes())
    _die_with(job["parent"])
    # A rank may come to ask for its parent when that has ended already.
    os.environ[LAUNCHER] = str(os.getpid())
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job["processes"],
        run_id="semids",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", __spec__.name if __spec__ else __name__, str(path))
    except SignalException:
        sys.exit(1)  # Whoever sent it knows.
    except ChildFailedError as error:
        if (path.parent / FAILURE).exists():
            return
        rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
        ended = f"by signal {-failure.exitcode}" if failure.exitcode < 0 else f"with exit code {failure.exitcode}"
        message = f"process {rank + 1} of {job['processes']} that train the RQ-VAE ended {ended}"
        commit_sealed_json(path.parent / FAILURE, {"kind": "ProcessError", "message": message})


def work(path: Path) -> None:
    """Be one rank of a job."""
    described = json.loads(path.read_bytes())
    _die_with(int(os.environ[LAUNCHER]))
    cuda = torch.cuda.is_available()
    place = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", place % torch.cuda.device_count()) if cuda else torch.device("cpu")
    torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=LONGEST_SILENCE)
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    shards = [Path(shard) for shard in described["shards"]]
    job = Job(
        sizes=tuple(described["sizes"]),
        settings=RqvaeSettings(**described["settings"]),
        seed=described["seed"],
        vectors=ShardedArray(ShardLayout(**described["layout"]), shards.__getitem__),
        rows=np.load(path.parent / ROWS, allow_pickle=False),
        folder=path.parent,
    )
    try:
        if ranks.rank > 0:
            train(job, lambda what, done, total: None, ranks=ranks, device=device)
        else:
            # Whoever a killed run left behind ends first.
            with wait_for_lock(path.parent / "lock"):
                _lead(job, ranks, device)
    except SemidsError as error:
        # All ranks find the same, and the first to end has the others ended.
        commit_sealed_json(path.parent / FAILURE, {"kind": type(error).__name__, "message": str(error)})
        raise
    torch.distributed.destroy_process_group()


def _lead(job: Job, ranks: Ranks, device: torch.device) -> None:
    """Train as the rank that tells how it goes and writes what comes of it."""
    assert job.folder is not None
    trained = train(job, _print, ranks=ranks, device=device)
    tensors, evidence = freeze_training(trained)
    commit(job.folder / TENSORS, lambda path: save_file(tensors, path))
    commit_sealed_json(job.folder / OUTCOME, evidence)


def _print(what: str, done: int, total: int) -> None:
    print(json.dumps([what, done, total]), flush=True)


def _die_with(parent: int) -> None:
    """End this process soon after its parent has ended, however it did, even if that was before this call."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(HEARTBEAT_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    (work if "LOCAL_RANK" in os.environ else launch)(Path(sys.argv[1]))
