"""A process's own Prefect server ends with it, whatever ends the process, and is not ended before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from servers import make_server

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("prefect")]

OWNER = """
import signal, sys
from tasks.server import start_own_server
signal.signal(signal.SIGINT, lambda *_: None)
print(start_own_server(), flush=True)
sys.stdin.read()
"""
END_SECONDS = 60


def answers(api: str) -> bool:
    try:
        return httpx.get(f"{api}/health").is_success
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("killed", [False, True])
def test_a_server_is_there_for_as_long_as_its_owner(tmp_path: Path, prefect_database: Path, killed: bool) -> None:
    """Guards: `start_new_session`, without which Ctrl-C ends it first; `_end_with_input` and `atexit.register`."""
    environment = make_server(tmp_path, database=prefect_database).environment
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", OWNER], env=environment, process_group=0, **pipes) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        api = owner.stdout.readline().decode().strip()
        os.killpg(owner.pid, signal.SIGINT)  # What Ctrl-C does.
        time.sleep(1)
        assert answers(api)
        if killed:
            owner.kill()
        else:
            owner.stdin.close()
    deadline = time.monotonic() + END_SECONDS
    while answers(api):
        assert time.monotonic() < deadline
        time.sleep(0.1)
