"""A Prefect server of one's own, such that those who write to SQLite queue for it.

    python -m tasks.server

SQLite has one writer at a time. A transaction that begins by reading, as Prefect's do, cannot wait for its turn to
write: where another has written since, it fails with "database is locked", however long the time-out is, and the client
asks again after two seconds. What a failed one leaves behind can also stop the whole server for a minute, as it is
cleaned up while another waits for its turn. One that asks for its turn as it begins waits
(https://www.sqlite.org/isolation.html). Other databases are not touched by this.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

START_SECONDS = 180
STOP_SECONDS = 40
ATTACHED = "--attached"
"""The server ends with the process that started it, however that ends."""
SERVICES = ("EVENT_PERSISTER", "TRIGGERS", "SCHEDULER", "LATE_RUNS", "FOREMAN")
QUIET = dict.fromkeys(
    ["PREFECT_SERVER_ANALYTICS_ENABLED", *(f"PREFECT_SERVER_SERVICES_{service}_ENABLED" for service in SERVICES)],
    "false",
)
"""Settings of a server that lives for one run: nobody reads its feed or starts runs from it, and SQLite is spared."""
RECORDER = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
}
"""What becomes of tasks is written down once a second, not at each of their steps, which takes twice the processor."""


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def address_settings(host: str, port: str) -> tuple[str, dict[str, str]]:
    """Return the address of a server there, and the settings that lead it and its clients to it.

    The dashboard asks the address that these name; the command's own options would leave it at the default port.
    """
    address = f"http://{host}:{port}"
    named = {"PREFECT_SERVER_API_HOST": host, "PREFECT_SERVER_API_PORT": port, "PREFECT_API_URL": f"{address}/api"}
    return address, named


def start_server(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a server that ends with this process, and is out of reach of its terminal's Ctrl-C; it shows its errors."""
    return subprocess.Popen(
        [sys.executable, "-m", "tasks.server", ATTACHED],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


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
            time.sleep(0.1)
    raise RuntimeError(f"the Prefect server did not answer at {address} within {START_SECONDS} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process; one that does not listen is killed."""
    process.terminate()
    try:
        process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def start_own_server() -> str:
    """Start a server for this process alone, which ends after what Prefect sends at the process's end.

    Returns:
        The address of its API.

    Raises:
        RuntimeError: see `wait_for_server`.
    """
    address, named = address_settings("127.0.0.1", str(free_port()))
    server = start_server(QUIET | os.environ | named)
    atexit.register(stop, server)
    wait_for_server(server, address)
    return named["PREFECT_API_URL"]


def make_writers_queue() -> None:
    """Have every transaction on SQLite, in this process, ask for its turn to write when it begins."""
    # Those who only start a server do without the library.
    from sqlalchemy import Engine, event

    @event.listens_for(Engine, "before_cursor_execute", retval=True)
    def begin_as_a_writer(
        connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> tuple[str, Any]:
        return ("BEGIN IMMEDIATE" if statement == "BEGIN DEFERRED" else statement), parameters


def _end_with_input() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    make_writers_queue()
    for name, value in RECORDER.items():
        os.environ.setdefault(name, value)
    if ATTACHED in sys.argv:
        threading.Thread(target=_end_with_input, daemon=True).start()
    sys.argv = ["prefect", "server", "start"]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
