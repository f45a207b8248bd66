"""Run a flow with a Prefect server of its own, which ends with the flow.

    python -m deployments.run flows.sweep CONFIG.yaml

Prefect would start such a server by itself, but one that does not make the writers of its database queue: on a slow
disk, two cells at a time then meet a locked one.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

from deployments.up import end, start_server, stop, wait_for_server

HOST = "127.0.0.1"


def main() -> int:
    """Run the module that the command line names, with its arguments; return its exit code."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = str(free.getsockname()[1])
    address = f"http://{HOST}:{port}"
    named = {"PREFECT_SERVER_API_HOST": HOST, "PREFECT_SERVER_API_PORT": port, "PREFECT_API_URL": f"{address}/api"}
    environment = os.environ | named
    signal.signal(signal.SIGTERM, end)
    running = [start_server(environment)]
    try:
        wait_for_server(running[0], address)
        running.append(subprocess.Popen([sys.executable, "-m", *sys.argv[1:]], env=environment))
        return running[1].wait()
    except KeyboardInterrupt:
        return 130
    finally:
        stop(running)


if __name__ == "__main__":
    sys.exit(main())
