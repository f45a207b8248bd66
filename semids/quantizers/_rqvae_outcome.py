"""What the training of an RQ-VAE leaves: the best weights as arrays, and how it went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from semids.quantizers._rqvae_model import RqvaeModel, decoder_tensors, layer_tensors
from semids.quantizers._rqvae_state import TrainingState
from semids.quantizers.base import Tensors


@dataclass(frozen=True)
class Trained:
    """The best weights of a training, and how it went."""

    model: RqvaeModel
    state: TrainingState
    rows: int
    held_out: int


def freeze_training(trained: Trained) -> tuple[Tensors, dict[str, Any]]:
    """Return a network's tensors and, as JSON, how its training went.

    The tensors are `encoder_weight_i` (d_in, d_out) and `encoder_bias_i` of its layers i from 1, those of the decoder,
    `codebook_l` (K_l, e_dim), and the `mean` (d,) and `scale` () of rows, which are part of the outermost layers
    already; float32.
    """
    model, state = trained.model.cpu().double(), trained.state
    tensors = layer_tensors("encoder", model.encoder) | decoder_tensors(model.decoder, model.mean, model.scale)
    tensors["encoder_weight_1"] = tensors["encoder_weight_1"] * model.scale
    tensors["encoder_bias_1"] = tensors["encoder_bias_1"] - model.mean @ tensors["encoder_weight_1"]
    tensors |= {"mean": model.mean, "scale": model.scale}
    tensors |= {f"codebook_{level}": book.detach() for level, book in enumerate(model.codebooks, start=1)}
    evidence = {
        "rows": trained.rows,
        "held_out": trained.held_out,
        "epochs": state.epoch,
        "best_epoch": state.best,
        "revived": state.revived,
        "losses": state.losses,
        "evaluations": state.evaluations,
    }
    return {name: np.ascontiguousarray(value.numpy(), dtype=np.float32) for name, value in tensors.items()}, evidence
