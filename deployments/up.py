"""Start a local Prefect server with its dashboard and serve the flows, until interrupted.

Run it with `make up`. The server listens on loopback and keeps its SQLite database in PREFECT_HOME.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import FrameType

import yaml
from prefect import serve
from prefect.deployments.runner import RunnerDeployment
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.build import build
from flows.sweep import sweep

CONFIGS = Path(__file__).parent / "configs"
START_SECONDS = 180


def start_server(host: str, port: str) -> subprocess.Popen[bytes]:
    """Start a Prefect server and return its process once it answers.

    Raises:
        RuntimeError: it ended, or did not answer in time; its own words are on standard error.
    """
    # The dashboard asks the address that these name; the command's own options would leave it at the default port.
    environment = {**os.environ, "PREFECT_SERVER_API_HOST": host, "PREFECT_SERVER_API_PORT": port}
    command = [sys.executable, "-m", "prefect", "server", "start"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the Prefect server ended with code {server.returncode}; is port {port} in use?")
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/api/health", timeout=2):
                return server
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    server.terminate()
    raise RuntimeError(f"the Prefect server did not answer on port {port} within {START_SECONDS} s")


def deployments() -> list[RunnerDeployment]:
    """Return the deployments of both flows, prefilled with the sample configurations."""
    described = {
        "build": (build, "One configuration: a catalogue in, semantic IDs and a collision report out."),
        "sweep": (sweep, "Every combination of shapes, mappings and quantizers, compared."),
    }
    return [
        RunnerDeployment.from_flow(
            flow,
            name=name,
            parameters={"config": yaml.safe_load((CONFIGS / f"sample-{name}.yaml").read_text(encoding="utf-8"))},
            description=description,
            tags=["semids"],
        )
        for name, (flow, description) in described.items()
    ]


def main() -> None:
    """Start the server and serve the deployments."""
    host = os.environ.get("PREFECT_SERVER_API_HOST", "127.0.0.1")
    port = os.environ.get("PREFECT_SERVER_API_PORT", "4200")

    def end(signal_number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    server = start_server(host, port)
    print(f"Dashboard: http://{host}:{port}   (Deployments → build or sweep → Run; stop with Ctrl-C)", flush=True)
    try:
        with temporary_settings({PREFECT_API_URL: f"http://{host}:{port}/api"}):
            os.environ["PREFECT_API_URL"] = f"http://{host}:{port}/api"  # for the processes that run the flows
            serve(*deployments())
    except KeyboardInterrupt:
        pass
    finally:
        server.terminate()
        server.wait(timeout=30)


if __name__ == "__main__":
    main()
