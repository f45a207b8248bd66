"""The stages as tasks: what each may take and how it is tagged."""

from __future__ import annotations

from pathlib import Path

from semids import encoding, pipeline, reporting, runs
from semids.config import BuildConfig, CommonConfig
from semids.results import CellRefs
from semids.stages import Ref, Stage
from tasks.stage import run_as_task

GPU = ("gpu",) if Path("/dev/nvidiactl").exists() else ()
"""The tag of stages that use a GPU, where there is one: the limit on it must not make CPUs wait for one another."""


def scan_catalogue(config: CommonConfig) -> Ref:
    """Read the catalogue into items and distinct contents."""
    return run_as_task(config.out, pipeline.scan_catalogue(config), hours=12, tags=("catalogue",))


def make_vectors(config: CommonConfig, items: Ref) -> Ref:
    """Embed every distinct text, or import the vectors that were given; a shape they cannot fill is refused first."""
    if isinstance(config, BuildConfig):
        pipeline.check_sizes(config, items)
    # 54M texts through an 8B model take days; a hung driver should still end.
    return run_as_task(config.out, pipeline.make_vectors(config, items), hours=24 * 14, tags=("embedding", *GPU))


def train_quantizer(config: BuildConfig, items: Ref, vectors: Ref) -> Ref:
    """Train the quantizer step by step, and freeze it into a model."""
    pipeline.check_sizes(config, items)

    def run(stage: Stage) -> Ref:
        return run_as_task(config.out, stage, hours=72, tags=("training", *GPU))

    return pipeline.train_quantizer(config, items, vectors, run)


def encode_vectors(config: CommonConfig, items: Ref, vectors: Ref, model: Ref) -> Ref:
    """Give every distinct content its codes."""
    return run_as_task(config.out, encoding.encode_vectors(items, vectors, model), hours=24, tags=("encoding", *GPU))


def assign_ids(config: CommonConfig, items: Ref, codes: Ref) -> Ref:
    """Write the semantic IDs, tokens and vocabulary."""
    return run_as_task(config.out, encoding.assign_ids(config, items, codes), hours=12, tags=("ids",))


def encode_items(config: BuildConfig, model: str, *, unique: bool) -> CellRefs:
    """Give new items their IDs from a frozen model, and report how they collide."""

    def run(stage: Stage) -> Ref:
        # Texts are embedded as long as it takes; the rest is a matter of hours.
        return run_as_task(config.out, stage, hours=24 * 14, tags=("encoding", *GPU))

    return runs.encode_items(config, Path(model), run, unique=unique)


def write_report(config: BuildConfig, items: Ref, vectors: Ref, model: Ref, codes: Ref) -> Ref:
    """Measure the codes, and write the report with its plots."""
    stage = reporting.write_report(config, items, vectors, model, codes)
    return run_as_task(config.out, stage, hours=12, tags=("report",))
