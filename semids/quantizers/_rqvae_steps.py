"""What a training step of an RQ-VAE is made of: the network, its optimizer, gradients, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from semids.quantizers._rqvae_model import Objective, RqvaeModel, StepLosses

if TYPE_CHECKING:
    from semids.quantizers.rqvae import RqvaeSettings

CODEBOOK_RATE = 10.0
"""Learning rate of codewords over that of weights. At 1 they lag behind the encoder: on product vectors, 8 % of error
more after 80 epochs, and half of the latent error would go if codebooks were fitted again."""
FUSED_ON = {
    "AdamW": ("cpu", "cuda"),
    "Adam": ("cpu", "cuda"),
    "SGD": ("cpu", "cuda"),
    "Adagrad": ("cpu",),
    "RMSprop": (),
}
"""Types of devices for which PyTorch has a fused step of an optimizer."""
LARGEST_GRADIENT = 1.0
"""Norm that gradients are clipped to."""


def make_model(sizes: Sequence[int], settings: RqvaeSettings, dimensions: int, *, seed: int) -> RqvaeModel:
    """Return an untrained network for vectors of so many dimensions."""
    return RqvaeModel(
        (dimensions, *settings.layers, settings.e_dim),
        sizes,
        Objective(
            settings.sk_epsilons or (0.0,) * len(sizes), settings.sk_iters, settings.beta, settings.quant_loss_weight
        ),
        generator=torch.Generator().manual_seed(seed),
    )


def make_optimizer(settings: RqvaeSettings, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of PyTorch that the settings name."""
    kind: Any = getattr(torch.optim, settings.optimizer)
    books = [value for name, value in model.named_parameters() if name.startswith("codebooks.")]
    others = [value for name, value in model.named_parameters() if not name.startswith("codebooks.")]
    groups = [{"params": others, "rate": 1.0}, {"params": books, "rate": CODEBOOK_RATE}]
    # One pass over the weights instead of one an operation.
    fused = {"fused": True} if others[0].device.type in FUSED_ON[settings.optimizer] else {}
    return kind(groups, lr=settings.lr, weight_decay=settings.weight_decay, **fused)


def find_gradients(model: nn.Module, optimizer: torch.optim.Optimizer, losses: StepLosses, *, parts: int = 1) -> Tensor:
    """Compute gradients, clipped to a norm of 1; return the norm before, a scalar.

    Args:
        parts: ranks over which gradients are averaged: each one's loss is its part of a sum.
    """
    optimizer.zero_grad(set_to_none=True)
    (losses.total * parts).backward()
    return nn.utils.clip_grad_norm_(model.parameters(), LARGEST_GRADIENT)


def count_codes(codes: Tensor, size: int) -> Tensor:
    """Return how many rows have each of `size` codes, (size,) int64; `torch.bincount` would wait for a device."""
    return torch.zeros(size, dtype=torch.int64, device=codes.device).scatter_add_(0, codes, torch.ones_like(codes))


def reset_moments(state: Mapping[str, Tensor], moved: Tensor) -> None:
    """Forget which way codewords went before they were moved, and expect gradients of the others' size.

    Without a size, the first steps of Adam would be several times those of codewords that live.

    Args:
        state: of a codebook in an optimizer.
        moved: (m,) which codewords.
    """
    for name, value in state.items():
        if value.ndim == 2:
            lives = torch.ones(len(value), dtype=torch.bool, device=value.device)
            lives[moved] = False
            forgotten = name in ("exp_avg", "momentum_buffer", "grad_avg") or not lives.any()
            value[moved] = 0 if forgotten else value[lives].mean(dim=0)


def rate_of(settings: RqvaeSettings, step: int, steps: int) -> float:
    """Return the learning rate of a step, counted from 0, over the largest.

    It rises over the warm-up; then it stays (constant), falls to 0 in proportion (linear), or in half a cosine.

    Args:
        steps: of an epoch.
    """
    warmup = settings.warmup_epochs * steps
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, settings.epochs * steps - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[settings.lr_scheduler]
