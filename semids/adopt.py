"""Vectors that were computed elsewhere, or by an older version, as those of a catalogue under a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from semids import pipeline
from semids.config import BuildConfig
from semids.errors import DataError, UsageError
from semids.items import CatalogueSettings, VectorSource, is_vectors
from semids.pipeline import Runner
from semids.shards import ShardLayout
from semids.stages import Ref, Stage, StageOutput, StageReader
from semids.store import digest_file, digest_json

UNIT_NORM_TOLERANCE = 1e-2


@dataclass(frozen=True)
class _Source:
    """Vectors by content id: how they are laid out, what returns [start, stop) of them, and digests of their files."""

    layout: ShardLayout
    take: Callable[[int, int], NDArray[Any]]
    files: dict[str, str]


def adopt_vectors(config: BuildConfig, source: Path, reason: str, run: Runner) -> Ref:
    """Register vectors computed elsewhere, or by an older version, as those of the catalogue under the model.

    Args:
        source: `.npy` with a row an item in catalogue order (quarantined items included); Parquet with the
            catalogue's id column and a vector column; or the folder of an older vectors stage of the same items.
        reason: kept in the manifest with the digests of the files, so that no one takes them for computed here.

    Raises:
        UsageError: the catalogue holds vectors itself, or others of this catalogue and model are there already.
        DataError: the vectors do not fit the items or the model, or are not of unit length.
    """
    if is_vectors(config.catalogue):
        raise UsageError(
            f"expected a catalogue of texts, got vectors in {config.catalogue.path!r}: use them as they are"
        )
    items = run(pipeline.scan_catalogue(config))
    found = _open_stage(items, source) if source.is_dir() else _open_file(config.catalogue, items, source)
    expected = config.make_embedder().declared_dimensions
    if expected is not None and found.layout.columns != expected:
        raise DataError(
            f"{source}: expected vectors of {expected} dimensions, as the model {config.make_embedder().short_name} "
            f"gives them, got {found.layout.columns}; are they another model's?"
        )
    adopted = {"reason": reason, "files": found.files}
    stage = pipeline.make_vectors(config, items)
    vectors = run(
        Stage(
            stage.name,
            "Adopt the vectors",
            stage.ingredients,
            partial(_adopt, source, found, adopted),
            origin=f"adopted from {source.name} ({digest_json(found.files)[:16]})",
        )
    )
    if StageReader(vectors.path).summary.get("adopted") != adopted:
        raise UsageError(f"{vectors.path} already holds vectors of this catalogue and model; nothing was adopted")
    return vectors


def _open_stage(items: Ref, source: Path) -> _Source:
    older = StageReader(source)
    if older.manifest["stage"] != "vectors":
        raise UsageError(f"expected a stage of vectors, got the stage {older.manifest['stage']!r} in {source}")
    if older.manifest["ingredients"]["inputs"].get("contents") != pipeline.contents_digest(items):
        raise DataError(f"{source} holds vectors of other items; embed again, or adopt them for their own catalogue")
    array = older.array("vectors")
    layout = ShardLayout(array.layout.rows, array.layout.columns, array.layout.dtype)
    files = {name: record["sha256"] for name, record in older.manifest["files"].items()}
    return _Source(layout, lambda start, stop: array.take(np.arange(start, stop)), files)


def _open_file(catalogue: CatalogueSettings, items: Ref, source: Path) -> _Source:
    vectors = VectorSource(CatalogueSettings(path=str(source), id_column=catalogue.id_column))
    order = _row_of_content(items, source, vectors.rows, catalogue.id_column)

    def take(start: int, stop: int) -> NDArray[Any]:
        wanted = order[start:stop]
        ascending = np.argsort(wanted, kind="stable")
        rows = vectors.rows_at(wanted[ascending])
        return rows[np.argsort(ascending, kind="stable")]

    layout = ShardLayout(len(order), vectors.dimensions, str(vectors.dtype))
    return _Source(layout, take, {source.name: digest_file(source)})


def _adopt(source: Path, found: _Source, adopted: dict[str, Any], output: StageOutput) -> dict[str, Any]:
    def unit_rows(start: int, stop: int) -> NDArray[Any]:
        part = found.take(start, stop)
        norms = np.linalg.norm(part.astype(np.float32), axis=1)
        wrong = np.flatnonzero(~(np.abs(norms - 1) <= UNIT_NORM_TOLERANCE))
        if wrong.size:
            raise DataError(
                f"{source}: expected unit vectors, as every embedder gives them, got norm {norms[wrong[0]]:g} "
                f"for content {start + int(wrong[0])}; normalise them first"
            )
        return part

    output.write_shards("vectors", found.layout, unit_rows)
    return {"rows": found.layout.rows, "dimensions": found.layout.columns, "adopted": adopted}


def _row_of_content(items: Ref, source: Path, vectors: int, id_column: str) -> NDArray[np.int64]:
    """Return the row of the source that holds each content's vector, (D,)."""
    reader = StageReader(items.path)
    frame = pl.read_parquet(reader.path("items.parquet"), glob=False, columns=["item_id", "content_id"])
    if source.suffix != ".npy":
        ids = pl.scan_parquet(source, glob=False).select(pl.col(id_column)).collect().to_series()
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
        skipped = pl.read_parquet(reader.path("quarantine.parquet"), glob=False, columns=["row"])["row"].to_numpy()
        total = len(frame) + len(skipped)
        if vectors != total:
            raise DataError(f"{source}: expected {total} rows, one for each item of the catalogue, got {vectors}")
        source_rows = np.setdiff1d(np.arange(total), skipped)
    first = np.unique(frame["content_id"].to_numpy(), return_index=True)[1]
    return source_rows[first].astype(np.int64)
