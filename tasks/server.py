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
import tempfile
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any

START_SECONDS = 180
"""A new database on busy processors takes longer than a minute."""
STOP_SECONDS = 40
"""Services end their rounds before the server ends."""
START_ATTEMPTS = 3
"""Another process may take the free port before the server does."""
ATTACHED_FLAG = "--attached"
"""The server ends with the process that started it, however that ends."""
UNUSED_SERVICES = ("EVENT_PERSISTER", "TRIGGERS", "SCHEDULER", "LATE_RUNS", "FOREMAN")
ONE_RUN_SETTINGS = dict.fromkeys(
    [
        "PREFECT_SERVER_ANALYTICS_ENABLED",
        "PREFECT_SERVER_UI_ENABLED",
        *(f"PREFECT_SERVER_SERVICES_{service}_ENABLED" for service in UNUSED_SERVICES),
    ],
    "false",
)
"""Of a server that lives for one run: nobody reads its feed or starts runs from it, and SQLite is spared."""
RECORDER_SETTINGS = {
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
}
"""States of tasks are written once a second, together; Prefect writes each in a transaction of its own."""


class ServerError(RuntimeError):
    """A server did not start; the message says why, in its words."""


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
    """Start a server that ends with this process, and is out of reach of its terminal's Ctrl-C; it shows its errors.

    It ends, too, when what is returned is no longer kept: that closes its input.
    """
    command = [sys.executable, "-m", "tasks.server", ATTACHED_FLAG]
    words = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the server
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=words, start_new_session=True)
    server.stdout = words
    return server


def wait_for_server(server: subprocess.Popen[bytes], address: str) -> None:
    """Return once the server answers.

    Raises:
        ServerError: it ended, or did not answer in time.
    """
    # Loopback is not behind a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        answers = False
        try:
            with opener.open(f"{address}/api/health", timeout=2):
                answers = True
        except (urllib.error.URLError, HTTPException, OSError):
            time.sleep(0.1)
        # One that has ended did not answer: somebody else has its port.
        if server.poll() is not None:
            raise ServerError(f"the Prefect server at {address} ended with code {server.returncode}{_words(server)}")
        if answers:
            return
    raise ServerError(f"the Prefect server at {address} did not answer within {START_SECONDS} s{_words(server)}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process; one that does not listen is killed."""
    process.terminate()
    try:
        process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def start_own_server() -> str:
    """Start a server for the run of this process, which ends with the process.

    Returns:
        The address of its API.

    Raises:
        ServerError: see `wait_for_server`.
    """
    from prefect.settings.context import get_current_settings

    chosen = get_current_settings().to_environment_variables(exclude_unset=True)
    attempts = START_ATTEMPTS
    while True:
        address, named = address_settings("127.0.0.1", str(free_port()))
        server = start_server(ONE_RUN_SETTINGS | chosen | os.environ | named)
        # Prefect sends its last words before functions registered here are called. This also keeps the server.
        atexit.register(stop, server)
        try:
            wait_for_server(server, address)
        except ServerError:
            attempts -= 1
            if server.poll() is None or not attempts:
                raise
        else:
            return named["PREFECT_API_URL"]


def _words(server: subprocess.Popen[bytes]) -> str:
    """Return what a server has printed, as the end of a sentence."""
    if server.stdout is None:
        return ""
    server.stdout.seek(0)
    return f": {server.stdout.read().decode(errors='replace').strip()}"


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
    # Not by `sys.stdin`, whose lock would still be held as the interpreter ends.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    make_writers_queue()
    for name, value in RECORDER_SETTINGS.items():
        os.environ.setdefault(name, value)
    if ATTACHED_FLAG in sys.argv:
        threading.Thread(target=_end_with_input, daemon=True).start()
    sys.argv = ["prefect", "server", "start"]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
