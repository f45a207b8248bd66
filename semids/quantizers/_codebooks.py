"""Codebooks among tensors: how training steps hand them on, and how models keep them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from semids.quantizers.base import Tensors
from semids.residual import PriceTable, ResidualCodebooks


def start_codebook(tensors: Tensors, level: int) -> NDArray[np.float32]:
    """Return the codebook of a level, from 1: of a step that fitted it alone, or of one that fitted all levels."""
    return tensors["codebook"] if "codebook" in tensors else tensors[f"codebook_{level}"]


def level_tensors(outcomes: Mapping[str, Tensors], kind: str, levels: int) -> Tensors:
    """Return `codebook_l` and `potentials_l` for every level l from 1, each from its step `kind-l`."""
    return {
        f"{part}_{level}": outcomes[f"{kind}-{level}"][part]
        for level in range(1, levels + 1)
        for part in ("codebook", "potentials")
    }


def read_codebooks(tensors: Tensors) -> ResidualCodebooks:
    """Return the codebooks of a model: `codebook_l`, `potentials_l`, `price_prefixes_l` and `prices_l`, l from 1."""
    levels = range(1, len([name for name in tensors if name.startswith("codebook_")]) + 1)
    return ResidualCodebooks(
        tuple(tensors[f"codebook_{level}"] for level in levels),
        tuple(tensors[f"potentials_{level}"] for level in levels),
        read_prices(tensors),
    )


def read_prices(tensors: Tensors) -> tuple[PriceTable, ...]:
    """Return the tables of prices among a model's tensors, one a level, or none."""
    levels = len([name for name in tensors if name.startswith("prices_")])
    return tuple(
        PriceTable(tensors[f"price_prefixes_{level}"], tensors[f"prices_{level}"]) for level in range(1, levels + 1)
    )
