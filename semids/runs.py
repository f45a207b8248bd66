"""Whole runs over a run folder without Prefect: build a configuration, encode new items, adopt vectors, publish."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from numpy.typing import NDArray

from semids import pipeline
from semids.config import BuildConfig
from semids.errors import DataError, StorageError, UsageError
from semids.items import CatalogueSettings, VectorSource
from semids.pipeline import Runner
from semids.progress import Progress
from semids.report import Report
from semids.reporting import read_report, write_report
from semids.shards import ShardLayout
from semids.stages import Ref, Stage, StageOutput, StageReader, find_stage, reference, run_stage
from semids.store import TEMPORARY_PREFIX, digest_file, digest_json

RESULTS = "results"
UNIT_NORM_TOLERANCE = 1e-2


@dataclass(frozen=True)
class CellRefs:
    """What a configuration leaves: references to its last stages."""

    model: Ref
    ids: Ref
    report: Ref


def local_runner(folder: Path, progress: Progress) -> Runner:
    """Return a runner that runs stages in this process, under `folder`."""
    return lambda stage: run_stage(folder, stage, progress)


class NotMadeError(Exception):
    """A stage has not been run yet."""


def finding_runner(folder: Path) -> Runner:
    """Return a runner that runs nothing: it finds a stage's outputs, or raises NotMadeError."""

    def find(stage: Stage) -> Ref:
        found = find_stage(folder, stage)
        if found is None:
            raise NotMadeError(stage.title)
        return found

    return find


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
    codes = run(pipeline.encode_vectors(vectors, model))
    ids = run(pipeline.assign_ids(config, items, codes))
    return CellRefs(model, ids, run(write_report(config, items, vectors, model, codes)))


def encoding_config(model_folder: Path) -> dict[str, Any]:
    """Return the configuration that gives new items their IDs as the model's own items got theirs, as JSON.

    Raises:
        UsageError: the folder holds something other than a model.
        CorruptionError: the folder holds no whole model.
    """
    model = _model_in(model_folder)
    values: dict[str, Any] = yaml.safe_load(StageReader(model.path).path("config.yaml").read_text(encoding="utf-8"))
    # New items belong to no split, and their suffixes could clash with those of the items before them.
    values["catalogue"] |= {"split_column": None, "train_split": "new"}
    return values | {"suffix": False}


def encode_items(config: BuildConfig, model_folder: Path, run: Runner) -> CellRefs:
    """Give new items their IDs from a frozen model, and report how they collide.

    Raises:
        DataError: the new vectors would come from another model than those the quantizer was trained on.
    """
    model = _model_in(model_folder)
    items = run(pipeline.scan_catalogue(config))
    stage = pipeline.make_vectors(config, items)
    trained_on: dict[str, Any] = StageReader(model.path).summary["vectors"]
    now: dict[str, Any] = stage.ingredients["parameters"]
    if now != trained_on:
        different = sorted(key for key in now.keys() | trained_on.keys() if now.get(key) != trained_on.get(key))
        raise DataError(
            "expected the embedding model that the quantizer was trained on, got another one "
            f"(they differ in {', '.join(different)}); pass the same --model, or train again"
        )
    vectors = run(stage)
    codes = run(pipeline.encode_vectors(vectors, model))
    ids = run(pipeline.assign_ids(config, items, codes))
    return CellRefs(model, ids, run(write_report(config, items, vectors, model, codes)))


def _model_in(folder: Path) -> Ref:
    model = reference(folder)
    if model.stage != "model":
        raise UsageError(f"expected a model folder, got the stage {model.stage!r} in {folder}")
    return model


def publish(folder: Path, label: str, refs: CellRefs) -> Path:
    """Show a configuration's outputs in `results/LABEL`: links into the stages, each replaced in one step.

    Returns:
        The folder with the links.
    """
    shown = folder.resolve() / RESULTS / label
    links = {"model": Path(refs.model.path)}
    for ref in (refs.ids, refs.report):
        links |= {name: Path(ref.path) / name for name in StageReader(ref.path).manifest["files"]}
    try:
        shown.mkdir(parents=True, exist_ok=True)
        for abandoned in shown.glob(f"{TEMPORARY_PREFIX}*"):
            abandoned.unlink()
        for name, target in links.items():
            relative = os.path.relpath(target, shown)
            link = shown / name
            if link.is_symlink() and os.readlink(link) == relative:  # noqa: PTH115
                continue
            temporary = shown / f"{TEMPORARY_PREFIX}{name}-{os.getpid()}"
            temporary.symlink_to(relative)
            temporary.replace(link)
    except OSError as error:
        raise StorageError(f"cannot link the results in {shown}: {error.strerror}; run again") from error
    return shown


def published_reports(folder: Path) -> list[Report]:
    """Return the reports of the configurations that a run folder shows, by name.

    Raises:
        UsageError: the folder shows none.
    """
    links = sorted((folder / RESULTS).glob("*/report.json"))
    if not links:
        raise UsageError(f"{folder} is not a run folder with results: {RESULTS}/*/report.json is missing")
    return [read_report(reference(link.resolve().parent)) for link in links]


def adopt_vectors(config: BuildConfig, items: Ref, source: Path, reason: str) -> Stage:
    """Register vectors computed elsewhere, or by an older version, as those of the catalogue under the model.

    Args:
        source: `.npy` with a row an item in catalogue order (quarantined items included); Parquet with the
            catalogue's id column and a vector column; or the folder of an older vectors stage of the same items.
        reason: kept in the manifest with the digests of the files, so that no one takes them for computed here.
    """
    stage = pipeline.make_vectors(config, items)
    build = partial(_adopt, config.catalogue, items, source, reason)
    return Stage(stage.name, "Adopt the vectors", stage.ingredients, build)


def _adopt(catalogue: CatalogueSettings, items: Ref, source: Path, reason: str, output: StageOutput) -> dict[str, Any]:
    if source.is_dir():
        older = StageReader(source)
        if older.manifest["ingredients"]["inputs"].get("contents") != pipeline.contents_digest(items):
            raise DataError(
                f"{source} holds vectors of other items; embed again, or adopt them for their own catalogue"
            )
        array = older.array("vectors")
        rows, dimensions, dtype = array.layout.rows, array.layout.columns, array.layout.dtype

        def take(start: int, stop: int) -> NDArray[Any]:
            return array.take(np.arange(start, stop))

        digests = {name: record["sha256"] for name, record in older.manifest["files"].items()}
    else:
        vectors = VectorSource(CatalogueSettings(path=str(source), id_column=catalogue.id_column))
        order = _row_of_content(items, source, vectors.rows, catalogue.id_column)
        rows, dimensions, dtype = len(order), vectors.dimensions, str(vectors.dtype)

        def take(start: int, stop: int) -> NDArray[Any]:
            wanted = order[start:stop]
            ascending = np.argsort(wanted, kind="stable")
            rows = vectors.rows_at(wanted[ascending])
            return rows[np.argsort(ascending, kind="stable")]

        digests = {source.name: digest_file(source)}

    def unit_rows(start: int, stop: int) -> NDArray[Any]:
        part = take(start, stop)
        norms = np.linalg.norm(part.astype(np.float32), axis=1)
        wrong = np.flatnonzero(~(np.abs(norms - 1) <= UNIT_NORM_TOLERANCE))
        if wrong.size:
            raise DataError(
                f"{source}: expected unit vectors, as every embedder gives them, got norm {norms[wrong[0]]:g} "
                f"for content {start + int(wrong[0])}; normalise them first"
            )
        return part

    origin = f"adopted from {source.name} ({digest_json(digests)[:16]})"
    output.write_shards("vectors", ShardLayout(rows, dimensions, dtype), unit_rows, origin=origin)
    return {"rows": rows, "dimensions": dimensions, "adopted": {"reason": reason, "files": digests}}


def _row_of_content(items: Ref, source: Path, vectors: int, id_column: str) -> NDArray[np.int64]:
    """Return the row of the source that holds each content's vector, (D,)."""
    reader = StageReader(items.path)
    frame = pl.read_parquet(reader.path("items.parquet"), columns=["item_id", "content_id"])
    if source.suffix != ".npy":
        ids = pl.scan_parquet(source).select(pl.col(id_column)).collect().to_series()
        if ids.dtype != frame["item_id"].dtype:
            raise DataError(f"{source}: expected ids of type {frame['item_id'].dtype}, got {ids.dtype}")
        repeated = ids.filter(ids.is_duplicated())
        if len(repeated):
            raise DataError(
                f"{source}: expected one vector an id, got several for {repeated.unique().head(5).to_list()}"
            )
        rows = pl.DataFrame({"item_id": ids, "row": np.arange(len(ids))})
        joined = frame.join(rows, on="item_id", how="left", maintain_order="left")
        missing = joined.filter(pl.col("row").is_null())["item_id"]
        if len(missing):
            raise DataError(f"{source}: expected a vector for every item, got none for {missing.head(5).to_list()}")
        source_rows = joined["row"].to_numpy()
    else:
        skipped = pl.read_parquet(reader.path("quarantine.parquet"), columns=["row"])["row"].to_numpy()
        total = len(frame) + len(skipped)
        if vectors != total:
            raise DataError(f"{source}: expected {total} rows, one for each item of the catalogue, got {vectors}")
        source_rows = np.setdiff1d(np.arange(total), skipped)
    first = np.unique(frame["content_id"].to_numpy(), return_index=True)[1]
    return source_rows[first].astype(np.int64)
