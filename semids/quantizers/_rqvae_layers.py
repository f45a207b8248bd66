"""What the network of an RQ-VAE is made of: layers, parts of the loss with their gradients, and distances."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

MIXED_ON = frozenset({"cuda"})
"""Types of devices on which the products of encoder and decoder are in bfloat16, as tensor cores take them."""


def make_layers(widths: Sequence[int], generator: torch.Generator) -> nn.Sequential:
    """Return linear layers of the given widths, ReLU between them, drawn by `generator` (Glorot and Bengio 2010)."""
    layers: list[nn.Module] = []
    for place, (before, after) in enumerate(itertools.pairwise(widths)):
        layer = Layer(before, after, positive=place < len(widths) - 2)
        nn.init.xavier_normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
        layers.append(layer)
    return nn.Sequential(*layers)


class Layer(nn.Linear):
    """A linear layer, of which the positive part is handed on if `positive`."""

    def __init__(self, before: int, after: int, *, positive: bool) -> None:
        super().__init__(before, after)
        self.positive = positive

    def forward(self, input: Tensor) -> Tensor:
        """Return (n, after) for (n, before) rows."""
        plain = input.dtype == torch.float32 and input.device.type == "cpu" and len(input)
        if plain and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu"):
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


def standardize(rows: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return (rows − mean) × scale in one pass, whatever the type of the rows."""
    return torch.addcmul(-mean * scale, rows, scale)


def nearest_codewords(rows: Tensor, codebook: Tensor) -> Tensor:
    """Return the (n,) places of the codewords nearest to (n, e) rows; of equal ones the first."""
    return torch.addmm(codebook.square().sum(dim=1), rows, codebook.T, alpha=-2).argmin(dim=1)


def squared_distances(residuals: Tensor, codebook: Tensor) -> Tensor:
    """Return the (n, K) squared distances of (n, e) residuals to (K, e) codewords."""
    products = torch.addmm(codebook.square().sum(dim=1), residuals, codebook.T, alpha=-2)
    return products.add_(residuals.square().sum(dim=1, keepdim=True))


class SquaredError(torch.autograd.Function):
    """The sum of the squared differences of (n, d) values and others that need no gradient; of as few passes as go."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, others: Tensor) -> Tensor:  # type: ignore[override]
        apart = values - others
        ctx.save_for_backward(apart)
        ctx.dtype = values.dtype
        # Row by row: one sum over all of them in float32 is 1 % too small at 65,536 rows of 1,024.
        return torch.linalg.vector_norm(apart, dim=1).square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (apart,) = ctx.saved_tensors
        return torch.mul(apart, 2 * gradient, out=torch.empty_like(apart, dtype=ctx.dtype)), None


class CodebookLoss(torch.autograd.Function):
    """The sum of the squared distances of rows to their codewords, with the gradient of the codebook.

    It is known with the loss: twice the differences, summed by code. PyTorch's own gradient of a lookup adds them one
    after the other where many rows share a codeword, which took 80 of a step's 113 ms at 131,072 rows on an H100.
    """

    @staticmethod
    def forward(ctx: Any, codebook: Tensor, rows: Tensor, codes: Tensor) -> Tensor:  # type: ignore[override]
        apart = codebook[codes] - rows
        ctx.save_for_backward(sum_by_code(apart, codes, len(codebook), rows.device.type).mul_(2))
        return apart.square().sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gradient * ctx.saved_tensors[0], None, None


def sum_by_code(rows: Tensor, codes: Tensor, size: int, kind: str) -> Tensor:
    """Return the (size, e) sums of the (n, e) rows of each of the (n,) codes, as a kind of device adds them best."""
    if kind == "cpu":
        return rows.new_zeros(size, rows.shape[1]).index_add_(0, codes, rows)
    # On CUDA the order of scattered additions differs from run to run, and with it the sum.
    chosen = rows.new_zeros(len(rows), size).scatter_(1, codes[:, None], 1)
    return chosen.T @ rows


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return a context in which products are in bfloat16 where that pays; weights stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type in MIXED_ON and _multiplies_bfloat16(device))


@functools.cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    """False on CUDA devices before Ampere, which only emulate it."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
