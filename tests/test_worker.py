"""Runs on a server and a worker: by schedule, cancelled, and killed; what is run again ends with the same IDs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from conftest import clustered_vectors
from dashboard import find_deployment
from servers import Server, make_server
from small_runs import published

from deployments.automations import NOTIFICATION
from deployments.up import start_worker
from semids.verification import verify_run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("worker")]

CRASHED_WITHIN_SECONDS = 120
PATIENCE_SECONDS = 240
SAVE_WEBHOOK = """
import os
from prefect.blocks.notifications import CustomWebhookNotificationBlock
body = {"subject": "{{subject}}", "body": "{{body}}"}
CustomWebhookNotificationBlock(name="alarms", url=os.environ["WEBHOOK"], json_data=body).save("alarms")
"""
ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass
class Services:
    """A server with the deployments of the project, and a worker that can be killed."""

    server: Server
    worker: subprocess.Popen[bytes] | None = None

    def start_worker(self) -> None:
        """Start the worker."""
        self.worker = start_worker(self.server.environment)

    def stop_worker(self) -> None:
        """Ask the worker to end, and wait."""
        if self.worker is not None:
            self.worker.terminate()
            self.worker.wait(timeout=60)

    def kill_worker(self) -> None:
        """Kill the worker and every process that it started, at once."""
        assert self.worker is not None
        for process in [*psutil.Process(self.worker.pid).children(recursive=True), psutil.Process(self.worker.pid)]:
            process.send_signal(signal.SIGKILL)
        self.worker.wait(timeout=30)

    def start(self, config: dict[str, Any], deployment: str = "build") -> str:
        """Start a deployment, and return the run's id."""
        place = find_deployment(self.server.address, deployment)
        return self.server.post(f"deployments/{place}/create_flow_run", {"parameters": {"config": config}})["id"]

    def state(self, run: str) -> str:
        """Return the type of a run's state."""
        return self._state(run)["type"]

    def message(self, run: str) -> str:
        """Return what a run's state says."""
        return self._state(run)["message"]

    def cells(self, run: str) -> list[str]:
        """Return the ids of the runs of a sweep's cells."""
        query = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}}
        return [cell["id"] for cell in self.server.post("flow_runs/filter", query)]

    def retry(self, run: str) -> None:
        """Do what the dashboard's button Retry does."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the Prefect UI"}
        self.server.post(f"flow_runs/{run}/set_state", {"state": state, "force": True})

    def _state(self, run: str) -> Any:
        answer = httpx.get(f"{self.server.address}/api/flow_runs/{run}", timeout=60)
        answer.raise_for_status()
        return answer.json()["state"]

    def wait(self, run: str, seconds: float = PATIENCE_SECONDS) -> str:
        """Wait until a run has ended, and return how."""
        deadline = time.monotonic() + seconds
        while (state := self.state(run)) not in ENDS:
            assert time.monotonic() < deadline, f"still {state} after {seconds} s"
            time.sleep(0.5)
        return state


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> Iterator[Services]:
    server = make_server(tmp_path_factory.mktemp("worker"), database=prefect_database)
    with server.running():
        subprocess.run(
            [sys.executable, "-m", "deployments.apply"], env=server.environment, cwd=server.folder, check=True
        )
        started = Services(server)
        started.start_worker()
        try:
            yield started
        finally:
            started.stop_worker()


@pytest.fixture(scope="module")
def catalogue(services: Services) -> str:
    np.save(services.server.folder / "vectors.npy", clustered_vectors(60_000, 64))
    return str(services.server.folder / "vectors.npy")


def config(catalogue: str, out: str) -> dict[str, Any]:
    return {"catalogue": {"path": catalogue}, "shape": "64x64x64", "mapping": "capacity", "out": out}


@pytest.fixture(scope="module")
def undisturbed(services: Services, catalogue: str) -> bytes:
    """The IDs that a run leaves which nothing interrupts."""
    assert services.wait(services.start(config(catalogue, "runs/undisturbed"))) == "COMPLETED"
    return ids_of(services.server.folder / "runs" / "undisturbed")


def sweep_config(catalogue: str, out: str) -> dict[str, Any]:
    """Of two cells that run at a time; one is that of `config`."""
    shared = {name: value for name, value in config(catalogue, out).items() if name not in {"shape", "mapping"}}
    return shared | {"shapes": ["64x64x64"], "mappings": ["uniform", "capacity"]}


def ids_of(run: Path) -> bytes:
    (ids,) = (run / "results").glob("*/*-capacity-*/semantic_ids.parquet")
    return ids.read_bytes()


def wait_for_stage(run: Path, seconds: float = PATIENCE_SECONDS) -> dict[str, int]:
    """Wait until all codebooks are trained, and return when the manifests of finished stages were written, in ns."""
    deadline = time.monotonic() + seconds
    while not any(name.startswith("train-codebook-3") for name in finished_stages(run)):
        assert time.monotonic() < deadline, f"no codebooks within {seconds} s: {sorted(finished_stages(run))}"
        time.sleep(0.05)
    return finished_stages(run)


def finished_stages(run: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in (run / "stages").glob("[!.]*/manifest.json")}


def test_a_schedule_starts_a_run(services: Services, catalogue: str, undisturbed: bytes) -> None:
    place = find_deployment(services.server.address, "build")
    parameters = {"config": config(catalogue, "runs/scheduled")}
    schedule = {"schedule": {"interval": 15}, "active": True, "parameters": parameters}
    made = services.server.post(f"deployments/{place}/schedules", [schedule])[0]["id"]
    query = {"deployments": {"id": {"any_": [place]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(run["auto_scheduled"] for run in services.server.post("flow_runs/filter", query)):
        assert time.monotonic() < deadline
        time.sleep(1)
    httpx.delete(f"{services.server.address}/api/deployments/{place}/schedules/{made}").raise_for_status()
    assert ids_of(services.server.folder / "runs" / "scheduled") == undisturbed


def test_a_cancelled_run_leaves_nothing_half_written_and_goes_on(
    services: Services, catalogue: str, undisturbed: bytes
) -> None:
    folder = services.server.folder / "runs" / "cancelled"
    run = services.start(sweep_config(catalogue, "runs/cancelled"), "sweep")
    before = wait_for_stage(folder)
    services.server.post(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    assert services.wait(run) == "CANCELLED"
    assert verify_run(folder).faults == []
    assert services.wait(services.start(sweep_config(catalogue, "runs/cancelled"), "sweep")) == "COMPLETED"
    assert ids_of(folder) == undisturbed
    assert before.items() <= finished_stages(folder).items()


def test_a_killed_worker_s_run_is_shown_as_crashed_and_goes_on(
    services: Services, catalogue: str, undisturbed: bytes
) -> None:
    folder = services.server.folder / "runs" / "killed"
    run = services.start(sweep_config(catalogue, "runs/killed"), "sweep")
    before = wait_for_stage(folder)
    services.kill_worker()
    killed = time.monotonic()
    runs = [run, *services.cells(run)]
    assert len(runs) == 3
    assert [services.state(one) for one in runs] == ["RUNNING"] * 3
    for one in runs:
        left = CRASHED_WITHIN_SECONDS - (time.monotonic() - killed)
        assert services.wait(one, left) == "CRASHED"
    services.start_worker()
    assert services.wait(services.start(sweep_config(catalogue, "runs/killed"), "sweep")) == "COMPLETED"
    assert ids_of(folder) == undisturbed
    assert before.items() <= finished_stages(folder).items()


def test_of_a_run_that_is_started_twice_one_goes_on_and_the_other_can_be_retried(
    services: Services, catalogue: str, undisturbed: bytes
) -> None:
    folder = services.server.folder / "runs" / "twice"
    runs = [services.start(config(catalogue, "runs/twice")) for _ in range(2)]
    states = {services.wait(run): run for run in runs}
    assert set(states) == {"COMPLETED", "FAILED"}
    assert "runs/twice" in services.message(states["FAILED"])
    finished = finished_stages(folder)
    assert ids_of(folder) == undisturbed
    services.retry(states["FAILED"])
    assert services.wait(states["FAILED"]) == "COMPLETED"
    assert finished_stages(folder) == finished


def test_a_collision_rate_above_its_limit_sends_a_message(services: Services, catalogue: str) -> None:
    with started_listener() as (url, messages):
        environment = services.server.environment | {"WEBHOOK": url, NOTIFICATION: "custom-webhook/alarms"}
        for command in (["-c", SAVE_WEBHOOK], ["-m", "deployments.apply"]):
            subprocess.run([sys.executable, *command], env=environment, cwd=services.server.folder, check=True)
        loud = {"shape": "16x16x16", "alarm_collision_rate": 0.5}
        assert services.wait(services.start(config(catalogue, "runs/loud") | loud)) == "COMPLETED"
        report = json.loads((published(services.server.folder / "runs" / "loud") / "report.json").read_text())
        message = messages.get(timeout=60)
    assert message["subject"] == "semids: too many items collide"
    label, _, figures = message["body"].partition(": ")
    assert label == "16x16x16-capacity-residual-kmeans"
    assert figures.startswith(f"collision rate {report['collision_rate']}, floor ")


@contextmanager
def started_listener() -> Iterator[tuple[str, Queue[dict[str, str]]]]:
    """Listen on loopback; yield the address, and the messages that are posted to it."""
    messages: Queue[dict[str, str]] = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        Thread(target=listener.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listener.server_port}", messages
        listener.shutdown()
