"""What the training and the use of residual codebooks ask of a machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from semids.arrays import capacity_of, code_dtype
from semids.balance import NEWTON_CODEWORDS, SINKHORN_STEPS_PER_NEWTON_STEP, fit_potentials, standard_deviation
from semids.blocks import BLOCK_BYTES, READ_ROWS
from semids.calibration import PROBE_ENTRIES, draw_rows, reading, taking
from semids.capacity import COST_BYTES, ROWS_PER_CHILD, Bounds, Loads, cheapest_children
from semids.kmeans import Lloyd, training_budget
from semids.parallel import AHEAD, thread_count
from semids.prefixes import assign_level, nearest_quantizer
from semids.quantizers._lloyd_work import lloyd_work
from semids.refits import DENSE_CODEWORDS, SUM_BYTES, refit_last
from semids.residual import CHUNK_ROWS, PART_ROWS, PRODUCT_BYTES, SCORE_BYTES
from semids.shards import SHARD_ROWS
from semids.work import Counts, Probe, Work

SMALL_CODEBOOK = 512
"""Largest codebook whose curvature a probe forms."""
EXPONENTIALS = 128
"""Multiplications that an entry of a cost matrix takes as long as, in a pass over it."""
PASSES, FEWER_PASSES = 8, 6
"""Passes over all costs until potentials converge, annealing on a part of them included: 5 to 17 at 256 codewords.
Fewer, 4 to 14 and 6 in the mean of rows, until they have about converged, or where annealing sees few of many rows."""
SLACK = 8
"""A bound so many times the mean load binds nowhere: the largest of nearest codewords' loads are 3 to 5 times it."""
ROUNDING_PASSES = 6
"""Times that the costs of a large prefix are looked at besides: nearest, by price, and by rounding."""
DIRECT_ENTRIES = 1 << 19
"""Largest cost matrix of a prefix that a probe assigns as it is; of a larger one, its parts are timed."""
KNOWN_BYTES = 80
"""Memory of a content whose codes are looked up: digests of the catalogue and of the model, and codes."""
EQUATION_ARRAYS = 8
"""Of codewords × dimensions in float64, while all codebooks are fitted at once."""
PAIR_BYTES = 32
"""Of a pair of codewords that occurs: its count in float64 and its place, and those before a block is added."""
THREAD_BYTES = 40_000_000
"""Freed memory that a thread which assigns prefixes keeps at hand."""
HEADER_BYTES = 160
"""Of a tensor in a file."""


def encoding(sizes: Sequence[int], dimensions: int, itemsize: int) -> Probe:
    """Rows encoded, times the codewords of all levels."""
    shrink = max(1.0, sum(sizes) * dimensions / PROBE_ENTRIES)
    smaller = [max(2, round(size / shrink)) for size in sizes]

    def prepare(folder: Path) -> tuple[Callable[[], Any], float]:
        rows = draw_rows(4096, dimensions, itemsize)
        drawn = draw_rows(sum(smaller), dimensions)
        quantizer = nearest_quantizer(np.split(drawn, np.cumsum(smaller)[:-1]))
        return lambda: quantizer.encode(rows), len(rows) * sum(smaller)

    return Probe(f"encode, {'x'.join(map(str, smaller))} × {dimensions} of {itemsize} bytes", prepare)


def measuring_errors(levels: int, dimensions: int, itemsize: int) -> Probe:
    """Rows whose errors are measured, or that are subtracted from, times levels."""

    def prepare(folder: Path) -> tuple[Callable[[], Any], float]:
        rows = draw_rows(4096, dimensions, itemsize)
        quantizer = nearest_quantizer([draw_rows(64, dimensions)] * levels)
        codes = np.random.default_rng(0).integers(0, 64, (len(rows), levels)).astype(np.uint8)
        return lambda: quantizer.squared_errors(rows, codes), len(rows) * levels

    return Probe(f"errors, {levels} × {dimensions} of {itemsize} bytes", prepare)


def passing(size: int) -> Probe:
    """Passes over a cost matrix while potentials are fitted, in entries × the time that one takes."""
    newton = size <= NEWTON_CODEWORDS
    codewords = min(size, SMALL_CODEBOOK) if newton else NEWTON_CODEWORDS + 1

    def prepare(folder: Path) -> tuple[Callable[[], Any], float]:
        rows = max(codewords, min(64 * codewords, (1 << 21) // codewords))
        costs = np.random.default_rng(0).standard_normal((rows, codewords), dtype=np.float32)
        epsilon = 0.3 * standard_deviation(costs)
        passes = 3 if newton else SINKHORN_STEPS_PER_NEWTON_STEP
        steps = 2 if newton else 1

        def run() -> None:
            fit_potentials(costs, epsilon=epsilon, max_iterations=steps, tolerance=0.0)

        return run, passes * rows * _entry_cost(codewords) * codewords

    return Probe(f"pass over costs of {codewords} codewords", prepare)


def _entry_cost(size: int) -> int:
    return EXPONENTIALS + (size if size <= NEWTON_CODEWORDS else 0)


def fit_work(rows: float, size: int, passes: float) -> Work:
    """Return the time of fitting potentials to a cost matrix, and the memory of the matrix and its check."""
    times = passes if size <= NEWTON_CODEWORDS else passes * SINKHORN_STEPS_PER_NEWTON_STEP
    return Work({passing(size): times * rows * size * _entry_cost(size)}, memory=round(5 * rows * size))


def refitting(dimensions: int) -> Probe:
    """Rows × levels that codebooks are fitted to by least squares."""

    def prepare(folder: Path) -> tuple[Callable[[], Any], float]:
        rows = draw_rows(8192, dimensions)
        books = [draw_rows(64, dimensions)] * 2
        codes = np.random.default_rng(0).integers(0, 64, (len(rows), 2)).astype(np.uint8)
        return lambda: refit_last(lambda some: rows[some], codes, books), 2 * len(rows)

    return Probe(f"re-fit, {dimensions} dimensions", prepare)


def looking(size: int) -> Probe:
    """Entries of a prefix's costs among which the cheapest child of a row is found."""
    codewords = min(size, SMALL_CODEBOOK)

    def prepare(folder: Path) -> tuple[Callable[[], Any], float]:
        rows = (1 << 21) // codewords
        costs = np.random.default_rng(0).standard_normal((rows, codewords), dtype=np.float32)
        prices = np.zeros(codewords, np.float32)
        return lambda: cheapest_children(lambda some: costs[some], rows, prices), costs.size

    return Probe(f"look at costs of {codewords} children", prepare)


def grouping(rows: int, size: int, loads: Loads, *, priced: bool) -> Probe:
    """Rows assigned to children within loads, in prefixes of so many rows on average and of unequal popularity."""
    groups = max(2, min(256, DIRECT_ENTRIES // (rows * size)))

    def prepare(folder: Path) -> tuple[Callable[[], Any], float]:
        # Exponentially distributed: what an exact assignment takes grows faster than rows.
        counts = np.clip(np.round(-rows * np.log(1 - (np.arange(groups) + 0.5) / groups)), 1, loads.most * size)
        prefixes = np.repeat(np.arange(groups), counts.astype(np.int64))
        vectors = draw_rows(len(prefixes), 16)
        quantizer = nearest_quantizer([draw_rows(count, 16) for count in (groups, size, *([2] if priced else []))])
        before = prefixes[:, None].astype(code_dtype((groups, size)))
        below = 2 if priced else 1
        bounds = Bounds(loads.least // below, -(-loads.most // below))
        contents = len(vectors)
        return lambda: assign_level(
            lambda some: vectors[some], quantizer, before, bounds, contents=contents, priced=priced
        ), contents

    return Probe(f"assign {rows} rows to {size} children, {loads.least} to {loads.most}, priced {priced}", prepare)


def codebook_bytes(sizes: Sequence[int], dimensions: int) -> int:
    """Return the size of codebooks and their potentials in a file."""
    return sum(4 * size * (dimensions + 1) + HEADER_BYTES for size in sizes)


def codebook_work(level: int, sizes: Sequence[int], counts: Counts, *, lloyd: Lloyd) -> Work:
    """Return the work of fitting the codebook of a level, from 1."""
    size, d = sizes[level - 1], counts.dimensions
    rows = sample_size(size, counts)
    sample, fit = _sample_work(level, rows, sizes, counts), lloyd_work(size, d, rows, lloyd)
    # What is read and subtracted from is left before starts are chosen.
    memory = max(sample.memory, 4 * rows * d + fit.memory)
    return replace(sample + fit, memory=memory, disk=codebook_bytes([size], d))


def uniform_work(
    level: int,
    sizes: Sequence[int],
    counts: Counts,
    *,
    budget: Callable[[int, int], int],
    coarse: Sequence[int],
    largest: int,
) -> Work:
    """Return the work of balancing a level, from 1.

    Args:
        budget: returns the rows that it is balanced on, if there are that many, of its codewords and dimensions.
        coarse: rows a codeword that each Lloyd step but the last sees.
        largest: bytes of the cost matrix at most.
    """
    size, d = sizes[level - 1], counts.dimensions
    rows = min(budget(size, d), counts.training)
    fitted = min(rows, largest // (4 * size))
    parts = [min(rows, some * size) for some in coarse]
    # The last of them has its potentials fitted once more; a part that potentials do not see whole is encoded besides.
    fits = [min(part, fitted) for part in (*parts, parts[-1])]
    encoded = rows + sum(part for part in (*parts, parts[-1]) if part > fitted)
    product = encoding([size], d, 4)
    # The sample, a part of it, and the costs of the rows that potentials are fitted to.
    copied = sum(some for some in {parts[-1], fitted} if some < rows)
    held = Work({product: (encoded + sum(fits) + fitted) * size}, memory=4 * (rows + copied) * d + 5 * fitted * size)
    return (
        _sample_work(level, rows, sizes, counts)
        + Work(fit_work(sum(fits), size, FEWER_PASSES).units)
        + fit_work(fitted, size, PASSES)
        + Work({refitting(d): sum(parts) + rows}, disk=codebook_bytes([size], d))
        + held
    )


def bounded_work(
    sizes: Sequence[int], bounds: Bounds, counts: Counts, *, rounds: int, coarse: int, part: int, least: int
) -> Work:
    """Return the work of fitting all codebooks within bounds.

    Args:
        rounds: re-fits of all codebooks, of which the first `coarse` see one of `part` rows, and `least` at least.
    """
    d, levels = counts.dimensions, len(sizes)
    budget = training_budget(max(sizes), d)
    rows = min(budget, counts.training)
    few = min(max(least, budget // part), rows)
    work = _held_work(rows, few, sizes, counts)
    for seen, times in ((few, coarse), (rows, rounds - coarse)):
        for level in range(levels):
            found = level_work(seen, level, sizes, bounds, counts, priced=False)
            work += Work({probe: times * amount for probe, amount in found.units.items()})
        work += Work({refitting(d): times * seen * levels})
    return work + Work(
        memory=work.memory + _fitting_bytes(rows, sizes, d),
        disk=codebook_bytes(sizes, d) + sum(_price_bytes(level, rows, sizes) for level in range(levels - 1)),
    )


def settled_work(
    sizes: Sequence[int], bounds: Bounds, counts: Counts, *, rounds: int, coarse: int, part: int, least: int
) -> Work:
    """Return the work of fitting the last codebook to whole prefixes; see `bounded_work`."""
    d, last = counts.dimensions, len(sizes) - 1
    rows = min(training_budget(sizes[last], d), counts.training)
    few = min(max(least, rows // part), rows)
    work = _held_work(rows, few, sizes, counts)
    for seen, times in ((few, coarse), (rows, rounds - coarse)):
        found = level_work(seen, last, sizes, bounds, counts, priced=False, whole=True)
        work += Work({probe: times * amount for probe, amount in found.units.items()})
        work += Work({refitting(d): times * seen * len(sizes)})
    return work + Work(
        memory=work.memory + _fitting_bytes(rows, sizes, d),
        disk=codebook_bytes([sizes[last]], d),
    )


def placed_work(level: int, sizes: Sequence[int], bounds: Bounds, counts: Counts) -> Work:
    """Return the work of placing every content on a level, from 0."""
    size, d, contents = sizes[level], counts.dimensions, counts.contents
    prices = _price_bytes(level, contents, sizes) if level < len(sizes) - 1 else 0
    costs = min(4 * contents * size, BLOCK_BYTES)
    # Prefixes, their order and starts, and codes; the vectors being read; and the costs.
    read = thread_count() * READ_ROWS * d * (counts.itemsize + 4 * CHUNK_ROWS // READ_ROWS)
    held = contents * (32 + level + 1) + read + costs + prices
    work = level_work(contents, level, sizes, bounds, counts, priced=True)
    work += Work(
        {reading(counts): counts.vector_bytes, taking(d, counts.itemsize): contents},
        memory=held + product_bytes(sizes, d),
        disk=contents * code_dtype(sizes).itemsize + 4 * size + prices + HEADER_BYTES,
    )
    if level == len(sizes) - 1:
        rows = min(contents, COST_BYTES // (4 * size))
        work += fit_work(rows, size, FEWER_PASSES) + Work({encoding([size], d, counts.itemsize): rows * size})
    return work


def level_work(
    rows: int, level: int, sizes: Sequence[int], bounds: Bounds, counts: Counts, *, priced: bool, whole: bool = False
) -> Work:
    """Return the work of assigning rows to a level, from 0, prefix by prefix, without reading them.

    Args:
        whole: the rows are all that their prefixes have.
    """
    size, ids = sizes[level], capacity_of(sizes[level + 1 :])
    prefixes = occupied(capacity_of(sizes[:level]), counts.contents if whole else rows)
    each = max(1, round((counts.contents if whole else rows) / prefixes))
    prefixes = rows / each
    loads = bounds.below(ids, rows, rows if whole else counts.contents).feasible(each, size)
    product = encoding([size], counts.dimensions, 4)
    last = level == len(sizes) - 1
    if each * size <= DIRECT_ENTRIES:
        return Work({product: rows * size, grouping(each, size, loads, priced=priced and not last): rows})
    fitted = min(each, ROWS_PER_CHILD * size, COST_BYTES // (4 * size))
    # Costs that do not fit are computed again whenever they are looked at.
    times = 1 if 4 * each * size <= BLOCK_BYTES else ROUNDING_PASSES
    if loads.least == 0 and loads.most * size >= SLACK * each:
        return Work({product: rows * size, looking(size): rows * size})
    fit = fit_work(fitted, size, PASSES)
    return Work({probe: prefixes * amount for probe, amount in fit.units.items()}, memory=fit.memory) + Work(
        {product: times * rows * size, looking(size): ROUNDING_PASSES * rows * size}
    )


def encoding_work(sizes: Sequence[int], counts: Counts, *, beam: int, known: bool) -> Work:
    """Return the work of giving every content its codes, or of looking them up where they are known."""
    d, levels = counts.dimensions, len(sizes)
    errors = Work({measuring_errors(levels, d, counts.itemsize): counts.contents * levels})
    if known:
        return errors + Work(memory=KNOWN_BYTES * counts.contents + product_bytes(sizes, d))
    slower = 1 if beam == 1 else 1 + beam / 12
    shard = min(counts.contents, SHARD_ROWS) * d * counts.itemsize
    rows = min(CHUNK_ROWS, max(1, SCORE_BYTES // (4 * sum(sizes) * beam)))
    memory = shard + product_bytes(sizes, d) + thread_count() * 4 * rows * (beam * sum(sizes) + d)
    return errors + Work({encoding(sizes, d, counts.itemsize): slower * counts.contents * sum(sizes)}, memory=memory)


def product_bytes(sizes: Sequence[int], dimensions: int) -> int:
    """Return the size of codebooks in memory, as they are and as encoding multiplies them, and of their products."""
    products = sum(4 * sizes[a] * sizes[b] for b in range(len(sizes)) for a in range(b))
    return 8 * sum(sizes) * dimensions + (products if products <= PRODUCT_BYTES else 0)


def occupied(prefixes: int, rows: int) -> float:
    """Return how many of so many prefixes have rows if each row falls under any of them."""
    return max(1.0, -prefixes * math.expm1(-rows / prefixes))


def sample_size(size: int, counts: Counts) -> int:
    """Return the rows that a codebook is fitted to."""
    return min(training_budget(size, counts.dimensions), counts.training)


def _sample_work(level: int, rows: int, sizes: Sequence[int], counts: Counts) -> Work:
    """Return the work of reading so many training rows and of taking the levels before from them."""
    d = counts.dimensions
    # The rows as they are stored are held until they are converted.
    copied = counts.itemsize == 2 or level > 1
    # Reconstructions of a part, and what is added to them.
    parts = 8 * d * min(rows, thread_count() * PART_ROWS) if level > 1 else 0
    work = Work(
        {reading(counts): counts.vector_bytes, taking(d, counts.itemsize): rows},
        memory=rows * d * (4 + counts.itemsize * copied) + parts,
    )
    if level > 1:
        before = sizes[: level - 1]
        units = {
            encoding(before, d, counts.itemsize): rows * sum(before),
            measuring_errors(1, d, 4): rows * (level - 1),
        }
        work += Work(units)
    return work


def _held_work(rows: int, few: int, sizes: Sequence[int], counts: Counts) -> Work:
    """Return the work of reading rows to hold them as float32, and few of them a second time."""
    d = counts.dimensions
    units = {reading(counts): counts.vector_bytes, taking(d, counts.itemsize): rows}
    return Work(units, memory=4 * d * (rows + few) + product_bytes(sizes, d))


def _fitting_bytes(rows: int, sizes: Sequence[int], dimensions: int) -> int:
    """Return what is held with a sample: the costs of some prefixes, or the equations of all codewords."""
    costs = round(4.25 * min(rows * max(sizes), BLOCK_BYTES // 4))
    return max(costs, _equation_bytes(rows, sizes, dimensions)) + thread_count() * THREAD_BYTES


def _equation_bytes(rows: int, sizes: Sequence[int], dimensions: int) -> int:
    """Return what the least squares over all codewords hold: rows that are summed, sums, and pairs that occur."""
    threads, total = thread_count(), sum(sizes)
    step = SUM_BYTES // (4 * dimensions)
    parts = min(threads, -(-rows // step))
    pairs = sum(min(rows, a * b) for a in sizes for b in sizes)
    sums = 4 * AHEAD * parts * total * dimensions
    summed = 4 * parts * min(rows, step) * dimensions + sums
    dense = 4 * total * total if total <= DENSE_CODEWORDS else 0
    return summed + EQUATION_ARRAYS * 8 * total * dimensions + PAIR_BYTES * pairs + dense


def _price_bytes(level: int, rows: int, sizes: Sequence[int]) -> int:
    return round(occupied(capacity_of(sizes[:level]), rows)) * (8 + 4 * sizes[level])
