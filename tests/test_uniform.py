"""Levels of equal loads: codebooks fitted to parts of the rows, whatever the order of the catalogue."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import clustered_vectors

from semids.progress import silent
from semids.quantizers import _uniform
from semids.quantizers.base import TrainingData
from semids.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansSettings
from semids.residual import ResidualCodebooks
from semids.shards import ShardedArray, ShardLayout


def balance_of(residuals: np.ndarray, size: int = 8) -> tuple[float, Mapping[str, Any]]:
    """The relative error of a balanced level, and its evidence."""
    start = residuals[:: len(residuals) // size][:size]
    outcome = _uniform._balance(_uniform.Sample(residuals, None), start, seed=0, done=lambda fits: None)
    books = ResidualCodebooks((outcome.tensors["codebook"],), (outcome.tensors["potentials"],))
    left = residuals - books.decode(books.encode(residuals))
    return float(np.square(left).sum() / np.square(residuals).sum()), outcome.evidence


def test_variants_that_take_turns_in_a_catalogue_are_all_seen_while_a_level_is_balanced() -> None:
    rng = np.random.default_rng(2)
    # Eight in turn; early re-fits see a 64th to a 16th of the rows: evenly spaced ones would be of one variant.
    rows = rng.normal(size=(8, 16))[np.arange(16_384) % 8] + 0.2 * rng.normal(size=(16_384, 16))
    in_turn, _ = balance_of(rows.astype(np.float32))
    shuffled, _ = balance_of(rng.permutation(rows).astype(np.float32))
    # Seen: 0.046, and 0.041 to 0.050 in five other orders.
    assert in_turn < 1.3 * shuffled


def test_a_level_is_balanced_on_a_part_of_many_rows(tmp_path: Path) -> None:
    rows = clustered_vectors(4 * 8 * _uniform.BALANCED_ROWS_PER_CODEWORD, 16)
    path = tmp_path / "rows.npy"
    np.save(path, rows)
    array = ShardedArray(ShardLayout(*rows.shape, "float32", shard_rows=len(rows)), lambda _: path)
    quantizer = ResidualKMeans((8,), "uniform", ResidualKMeansSettings(), seed=0)
    outcomes: dict[str, Any] = {}
    for step in quantizer.training_steps():
        needed = {name: outcomes[name].tensors for name in step.needs}
        outcomes[step.name] = quantizer.run_step(step, TrainingData(array, np.arange(len(rows))), needed, silent)
    assert outcomes["uniform-1"].evidence["rows"] == 8 * 256
    tensors = quantizer.assemble({name: outcome.tensors for name, outcome in outcomes.items()})
    loads = np.bincount(quantizer.freeze(tensors).encode(rows)[:, 0], minlength=8) / (len(rows) / 8)
    # Of 256 rows a codeword a sixteenth more or less is one standard deviation.
    assert 0.8 < loads.min() < loads.max() < 1.2


def test_costs_are_squared_distances_whatever_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    rows, codebook = rng.normal(size=(50, 6)).astype(np.float32), rng.normal(size=(5, 6)).astype(np.float32)
    monkeypatch.setattr(_uniform, "PART_ROWS", 7)
    expected = np.square(rows[:, None].astype(np.float64) - codebook).sum(axis=2)
    assert np.allclose(_uniform.squared_distances(rows, codebook), expected, atol=1e-5)


def test_a_cost_matrix_keeps_its_bound_while_a_level_is_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = _uniform.squared_distances

    def watched(residuals: np.ndarray, codebook: np.ndarray) -> np.ndarray:
        made.append(4 * len(residuals) * len(codebook))
        return real(residuals, codebook)

    monkeypatch.setattr(_uniform, "squared_distances", watched)
    monkeypatch.setattr(_uniform, "COST_BYTES", 32_000)
    _, evidence = balance_of(np.random.default_rng(3).normal(size=(4096, 16)).astype(np.float32))
    assert max(made) == 32_000
    assert evidence["potentials_rows"] == 1000
    assert evidence["load_max"] < 1.2
