"""Run a flow with a Prefect server of its own, which ends with the flow.

    python -m deployments.run flows.sweep CONFIG.yaml

Prefect would start such a server by itself, but one that does not make the writers of its database queue: beside other
work, two cells at a time then meet a locked one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from deployments.up import address_settings, end, free_port, start_server, stop, wait_for_server


def main() -> int:
    """Run the module that the command line names, with its arguments; return its exit code."""
    address, named = address_settings("127.0.0.1", str(free_port()))
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
