"""The network of an RQ-VAE while it is trained: encoder, residual codebooks in its latent space, decoder, and loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, mse_loss

from semids.quantizers._ranks import Ranks

CHECK_EVERY = 10
"""Sinkhorn iterations between two looks at the scalings."""
CONVERGED = 1e-6
"""Largest relative change of a scaling in an iteration beyond which more of them change no code but ties."""
LARGEST_EXPONENT = 30.0
"""Logarithm of a scaling that is folded into the kernel, before float32, which has 88, runs out of exponents."""
LEAST_MASS = 1e-30
"""Mass of a codeword in the first kernel below which its digits are not to be trusted."""


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
        """Return (n, d) rows less their mean, with a mean square of about 1."""
        return torch.sub(rows, self.mean).mul_(self.scale)

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
        latents = self.encoder(standard)
        residuals = latents
        rounded = torch.zeros_like(latents)
        quantization = latents.new_zeros(())
        codes: list[Tensor] = []
        if not quantized:
            # Every parameter takes part, which is what ranks that average gradients expect.
            idle = sum((codebook.sum() for codebook in self.codebooks), latents.new_zeros(())) * 0.0
            reconstruction = mse_loss(self.decoder(latents), standard, reduction="sum") / (whole * rows.shape[1])
            none = torch.zeros((0, len(self.codebooks)), dtype=torch.int64, device=rows.device)
            return StepLosses(reconstruction + idle, reconstruction.detach(), quantization, none)
        for level, codebook in enumerate(self.codebooks):
            codes.append(self.choose(residuals.detach(), level))
            chosen = codebook[codes[-1]]
            fit = (chosen - residuals.detach()).square().sum()
            # Later levels' is the same number, without the part that has no gradient.
            commitment = (chosen.detach() - residuals).square().sum() if level == 0 else fit.detach()
            quantization = quantization + fit + self.objective.beta * commitment
            rounded = rounded + chosen.detach()
            residuals = (residuals - chosen).detach()
        # The value of the codewords, and the gradient of the latents.
        decoded = self.decoder(latents + (rounded - latents).detach())
        reconstruction = mse_loss(decoded, standard, reduction="sum") / (whole * rows.shape[1])
        quantization = quantization / (whole * latents.shape[1] * len(self.codebooks))
        total = reconstruction + self.objective.quant_loss_weight * quantization
        return StepLosses(total, reconstruction.detach(), quantization.detach(), torch.stack(codes, dim=1))

    @torch.no_grad()
    def choose(self, residuals: Tensor, level: int, *, alone: bool = False) -> Tensor:
        """Return the (b,) codes of (b, e_dim) residuals as training assigns them.

        Args:
            alone: True where other ranks do not take part.
        """
        epsilon = self.objective.sk_epsilons[level]
        distances = squared_distances(residuals, self.codebooks[level])
        if epsilon <= 0:
            return distances.argmin(dim=1)
        return sinkhorn_codes(distances, epsilon, self.objective.sk_iters, Ranks() if alone else self.ranks)

    @torch.no_grad()
    def nearest(self, latents: Tensor) -> Tensor:
        """Return the (n, L) codes that the mapping nearest gives to latent vectors."""
        codes: list[Tensor] = []
        for codebook in self.codebooks:
            codes.append(squared_distances(latents, codebook).argmin(dim=1))
            latents = latents - codebook[codes[-1]]
        return torch.stack(codes, dim=1)

    @torch.no_grad()
    def look_up(self, codes: Tensor) -> Tensor:
        """Return the (n, e_dim) sums of the codewords of (n, L) codes."""
        return torch.stack([book[codes[:, level]] for level, book in enumerate(self.codebooks)]).sum(dim=0)


def make_layers(widths: Sequence[int], generator: torch.Generator) -> nn.Sequential:
    """Return linear layers of the given widths, ReLU between them, drawn by `generator` (Glorot and Bengio 2010)."""
    layers: list[nn.Module] = []
    for place, (before, after) in enumerate(itertools.pairwise(widths)):
        layer = Layer(before, after, positive=place < len(widths) - 2)
        nn.init.xavier_normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
        layers.append(layer)
    return nn.Sequential(*layers)


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


class Layer(nn.Linear):
    """A linear layer, of which the positive part is handed on if `positive`."""

    def __init__(self, before: int, after: int, *, positive: bool) -> None:
        super().__init__(before, after)
        self.positive = positive

    def forward(self, input: Tensor) -> Tensor:
        """Return (n, after) for (n, before) rows."""
        plain = input.dtype == torch.float32 and input.device.type == "cpu" and len(input)
        if plain and torch.backends.mkldnn.is_available():
            found: Tensor = OneDnnLinear.apply(input, self.weight, self.bias, self.positive)  # type: ignore[assignment]
            return found
        output = linear(input, self.weight, self.bias)
        return output.relu_() if self.positive else output


class OneDnnLinear(torch.autograd.Function):
    """A linear layer by oneDNN, bias and ReLU within the product: on AMD, 0.8 of the time that MKL takes without them.

    PyTorch itself uses it where it compiles a network; the operator's name is that of the pinned version.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, positive: bool) -> Tensor:  # type: ignore[override]
        output = _multiply(rows, weight, bias, "relu" if positive else "none")
        ctx.save_for_backward(rows, weight, output if positive else None)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:  # type: ignore[override]
        rows, weight, output = ctx.saved_tensors
        if output is not None:
            gradient = torch.ops.aten.threshold_backward(gradient, output, 0)
        # The rows of a batch need no gradient.
        before = _multiply(gradient, weight.T.contiguous(), None, "none") if ctx.needs_input_grad[0] else None
        return before, gradient.T @ rows, gradient.sum(dim=0), None


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None, after: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, after, [], "")


def squared_distances(residuals: Tensor, codebook: Tensor) -> Tensor:
    """Return the (n, K) squared distances of (n, e) residuals to (K, e) codewords."""
    products = torch.addmm(codebook.square().sum(dim=1), residuals, codebook.T, alpha=-2)
    return products.add_(residuals.square().sum(dim=1, keepdim=True))


@torch.no_grad()
def sinkhorn_codes(distances: Tensor, epsilon: float, iterations: int, ranks: Ranks) -> Tensor:
    """Return the (b,) codes of the transport plan that uses every codeword equally often over the batch.

    The iteration of Cuturi 2013, rows first, on distances brought to [-1, 1] as LC-Rec does (Zheng et al. 2024,
    section 3.2.1). Only scaling vectors change, in float32, and are folded into the kernel in the logarithm now and
    then (Schmitzer 2019, section 3): as it stands, the kernel is NaN in float32 at epsilon ≤ 0.01. Column sums are
    taken over all ranks.

    Args:
        distances: (b, K) squared distances; overwritten.
        epsilon: smoothing, in halves of the range of the distances. Large: all codewords are about equally good.
            Small: closer to exact, and more iterations to equal use.
        iterations: of rows and columns. Few leave the loads unequal.
    """
    rows = ranks.sum(torch.tensor(float(len(distances)), device=distances.device))
    # An empty part of a batch still takes part in the sums.
    highest = ranks.max(distances.max() if len(distances) else distances.new_full((), -torch.inf))
    lowest = -ranks.max(-distances.min() if len(distances) else distances.new_full((), -torch.inf))
    middle = (highest + lowest) / 2
    logits = distances.sub_(middle).div_(-epsilon * (highest - middle + 1e-5))
    share = rows / logits.shape[1]
    potentials = torch.zeros_like(logits[0]) if len(logits) else logits.new_zeros(logits.shape[1])
    kernel = _kernel(logits, potentials)
    done = 0
    if float(ranks.sum(kernel.sum(dim=0)).min()) < LEAST_MASS:
        # A codeword too far from all rows for float32 to tell its mass from none: one iteration in the logarithm.
        log_plan = logits - logits.logsumexp(dim=1, keepdim=True)
        peaks = ranks.max(log_plan.amax(dim=0) if len(logits) else torch.full_like(potentials, -torch.inf))
        potentials = share.log() - peaks - ranks.sum((log_plan - peaks).exp_().sum(dim=0)).log_()
        kernel = _kernel(logits, potentials)
        done = 1
    scaling = torch.ones_like(potentials)
    while done < iterations:
        before, scaling = scaling, share / ranks.sum((kernel @ scaling).reciprocal_() @ kernel)
        done += 1
        if done % CHECK_EVERY == 0:
            if float((scaling / before - 1).abs().max()) < CONVERGED:
                break
            if float(scaling.log().abs().max()) > LARGEST_EXPONENT:
                potentials += scaling.log()
                kernel, scaling = _kernel(logits, potentials), torch.ones_like(potentials)
    potentials += scaling.log()
    return logits.add_(potentials).argmax(dim=1)


def _kernel(logits: Tensor, potentials: Tensor) -> Tensor:
    kernel = logits + potentials
    # e^−85 is still a normal number of float32, with others of which some processors are slow, and sums over 8 million
    # rows to less than LEAST_MASS.
    return kernel.sub_(kernel.amax(dim=1, keepdim=True)).clamp_(min=-85).exp_()
