"""Start a local Prefect server with its dashboard, register the deployments and run a worker, until interrupted.

Run it with `make up`. The server listens on loopback and keeps its SQLite database in PREFECT_HOME.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import FrameType

from deployments.apply import PROCESS_POOL

START_SECONDS = 180
STOP_SECONDS = 40


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_free(host: str, port: str) -> bool:
    """Return True where nobody listens: a server that does is somebody else's."""
    with socket.socket() as probe:
        # As a server asks: an address whose last listener has just ended is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError:
            return False
    return True


def address_settings(host: str, port: str) -> tuple[str, dict[str, str]]:
    """Return the address of a server there, and the settings that lead it and its clients to it.

    The dashboard asks the address that these name; the command's own options would leave it at the default port.
    """
    address = f"http://{host}:{port}"
    named = {"PREFECT_SERVER_API_HOST": host, "PREFECT_SERVER_API_PORT": port, "PREFECT_API_URL": f"{address}/api"}
    return address, named


def start_server(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start the server; of its output errors are shown."""
    return _start("deployments.server", environment)


def start_worker(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a worker of the process pool; of its output errors are shown."""
    return _start("prefect", environment, "worker", "start", "--pool", PROCESS_POOL)


def wait_for_server(server: subprocess.Popen[bytes], address: str) -> None:
    """Return once the server answers.

    Raises:
        RuntimeError: it ended, or did not answer in time; its own words are on standard error.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the Prefect server ended with code {server.returncode}; see above")
        try:
            with urllib.request.urlopen(f"{address}/api/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"the Prefect server did not answer at {address} within {START_SECONDS} s")


def end(signal_number: int, frame: FrameType | None) -> None:
    """Answer a signal as Ctrl-C."""
    raise KeyboardInterrupt


def main() -> int:
    """Run server and worker until interrupted, or until one of them ends; return the exit code."""
    host = os.environ.get("PREFECT_SERVER_API_HOST", "127.0.0.1")
    port = os.environ.get("PREFECT_SERVER_API_PORT", "4200")
    address, named = address_settings(host, port)
    if not is_free(host, port):
        print(f"Something listens at {address} already; set PREFECT_SERVER_API_PORT to another port.", file=sys.stderr)
        return 1
    environment = os.environ | named
    signal.signal(signal.SIGTERM, end)
    running = [start_server(environment)]
    try:
        wait_for_server(running[0], address)
        if code := subprocess.run([sys.executable, "-m", "deployments.apply"], env=environment, check=False).returncode:
            return code
        running.append(start_worker(environment))
        print(f"\nDashboard: {address}   (Deployments → quick-look → Run; stop with Ctrl-C)", flush=True)
        while all(process.poll() is None for process in running):
            time.sleep(0.5)
        print("The server or the worker has ended; see above.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        stop(running)


def stop(running: list[subprocess.Popen[bytes]]) -> None:
    """End a server and what it serves, that first: it tells the server what becomes of its runs."""
    for process in reversed(running):
        process.terminate()
        try:
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def _start(module: str, environment: dict[str, str], *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
