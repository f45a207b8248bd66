"""The training steps of the mapping capacity, for every quantizer: codebooks, prices and exact codes within bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semids.arrays import Codes, widen
from semids.balance import Shares, fit_potentials, standard_deviation
from semids.blocks import KeptBlocks, Take, count_blocks, read_costs
from semids.capacity import COST_BYTES, MAX_ITERATIONS, RELATIVE_EPSILON, Bounds
from semids.kmeans import sample_rows, training_budget
from semids.prefixes import assign_level, assign_within_bounds, nearest_quantizer
from semids.progress import Progress
from semids.quantizers._codebooks import read_prices, start_codebook
from semids.quantizers._work import bounded_work, placed_work, settled_work
from semids.quantizers.base import StepOutcome, Tensors, TrainingData, TrainingStep
from semids.refits import refit_jointly, refit_last
from semids.residual import PriceTable, prefix_numbers
from semids.shards import EVERY

ROUNDS = 12
"""Re-fits of all codebooks under the bounded assignment: on real product vectors, 2 leave 0.7 % of error over 24 of
them, 12 leave 0.1 to 0.2 %."""
COARSE_ROUNDS = 10
"""How many of these see a part of the rows alone: 0.4 % of error for half of the time, on generated vectors."""
COARSE = 8
"""All rows over those of that part."""
COARSE_ROWS = 16_384
"""Rows of a part at least: of a small sample, all."""
LAST_ROUNDS = 6
"""Re-fits of the last codebook to whole prefixes: 4 leave 0.05 % of error over 12."""
COARSE_LAST_ROUNDS = 4
"""How many of these see a part of the prefixes alone: 0.03 % of error, on generated vectors."""
LAST_COARSE = 4
"""All prefixes over those of that part."""
FEWEST_PREFIXES = 256
"""All prefixes where that part would have fewer: the last codebook would be theirs alone."""
LAST_TOLERANCE = 0.01
"""Marginal error of the last level's potentials: contents that come later differ from these by more."""


def bounded_steps(
    sizes: Sequence[int], bounds: Bounds, *, seed: int, codebooks: Sequence[str], weighted: bool = False
) -> list[TrainingStep]:
    """Return the steps that take the nearest mapping's codebooks to codes within bounds.

    All codebooks are re-fitted to a sample of rows. Every content is placed, level by level, within its bounds; above
    the last level, a sample knows the bounds scaled to its size, but of the few rows under one ID it has at most one.
    So the last codebook is fitted again, to whole prefixes, before the last level is placed.

    Args:
        codebooks: the names of the steps whose codebooks are the start, one a level, or the one that has all.
        weighted: contents weigh in the codebooks as many items have them; in the bounds each counts once.
    """
    fitted = {"seed": seed, "weighted": weighted}
    common = {"least": bounds.least, "most": bounds.most}
    steps = [
        TrainingStep(
            name="bounded",
            title="Fit the codebooks within bounds",
            parameters={**common, **fitted, "sizes": list(sizes)},
            run=_fit_codebooks,
            work=partial(
                bounded_work, sizes, bounds, rounds=ROUNDS, coarse=COARSE_ROUNDS, part=COARSE, least=COARSE_ROWS
            ),
            needs=tuple(codebooks),
            weighted=weighted,
        )
    ]
    for level in range(1, len(sizes) + 1):
        placed = tuple(f"placed-{above}" for above in range(1, level))
        if level == len(sizes) > 1:
            steps.append(
                TrainingStep(
                    name="settled",
                    title="Fit the last codebook to whole prefixes",
                    parameters={**common, **fitted},
                    run=_fit_last_codebook,
                    work=partial(
                        settled_work,
                        sizes,
                        bounds,
                        rounds=LAST_ROUNDS,
                        coarse=COARSE_LAST_ROUNDS,
                        part=LAST_COARSE,
                        least=COARSE_ROWS,
                    ),
                    needs=("bounded", *placed),
                    weighted=weighted,
                )
            )
        steps.append(
            TrainingStep(
                name=f"placed-{level}",
                title=f"Place every content on level {level}",
                parameters={**common, "seed": seed},
                run=_place_level,
                work=partial(placed_work, level - 1, sizes, bounds),
                lots=partial(count_blocks, size=sizes[level - 1]) if level > 1 else None,
                needs=(*(("bounded", "settled") if level == len(sizes) > 1 else ("bounded",)), *placed),
            )
        )
    return steps


def bounded_codes(outcomes: Mapping[str, Tensors]) -> Codes:
    """Return the (D, L) codes that the steps gave every content."""
    levels = len([name for name in outcomes if name.startswith("placed-")])
    return np.stack([outcomes[f"placed-{level}"]["codes"] for level in range(1, levels + 1)], axis=1)


def bounded_tensors(outcomes: Mapping[str, Tensors]) -> Tensors:
    """Return `codebook_l`, `potentials_l` (zeros but for the last), `price_prefixes_l`, `prices_l` for l from 1."""
    tensors: Tensors = {}
    for level, codebook in enumerate(_codebooks(outcomes), start=1):
        tensors[f"codebook_{level}"] = codebook
        for part in ("potentials", "price_prefixes", "prices"):
            tensors[f"{part}_{level}"] = outcomes[f"placed-{level}"][part]
    return tensors


def _fit_codebooks(
    quantizer: Any, step: TrainingStep, data: TrainingData, needed: Mapping[str, Tensors], progress: Progress
) -> StepOutcome:
    """Alternate between assigning a sample of rows within bounds and re-fitting all codebooks to that."""
    seed, size = step.parameters["seed"], max(step.parameters["sizes"])
    budget = training_budget(size, data.vectors.layout.columns)
    drawn = sample_rows(len(data.rows), budget, seed=seed)
    sample, weights = _take_float32(data, drawn), _weights(data, drawn)
    few = sample_rows(len(sample), max(COARSE_ROWS, budget // COARSE), seed=seed)
    coarse = sample[few] if len(few) < len(sample) else sample
    few_weights = weights[few] if weights is not None else None
    bounds, contents = _bounds(step), data.vectors.layout.rows
    levels = range(1, len(step.parameters["sizes"]) + 1)
    starts = [needed[step.needs[0 if len(step.needs) == 1 else level - 1]] for level in levels]
    books = tuple(start_codebook(tensors, level) for level, tensors in zip(levels, starts, strict=True))
    prices: tuple[PriceTable, ...] | None = None
    # As many codewords as rows fit them exactly by least squares, as sums that greedy encoding does not find again.
    determined = sum(step.parameters["sizes"]) < len(sample)
    rounds = ROUNDS if determined else 1
    for finished in range(rounds):
        is_coarse = determined and finished < COARSE_ROUNDS
        vectors = coarse if is_coarse else sample
        take = _taker(vectors)
        found = assign_within_bounds(
            take, books, bounds, rows=len(vectors), contents=contents, start=prices, priced=False
        )
        prices = found.prices
        if determined:
            books = refit_jointly(take, found.codes, books, weights=few_weights if is_coarse else weights)
        progress(step.title, finished + 1, rounds, "rounds")
    tensors: Tensors = {}
    for level, (codebook, table) in enumerate(zip(books, prices or (), strict=True), start=1):
        tensors[f"codebook_{level}"] = codebook
        tensors[f"price_prefixes_{level}"] = table.prefixes
        tensors[f"prices_{level}"] = table.values
    return StepOutcome(tensors, {"rows": len(sample), **step.parameters})


def _place_level(
    quantizer: Any, step: TrainingStep, data: TrainingData, needed: Mapping[str, Tensors], progress: Progress
) -> StepOutcome:
    """Give every content its code on a level within bounds, and find the prices that give later ones theirs."""
    books = _codebooks(needed)
    before = _codes_above(needed, data.vectors.layout.rows)
    level = before.shape[1]
    contents = len(before)
    found = assign_level(
        data.vectors.take,
        nearest_quantizer(books),
        before,
        _bounds(step),
        contents=contents,
        start=read_prices(needed["bounded"])[level],
        kept=KeptBlocks(data.folder, data.lot),
        done=lambda rows: progress(step.title, rows, contents, "contents"),
    )
    if data.lot != EVERY:
        return StepOutcome({})
    evidence = {
        "share_moved": round(found.moved / contents, 6),
        "priced_prefixes": len(found.prices.prefixes),
        "converged": found.converged,
    }
    potentials = np.zeros(len(books[level]), np.float32)
    if level == len(books) - 1 and found.moved:
        potentials = _fit_last_potentials(data, books, before, found.codes, seed=step.parameters["seed"])
    tensors = {"codes": found.codes, "price_prefixes": found.prices.prefixes, "prices": found.prices.values}
    return StepOutcome({**tensors, "potentials": potentials}, evidence)


def _fit_last_potentials(
    data: TrainingData, books: Sequence[NDArray[np.float32]], before: Codes, codes: Codes, *, seed: int
) -> NDArray[np.float32]:
    """Return what makes later rows use the codes of the last level as often as the contents do.

    Prices there would be a number for every ID, and an ID that is free now is taken later. What its places have in
    common, a number a codeword, still leads rows away from codes that most prefixes have none left of.
    """
    size = len(books[-1])
    # More rows than for prices: what a sample of 256 a codeword leaves of its own noise is 2.5 % of the loads.
    rows = sample_rows(len(codes), COST_BYTES // (4 * size), seed=seed)
    costs = read_costs(data.vectors.take, nearest_quantizer(books), before, rows)
    costs -= costs.mean(axis=1, keepdims=True)
    # A code that no content has is left all but unused: a share of nothing would have no price.
    shares = np.maximum(np.bincount(codes, minlength=size), 0.01 * len(codes) / size)
    shares /= shares.sum()
    epsilon = RELATIVE_EPSILON * standard_deviation(costs) or 1.0
    return fit_potentials(
        costs,
        epsilon=epsilon,
        max_iterations=MAX_ITERATIONS,
        bounds=Shares(shares, shares),
        tolerance=LAST_TOLERANCE,
    ).values


def _fit_last_codebook(
    quantizer: Any, step: TrainingStep, data: TrainingData, needed: Mapping[str, Tensors], progress: Progress
) -> StepOutcome:
    """Alternate between assigning the rows of whole prefixes to the last level and moving its codewords to them."""
    bounds, contents = _bounds(step), data.vectors.layout.rows
    books = _codebooks(needed)
    above = _codes_above(needed, contents)[data.rows]
    sizes = [len(book) for book in books]
    budget = training_budget(sizes[-1], data.vectors.layout.columns)
    prefixes = prefix_numbers(above, sizes)
    chosen = _whole_prefixes(prefixes, budget, seed=step.parameters["seed"])
    part = _part_of_prefixes(prefixes[chosen], seed=step.parameters["seed"])
    take = _taker(_take_float32(data, chosen[part]))
    for finished in range(LAST_ROUNDS):
        if finished == COARSE_LAST_ROUNDS and part is not EVERY:
            part = EVERY
            take = _taker(_take_float32(data, chosen))
        seen, weights = above[chosen[part]], _weights(data, chosen[part])
        # The training rows of a prefix are all there, so that the bounds of an ID hold for them as they are.
        found = assign_level(take, nearest_quantizer(books), seen, bounds, contents=len(seen), priced=False)
        books = refit_last(take, np.column_stack([seen, found.codes]), books, weights=weights)
        progress(step.title, finished + 1, LAST_ROUNDS, "rounds")
    return StepOutcome({"codebook": books[-1]}, {"rows": len(chosen)})


def _part_of_prefixes(prefixes: NDArray[np.int64], *, seed: int) -> NDArray[np.int64] | slice:
    """Return the rows of the part of the prefixes that the coarse rounds see."""
    part = _whole_prefixes(prefixes, max(COARSE_ROWS, len(prefixes) // LAST_COARSE), seed=seed)
    return part if len(np.unique(prefixes[part])) >= FEWEST_PREFIXES else EVERY


def _whole_prefixes(prefixes: NDArray[np.int64], budget: int, *, seed: int) -> NDArray[np.int64]:
    """Return the rows, ascending, of prefixes drawn one by one until their rows are `budget`; one prefix at least."""
    each, counts = np.unique(prefixes, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(each))
    drawn = max(1, int(np.searchsorted(np.cumsum(counts[order]), budget, side="right")))
    return np.flatnonzero(np.isin(prefixes, each[order[:drawn]]))


def _take_float32(data: TrainingData, places: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return training rows by their places among them, converted once instead of in every round."""
    vectors = data.vectors.take(data.rows[places])
    return widen(vectors, out=np.empty(vectors.shape, np.float32))


def _weights(data: TrainingData, places: NDArray[np.int64]) -> NDArray[np.float32] | None:
    return data.weights[places] if data.weights is not None else None


def _taker(vectors: NDArray[np.float32]) -> Take:
    def take(rows: NDArray[np.int64]) -> NDArray[np.float32]:
        # Rows of many prefixes are neighbours once they are in ascending order: a slice of them needs no copy.
        first, last = int(rows[0]), int(rows[-1]) + 1
        is_run = last - first == len(rows) and bool((np.diff(rows) == 1).all())
        return vectors[first:last] if is_run else vectors[rows]

    return take


def _bounds(step: TrainingStep) -> Bounds:
    return Bounds(step.parameters["least"], step.parameters["most"])


def _codebooks(outcomes: Mapping[str, Tensors]) -> tuple[NDArray[np.float32], ...]:
    fitted = outcomes["bounded"]
    books = [fitted[f"codebook_{level}"] for level in range(1, len(fitted) // 3 + 1)]
    return (*books[:-1], outcomes["settled"]["codebook"]) if "settled" in outcomes else tuple(books)


def _codes_above(needed: Mapping[str, Tensors], contents: int) -> Codes:
    placed = any(name.startswith("placed-") for name in needed)
    return bounded_codes(needed) if placed else np.zeros((contents, 0), np.uint8)
