"""Where k-means starts: at rows that are spread over all of them, by greedy k-means++ (Arthur & Vassilvitskii 2007)."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from semids.parallel import in_order, single_threaded_products, slices

ROWS_PER_START = 32
"""Rows a codeword that starts are chosen among. CHANGELOG.md has what other numbers gave, here and below."""
START_BYTES = 1 << 29
"""Largest copy of those rows."""
CANDIDATES = 32
"""Rows that are drawn at a time."""
CHOSEN = 4
"""How many of them become starts, at most."""
SLICE_ROWS = 1 << 12
"""Rows whose distances are computed at a time, each part by a thread."""


class StartRows(Protocol):
    """Rows among which starts are chosen, on the processor or on a device, whose arrays `Any` stands for."""

    @property
    def weights(self) -> Any:
        """(n,) float32, how often each row counts."""
        ...

    def distances(self, chosen: NDArray[np.int64]) -> Any:
        """Return the (m, n) float32 squared distances of m of the rows to all, to itself exactly 0."""
        ...

    def to_host(self, values: Any) -> NDArray[np.float32]:
        """Return (n,) values as an array of NumPy."""
        ...


def start_rows(size: int, dimensions: int) -> int:
    """Return how many rows of so many dimensions `size` starts are chosen among, where there are that many."""
    return max(size, min(ROWS_PER_START * size, START_BYTES // (np.dtype(np.float32).itemsize * dimensions)))


def choose_starts(rows: StartRows, size: int, *, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the numbers of `size` rows that are spread over all, (size,).

    Candidates are drawn in proportion to their squared distance to the starts found already, and those become starts
    that bring the rows closest to one: rows far from the others, where there are many. All are different, unless fewer
    rows are; then rows drawn evenly fill the places left over.
    """
    with single_threaded_products():
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
                if nearest[candidates[best]] == 0:
                    break  # A start, or the copy of one: no candidate that is left brings any row closer.
                chosen.append(int(candidates[best]))
                nearest = distances[best]
    return np.array(chosen)


def _draw(cumulated: NDArray[np.float64], count: int, *, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return the numbers of rows drawn in proportion to what the sum rises by at each."""
    drawn = np.searchsorted(cumulated, rng.random(count) * cumulated[-1], side="right")
    # A draw that rounding has made the whole sum is the last row that adds to it.
    return drawn.clip(max=np.searchsorted(cumulated, cumulated[-1], side="left"))


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
        """Return the (m, n) float32 squared distances of m of the rows to all, the same for any number of threads."""
        candidates, norms = self.rows[chosen], self._norms[chosen, None]
        distances = np.empty((len(chosen), len(self.rows)), np.float32)

        def measure(part: slice) -> None:
            found = candidates @ self.rows[part].T
            found *= -2
            found += self._norms[part]
            found += norms
            np.maximum(found, 0, out=distances[:, part])

        for _ in in_order(measure, slices(len(self.rows), SLICE_ROWS)):
            pass
        # Rounding leaves some distance, of which long rows would have the most.
        distances[np.arange(len(chosen)), chosen] = 0
        return distances

    def to_host(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the (n,) values."""
        return values
