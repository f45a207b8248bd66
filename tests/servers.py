"""A Prefect server of a test's own, on a free port of loopback and with a database that nobody else uses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from deployments.up import wait_for_server


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
        command = [sys.executable, "-m", "deployments.server"]
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


def make_server(folder: Path, **settings: str) -> Server:
    """Return a server that is not started yet, with further settings."""
    port = str(free_port())
    address = f"http://127.0.0.1:{port}"
    named = {
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": port,
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return Server(folder, address, others | named | settings)
