"""Start Prefect's server such that those who write to SQLite queue for it.

    python -m deployments.server

SQLite has one writer at a time. A transaction that begins by reading, as Prefect's do, cannot wait for its turn to
write: where another has written since, it fails with "database is locked", however long the time-out is. One that asks
for its turn as it begins waits (https://www.sqlite.org/isolation.html). Other databases are not touched by this.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from sqlalchemy import Engine, event


@event.listens_for(Engine, "before_cursor_execute", retval=True)
def begin_as_a_writer(
    connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> tuple[str, Any]:
    """Ask for the turn to write when a transaction begins; the arguments are those of SQLAlchemy's event."""
    return ("BEGIN IMMEDIATE" if statement == "BEGIN DEFERRED" else statement), parameters


if __name__ == "__main__":
    sys.argv = ["prefect", "server", "start"]
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)
