"""Mappings: uniform and capacity of semids against the usual dense Sinkhorn, from the same codebooks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semids.arrays import Codes, capacity_of
from semids.balance import TOLERANCE
from semids.capacity import resolve_bounds
from semids.kmeans import sample_rows
from semids.progress import silent
from semids.quantizers._uniform import fit_uniform, squared_distances
from semids.quantizers.base import MappingName, Tensors, TrainingData
from semids.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansSettings
from semids.residual import ResidualCodebooks
from semids.shards import ShardedArray, ShardLayout
from tests.benchmarks.dense_sinkhorn import assign_by_dense_sinkhorn
from tests.benchmarks.measure import Contender, Record, take_turns
from tests.benchmarks.quality import SIZES, Codebooks, id_figures, with_beam

PART = "mapping"
SEED = 0
REPETITIONS = 3
FROZEN_ROWS_PER_CODEWORD = 128

Assigned = tuple[Codebooks, Codes]
"""The codebooks that reconstruct, and the (n, L) codes of all rows."""


def measure_mappings(vectors: NDArray[np.float16], codebooks: Codebooks) -> None:
    """Measure how long all (n, d) vectors take to their codes under each mapping, from the nearest one's codebooks."""
    distinct, places = _distinct_rows(vectors)

    def finish(name: str, outcome: Assigned) -> Mapping[str, Any]:
        return id_figures(outcome[0], vectors, outcome[1])

    facts = {
        "rows": len(vectors),
        "distinct_contents": len(distinct),
        "dimensions": vectors.shape[1],
        "sizes": SIZES,
    }
    with tempfile.TemporaryDirectory() as folder:
        # As a catalogue lies on disk once it was read, which is not part of a mapping.
        rows = _as_sharded(vectors, Path(folder) / "rows.npy")
        contents = _as_sharded(vectors[distinct], Path(folder) / "contents.npy")
        runs: dict[str, Callable[[], Assigned]] = {
            "semids, nearest": lambda: (codebooks, with_beam(codebooks, 1).encode(vectors)),
            "semids, uniform": lambda: _map_uniformly(rows, codebooks),
            "semids, uniform, codebooks not re-fitted": lambda: _map_frozen_codebooks(rows, codebooks),
            "semids, capacity": lambda: _map_within_bounds(contents, places, codebooks),
            "dense Sinkhorn (POT), greedy rounding": lambda: (codebooks, assign_by_dense_sinkhorn(vectors, codebooks)),
        }
        take_turns(Record(PART, facts), {name: Contender(run, REPETITIONS) for name, run in runs.items()}, finish)


def _map_uniformly(rows: ShardedArray, codebooks: Codebooks) -> Assigned:
    quantizer, outcomes = _train("uniform", rows, codebooks)
    tensors = quantizer.assemble(outcomes)
    return _codebooks_of(tensors), quantizer.freeze(tensors).encode(rows.shard(0))


def _map_frozen_codebooks(rows: ShardedArray, codebooks: Codebooks) -> Assigned:
    """Find potentials alone, the codebooks being given, as the dense plan does.

    They are those of a part of the rows: the loads of all deviate by what is drawn, where the plan's rounding gives no
    codeword a row too many.
    """
    vectors = rows.shard(0)
    potentials: tuple[NDArray[np.float32], ...] = ()
    for level, codebook in enumerate(codebooks):
        part = vectors[sample_rows(len(vectors), FROZEN_ROWS_PER_CODEWORD * len(codebook), seed=SEED)]
        before = ResidualCodebooks(codebooks[:level], potentials) if level else None
        residuals = before.residuals(part) if before else part.astype(np.float32)
        found = fit_uniform(squared_distances(residuals, codebook), start=None, tolerance=TOLERANCE)
        potentials = (*potentials, found.values)
    return codebooks, ResidualCodebooks(codebooks, potentials).encode(vectors)


def _map_within_bounds(contents: ShardedArray, places: NDArray[np.int64], codebooks: Codebooks) -> Assigned:
    """Place the distinct contents: the (n,) rows have the IDs of theirs."""
    quantizer, outcomes = _train("capacity", contents, codebooks)
    given = quantizer.given_codes(outcomes)
    assert given is not None, "the mapping capacity gives codes itself"
    return _codebooks_of(quantizer.assemble(outcomes)), given[places]


def _train(
    mapping: MappingName, array: ShardedArray, codebooks: Codebooks
) -> tuple[ResidualKMeans, dict[str, Tensors]]:
    """Carry out the steps of a mapping, given the outcomes of those that fit the codebooks."""
    bounds = resolve_bounds(array.layout.rows, capacity_of(SIZES), least="auto", most="auto")
    quantizer = ResidualKMeans(SIZES, mapping, ResidualKMeansSettings(), seed=SEED, bounds=bounds)
    outcomes: dict[str, Tensors] = {
        f"codebook-{level}": {"codebook": codebook, "potentials": np.zeros(len(codebook), np.float32)}
        for level, codebook in enumerate(codebooks, start=1)
    }
    data = TrainingData(array, np.arange(array.layout.rows))
    for step in quantizer.training_steps():
        if step.name not in outcomes:
            needed = {name: outcomes[name] for name in step.needs}
            outcomes[step.name] = quantizer.run_step(step, data, needed, silent).tensors
    return quantizer, outcomes


def _codebooks_of(tensors: Tensors) -> Codebooks:
    return tuple(tensors[f"codebook_{level}"] for level in range(1, len(SIZES) + 1))


def _as_sharded(vectors: NDArray[np.float16], path: Path) -> ShardedArray:
    """Write vectors as the one shard of an array."""
    np.save(path, vectors)
    return ShardedArray(ShardLayout(*vectors.shape, str(vectors.dtype), shard_rows=len(vectors)), lambda _: path)


def _distinct_rows(vectors: NDArray[np.float16]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the (D,) first rows of distinct contents, ascending, and which of these each of the (n,) rows is."""
    rows_as_bytes = np.ascontiguousarray(vectors).view(np.dtype((np.void, vectors.itemsize * vectors.shape[1])))
    _, first, places = np.unique(rows_as_bytes.ravel(), return_index=True, return_inverse=True)
    order = np.argsort(first)
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return first[order], ranks[places]
