"""A process's own Prefect server ends with it, whatever ends the process, and is not ended before."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
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
