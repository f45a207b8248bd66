"""Whole runs over a run folder without Prefect: build a configuration, or encode new items."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from semids import encoding, pipeline
from semids.config import BuildConfig, CommonConfig, EncodeConfig
from semids.errors import DataError, UsageError
from semids.pipeline import Runner
from semids.progress import Progress
from semids.readers import find_files
from semids.remote import check_place, fetch
from semids.reporting import write_report
from semids.results import CellRefs
from semids.stages import MANIFEST, Ref, StageReader, reference, run_stage


def local_runner(folder: Path, progress: Progress) -> Runner:
    """Return a runner that runs stages in this process, under `folder`."""
    return lambda stage: run_stage(folder, stage, progress)


ENCODED = "encoded"
"""The run folder of new items, if none is named."""
AnyConfig = TypeVar("AnyConfig", bound=CommonConfig)


class NotMadeError(Exception):
    """A stage has not been run yet."""


def fetch_catalogue(config: AnyConfig) -> AnyConfig:
    """Return the configuration with a catalogue on this machine: copies in the run folder, if a URL says where it is.

    Raises:
        UsageError: the URL matches nothing, or nothing installed opens it.
        StorageError: the store did not answer, or refused.
    """
    if config.copy_to:
        check_place(config.copy_to)
    path = fetch(config.catalogue.path, Path(config.out))
    return config.model_copy(update={"catalogue": config.catalogue.model_copy(update={"path": path})})


def fetch_new_items(config: EncodeConfig) -> EncodeConfig:
    """Return the configuration with new items on this machine; see `fetch_catalogue`.

    Raises:
        UsageError: also if the folder of the model holds something else.
    """
    _model_in(Path(config.model))
    if config.copy_to:
        check_place(config.copy_to)
    return config.model_copy(update={"new_items": fetch(config.new_items, Path(config.out))})


def build(config: BuildConfig, run: Runner) -> CellRefs:
    """Turn a catalogue into semantic IDs and a report under one configuration."""
    items = run(pipeline.scan_catalogue(config))
    pipeline.check_sizes(config, items)
    vectors = run(pipeline.make_vectors(config, items))
    return build_cell(config, items, vectors, run)


def build_cell(config: BuildConfig, items: Ref, vectors: Ref, run: Runner) -> CellRefs:
    """Train, encode and report one configuration on vectors that are there."""
    pipeline.check_sizes(config, items)
    model = pipeline.train_quantizer(config, items, vectors, run)
    codes = run(encoding.encode_vectors(items, vectors, model))
    ids = run(encoding.assign_ids(config, items, codes))
    return CellRefs(model, ids, run(write_report(config, items, vectors, model, codes)))


def encoding_config(model_folder: Path, new_items: str) -> dict[str, Any]:
    """Return the configuration that gives new items their IDs as the model's own items got theirs, as JSON.

    Raises:
        UsageError: the folder holds something other than a model, or there are no new items.
        CorruptionError: the folder holds no whole model.
    """
    values: dict[str, Any] = StageReader(_model_in(model_folder).path).manifest["run"]["config"]
    # New items belong to no split and need not say what product they are.
    unused = {"split_column": None, "brand_column": None, "category_column": None, "train_split": "new"}
    if find_files(new_items)[0] == "npy":
        unused["vector_column"] = None
    values["catalogue"] |= {"path": new_items, **unused}
    # Their suffixes could clash with those of the items before them.
    return values | {"suffix": False, "out": ENCODED, "copy_to": "", "ray": ""}


def encode_items(config: BuildConfig, model_folder: Path, run: Runner, *, unique: bool = False) -> CellRefs:
    """Give new items their IDs from a frozen model, and report how they collide.

    Args:
        unique: contents that the model does not know get IDs that no content has; the model returned knows them.

    Raises:
        UsageError: unique IDs are asked for and cannot be given.
        DataError: the new vectors would come from another model than those the quantizer was trained on.
    """
    model = _model_in(model_folder)
    items = run(pipeline.scan_catalogue(config))
    if unique:
        encoding.check_unique(items, model)
    stage = pipeline.make_vectors(config, items)
    trained_on: dict[str, Any] = StageReader(model.path).summary["vectors"]
    now = pipeline.vector_model(stage.ingredients)
    if bool(now) != bool(trained_on):
        kinds = {True: "texts", False: "vectors"}
        raise DataError(
            f"expected {kinds[bool(trained_on)]} as the model was trained on, got {kinds[bool(now)]} in "
            f"{config.catalogue.path!r}; semids adopt registers vectors of texts that were embedded elsewhere"
        )
    if now != trained_on:
        different = sorted(key for key in now.keys() | trained_on.keys() if now.get(key) != trained_on.get(key))
        raise DataError(
            "expected the embedding model that the quantizer was trained on, got another one "
            f"(they differ in {', '.join(different)}); pass the same --model, or train again"
        )
    vectors = run(stage)
    codes = run(encoding.encode_vectors(items, vectors, model, unique=unique))
    ids = run(encoding.assign_ids(config, items, codes))
    report = run(write_report(config, items, vectors, model, codes))
    return CellRefs(run(encoding.extend_model(items, model, codes)) if unique else model, ids, report)


def _model_in(folder: Path) -> Ref:
    if not (folder / MANIFEST).exists():
        hint = f"; did you mean {folder / 'model'}?" if (folder / "model" / MANIFEST).exists() else ""
        raise UsageError(f"expected a model folder, got {folder}, which holds no finished stage{hint}")
    model = reference(folder)
    if model.stage != "model":
        raise UsageError(f"expected a model folder, got the stage {model.stage!r} in {folder}")
    return model
