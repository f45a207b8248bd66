"""Potentials: one number a codeword that makes every codeword of a level equally used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semids.errors import ShapeError

TOLERANCE = 1e-4
"""Largest sum of |share of a codeword − 1/K| that counts as converged."""

ANNEALING_STEPS = 16
ITERATIONS_PER_STEP = 12
RELAXATION = 1.8
"""Length of the last steps, 1 being Sinkhorn's own; halves their number (Lehmann et al. 2021), 2 diverges."""
BLOCK_ENTRIES = 1 << 20
"""Entries of the cost matrix handled at a time, so that the temporaries stay in the processor's cache."""


@dataclass(frozen=True)
class Potentials:
    """The dual solution of uniform transport, and the evidence of how good it is.

    Args:
        values: (K,) float32, in the units of the costs, of mean zero. Code = argmin(cost − value).
        epsilon: the smoothing they were found at, in the units of the costs.
        iterations: Sinkhorn iterations done, all annealing steps together.
        marginal_error: Σ_k |share of codeword k under the smoothed plan − 1/K|; the rows' marginals are exact.
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
) -> Potentials:
    """Find per-codeword potentials that make every codeword equally used.

    Solves entropic optimal transport with uniform marginals in log space (Cuturi 2013, eq. 2; log domain
    and ε-annealing as in Peyré and Cuturi 2019, section 4.4), keeping only the K column potentials: the
    row potentials are a soft minimum that is recomputed. Subtract the values from any later costs to
    assign new rows without solving again.

    Args:
        costs: (n, K) float16, float32 or float64 squared distances, in squared units of the vectors.
        epsilon: smoothing, in the units of costs. Large: the plan blurs over all codewords and hard loads
            stay unequal. Small: exact, but slower; too small ends with converged=False.
        max_iterations: upper bound at the last epsilon; one iteration is O(nK) and O(K) memory.
        start: (K,) potentials to begin from, for costs close to those they were fitted on; annealing then
            begins nearer to epsilon. None begins from zeros.

    Raises:
        ShapeError: costs is not 2-D, has fewer rows than 1 or fewer columns than 2, or holds a non-finite entry.
    """
    if costs.ndim != 2 or costs.shape[0] < 1 or costs.shape[1] < 2:
        raise ShapeError(f"expected costs of shape (n ≥ 1, K ≥ 2), got {costs.shape}")
    if not np.isfinite(costs).all():
        raise ShapeError("expected finite costs, got NaN or infinite entries")
    costs = costs.astype(np.float32, copy=False)
    codewords = costs.shape[1]
    values = np.zeros(codewords) if start is None else start.astype(np.float64)
    iterations = 0
    spread = float(costs.std(dtype=np.float64))
    first = max(0.3 * spread if start is None else 0.01 * spread, epsilon)
    for smoothing in np.geomspace(first, epsilon, ANNEALING_STEPS)[:-1]:
        for _ in range(ITERATIONS_PER_STEP):
            values += _step(costs, values, float(smoothing))[0]
            iterations += 1
    marginal_error = np.inf
    for _ in range(max_iterations):
        step, marginal_error = _step(costs, values, epsilon)
        if marginal_error <= TOLERANCE:
            break
        values += RELAXATION * step
        iterations += 1
    values -= values.mean()
    frozen = values.astype(np.float32)
    load_min, load_max = _hard_loads(costs, frozen)
    converged = bool(marginal_error <= TOLERANCE)
    return Potentials(frozen, epsilon, iterations, float(marginal_error), converged, load_min, load_max)


def _step(costs: NDArray[np.float32], values: NDArray[np.float64], epsilon: float) -> tuple[NDArray[np.float64], float]:
    codewords = costs.shape[1]
    # float64 sums: a share is compared with 1/K to four digits.
    shares = np.zeros(codewords)
    scaled = (values / epsilon).astype(np.float32)
    inverse = np.float32(1 / epsilon)
    for block in _blocks(costs):
        logits = scaled - block * inverse
        logits -= logits.max(axis=1, keepdims=True)
        np.exp(logits, out=logits)
        weights = 1 / logits.sum(axis=1, dtype=np.float32)
        shares += weights @ logits
    shares /= len(costs)
    marginal_error = float(np.abs(shares - 1 / codewords).sum())
    # A codeword that no row reaches has share 0; the floor lets it come closer a bounded step at a time.
    floor = np.finfo(np.float32).tiny
    return -epsilon * np.log(np.maximum(shares, floor) * codewords), marginal_error


def _hard_loads(costs: NDArray[np.float32], values: NDArray[np.float32]) -> tuple[float, float]:
    loads = np.zeros(costs.shape[1], dtype=np.int64)
    for block in _blocks(costs):
        loads += np.bincount((block - values).argmin(axis=1), minlength=costs.shape[1])
    scale = costs.shape[1] / len(costs)
    return float(loads.min() * scale), float(loads.max() * scale)


def _blocks(costs: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    rows = max(1, BLOCK_ENTRIES // costs.shape[1])
    for start in range(0, len(costs), rows):
        yield costs[start : start + rows]
