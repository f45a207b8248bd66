"""The network of an RQ-VAE while it is trained: encoder, residual codebooks in its latent space, decoder, and loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from semids.quantizers._ranks import Ranks
from semids.quantizers._rqvae_layers import (
    CodebookLoss,
    SquaredError,
    make_layers,
    mixed_precision,
    nearest_codewords,
    squared_distances,
    standardize,
)
from semids.quantizers._sinkhorn import sinkhorn_codes


@dataclass(frozen=True)
class StepLosses:
    """What a training step minimises, and the codes it chose.

    Args:
        total: scalar to differentiate: the part of the whole batch's loss that these rows make up.
        reconstruction: mean squared error of the standardised rows, a part like `total`.
        quantization: mean over levels of codebook loss + beta × commitment loss, a part like `total`.
        codes: (b, L) int64.
    """

    total: Tensor
    reconstruction: Tensor
    quantization: Tensor
    codes: Tensor


@dataclass(frozen=True)
class Objective:
    """What a training step assigns rows by and minimises, besides the reconstruction loss.

    Args:
        sk_epsilons: smoothing of each level's Sinkhorn assignment; 0 is the nearest codeword.
        sk_iters: its iterations.
        beta: weight of the commitment loss.
        quant_loss_weight: weight of the quantization loss beside the reconstruction loss.
    """

    sk_epsilons: tuple[float, ...]
    sk_iters: int
    beta: float
    quant_loss_weight: float


class RqvaeModel(nn.Module):
    """Encoder, codebooks and decoder.

    Rows are standardised first, by one mean vector and one scale, so that the two parts of the loss weigh the same
    whatever the norm of the vectors: unit vectors of 1,024 dimensions have a mean square of 0.001.

    Args:
        widths: of the vectors, the hidden layers and the latent space.
        sizes: codebook sizes.
        generator: draws the first weights.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self, widths: Sequence[int], sizes: Sequence[int], objective: Objective, *, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.encoder = make_layers(widths, generator)
        self.decoder = make_layers(widths[::-1], generator)
        self.codebooks = nn.ParameterList(
            nn.Parameter((2 * torch.rand(size, widths[-1], generator=generator) - 1) / size) for size in sizes
        )
        self.register_buffer("mean", torch.zeros(widths[0]))
        self.register_buffer("scale", torch.ones(()))
        self.objective = objective
        self.ranks = Ranks()

    def standardize(self, rows: Tensor) -> Tensor:
        """Return (n, d) rows less their mean, with a mean square of about 1, in the type of the weights."""
        return standardize(rows, self.mean, self.scale)

    def encode(self, rows: Tensor) -> Tensor:
        """Return the (n, e_dim) latent vectors of (n, d) rows as they come."""
        return self.encoder(self.standardize(rows))

    def decode(self, latents: Tensor) -> Tensor:
        """Return the (n, d) rows that latent vectors stand for."""
        return self.decoder(latents) / self.scale + self.mean

    def forward(self, rows: Tensor, whole: int, *, quantized: bool = True) -> StepLosses:
        """Return the losses of a training step (Zeghidour et al. 2021, Lee et al. 2022, as LC-Rec trains it).

        The gradient passes through the codes as if they were not there (straight-through, van den Oord et al. 2017).
        As published, what later levels see of the encoder is cut off: the straight-through residual of a level has no
        gradient, so that the encoder is committed to the first level alone.

        Args:
            rows: (b, d), of a batch of `whole` rows over all ranks.
            quantized: False trains encoder and decoder alone: the codes are empty, and codebooks have no gradient.
        """
        standard = self.standardize(rows)
        with mixed_precision(rows.device):
            latents = self.encoder(standard)
        latents = latents.to(standard.dtype)
        residuals = latents
        rounded = torch.zeros_like(latents)
        quantization = latents.new_zeros(())
        codes: list[Tensor] = []
        if not quantized:
            # Every parameter takes part, which is what ranks that average gradients expect.
            idle = sum((codebook.sum() for codebook in self.codebooks), latents.new_zeros(())) * 0.0
            reconstruction = self._reconstruction(latents, standard, whole)
            none = torch.zeros((0, len(self.codebooks)), dtype=torch.int64, device=rows.device)
            return StepLosses(reconstruction + idle, reconstruction.detach(), quantization, none)
        for level, codebook in enumerate(self.codebooks):
            codes.append(self.choose(residuals.detach(), level))
            chosen = codebook.detach()[codes[-1]]
            fit: Tensor = CodebookLoss.apply(codebook, residuals.detach(), codes[-1])  # type: ignore[assignment]
            # Later levels' is the same number, without the part that has no gradient.
            commitment = (chosen - residuals).square().sum() if level == 0 else fit.detach()
            quantization = quantization + fit + self.objective.beta * commitment
            rounded = rounded + chosen
            residuals = (residuals - chosen).detach()
        # The value of the codewords, and the gradient of the latents.
        reconstruction = self._reconstruction(latents + (rounded - latents).detach(), standard, whole)
        quantization = quantization / (whole * latents.shape[1] * len(self.codebooks))
        total = reconstruction + self.objective.quant_loss_weight * quantization
        return StepLosses(total, reconstruction.detach(), quantization.detach(), torch.stack(codes, dim=1))

    def _reconstruction(self, latents: Tensor, standard: Tensor, whole: int) -> Tensor:
        with mixed_precision(latents.device):
            decoded = self.decoder(latents)
        error: Tensor = SquaredError.apply(decoded, standard)  # type: ignore[assignment]
        return error / (whole * standard.shape[1])

    @torch.no_grad()
    def choose(self, residuals: Tensor, level: int, *, alone: bool = False) -> Tensor:
        """Return the (b,) codes of (b, e_dim) residuals as training assigns them.

        Args:
            alone: True where other ranks do not take part.
        """
        epsilon = self.objective.sk_epsilons[level]
        if epsilon <= 0:
            return nearest_codewords(residuals, self.codebooks[level])
        distances = squared_distances(residuals, self.codebooks[level])
        return sinkhorn_codes(distances, epsilon, self.objective.sk_iters, Ranks() if alone else self.ranks)

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """Return the (n, L) codes that the mapping nearest gives to latent vectors."""
        codes: list[Tensor] = []
        for codebook in self.codebooks:
            codes.append(nearest_codewords(latents, codebook))
            latents = latents - codebook[codes[-1]]
        return torch.stack(codes, dim=1)

    @torch.no_grad()
    def look_up(self, codes: Tensor) -> Tensor:
        """Return the (n, e_dim) sums of the codewords of (n, L) codes."""
        return torch.stack([book[codes[:, level]] for level, book in enumerate(self.codebooks)]).sum(dim=0)


def layer_tensors(name: str, network: nn.Sequential) -> dict[str, Tensor]:
    """Return `NAME_weight_i` (d_in, d_out) and `NAME_bias_i` of a network's linear layers i from 1, detached."""
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    return {
        f"{name}_{part}_{number}": value
        for number, layer in enumerate(linear, start=1)
        for part, value in (("weight", layer.weight.detach().T), ("bias", layer.bias.detach()))
    }


def decoder_tensors(decoder: nn.Sequential, mean: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a decoder of standardised rows as those of one of rows as they come."""
    tensors = layer_tensors("decoder", decoder)
    last = len(tensors) // 2
    tensors[f"decoder_weight_{last}"] = tensors[f"decoder_weight_{last}"] / scale
    tensors[f"decoder_bias_{last}"] = tensors[f"decoder_bias_{last}"] / scale + mean
    return tensors
