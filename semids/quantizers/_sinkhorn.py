"""Codes of a batch that uses every codeword equally often: entropic transport by scaling (Sinkhorn)."""

from __future__ import annotations

import torch
from torch import Tensor

from semids.quantizers._ranks import Ranks

CHECK_EVERY = 10
"""Iterations between two looks at the scalings."""
CONVERGED = 1e-6
"""Largest relative change of a scaling in an iteration beyond which more of them change no code but ties."""
LARGEST_EXPONENT = 30.0
"""Logarithm of a scaling that is folded into the kernel, before float32, which has 88, runs out of exponents."""
LEAST_MASS = 1e-30
"""Mass of a codeword in the first kernel below which its digits are not to be trusted."""


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
    sharpness = -1 / (epsilon * (highest - middle + 1e-5))
    # In one pass.
    logits = torch.addcmul(-middle * sharpness, distances, sharpness, out=distances)
    share = rows / logits.shape[1]
    return logits.add_(_balance(logits, share, iterations, ranks)).argmax(dim=1)


def _balance(logits: Tensor, share: Tensor, iterations: int, ranks: Ranks) -> Tensor:
    """Return the potentials of the columns, (K,), under which each has its share of the rows."""
    potentials = logits.new_zeros(logits.shape[1])
    kernel = _kernel(logits, potentials)
    done = 0
    if float(ranks.sum(kernel.sum(dim=0)).min()) < LEAST_MASS:
        potentials = _first_potentials(logits, share, ranks)
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
    return potentials.add_(scaling.log())


def _first_potentials(logits: Tensor, share: Tensor, ranks: Ranks) -> Tensor:
    """Return the potentials after an iteration in the logarithm.

    For where a codeword is too far from all rows for float32 to tell its mass from none.
    """
    log_plan = logits - logits.logsumexp(dim=1, keepdim=True)
    peaks = ranks.max(log_plan.amax(dim=0) if len(logits) else logits.new_full((logits.shape[1],), -torch.inf))
    return share.log() - peaks - ranks.sum((log_plan - peaks).exp_().sum(dim=0)).log_()


def _kernel(logits: Tensor, potentials: Tensor) -> Tensor:
    kernel = logits + potentials
    # e^−85 is still a normal number of float32, with others of which some processors are slow, and sums over 8 million
    # rows to less than LEAST_MASS.
    return kernel.sub_(kernel.amax(dim=1, keepdim=True)).clamp_(min=-85).exp_()
