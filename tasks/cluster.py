"""Where tasks that can be apart run: in threads of this machine, or on those of a Ray cluster that share the folder."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from semids.config import CommonConfig, EncodeConfig
from semids.errors import UsageError
from semids.stages import Stage, make_shards, peek_stage
from tasks.stage import RETRIES, ProgressArtifact

CELLS_AT_A_TIME = 2
LOTS_PER_SLOT = 4
"""Lots of shards for each task that the cluster runs at a time: none waits long for the last, and a lot loads its model
once."""
REPORTING_SECONDS = 3

Runner = TaskRunner[PrefectFuture[Any]]


def check_cluster(config: CommonConfig | EncodeConfig) -> None:
    """Refuse a Ray cluster where what speaks to it is not installed.

    Raises:
        UsageError: the package prefect-ray is missing.
    """
    if config.ray and importlib.util.find_spec("prefect_ray") is None:
        raise UsageError(f"ray: {config.ray!r} needs the package prefect-ray; pip install 'semids[ray]'")


def cell_runner(config: CommonConfig) -> AbstractContextManager[Runner]:
    """Return what runs the cells of a sweep."""
    return _on_ray(config.ray) if config.ray else cast("Runner", ThreadPoolTaskRunner(CELLS_AT_A_TIME))


def spread_shards(config: CommonConfig, stage: Stage, *, uses_gpu: bool, lots_per_slot: int = LOTS_PER_SLOT) -> None:
    """Have a cluster make the shards of a stage that are missing, if there is one and the stage is made of several."""
    folder = Path(config.out)
    if not config.ray or stage.shards < 2 or peek_stage(folder, stage) is not None:
        return
    with _on_ray(config.ray) as runner:
        import ray
        from prefect_ray.context import remote_options

        slots = ray.cluster_resources()
        on_gpus = uses_gpu and slots.get("GPU", 0) >= 1
        options: AbstractContextManager[Any] = remote_options(num_gpus=1) if on_gpus else nullcontext()
        lots = min(stage.shards, lots_per_slot * int(slots["GPU" if on_gpus else "CPU"]))
        with options:
            futures = [
                runner.submit(make_lot, {"folder": str(folder.resolve()), "stage": stage, "lot": lot, "lots": lots})
                for lot in range(lots)
            ]
            for future in futures:
                future.wait()
        for future in futures:
            future.result()


@task(
    task_run_name="{stage.title}, lot {lot} of {lots}",
    cache_policy=NO_CACHE,
    **RETRIES,
)
def make_lot(folder: str, stage: Stage, lot: int, lots: int) -> None:
    """Make every `lots`-th shard of a stage, from `lot` on."""
    make_shards(Path(folder), stage, lot=lot, lots=lots, progress=ProgressArtifact(stage.title))


@contextmanager
def _on_ray(address: str) -> Generator[Runner]:
    from prefect_ray import RayTaskRunner

    # By itself the runner would take "auto" for a cluster of its own on this machine, where none is running.
    found = RayTaskRunner(init_kwargs={"address": "auto"}) if address == "auto" else RayTaskRunner(address=address)
    with cast("Runner", found) as runner:
        yield runner
        # Ray ends its processes with the job, which may still have to tell the Prefect server how their tasks ended.
        time.sleep(REPORTING_SECONDS)
