"""The training step of an RQ-VAE as LC-Rec and its descendants publish it, plainly: an oracle, and a rival in time.

Written from what those systems do (Zheng et al. 2024; the code of LC-Rec and MiniOneRec): a loop over levels whose
straight-through residual goes on to the next, a Sinkhorn assignment in float64 that divides the whole plan in every
iteration, mean squared errors, a clipped gradient, and a dataset that is asked for one item at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import Dataset


class Items(Dataset[Tensor]):
    """Vectors in memory, one at a time."""

    def __init__(self, vectors: NDArray[np.float32]) -> None:
        self.vectors = vectors

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, place: int) -> Tensor:
        return torch.FloatTensor(self.vectors[place])


class PublishedRqvae(nn.Module):
    """Encoder, codebooks, decoder; `forward` returns both losses and the codes."""

    def __init__(
        self, widths: Sequence[int], sizes: Sequence[int], epsilons: Sequence[float], *, iterations: int, beta: float
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = perceptron(widths), perceptron(widths[::-1])
        self.books = nn.ModuleList(nn.Embedding(size, widths[-1]) for size in sizes)
        self.epsilons, self.iterations, self.beta = epsilons, iterations, beta

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        residual = self.encoder(rows)
        total, losses, codes = torch.zeros_like(residual), [], []
        for book, epsilon in zip(self.books, self.epsilons, strict=True):
            code = self.assign(residual, book.weight, epsilon)
            chosen = book(code)
            losses.append(mse_loss(chosen, residual.detach()) + self.beta * mse_loss(chosen.detach(), residual))
            through = residual + (chosen - residual).detach()
            residual, total = residual - through, total + through
            codes.append(code)
        return mse_loss(self.decoder(total), rows), torch.stack(losses).mean(), torch.stack(codes, dim=1)

    def assign(self, residual: Tensor, book: Tensor, epsilon: float) -> Tensor:
        distances = (residual**2).sum(1, keepdim=True) + (book**2).sum(1) - 2 * residual @ book.T
        if epsilon <= 0:
            return distances.argmin(dim=1)
        plan = published_sinkhorn(distances.detach(), epsilon, self.iterations)
        if torch.isnan(plan).any() or torch.isinf(plan).any():
            print("Sinkhorn returns NaN or infinite values")
        return plan.argmax(dim=1)


@torch.no_grad()
def published_sinkhorn(distances: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Return the (B, K) plan, in float64, of distances brought to [-1, 1]."""
    middle = (distances.max() + distances.min()) / 2
    plan = torch.exp(-((distances - middle) / (distances.max() - middle + 1e-5)).double() / epsilon)
    plan /= plan.sum()
    for _ in range(iterations):
        plan /= plan.sum(dim=1, keepdim=True)
        plan /= plan.shape[0]
        plan /= plan.sum(dim=0, keepdim=True)
        plan /= plan.shape[1]
    return plan * plan.shape[0]


def published_step(model: PublishedRqvae, optimizer: torch.optim.Optimizer, rows: Tensor) -> float:
    """Take a step and return its loss."""
    optimizer.zero_grad()
    reconstruction, quantization, _ = model(rows)
    loss = reconstruction + quantization
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def copy_weights(source: nn.Module, target: PublishedRqvae) -> None:
    """Give the published network the encoder and decoder of another with the same layers."""
    for name in ("encoder", "decoder"):
        pairs = zip(getattr(source, name).parameters(), getattr(target, name).parameters(), strict=True)
        for ours, theirs in pairs:
            theirs.data.copy_(ours.data)


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
