"""Training steps of the mapping capacity, for every quantizer: codebooks and prices within bounds, and exact codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semids.arrays import Vectors, capacity_of
from semids.capacity import Bounds
from semids.prefixes import Take, assign_within_bounds, refit_jointly
from semids.quantizers.base import StepOutcome, Tensors
from semids.residual import PriceTable

ROUNDS = 12
"""Re-fits of the codebooks under the bounded assignment: on real product vectors, 2 leave 0.7 % of error over 24 of
them, 12 leave 0.1 to 0.2 %."""


def fit_within_bounds(
    vectors: Vectors,
    codebooks: Sequence[NDArray[np.float32]],
    bounds: Bounds,
    *,
    contents: int,
    done: Callable[[int, int], None],
) -> StepOutcome:
    """Alternate between assigning rows within bounds and re-fitting all codebooks to that, and find the prices.

    Args:
        vectors: (n, d) training rows.
        codebooks: those of the nearest mapping.
        contents: D, which the rows stand for.
        done: called with the rounds finished and their number.

    Returns:
        `codebook_l`, `potentials_l` (zeros), `price_prefixes_l` and `prices_l` for every level l from 1.
    """
    rows = len(vectors)
    books = tuple(codebooks)

    def take(some: NDArray[np.int64]) -> NDArray[Any]:
        return vectors[some]

    prices: tuple[PriceTable, ...] | None = None
    for finished in range(ROUNDS):
        found = assign_within_bounds(take, books, bounds, rows=rows, contents=contents, start=prices, priced=False)
        books, prices = refit_jointly(take, found.codes, books), found.prices
        done(finished + 1, ROUNDS + 1)
    last = assign_within_bounds(take, books, bounds, rows=rows, contents=contents, start=prices)
    done(ROUNDS + 1, ROUNDS + 1)
    tensors: Tensors = {}
    for level, (codebook, table) in enumerate(zip(books, last.prices, strict=True), start=1):
        tensors[f"codebook_{level}"] = codebook
        tensors[f"potentials_{level}"] = np.zeros(len(codebook), np.float32)
        tensors[f"price_prefixes_{level}"] = table.prefixes
        tensors[f"prices_{level}"] = table.values
    evidence = {
        "rows": rows,
        "least_contents_per_id": bounds.least,
        "most_contents_per_id": bounds.most,
        "priced_prefixes": [len(table.prefixes) for table in last.prices],
        "converged": last.converged,
    }
    return StepOutcome(tensors, evidence)


def assign_contents(
    take: Take, bounded: Tensors, bounds: Bounds, *, contents: int, done: Callable[[int, int], None]
) -> StepOutcome:
    """Give every content its codes within bounds, by the codebooks and prices of `fit_within_bounds`.

    Returns:
        `codes` (D, L), in the smallest unsigned type.
    """
    levels = range(1, len([name for name in bounded if name.startswith("codebook_")]) + 1)
    books = [bounded[f"codebook_{level}"] for level in levels]
    found = assign_within_bounds(
        take, books, bounds, rows=contents, contents=contents, start=read_prices(bounded), done=done
    )
    loads = np.unique(found.codes, axis=0, return_counts=True)[1]
    sizes = [len(book) for book in books]
    evidence = {
        "largest_load": int(loads.max()),
        "ids_used": len(loads),
        "capacity": capacity_of(sizes),
        # The last level has no prices: an ID goes to whom rounding gives it.
        "share_moved_by_level": [round(moved / contents, 6) for moved in found.moved],
        "converged": found.converged,
    }
    return StepOutcome({"codes": found.codes}, evidence)


def read_prices(tensors: Tensors) -> tuple[PriceTable, ...]:
    """Return the tables of prices among a model's tensors, one a level, or none."""
    levels = len([name for name in tensors if name.startswith("prices_")])
    return tuple(
        PriceTable(tensors[f"price_prefixes_{level}"], tensors[f"prices_{level}"]) for level in range(1, levels + 1)
    )
