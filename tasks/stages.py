"""The stages as tasks: what each may take and how it is tagged."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from semids import encoding, pipeline, reporting, runs
from semids.config import BuildConfig, CommonConfig, EncodeConfig, SweepConfig
from semids.memory import DRIVERS
from semids.plan import checking_runner
from semids.remote import is_remote
from semids.results import CellRefs
from semids.stages import Ref, Stage
from tasks.cluster import spread_shards
from tasks.stage import RETRIES, run_as_task

AnyConfig = TypeVar("AnyConfig", bound=CommonConfig)

GPU = ("gpu",) if any(driver.exists() for driver in DRIVERS) else ()
"""The tag of stages that use a GPU, where there is one: the limit on it must not make CPUs wait for one another.

No stage has another: before a task with tags runs, it asks the server whether limits on them have room. A server as
Prefect starts it on SQLite refuses that while it records another task, and its client asks again after two seconds.
"""


def fetch_catalogue(config: AnyConfig) -> AnyConfig:
    """Return the configuration with a catalogue on this machine: copied to the run folder where a URL names it."""
    return copy_catalogue(config) if is_remote(config.catalogue.path) or config.copy_to else config


@task(
    task_run_name="Copy {config.catalogue.path}",
    cache_policy=NO_CACHE,
    **RETRIES,
)
def copy_catalogue(config: AnyConfig) -> AnyConfig:
    """See `semids.runs.fetch_catalogue`."""
    return runs.fetch_catalogue(config)


def fetch_new_items(config: EncodeConfig) -> EncodeConfig:
    """Return the configuration with new items on this machine: copied to the run folder where a URL names them."""
    return copy_new_items(config) if is_remote(config.new_items) or config.copy_to else config


@task(
    task_run_name="Copy {config.new_items}",
    cache_policy=NO_CACHE,
    **RETRIES,
)
def copy_new_items(config: EncodeConfig) -> EncodeConfig:
    """See `semids.runs.fetch_new_items`."""
    return runs.fetch_new_items(config)


def scan_catalogue(config: CommonConfig) -> Ref:
    """Read the catalogue into items and distinct contents."""
    return _run(config, pipeline.scan_catalogue(config), hours=12)


def make_vectors(config: BuildConfig | SweepConfig, items: Ref) -> Ref:
    """Embed every distinct text, or import the vectors that were given.

    A run that has no room is refused first, and so is a build whose shape they cannot fill; in a sweep such cells fail.
    """
    if isinstance(config, BuildConfig):
        pipeline.check_sizes(config, items)
    cells = config.cells() if isinstance(config, SweepConfig) else [config]
    stage = pipeline.make_vectors(config, items)

    def run(stage: Stage) -> Ref:
        # 54M texts through an 8B model take days; a hung driver should still end.
        return _run(config, stage, hours=24 * 14, gpu=True)

    # On a cluster, other machines than this one need the room.
    return run(stage) if config.ray else checking_runner(cells, run, made=[items])(stage)


def train_quantizer(config: BuildConfig, items: Ref, vectors: Ref) -> Ref:
    """Train the quantizer step by step, and freeze it into a model; one that has no room is refused first."""
    pipeline.check_sizes(config, items)

    def run(stage: Stage) -> Ref:
        # Prefixes are placed by processors, for the most part, and each lot of them reads all vectors.
        spread_shards(config, stage, uses_gpu=False, lots_per_slot=1)
        return _run_here(config, stage, hours=72, gpu=True)

    return pipeline.train_quantizer(config, items, vectors, checking_runner([config], run, made=[items, vectors]))


def encode_vectors(config: CommonConfig, items: Ref, vectors: Ref, model: Ref) -> Ref:
    """Give every distinct content its codes."""
    stage = encoding.encode_vectors(items, vectors, model)
    return _run(config, stage, hours=24, gpu=True)


def assign_ids(config: CommonConfig, items: Ref, codes: Ref) -> Ref:
    """Write the semantic IDs, tokens and vocabulary."""
    return _run(config, encoding.assign_ids(config, items, codes), hours=12)


def encode_items(config: BuildConfig, model: str, *, unique: bool) -> CellRefs:
    """Give new items their IDs from a frozen model, and report how they collide."""
    # Texts are embedded as long as it takes; the rest is a matter of hours.
    return runs.encode_items(
        config,
        Path(model),
        lambda stage: _run(config, stage, hours=24 * 14, gpu=True),
        unique=unique,
    )


def write_report(config: BuildConfig, items: Ref, vectors: Ref, model: Ref, codes: Ref) -> Ref:
    """Measure the codes, and write the report with its plots."""
    stage = reporting.write_report(config, items, vectors, model, codes)
    return _run(config, stage, hours=12)


def _run(config: CommonConfig, stage: Stage, *, hours: float, gpu: bool = False) -> Ref:
    spread_shards(config, stage, uses_gpu=gpu)
    return _run_here(config, stage, hours=hours, gpu=gpu)


def _run_here(config: CommonConfig, stage: Stage, *, hours: float, gpu: bool) -> Ref:
    return run_as_task(config.out, stage, hours=hours, tags=GPU if gpu else ())
