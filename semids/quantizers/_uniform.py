"""The training steps of the mapping uniform, for every quantizer: codebooks and potentials of equal loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semids.balance import COARSE_TOLERANCE, TOLERANCE, Potentials, fit_potentials, standard_deviation
from semids.kmeans import sample_rows, training_budget
from semids.progress import Progress
from semids.quantizers._codebooks import start_codebook
from semids.quantizers._work import uniform_work
from semids.quantizers.base import StepOutcome, Tensors, TrainingData, TrainingStep
from semids.refits import refit_jointly
from semids.residual import ResidualCodebooks

REFIT_STEPS = 6
"""Lloyd steps under the uniform assignment: on real product vectors none costs 13 % of error, 4 leave 1.2 %
above the nearest mapping, 12 leave 0.7 %."""
COARSE_STEPS = 4
"""How many of these see a part of the rows alone."""
COARSE = 4
"""All rows over those of that part."""
RELATIVE_EPSILON = 0.01
"""Smoothing of the uniform mapping over the standard deviation of its costs."""
MAX_ITERATIONS = 60
COARSE_ROWS_PER_CODEWORD = 256
"""Rows that potentials are fitted on while the codebook still moves."""
COST_BYTES = 1 << 30
"""Largest cost matrix that potentials are fitted on; it bounds their sample at large codebooks."""


def uniform_steps(
    sizes: Sequence[int], *, seed: int, codebooks: Sequence[str], weighted: bool = False
) -> list[TrainingStep]:
    """Return a step a level that takes the nearest mapping's codebooks to ones of which all codewords are equally used.

    Args:
        weighted: contents weigh in the codebooks as many items have them; in the loads each counts once.
        codebooks: the names of the steps whose codebooks are the start, one a level, or the one that has all.
    """
    steps: list[TrainingStep] = []
    for level, size in enumerate(sizes, start=1):
        before = tuple(f"uniform-{number}" for number in range(1, level))
        start = codebooks[0 if len(codebooks) == 1 else level - 1]
        steps.append(
            TrainingStep(
                name=f"uniform-{level}",
                title=f"Balance level {level} ({size} codewords)",
                parameters={"size": size, "seed": seed, "weighted": weighted},
                run=_balance_level,
                work=partial(
                    uniform_work,
                    level,
                    sizes,
                    refits=REFIT_STEPS,
                    moves=REFIT_STEPS - COARSE_STEPS + COARSE_STEPS / COARSE,
                    coarse=COARSE_ROWS_PER_CODEWORD,
                    largest=COST_BYTES,
                ),
                needs=(*before, start),
                weighted=weighted,
            )
        )
    return steps


@dataclass(frozen=True)
class Sample:
    """What the levels before a level leave of some training rows.

    Args:
        residuals: (n, d) float32.
        weights: (n,) float32, how many items have each row, or None: one each.
    """

    residuals: NDArray[np.float32]
    weights: NDArray[np.float32] | None


def sample_residuals(data: TrainingData, levels: Sequence[Tensors], *, size: int, seed: int) -> Sample:
    """Return what the levels before a level leave of a sample of the training rows.

    Args:
        levels: the `codebook` and `potentials` of each level before.
        size: codewords of the level.
    """
    chosen = sample_rows(len(data.rows), training_budget(size, data.vectors.layout.columns), seed=seed)
    rows = data.vectors.take(data.rows[chosen])
    weights = data.weights[chosen] if data.weights is not None else None
    if not levels:
        return Sample(rows.astype(np.float32, copy=False), weights)
    before = ResidualCodebooks(
        tuple(level["codebook"] for level in levels), tuple(level["potentials"] for level in levels)
    )
    return Sample(before.residuals(rows), weights)


def _balance_level(
    quantizer: Any, step: TrainingStep, data: TrainingData, needed: Mapping[str, Tensors], progress: Progress
) -> StepOutcome:
    before, start = [needed[name] for name in step.needs[:-1]], step.needs[-1]
    sample = sample_residuals(data, before, size=step.parameters["size"], seed=step.parameters["seed"])
    codebook = start_codebook(needed[start], level=len(before) + 1)

    def done(fits: int) -> None:
        progress(step.title, fits, REFIT_STEPS + 1, "fits")

    return _balance(sample, codebook, seed=step.parameters["seed"], done=done)


def _balance(sample: Sample, codebook: NDArray[np.float32], *, seed: int, done: Callable[[int], None]) -> StepOutcome:
    """Move a codebook to the centroids of a balanced assignment, and find its potentials."""
    size, residuals = len(codebook), sample.residuals
    fitted_on = residuals[sample_rows(len(residuals), COST_BYTES // (4 * size), seed=seed)]
    coarse = fitted_on[:: -(-len(fitted_on) // (COARSE_ROWS_PER_CODEWORD * size))]
    potentials = _fit_uniform(coarse, codebook, start=None, tolerance=COARSE_TOLERANCE)
    for step in range(REFIT_STEPS):
        done(step + 1)
        part = slice(None, None, 1 if step >= COARSE_STEPS else COARSE)
        moved_to = residuals[part]
        weights = sample.weights[part] if sample.weights is not None else None
        codes = ResidualCodebooks((codebook,), (potentials.values,)).assign(moved_to)
        # Rows are asked for in runs: a slice of them needs no copy.
        (codebook,) = refit_jointly(
            lambda rows, of=moved_to: of[rows[0] : rows[-1] + 1], codes, (codebook,), weights=weights
        )
        last = step == REFIT_STEPS - 1
        potentials = _fit_uniform(
            fitted_on if last else coarse,
            codebook,
            start=potentials.values,
            tolerance=TOLERANCE if last else COARSE_TOLERANCE,
        )
    done(REFIT_STEPS + 1)
    evidence: dict[str, Any] = {
        "rows": len(residuals),
        "potentials_rows": len(fitted_on),
        "converged": potentials.converged,
        "marginal_error": potentials.marginal_error,
        "iterations": potentials.iterations,
        "epsilon": potentials.epsilon,
        "load_min": potentials.load_min,
        "load_max": potentials.load_max,
    }
    return StepOutcome({"codebook": codebook, "potentials": potentials.values}, evidence)


def _fit_uniform(
    residuals: NDArray[np.float32],
    codebook: NDArray[np.float32],
    *,
    start: NDArray[np.float32] | None,
    tolerance: float,
) -> Potentials:
    costs = residuals @ (-2 * codebook.T)
    costs += np.einsum("kd,kd->k", codebook, codebook)
    costs += np.einsum("nd,nd->n", residuals, residuals)[:, None]
    spread = standard_deviation(costs)
    # Constant costs (every residual zero) leave nothing to balance; any smoothing gives zero potentials.
    epsilon = RELATIVE_EPSILON * spread or 1.0
    return fit_potentials(costs, epsilon=epsilon, max_iterations=MAX_ITERATIONS, start=start, tolerance=tolerance)
