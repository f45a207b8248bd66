"""Potentials: one number a codeword that makes its load equal to all others', or keeps it within bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from semids.device import accelerator, upload
from semids.errors import ShapeError
from semids.memory import device_free_bytes
from semids.parallel import in_order

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4
"""Largest sum of |share of a codeword − 1/K| that counts as converged."""
COARSE_TOLERANCE = 0.05
"""The same, before the smoothing is lowered further."""
COOLING = 0.4
"""Smoothing of an annealing step over that of the step before it."""

NEWTON_CODEWORDS = 2048
"""Largest codebook whose K × K curvature is formed: on product vectors 20 Newton steps do what 1,000 Sinkhorn
iterations do not. Above it, an n·K² product and a K³ solution a step cost more than they save."""
COARSE_ROWS_PER_CODEWORD = 32
"""Rows that annealing looks at, evenly spaced: where they lead, all rows are a few steps from their own solution. 128
make most passes over few rows passes over all: a sixth more time for the potentials of `uniform`."""
FIRST_DAMPING = 0.1
"""Of a Newton step, in shares of 1/K: far from the solution, codewords that few rows reach would be led astray."""
MOST_DAMPING = 1e6
"""Steps are those of a gradient by then, and short."""
SINKHORN_STEPS_PER_NEWTON_STEP = 12
RELAXATION = 1.8
"""Length of a Sinkhorn step, 1 being its own; halves their number (Lehmann et al. 2021), 2 diverges."""
BLOCK_ENTRIES = 1 << 18
"""Entries of the cost matrix handled at a time, so that the temporaries stay in the processor's cache."""
DEVICE_BLOCK_ENTRIES = 1 << 26
"""The same on a CUDA device."""
AT_A_TIME = 4
"""Arrays of a block's size that a pass over it holds there."""
DEVICE_ENTRIES = 1 << 21
"""Smallest cost matrix whose passes are worth a device: those of most prefixes are smaller, and there are many."""
MOST_SHARPNESS = float(np.finfo(np.float32).max)
"""Largest inverse of a smoothing that costs in float32 can be multiplied by."""
LEAST_LOGIT = -41.0
"""Shares of a row below e^−41, which change no sum, are taken for that: their products would be subnormal numbers,
which some processors multiply a hundred times as slowly."""


Share = float | NDArray[np.float64]
"""One share of all rows for every codeword, or (K,) of them."""


@dataclass(frozen=True)
class Shares:
    """The least and the most of all rows that a codeword may have: equal numbers ask for just that share."""

    least: Share
    most: Share

    def targets(self, values: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the (K,) shares that the optimum has: a bound where a potential presses, else what is within them."""
        pressed = np.where(values < 0, self.most, self.least)
        return np.where(values == 0, np.clip(shares, self.least, self.most), pressed)

    def clip(
        self, values: NDArray[np.float64], moved: NDArray[np.float64], shares: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return moved potentials of which none presses to the side whose bound is slack."""
        if np.array_equal(self.least, self.most):
            return moved - moved.mean()  # A common constant changes nothing but would grow.
        below = (values < 0) | ((values == 0) & (shares > self.most))
        above = (values > 0) | ((values == 0) & (shares < self.least))
        return np.where(below, np.minimum(moved, 0), np.where(above, np.maximum(moved, 0), 0))


@dataclass(frozen=True)
class Potentials:
    """The dual solution of bounded transport, and the evidence of how good it is.

    Args:
        values: (K,) float32, in the units of the costs. Code = argmin(cost − value). Of mean zero where all loads are
            to be equal; else negative where the upper bound presses, positive where the lower does, mostly zero.
        epsilon: the smoothing they were found at, in the units of the costs.
        iterations: passes over the costs, all annealing steps together.
        marginal_error: Σ_k |share of codeword k under the smoothed plan − its target|, the target being the bound that
            presses, or the share itself within the bounds; the rows' marginals are exact.
        converged: marginal_error ≤ 1e-4.
        load_min: hard-assigned rows of the least used codeword over n/K; 1 is balance.
        load_max: the same of the most used.
    """

    values: NDArray[np.float32]
    epsilon: float
    iterations: int
    marginal_error: float
    converged: bool
    load_min: float
    load_max: float


def fit_potentials(
    costs: NDArray[np.floating],
    *,
    epsilon: float,
    max_iterations: int,
    start: NDArray[np.float32] | None = None,
    bounds: Shares | None = None,
    tolerance: float = TOLERANCE,
) -> Potentials:
    """Find per-codeword potentials that make every codeword equally used, or keep its share within bounds.

    Solves entropic optimal transport with fixed or bounded column marginals in log space (Cuturi 2013, eq. 2;
    ε-annealing as in Peyré and Cuturi 2019, section 4.1; bounds by clipping as for the unbalanced problem of Chizat
    et al. 2018, table 1), keeping only the K column potentials: the row potentials are a soft minimum that is
    recomputed. The dual is concave in them; it is climbed by Newton steps with Levenberg's damping (curvature as in
    Brauer et al. 2017, eq. 9; damping by how much of its promise a step keeps, as Nielsen 1999 does) on the potentials
    that are free to move, or by relaxed Sinkhorn steps where K is large.
    Subtract the values from any later costs to assign new rows without solving again.

    Args:
        costs: (n, K) float16, float32 or float64 squared distances, in squared units of the vectors.
        epsilon: smoothing, in the units of costs. Large: the plan blurs over all codewords and hard loads
            stay unequal. Small: exact, but slower; too small ends with converged=False.
        max_iterations: upper bound for each annealing step; an iteration is O(nK) time and O(K) memory beside the
            costs, O(nK²) and O(K²) where Newton steps are taken.
        start: (K,) potentials to begin from, for costs close to those they were fitted on; annealing then
            begins nearer to epsilon. None, or a start that leads nowhere, begins from zeros.
        bounds: None asks for 1/K of the rows for every codeword.
        tolerance: marginal error at which to stop. Larger ends sooner, for potentials that are fitted again.

    Raises:
        ShapeError: costs is not 2-D, has fewer rows than 1 or fewer columns than 2, or holds a non-finite entry.
    """
    if costs.ndim != 2 or costs.shape[0] < 1 or costs.shape[1] < 2:
        raise ShapeError(f"expected costs of shape (n ≥ 1, K ≥ 2), got {costs.shape}")
    if not np.isfinite(costs).all():
        raise ShapeError("expected finite costs, got NaN or infinite entries")
    costs = np.require(costs, np.float32, ["C", "A", "W"])  # PyTorch warns of others, or refuses them.
    bounds = bounds or Shares(1 / costs.shape[1], 1 / costs.shape[1])
    climb = partial(_climb_by_newton if costs.shape[1] <= NEWTON_CODEWORDS else _climb_by_sinkhorn, bounds)
    anneal = partial(_anneal, climb, _as_tensor(costs), standard_deviation(costs), epsilon, tolerance, max_iterations)
    values, iterations, marginal_error = anneal(start)
    if start is not None and marginal_error > tolerance:
        # Potentials of costs that have changed too much lead nowhere; the way from zero is longer and safe.
        values, more, marginal_error = anneal(None)
        iterations += more
    frozen = values.astype(np.float32)
    load_min, load_max = _hard_loads(costs, frozen)
    converged = marginal_error <= TOLERANCE
    return Potentials(frozen, epsilon, iterations, marginal_error, converged, load_min, load_max)


Climb = Callable[["torch.Tensor", NDArray[np.float64], float, float, int], tuple[NDArray[np.float64], int, float]]
"""Takes costs, potentials, smoothing, tolerance and the most passes; returns better potentials, passes and error."""


def _as_tensor(costs: NDArray[np.float32]) -> torch.Tensor:
    """Return the costs where passes over them are fastest: large ones on a CUDA device, if there is one."""
    # PyTorch takes half of NumPy's time for a pass. Imported here: most of the package does without.
    import torch

    device = accelerator() if costs.size >= DEVICE_ENTRIES else None
    free = device_free_bytes() if device is not None else None
    if device is None or (free is not None and costs.nbytes + AT_A_TIME * 4 * DEVICE_BLOCK_ENTRIES > free):
        return torch.from_numpy(costs)
    return upload(costs, device)


def _anneal(
    climb: Climb,
    costs: torch.Tensor,
    spread: float,
    epsilon: float,
    tolerance: float,
    max_iterations: int,
    start: NDArray[np.float32] | None,
) -> tuple[NDArray[np.float64], int, float]:
    """Return potentials at a smoothing that is lowered to epsilon, the passes over the costs, and the error."""
    values = np.zeros(costs.shape[1]) if start is None else start.astype(np.float64)
    coarse = costs[:: max(1, len(costs) // (COARSE_ROWS_PER_CODEWORD * costs.shape[1]))]
    smoothing = max((0.3 if start is None else 0.02) * spread, epsilon)
    iterations = 0
    while smoothing > epsilon:
        values, steps, _ = climb(coarse, values, smoothing, COARSE_TOLERANCE, max_iterations)
        iterations += steps
        smoothing = max(smoothing * COOLING, epsilon)
    if len(coarse) < len(costs):
        values, steps, _ = climb(coarse, values, epsilon, COARSE_TOLERANCE, max_iterations)
        iterations += steps
    values, steps, marginal_error = climb(costs, values, epsilon, tolerance, max_iterations)
    return values, iterations + steps, marginal_error


def standard_deviation(costs: NDArray[np.float32]) -> float:
    """Return the standard deviation of all entries, without a copy of them in a wider type."""
    mean = np.float32(costs.mean(dtype=np.float64))
    # Squares of costs leave the range of float32 where the costs themselves do not.
    scale = max(costs.max() - mean, mean - costs.min()) or np.float32(1)
    squares = sum(float(np.square((block - mean) / scale).sum(dtype=np.float64)) for block in _blocks(costs))
    return float(scale) * math.sqrt(squares / costs.size)


def _climb_by_newton(
    bounds: Shares,
    costs: torch.Tensor,
    values: NDArray[np.float64],
    epsilon: float,
    tolerance: float,
    max_iterations: int,
) -> tuple[NDArray[np.float64], int, float]:
    """Return better potentials, the passes over the costs that they took, and their marginal error."""
    codewords = costs.shape[1]
    damping, growth = FIRST_DAMPING, 4.0
    here = _dual(costs, values, epsilon, bounds, curvature=True)
    for passes in range(1, max_iterations + 1):
        if here.marginal_error <= tolerance:
            return values, passes, here.marginal_error
        assert here.overlaps is not None
        slope = bounds.targets(values, here.shares) - here.shares
        # What is slack and within its bounds stays where it is: at zero.
        free = np.flatnonzero((values != 0) | (slope != 0))
        curvature = np.diag(here.shares[free]) - here.overlaps[np.ix_(free, free)]
        damped = curvature + np.diag(np.full(len(free), damping / codewords))
        moved = values.copy()
        moved[free] += np.linalg.solve(damped, epsilon * slope[free])
        moved = bounds.clip(values, moved, here.shares)
        there = _dual(costs, moved, epsilon, bounds, curvature=True)
        # Near the top the objective moves less than float32 logits resolve; the error still tells.
        if there.objective > here.objective or there.marginal_error < 0.9 * here.marginal_error:
            step = (moved - values)[free]
            promised = slope[free] @ step - step @ curvature @ step / (2 * epsilon)
            kept = (there.objective - here.objective) / promised if promised > 0 else 1.0
            damping = max(damping * max(0.2, 1 - (2 * min(max(kept, 0.0), 1.0) - 1) ** 3), 1e-9)
            values, here, growth = moved, there, 4.0
        else:
            damping, growth = min(growth * damping, MOST_DAMPING), 2 * growth
    return values, max_iterations, here.marginal_error


def _climb_by_sinkhorn(
    bounds: Shares,
    costs: torch.Tensor,
    values: NDArray[np.float64],
    epsilon: float,
    tolerance: float,
    max_iterations: int,
) -> tuple[NDArray[np.float64], int, float]:
    """As `_climb_by_newton`, in more and cheaper steps."""
    error = np.inf
    passes = 0
    while passes < SINKHORN_STEPS_PER_NEWTON_STEP * max_iterations:
        here = _dual(costs, values, epsilon, bounds, curvature=False)
        passes, error = passes + 1, here.marginal_error
        if error <= tolerance:
            break
        # A codeword that no row reaches has share 0; the floor lets it come closer a bounded step at a time.
        tiny = float(np.finfo(np.float32).tiny)
        targets = np.maximum(bounds.targets(values, here.shares), tiny)
        moved = values - RELAXATION * epsilon * np.log(np.maximum(here.shares, tiny) / targets)
        values = bounds.clip(values, moved, here.shares)
    return values, passes, error


@dataclass(frozen=True)
class _Dual:
    """The dual objective at some potentials, its slope as (K,) shares, and (K, K) overlaps for its curvature."""

    objective: float
    shares: NDArray[np.float64]
    overlaps: NDArray[np.float64] | None
    marginal_error: float


def _dual(
    costs: torch.Tensor, values: NDArray[np.float64], epsilon: float, bounds: Shares, *, curvature: bool
) -> _Dual:
    codewords = costs.shape[1]
    # float64 sums: a share is compared with 1/K to four digits.
    shares = np.zeros(codewords)
    overlaps = np.zeros((codewords, codewords) if curvature else (0, 0))
    soft_minima = 0.0
    scaled = (values / epsilon).astype(np.float32)
    block_rows = max(1, (DEVICE_BLOCK_ENTRIES if costs.is_cuda else BLOCK_ENTRIES) // codewords)
    for soft_minimum, sums, products in in_order(
        lambda block: _sums_of_plan(block, scaled, epsilon, curvature=curvature), costs.split(block_rows)
    ):
        soft_minima += soft_minimum
        shares += sums
        if products is not None:
            overlaps += products
    rows = len(costs)
    shares /= rows
    pressure = float((np.where(values < 0, bounds.most, bounds.least) * values).sum())
    error = float(np.abs(shares - bounds.targets(values, shares)).sum())
    return _Dual(epsilon * soft_minima / rows + pressure, shares, overlaps / rows if curvature else None, error)


def _sums_of_plan(
    costs: torch.Tensor, scaled: NDArray[np.float32], epsilon: float, *, curvature: bool
) -> tuple[float, NDArray[np.float32], NDArray[np.float32] | None]:
    """Return the rows' soft minima, summed, the (K,) sums of their plan's columns, and the columns' products."""
    import torch

    plan = torch.sub(torch.from_numpy(scaled).to(costs.device), costs, alpha=min(1 / epsilon, MOST_SHARPNESS))
    peaks = plan.amax(dim=1, keepdim=True)
    plan.sub_(peaks).clamp_(min=LEAST_LOGIT).exp_()
    sums = plan.sum(dim=1, keepdim=True)
    plan.mul_(sums.reciprocal())
    soft_minimum = -float(peaks.add_(sums.log_()).sum(dtype=torch.float64))
    if costs.is_cuda:
        products = (plan.T @ plan).cpu().numpy() if curvature else None
        return soft_minimum, plan.sum(dim=0).cpu().numpy(), products
    # By NumPy: its BLAS sees that this product is symmetric, and adds columns several times faster than either.
    shares = plan.numpy()
    return soft_minimum, np.ones(len(shares), np.float32) @ shares, shares.T @ shares if curvature else None


def _hard_loads(costs: NDArray[np.float32], values: NDArray[np.float32]) -> tuple[float, float]:
    loads = np.zeros(costs.shape[1], dtype=np.int64)
    for block in _blocks(costs):
        loads += np.bincount((block - values).argmin(axis=1), minlength=costs.shape[1])
    scale = costs.shape[1] / len(costs)
    return float(loads.min() * scale), float(loads.max() * scale)


def _blocks(costs: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    rows = max(1, BLOCK_ENTRIES // costs.shape[1])
    return [costs[start : start + rows] for start in range(0, len(costs), rows)]
