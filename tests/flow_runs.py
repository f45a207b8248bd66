"""Flows run by tests on the server of their module, and what the server shows of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
)

from semids import store
from semids.config import BuildConfig


def build_config(catalogue: dict[str, str], tmp_path: Path, **changes: Any) -> BuildConfig:
    values: dict[str, Any] = {"catalogue": catalogue, "shape": "8x8x8", "out": str(tmp_path / "run")}
    return BuildConfig(**(values | changes))


def artifacts_of(run_ids: list[Any]) -> dict[str, Any]:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=run_ids)), limit=200
        )
    return {artifact.key: artifact for artifact in found if artifact.key}


def cells_of(state: Any) -> list[Any]:
    """Return the ids of the flow runs of a sweep's cells."""
    parent = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        return [run.id for run in client.read_flow_runs(flow_run_filter=parent)]


def task_states(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return (task, how its run ended), in order, since the log was last cleared; the server's own list lags."""
    return [
        (record.task_run_name, record.getMessage().removeprefix("Finished in state ").split("(")[0])
        for record in caplog.records
        if hasattr(record, "task_run_name") and record.getMessage().startswith("Finished in state")
    ]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file() and ".lock" not in str(path)]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def assert_refused_while_in_use(folder: Path, run: Callable[[], Any]) -> None:
    """Run a flow in a child while this process owns the run folder, and see that it fails, naming the owner."""
    with store.run_lock(folder):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                store._held_locks.clear()
                state = run()
                message = str(state.result(raise_on_failure=False))
                code = 0 if state.is_failed() and f"process {os.getppid()}" in message else 1
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def fail_third_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """Have the third call of a function fail as a disk does; return the arguments of all calls, as they come."""
    calls: list[tuple[Any, ...]] = []
    real: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(owner, name, call)
    return calls
