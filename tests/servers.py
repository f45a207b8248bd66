"""A Prefect server and a Ray cluster of a test's own, on free ports of loopback."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil

from tasks.server import ONE_RUN_SETTINGS, address_settings, free_port, wait_for_server

NODE_SECONDS = 180
DATABASE = "prefect.db"


@dataclass
class Server:
    """Where a server listens, and the settings of those that speak to it."""

    folder: Path
    address: str
    environment: dict[str, str]

    @property
    def log(self) -> Path:
        """What the server said."""
        return self.folder / "server.log"

    def start(self) -> subprocess.Popen[bytes]:
        """Start the server, and return once it answers."""
        command = [sys.executable, "-m", "tasks.server"]
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        wait_for_server(process, self.address)
        return process

    @contextmanager
    def running(self) -> Generator[subprocess.Popen[bytes]]:
        """Have the server running."""
        process = self.start()
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=60)

    def post(self, path: str, body: Any) -> Any:
        """Send something to the server and return its answer."""
        answer = httpx.post(f"{self.address}/api/{path}", json=body, timeout=60)
        answer.raise_for_status()
        return answer.json()


def make_server(folder: Path, *, database: Path | None = None, **settings: str) -> Server:
    """Return a server that is not started yet, with further settings.

    Args:
        database: what a server has left that did nothing; making that takes ten seconds.
    """
    address, named = address_settings("127.0.0.1", str(free_port()))
    named |= {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    if database:
        give_database(folder / "prefect", database)
    return Server(folder, address, others | named | settings)


def give_database(home: Path, database: Path) -> None:
    """Have the servers of a new PREFECT_HOME begin with a copy of a database."""
    home.mkdir()
    shutil.copy(database, home / DATABASE)


def make_database(path: Path, folder: Path) -> None:
    """Write the database of a server that did nothing; it works in `folder`."""
    server = make_server(folder, **ONE_RUN_SETTINGS)
    with server.running():
        pass
    with closing(sqlite3.connect(folder / "prefect" / DATABASE)) as database:
        database.execute("VACUUM INTO ?", [f"{path}.part"])
    Path(f"{path}.part").rename(path)


@contextmanager
def started_cluster(workers: int) -> Generator[str]:
    """Start a Ray cluster of so many nodes with one processor each, and yield its address."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1"]
    start += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    address = f"127.0.0.1:{(port := free_port())}"
    head = ["--head", f"--port={port}", f"--ray-client-server-port={free_port()}", "--include-dashboard=false"]
    # The path of a socket has 107 bytes at most: that of a test's folder may be longer.
    with ExitStack() as nodes:
        folder = nodes.enter_context(TemporaryDirectory(prefix="ray-"))
        for number in range(workers):
            part = [f"--address={address}"] if number else [*head, f"--temp-dir={folder}"]
            nodes.enter_context(_ended_with_children([*start, *part], environment))
            _wait_for_nodes(address, number + 1)
        yield address


@contextmanager
def _ended_with_children(command: list[str], environment: dict[str, str]) -> Generator[None]:
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            member.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=30)


def _wait_for_nodes(address: str, count: int) -> None:
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", f"--address={address}"]
    deadline = time.monotonic() + NODE_SECONDS
    while True:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.stdout.count("node_") >= count:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"Ray did not start {count} nodes: {answer.stderr}")
        time.sleep(0.5)
