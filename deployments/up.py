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
from types import FrameType

from deployments.apply import PROCESS_POOL
from tasks.server import ServerError, address_settings, start_server, stop, wait_for_server


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


def start_worker(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a worker of the process pool; of its output errors are shown."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", PROCESS_POOL]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


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
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        # The worker first: it tells the server what becomes of its runs.
        for process in reversed(running):
            stop(process)


if __name__ == "__main__":
    sys.exit(main())
