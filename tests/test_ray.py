"""A sweep and a build on a Ray cluster of two workers give the IDs that one process gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import yaml
from conftest import clustered_vectors
from dashboard import free_port
from small_runs import published

from deployments.up import start_prefect, wait_for_server
from semids.cli import main

ray = pytest.importorskip("ray", reason="Ray is not installed: the extra `ray` brings it")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

SHARDS = 2
ROWS = 70_000
PATIENCE_SECONDS = 180
MAPPINGS = ["nearest", "capacity"]


@contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[None]:
    """Have a part of a cluster running, and end it with every process that it started."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            member.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=30)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a head and of a worker that joined it, one processor each."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    start += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    address = f"127.0.0.1:{(port := free_port())}"
    head = ["--head", f"--port={port}", f"--ray-client-server-port={free_port()}", "--include-dashboard=false"]
    # The path of a socket has 107 bytes at most: that of a test's folder may be longer.
    with TemporaryDirectory(prefix="ray-") as folder, started([*start, *head, f"--temp-dir={folder}"], environment):
        wait_for_nodes(address, 1)
        with started([*start, f"--address={address}"], environment):
            wait_for_nodes(address, 2)
            yield address


def wait_for_nodes(address: str, count: int) -> None:
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", f"--address={address}"]
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.stdout.count("node_") >= count:
            return
        assert time.monotonic() < deadline, answer.stderr
        time.sleep(0.5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with vectors in several shards, and the settings of a Prefect server that runs."""
    folder = tmp_path_factory.mktemp("spread")
    np.save(folder / "vectors.npy", clustered_vectors(ROWS, 16).astype(np.float16))
    port = str(free_port())
    named = {
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": port,
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    server = start_prefect(["server", "start"], others | named)
    try:
        wait_for_server(server, f"http://127.0.0.1:{port}")
        yield folder, others | named
    finally:
        server.terminate()
        server.wait(timeout=60)


def run_flow(place: tuple[Path, dict[str, str]], flow: str, values: dict[str, Any]) -> Path:
    folder, environment = place
    out = folder / flow
    config = folder / f"{flow}.yaml"
    config.write_text(yaml.safe_dump({"catalogue": {"path": str(folder / "vectors.npy")}, "out": str(out)} | values))
    ended = subprocess.run(
        [sys.executable, "-m", f"flows.{flow}", str(config)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return out


def task_runs(environment: dict[str, str], name: str) -> list[str]:
    query = {"task_runs": {"name": {"like_": name}}, "limit": 200}
    found = httpx.post(f"{environment['PREFECT_API_URL']}/task_runs/filter", json=query, timeout=60).json()
    return [run["name"] for run in found if run["state_type"] == "COMPLETED"]


def test_shards_and_cells_on_a_cluster_give_the_ids_of_one_process(
    place: tuple[Path, dict[str, str]], cluster: str
) -> None:
    folder, environment = place
    sweep = run_flow(place, "sweep", {"shapes": ["32x32x64"], "mappings": MAPPINGS, "ray": cluster})
    build = run_flow(place, "build", {"shape": "32x32x64", "mapping": "nearest", "ray": cluster})
    for mapping in MAPPINGS:
        alone = folder / mapping
        arguments = [str(folder / "vectors.npy"), "--shape", "32x32x64", "--mapping", mapping, "--out", str(alone)]
        assert main(["tokenize", *arguments]) == 0
        ids = (published(alone) / "semantic_ids.parquet").read_bytes()
        cell = sweep / "results" / "vectors" / f"32x32x64-{mapping}-residual-kmeans"
        assert (cell / "semantic_ids.parquet").read_bytes() == ids
        assert mapping != "nearest" or (published(build) / "semantic_ids.parquet").read_bytes() == ids
    lots = [f"{stage}, lot {lot} of {SHARDS}" for stage in ("Import the vectors",) * 2 for lot in range(SHARDS)]
    lots += [f"Encode the vectors, lot {lot} of {SHARDS}" for lot in range(SHARDS)]
    deadline = time.monotonic() + 30
    while sorted(task_runs(environment, "lot")) != sorted(lots):
        assert time.monotonic() < deadline, task_runs(environment, "lot")
        time.sleep(0.5)
