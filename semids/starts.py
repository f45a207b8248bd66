"""Where k-means starts: at rows that are spread over all of them, by greedy k-means++ (Arthur & Vassilvitskii 2007)."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from semids.parallel import in_order, slices

ROWS_PER_START = 32
"""Rows a codeword that starts are chosen among: 16 cost 0.5 % of error, 64 gain nothing."""
START_BYTES = 1 << 29
"""Of those rows at most: they are a copy."""
CANDIDATES = 32
"""Rows that are drawn at a time: of 7, the number usual for 256 codewords, the best are 0.5 % worse."""
CHOSEN = 4
"""How many of them become starts. One a time is no better and takes twice as long, 8 are a little worse."""
SLICE_ROWS = 1 << 12
"""Rows whose distances are computed at a time, each part by a thread."""


class StartRows(Protocol):
    """Rows among which starts are chosen, on the processor or on a device, whose arrays `Any` stands for."""

    @property
    def weights(self) -> Any:
        """(n,) float32, how often each row counts."""
        ...

    def distances(self, chosen: NDArray[np.int64]) -> Any:
        """Return the (m, n) float32 squared distances of m of the rows to all."""
        ...

    def to_host(self, values: Any) -> NDArray[np.float32]:
        """Return (n,) values as an array of NumPy."""
        ...


def draw_start_rows(rows: int, size: int, dimensions: int, *, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the numbers of the rows, ascending, that the starts of `size` codewords are chosen among."""
    count = min(rows, start_rows(size, dimensions))
    return np.arange(rows) if count == rows else np.sort(rng.choice(rows, count, replace=False, shuffle=False))


def start_rows(size: int, dimensions: int) -> int:
    """Return how many rows there are to choose among, where there are enough."""
    return max(size, min(ROWS_PER_START * size, START_BYTES // (np.dtype(np.float32).itemsize * dimensions)))


def choose_starts(rows: StartRows, size: int, *, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the numbers of `size` rows that lie far apart, yet where rows are many.

    Candidates are drawn in proportion to their squared distance to the starts found already, and those become starts
    that bring the rows closest to one. A row is chosen twice only where fewer are distinct.
    """
    chosen = _draw(np.cumsum(rows.to_host(rows.weights), dtype=np.float64), 1, rng=rng).tolist()
    nearest = rows.distances(np.array(chosen))[0]
    while len(chosen) < size:
        cumulated = np.cumsum(rows.to_host(nearest * rows.weights), dtype=np.float64)
        if not cumulated[-1] > 0:
            return np.append(chosen, rng.integers(len(cumulated), size=size - len(chosen)))
        candidates = np.unique(_draw(cumulated, CANDIDATES, rng=rng))
        distances = rows.distances(candidates)
        for _ in range(min(CHOSEN, len(candidates), size - len(chosen))):
            distances = distances.clip(max=nearest)
            best = int((distances @ rows.weights).argmin())
            chosen.append(int(candidates[best]))
            nearest = distances[best]
    return np.array(chosen)


def _draw(cumulated: NDArray[np.float64], count: int, *, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the numbers of rows drawn in proportion to what the sum rises by at each."""
    drawn = np.searchsorted(cumulated, rng.random(count) * cumulated[-1], side="right")
    return drawn.clip(max=len(cumulated) - 1)


class HostRows:
    """Rows in memory.

    Args:
        rows: (n, d) float32.
        weights: (n,) float32.
    """

    def __init__(self, rows: NDArray[np.float32], weights: NDArray[np.float32]) -> None:
        self.rows, self.weights = rows, weights
        self._norms = np.einsum("nd,nd->n", rows, rows)

    def distances(self, chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the (m, n) squared distances of m of the rows to all, the same for any number of threads."""
        candidates, norms = self.rows[chosen], self._norms[chosen, None]

        def measure(part: slice) -> NDArray[np.float32]:
            found = candidates @ self.rows[part].T
            found *= -2
            found += self._norms[part]
            found += norms
            return np.maximum(found, 0, out=found)

        return np.concatenate(list(in_order(measure, slices(len(self.rows), SLICE_ROWS))), axis=1)

    def to_host(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the values."""
        return values
