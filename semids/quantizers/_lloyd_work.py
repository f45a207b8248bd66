"""What k-means asks of a machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from semids.calibration import PROBE_ENTRIES, draw_rows
from semids.kmeans import Lloyd, draw_starts, lloyd_stepper, part_rows
from semids.parallel import AHEAD, thread_count
from semids.starts import CANDIDATES, ROWS_PER_START, start_rows
from semids.work import Probe, Work

FLOPS = 1 << 34
"""Multiplications and additions of a probe at most: a third of a second of one core."""
PRODUCT_CODEWORDS = 1024
"""Codewords whose products with rows FAISS holds at a time."""
PROBE_STARTS = 128
"""Codewords that a probe chooses starts of."""


def fitting(size: int, dimensions: int) -> Probe:
    """Row × codeword products of one Lloyd step."""
    codewords = max(2, min(size, PROBE_ENTRIES // dimensions))

    def prepare(folder: Path) -> tuple[Callable[[], Any], float]:
        rows = draw_rows(max(4 * codewords, min(16_384, FLOPS // (2 * codewords * dimensions))), dimensions)
        stepper = lloyd_stepper(rows, codewords)
        return lambda: stepper.step(rows[:codewords]), len(rows) * codewords

    return Probe(f"Lloyd step, {codewords} × {dimensions}", prepare)


def starting(dimensions: int) -> Probe:
    """Rows that starts are chosen among, times codewords."""

    def prepare(folder: Path) -> tuple[Callable[[], Any], float]:
        rows = draw_rows(PROBE_STARTS * ROWS_PER_START, dimensions)
        stepper = lloyd_stepper(rows, PROBE_STARTS)

        def run() -> None:
            draw_starts(stepper, rows, PROBE_STARTS, rng=np.random.default_rng(0))

        return run, min(len(rows), start_rows(PROBE_STARTS, dimensions)) * PROBE_STARTS

    return Probe(f"starts, {PROBE_STARTS} × {dimensions}", prepare)


def lloyd_work(size: int, dimensions: int, rows: int, lloyd: Lloyd) -> Work:
    """Return the work of fitting `size` codewords to so many rows; the memory of the rows themselves is left out.

    Args:
        size: K, number of codewords.
        dimensions: d, of a row.
        lloyd: how many steps and starts.
    """
    seen = min(rows, start_rows(size, dimensions))
    units = {
        starting(dimensions): lloyd.restarts * seen * size,
        fitting(size, dimensions): lloyd.restarts * lloyd.iterations * rows * size,
    }
    # A copy of the rows that are chosen among, and distances to candidates: new ones, lowered ones, those before.
    starts = 4 * seen * (dimensions + 3 * CANDIDATES)
    # Sums of the parts that are at work or wait for their turn, products of the former, and the means of all.
    parts = min(-(-rows // part_rows(rows)), AHEAD * thread_count())
    sums = (4 * parts + 28) * size * dimensions + thread_count() * 4 * part_rows(rows) * min(size, PRODUCT_CODEWORDS)
    return Work(units, memory=max(starts, sums))
