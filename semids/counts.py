"""How large a run is: from the catalogue, from what an earlier run found in it, or supposed."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from semids.catalogue import is_vectors
from semids.config import BuildConfig
from semids.errors import UsageError
from semids.pipeline import Runner, scan_catalogue
from semids.stages import Ref, StageReader, peek_stage
from semids.vector_items import VectorSource
from semids.work import Counts


class UnknownDimensionsError(UsageError):
    """The files of an embedding model do not tell how wide its vectors are."""


ID_ROWS = 1 << 18
"""Items whose ids are measured."""


def count_catalogue(config: BuildConfig, run: Runner) -> Counts:
    """Return the counts of a catalogue: of texts by reading it, a stage that the run then finds done.

    Vectors of which no earlier run has counted the distinct ones are taken to be distinct, and the training split
    to be all of them.

    Args:
        run: runs the stage that reads texts.

    Raises:
        UsageError, DataError, StorageError: as reading the catalogue does.
    """
    given = is_vectors(config.catalogue)
    folder = Path(config.out)
    # To name a stage, the catalogue is digested: not where nothing can be found.
    if given and not (folder / "stages").is_dir():
        return _count_vectors(config)
    stage = scan_catalogue(config)
    found = peek_stage(folder, stage)
    if found is None and given:
        return _count_vectors(config)
    return read_counts(config, found or run(stage))


def _count_vectors(config: BuildConfig) -> Counts:
    source = VectorSource(config.catalogue)
    return suppose_vectors(source.rows, source.dimensions, itemsize=source.dtype.itemsize)


def suppose_vectors(rows: int, dimensions: int, *, itemsize: int = 2) -> Counts:
    """Return the counts of a catalogue of distinct vectors that need not exist, all for training, ids from 0."""
    digits = sum(max(0, rows - 10**place) for place in range(1, len(str(rows)))) / max(1, rows) + 1
    return Counts(rows, rows, rows, rows, 1, dimensions, itemsize, digits, None, exact=False)


def suppose_rows(counts: Counts, rows: int) -> Counts:
    """Return the counts of a catalogue like the given one, with so many items; vectors not read yet are distinct."""
    if not counts.exact:
        return suppose_vectors(rows, counts.dimensions, itemsize=counts.itemsize)
    factor = rows / counts.items
    return replace(
        counts,
        items=rows,
        contents=max(1, round(counts.contents * factor)),
        training=max(1, round(counts.training * factor)),
        training_items=max(1, round(counts.training_items * factor)),
        exact=False,
    )


def read_counts(config: BuildConfig, items: Ref) -> Counts:
    """Return the counts that the stage of the items left.

    Raises:
        UnknownDimensionsError: the embedding model does not tell its dimensions.
    """
    reader = StageReader(items.path)
    summary = reader.summary
    split = summary["splits"][config.catalogue.train_split]
    dimensions = summary["dimensions"] or config.make_embedder().declared_dimensions
    if dimensions is None:
        raise UnknownDimensionsError("expected a model whose config.json names its dimensions; set embedder.dimensions")
    return Counts(
        items=summary["items"],
        contents=summary["distinct_contents"],
        training=split["distinct_contents"],
        training_items=split["items"],
        splits=len(summary["splits"]),
        dimensions=dimensions,
        itemsize=4 if summary["dtype"] == "float32" else 2,
        id_bytes=_mean_id_bytes(reader.path("items.parquet")),
        texts=reader.path("contents.parquet") if summary["kind"] == "texts" else None,
        exact=True,
    )


@lru_cache(maxsize=8)
def _mean_id_bytes(path: Path) -> float:
    """Return the mean length of the first items' ids. Every stage of a cell asks, and committed files never change."""
    with pq.ParquetFile(path) as file:
        some: list[Any] = next(file.iter_batches(ID_ROWS, columns=["item_id"])).column(0).to_pylist()
    return sum(len(str(name).encode()) for name in some) / len(some)
