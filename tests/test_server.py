"""A process's own Prefect server ends with it, whatever ends the process, and is not ended before."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import yaml
from servers import make_server

from tasks.server import ServerError, address_settings, start_server, wait_for_server

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("prefect")]

OWNER = """
import sys
from tasks.server import start_own_server
print(start_own_server(), flush=True)
sys.stdin.read()
"""
END_SECONDS = 60


@pytest.mark.parametrize("killed", [False, True])
def test_a_server_is_there_for_as_long_as_its_owner(tmp_path: Path, prefect_database: Path, killed: bool) -> None:
    """Guards: `start_new_session`, without which Ctrl-C ends it first; `_end_with_input`."""
    environment = make_server(tmp_path, database=prefect_database).environment
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", OWNER], env=environment, **pipes) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        api = owner.stdout.readline().decode().strip()
        assert httpx.get(f"{api}/health").is_success
        (server,) = psutil.Process(owner.pid).children()
        assert os.getpgid(server.pid) != os.getpgid(owner.pid)
        if killed:
            owner.kill()
        else:
            owner.stdin.close()
    psutil.wait_procs([server], timeout=END_SECONDS)
    assert not server.is_running()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    """Guards: `_words`, and `os.read` in `_end_with_input`."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address, named = address_settings("127.0.0.1", str(taken.getsockname()[1]))
        server = start_server(make_server(tmp_path).environment | named)
        with pytest.raises(ServerError, match=r"ended with code 1: [^$]*already in use"):
            wait_for_server(server, address)


def servers_of(pid: int) -> list[psutil.Process]:
    """The servers that a process has started; its libraries start others, for a moment."""
    found: list[psutil.Process] = []
    for child in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):
            found += [child] if "tasks.server" in child.cmdline() else []
    return found


def test_a_run_that_is_interrupted_while_its_server_starts_says_so(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", np.eye(8, dtype=np.float32))
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"catalogue": {"path": str(tmp_path / "vectors.npy")}, "shape": "2x2"}))
    environment = make_server(tmp_path).environment
    del environment["PREFECT_API_URL"]
    command = [sys.executable, "-m", "flows.build", str(config)]
    run = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # A shell has what it starts in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + END_SECONDS
    while not (started := servers_of(run.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=END_SECONDS)
    assert run.returncode == 130
    assert said == "semids: interrupted; run the same command again to go on from here\n"
    psutil.wait_procs(started, timeout=END_SECONDS)
    assert not any(server.is_running() for server in started)
