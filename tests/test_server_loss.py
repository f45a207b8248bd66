"""A run whose Prefect server is not there, dies, is frozen or starts again computes the same, and says what is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from conftest import clustered_vectors
from dashboard import free_port
from small_runs import published

from deployments.up import start_prefect, wait_for_server
from semids.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("server-loss")]

FROZEN_SECONDS = 30
PATIENCE_SECONDS = 300
MAPPINGS = ["nearest", "capacity"]


@dataclass
class Place:
    """A folder with vectors, and the settings of a Prefect server of which nothing is started yet."""

    folder: Path
    address: str
    environment: dict[str, str]

    def write_config(self, name: str, values: dict[str, Any]) -> str:
        path = self.folder / f"{name}.yaml"
        common = {"catalogue": {"path": str(self.folder / "vectors.npy")}, "out": str(self.folder / name)}
        path.write_text(yaml.safe_dump(common | values))
        return str(path)

    def start_server(self) -> subprocess.Popen[bytes]:
        server = start_prefect(["server", "start"], self.environment)
        wait_for_server(server, self.address)
        return server

    @contextmanager
    def started_sweep(self) -> Iterator[subprocess.Popen[str]]:
        """Start a sweep, and go on when its first codebook is there."""
        config = self.write_config("flow", {"shapes": ["32x32x32"], "mappings": MAPPINGS})
        command = [sys.executable, "-m", "flows.sweep", config]
        process = subprocess.Popen(command, env=self.environment, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while not list((self.folder / "flow" / "stages").glob("train*/manifest.json")):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield process
        finally:
            process.kill()
            process.wait()

    def states(self) -> list[str]:
        """Return the names of the states that the flow runs ended in, as the server has them."""
        runs = httpx.post(f"{self.address}/api/flow_runs/filter", json={}, timeout=60).json()
        return [run["state_name"] for run in runs]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    np.save(tmp_path / "vectors.npy", clustered_vectors(30_000, 64))
    port = str(free_port())
    named = {
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": port,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return Place(tmp_path, f"http://127.0.0.1:{port}", others | named)


def check_ids(place: Place) -> None:
    """Compare the IDs of every cell with those of a run that knows no server."""
    for mapping in MAPPINGS:
        config = place.write_config(mapping, {"shape": "32x32x32", "mapping": mapping})
        assert main(["tokenize", "--config", config]) == 0
        cell = place.folder / "flow" / "results" / "vectors" / f"32x32x32-{mapping}-residual-kmeans"
        alone = published(place.folder / mapping) / "semantic_ids.parquet"
        assert (cell / "semantic_ids.parquet").read_bytes() == alone.read_bytes()


def test_a_flow_whose_server_is_absent_finishes_with_the_same_ids(place: Place) -> None:
    config = place.write_config("flow", {"shapes": ["32x32x32"], "mappings": MAPPINGS})
    ended = subprocess.run(
        [sys.executable, "-m", "flows.sweep", config],
        env=place.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert f"server at {place.address}/api knows nothing of this run" in ended.stderr
    check_ids(place)


def test_a_flow_whose_server_dies_finishes_with_the_same_ids(place: Place) -> None:
    # Prefect's client otherwise tries for a minute at each of the calls that end a flow.
    place.environment["PREFECT_CLIENT_MAX_RETRIES"] = "1"
    server = place.start_server()
    with place.started_sweep() as sweep:
        server.kill()
        server.wait()
        errors = sweep.communicate(timeout=PATIENCE_SECONDS)[1]
    assert sweep.returncode == 0, errors
    assert f"server at {place.address}/api stopped answering during this run" in errors
    check_ids(place)


def test_a_frozen_server_loses_nothing(place: Place) -> None:
    server = place.start_server()
    try:
        with place.started_sweep() as sweep:
            server.send_signal(signal.SIGSTOP)
            time.sleep(FROZEN_SECONDS)
            server.send_signal(signal.SIGCONT)
            errors = sweep.communicate(timeout=PATIENCE_SECONDS)[1]
        assert sweep.returncode == 0, errors
        assert "does not answer" not in errors
        assert place.states() == ["Completed"] * 3
    finally:
        server.terminate()
        server.wait(timeout=60)
    check_ids(place)


def test_a_server_that_starts_again_shows_how_the_run_ended(place: Place) -> None:
    server = place.start_server()
    with place.started_sweep() as sweep:
        server.kill()
        server.wait()
        server = place.start_server()
        try:
            errors = sweep.communicate(timeout=PATIENCE_SECONDS)[1]
            assert sweep.returncode == 0, errors
            # A cell that began while no server answered has no page of its own.
            assert set(place.states()) == {"Completed"}
        finally:
            server.terminate()
            server.wait(timeout=60)
    check_ids(place)
