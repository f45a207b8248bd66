"""Vectors that were computed elsewhere, or by an older version, as those of a catalogue under a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from semids import pipeline
from semids.config import BuildConfig
from semids.errors import DataError
from semids.items import CatalogueSettings, VectorSource
from semids.shards import ShardLayout
from semids.stages import Ref, Stage, StageOutput, StageReader
from semids.store import digest_file, digest_json

UNIT_NORM_TOLERANCE = 1e-2


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
