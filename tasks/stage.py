"""The one task every stage runs as: cached by fingerprint, retried on I/O errors, watched through artifacts."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import CachePolicy
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.filesystems import LocalFileSystem
from prefect.logging import get_run_logger
from prefect.serializers import JSONSerializer

from semids.errors import CorruptionError, ProcessError, SemidsError, StorageError
from semids.stages import Ref, Stage, run_stage
from semids.store import digest_json
from tasks.tracking import greet_server, prefer_tracked

FIRST_PROGRESS_SECONDS = 10.0
PROGRESS_EVERY_SECONDS = 10.0
RETRY_DELAYS: list[float] = [1, 30]
HOUR = 3600
JSON_SERIALIZER = JSONSerializer().model_dump()


@dataclass
class StageFingerprint(CachePolicy):
    """Two runs of a stage are one if its fingerprint and the run folder are the same.

    Prefect's own policies see a task's lines or a run's id; the fingerprint sees digests of inputs,
    parameters and every line of library code the stage depends on.
    """

    def compute_key(
        self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: Any
    ) -> str | None:
        """Return the key of the stage in `inputs`; None, and the task then runs, where Prefect's results are no files.

        Raises:
            CorruptionError: what is kept under the key was not written by a stage; Prefect logs it, and the task runs.
        """
        key = digest_json([inputs["stage"].fingerprint, str(Path(inputs["folder"]).resolve())])
        storage = task_ctx.result_store.result_storage
        if not isinstance(storage, LocalFileSystem) or storage.basepath is None:
            return None
        refuse_foreign_record(Path(storage.basepath).expanduser() / key)
        return key


def refuse_foreign_record(path: Path) -> None:
    """Refuse a result that Prefect would load in any other way than a stage writes it.

    Prefect loads a result by the serializer that the result itself names: by pickle, if none, or by any function.

    Raises:
        CorruptionError: the file is not a result in JSON.
    """
    if not path.exists():
        return
    try:
        record: Any = json.loads(path.read_bytes())
        serializer = record["metadata"]["serializer"]
    except (ValueError, LookupError, TypeError):
        serializer = None
    if serializer != JSON_SERIALIZER:
        raise CorruptionError(
            f"expected a result in JSON in {path}, got one for another serializer: it was changed after it was "
            "written; it is not loaded; delete it"
        )


def is_worth_retrying(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Return True for errors of the file system, of processes and of the interpreter (`semids.parser` tells of one).

    They pass; bad data and parameters never do.
    """
    error = state.result(raise_on_failure=False)
    if isinstance(error, SemidsError):
        return isinstance(error, StorageError | ProcessError)
    return isinstance(error, OSError | SystemError)


RETRIES: dict[str, Any] = {
    "retries": len(RETRY_DELAYS),
    "retry_delay_seconds": RETRY_DELAYS,
    "retry_condition_fn": is_worth_retrying,
}
"""How tasks that read and write files are retried."""


class ProgressArtifact:
    """Shows a long step as a progress bar in the dashboard, with its rate in the logs; short steps leave no trace."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._started = self._updated = time.monotonic()
        self._artifact: UUID | None = None

    def __call__(self, step: str, done: int, total: int, unit: str) -> None:
        """Take a report; see `semids.progress.Progress`."""
        now = time.monotonic()
        if now - self._started < FIRST_PROGRESS_SECONDS:
            return
        if now - self._updated < PROGRESS_EVERY_SECONDS and done < total:
            return
        self._updated = now
        rate = done / (now - self._started)
        description = f"{self._title}: {done:,} of {total:,} {unit}, {rate:,.0f} a second"
        prefer_tracked(lambda: self._show(100.0 * done / max(total, 1), description), lambda: None)
        get_run_logger().info(description)

    def _show(self, percent: float, description: str) -> None:
        if self._artifact is None:
            self._artifact = cast("UUID", create_progress_artifact(progress=percent, description=description))
        else:
            update_progress_artifact(self._artifact, progress=percent, description=description)


@task(
    task_run_name="{stage.title}",
    persist_result=True,
    result_serializer="json",
    cache_policy=StageFingerprint(),
    **RETRIES,
)
def run_stage_task(folder: str, stage: Stage) -> Ref:
    """Run a stage, or find what an earlier run left of it."""
    return run_stage(Path(folder), stage, ProgressArtifact(stage.title))


def run_as_task(folder: str, stage: Stage, *, hours: float, tags: tuple[str, ...]) -> Ref:
    """Return the reference to a stage's outputs, made or found by a task run.

    Prefect's cache never looks at files: where it answers with some that are gone or changed, the task runs again.

    Args:
        hours: a task that takes longer is stopped and fails. In a worker thread, where a cell of a sweep runs,
            Prefect cannot interrupt anything, so none is set there.
        tags: a concurrency limit on a tag bounds all stages that carry it.
    """
    interruptible = threading.current_thread() is threading.main_thread()
    configured = run_stage_task.with_options(timeout_seconds=hours * HOUR if interruptible else None)

    def run(tags: tuple[str, ...]) -> Ref:
        tagged = configured.with_options(tags=tags)
        state: State[Ref] = tagged(folder, stage, return_state=True)
        ref = state.result()
        if state.name == "Cached" and not ref.is_present():
            ref = tagged.with_options(refresh_cache=True)(folder, stage)
        return ref

    def run_shown() -> Ref:
        greet_server()
        return run(tags)

    # A task without tags asks the server for nothing before it runs.
    return prefer_tracked(run_shown, lambda: run(()))
