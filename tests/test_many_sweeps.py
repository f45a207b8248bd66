"""Four sweeps at once against one server all end well, and its database is never locked against them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import yaml
from conftest import clustered_vectors
from servers import Server, make_server

from tasks.server import free_port

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("many-sweeps")]

SWEEPS, SHAPES, MAPPINGS = 4, ["8x8x8", "16x16"], ["nearest", "uniform", "capacity"]
PATIENCE_SECONDS = 420
POSTGRES = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
PROGRAMS = Path(found).parent if (found := shutil.which("initdb")) else POSTGRES


@contextmanager
def started_postgres() -> Generator[str]:
    """Start PostgreSQL on loopback, and yield the URL of an empty database."""
    assert PROGRAMS is not None
    # It refuses to run as root.
    owner = "postgres" if os.geteuid() == 0 else None
    port = free_port()
    with TemporaryDirectory(prefix="postgres-") as name:
        if owner:
            shutil.chown(name, owner)
        data, run = Path(name) / "data", {"user": owner, "cwd": name, "stdout": subprocess.DEVNULL}
        subprocess.run(
            [PROGRAMS / "initdb", "--auth=trust", "--encoding=UTF8", "--username=semids", data], check=True, **run
        )
        options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={name}"
        control = [PROGRAMS / "pg_ctl", f"--pgdata={data}", "--wait"]
        subprocess.run([*control, f"--options={options}", f"--log={name}/log", "start"], check=True, **run)
        try:
            yield f"postgresql+asyncpg://semids@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "--mode=fast", "stop"], check=True, **run)


def run_sweeps(server: Server) -> None:
    """Register everything, and start the sweeps together; each must end with success."""
    # Automations have the server write at every event of a run.
    apply = [sys.executable, "-m", "deployments.apply"]
    subprocess.run(apply, env=server.environment, cwd=server.folder, check=True)
    np.save(server.folder / "vectors.npy", clustered_vectors(2000, 16))
    common = {"catalogue": {"path": str(server.folder / "vectors.npy")}, "shapes": SHAPES, "mappings": MAPPINGS}
    processes: list[subprocess.Popen[str]] = []
    try:
        for number in range(SWEEPS):
            config = server.folder / f"sweep-{number}.yaml"
            config.write_text(yaml.safe_dump(common | {"out": str(server.folder / f"run-{number}")}))
            command = [sys.executable, "-m", "flows.sweep", str(config)]
            processes.append(subprocess.Popen(command, env=server.environment, stderr=subprocess.PIPE, text=True))
        for process in processes:
            errors = process.communicate(timeout=PATIENCE_SECONDS)[1]
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()


def states(server: Server, kind: str) -> list[str]:
    """Return the types of the states of all runs of a kind, as the server has them."""
    found: list[str] = []
    while True:
        page = server.post(f"{kind}/filter", {"limit": 200, "offset": len(found)})
        found += [run["state_type"] for run in page]
        if len(page) < 200:
            return found


def check_states(server: Server) -> None:
    """Every sweep and cell has completed, and so has every task, once the server has written down what it heard."""
    assert states(server, "flow_runs") == ["COMPLETED"] * SWEEPS * (1 + len(SHAPES) * len(MAPPINGS))
    deadline = time.monotonic() + 60
    while set(states(server, "task_runs")) != {"COMPLETED"}:
        assert time.monotonic() < deadline, states(server, "task_runs")
        time.sleep(1)


def test_four_sweeps_at_once_on_sqlite(tmp_path: Path, prefect_database: Path) -> None:
    """Guard: `make_writers_queue` in `tasks.server`."""
    server = make_server(tmp_path, database=prefect_database, PREFECT_SERVER_LOG_RETRYABLE_ERRORS="true")
    with server.running():
        run_sweeps(server)
        check_states(server)
    assert "locked" not in server.log.read_text()


@pytest.mark.skipif(PROGRAMS is None, reason="needs PostgreSQL; on Debian: apt-get install postgresql")
def test_four_sweeps_at_once_on_postgresql(tmp_path: Path) -> None:
    with started_postgres() as url:
        server = make_server(tmp_path, PREFECT_SERVER_DATABASE_CONNECTION_URL=url)
        with server.running():
            run_sweeps(server)
            check_states(server)
        assert "deadlock" not in server.log.read_text()
