"""What held-out contents say of an RQ-VAE under training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semids.arrays import code_dtype
from semids.metrics import measure_ids
from semids.quantizers._rqvae_model import RqvaeModel
from semids.quantizers._rqvae_rows import StreamedRows, read_ahead
from semids.shards import ShardedArray

if TYPE_CHECKING:
    from semids.quantizers.rqvae import RqvaeSettings

EVALUATION_ROWS = 8192
"""Rows that pass through the network at a time."""


@torch.no_grad()
def evaluate(model: RqvaeModel, vectors: ShardedArray, rows: NDArray[np.int64], *, batch_size: int) -> dict[str, Any]:
    """Return figures of distinct contents under the mapping nearest, as JSON.

    Args:
        rows: (m,) int64, of the vectors.
        batch_size: rows that training assigns together: where it balances, codes depend on it.
    """
    device = model.mean.device
    codes: list[NDArray[Any]] = []
    errors = squares = agreeing = 0.0
    sums = torch.zeros(model.mean.shape, dtype=torch.float64, device=device)
    dtype = code_dtype([len(book) for book in model.codebooks])
    source = StreamedRows(vectors, rows, device)
    places = np.arange(len(rows))
    batches = [places[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    for batch in read_ahead(source.read, batches, device):
        for part in batch.split(EVALUATION_ROWS):
            latents = model.encode(part)
            nearest = model.nearest(latents)
            # Deviations from the training mean: sums of squares lose fewer digits.
            apart = (part - model.mean).double()
            errors += float((part - model.decode(model.look_up(nearest))).square().sum(dtype=torch.float64))
            squares += float(apart.square().sum())
            sums += apart.sum(dim=0)
            codes.append(nearest.cpu().numpy().astype(dtype))
        agreeing += _agreement(model, batch)
    sizes = tuple(len(book) for book in model.codebooks)
    ids = measure_ids(codes, [np.ones(len(part), np.uint32) for part in codes], sizes=sizes)
    spread = squares - float(sums.square().sum()) / len(rows)
    return {
        "contents": len(rows),
        "collision_rate": ids.collision_rate,
        "floor": ids.floor,
        "excess_collisions": ids.excess_collisions,
        "codes_used": [level.codes_used for level in ids.levels],
        "perplexity": [level.perplexity for level in ids.levels],
        "relative_mse": errors / spread if spread > 0 else None,
        "agreement": agreeing / len(rows),
    }


def _agreement(model: RqvaeModel, batch: Tensor) -> float:
    """Return how many rows of a batch get the same codes in training as under the mapping nearest."""
    if not any(model.objective.sk_epsilons):
        return float(len(batch))
    latents = model.encode(batch)
    nearest, residuals = model.nearest(latents), latents
    same = torch.ones(len(batch), dtype=torch.bool, device=batch.device)
    for level, codebook in enumerate(model.codebooks):
        codes = model.choose(residuals, level, alone=True)
        same &= codes == nearest[:, level]
        residuals = residuals - codebook[codes]
    return float(same.sum())


def rank_of(settings: RqvaeSettings, figures: dict[str, Any]) -> tuple[float, ...]:
    """Return what orders evaluations, the better first."""
    error = figures["relative_mse"] if figures["relative_mse"] is not None else math.inf
    return (figures["excess_collisions"], error) if settings.best_by == "collisions" else (error,)
