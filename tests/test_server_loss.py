"""A run whose Prefect server is not there, dies, is frozen or starts again computes the same, and says what is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import clustered_vectors
from servers import Server, make_server
from small_runs import published

from semids.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("server-loss")]

FROZEN_SECONDS = 30
PATIENCE_SECONDS = 300
MAPPINGS = ["nearest", "capacity"]


@pytest.fixture
def server(tmp_path: Path, prefect_database: Path) -> Server:
    """A server of which nothing is started yet, and vectors in its folder."""
    np.save(tmp_path / "vectors.npy", clustered_vectors(30_000, 64))
    return make_server(tmp_path, database=prefect_database)


def write_config(server: Server, name: str, values: dict[str, Any]) -> str:
    path = server.folder / f"{name}.yaml"
    common = {"catalogue": {"path": str(server.folder / "vectors.npy")}, "out": str(server.folder / name)}
    path.write_text(yaml.safe_dump(common | values))
    return str(path)


@contextmanager
def started_sweep(server: Server) -> Iterator[subprocess.Popen[str]]:
    """Start a sweep, and go on when its first codebook is there."""
    config = write_config(server, "flow", {"shapes": ["32x32x32"], "mappings": MAPPINGS})
    command = [sys.executable, "-m", "flows.sweep", config]
    process = subprocess.Popen(command, env=server.environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not list((server.folder / "flow" / "stages").glob("train*/manifest.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def states(server: Server) -> list[str]:
    """Return the names of the states that the flow runs ended in, as the server has them."""
    return [run["state_name"] for run in server.post("flow_runs/filter", {})]


def check_ids(server: Server) -> None:
    """Compare the IDs of every cell with those of a run that knows no server."""
    for mapping in MAPPINGS:
        config = write_config(server, mapping, {"shape": "32x32x32", "mapping": mapping})
        assert main(["tokenize", "--config", config]) == 0
        cell = server.folder / "flow" / "results" / "vectors" / f"32x32x32-{mapping}-residual-kmeans"
        alone = published(server.folder / mapping) / "semantic_ids.parquet"
        assert (cell / "semantic_ids.parquet").read_bytes() == alone.read_bytes()


def test_a_flow_whose_server_is_absent_finishes_with_the_same_ids(server: Server) -> None:
    config = write_config(server, "flow", {"shapes": ["32x32x32"], "mappings": MAPPINGS})
    ended = subprocess.run(
        [sys.executable, "-m", "flows.sweep", config],
        env=server.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert f"server at {server.address}/api knows nothing of this run" in ended.stderr
    check_ids(server)


def test_a_flow_whose_server_dies_finishes_with_the_same_ids(server: Server) -> None:
    # Prefect's client otherwise tries for a minute at each of the calls that end a flow.
    server.environment["PREFECT_CLIENT_MAX_RETRIES"] = "1"
    process = server.start()
    with started_sweep(server) as sweep:
        process.kill()
        process.wait()
        errors = sweep.communicate(timeout=PATIENCE_SECONDS)[1]
    assert sweep.returncode == 0, errors
    assert "states, logs and artifacts of that part are missing from its page" in errors
    assert f"server at {server.address}/api stopped answering during this run" in errors
    check_ids(server)


def test_a_frozen_server_loses_nothing(server: Server) -> None:
    with server.running() as process:
        with started_sweep(server) as sweep:
            process.send_signal(signal.SIGSTOP)
            time.sleep(FROZEN_SECONDS)
            process.send_signal(signal.SIGCONT)
            errors = sweep.communicate(timeout=PATIENCE_SECONDS)[1]
        assert sweep.returncode == 0, errors
        assert "does not answer" not in errors
        assert states(server) == ["Completed"] * 3
    check_ids(server)


def test_a_server_that_starts_again_shows_how_the_run_ended(server: Server) -> None:
    process = server.start()
    with started_sweep(server) as sweep:
        process.kill()
        process.wait()
        with server.running():
            errors = sweep.communicate(timeout=PATIENCE_SECONDS)[1]
            assert sweep.returncode == 0, errors
            # A cell that began while no server answered has no page of its own.
            assert set(states(server)) == {"Completed"}
    check_ids(server)
