"""Residual codebooks and networks on a device of PyTorch: what NumPy does on the processor, for machines with a GPU."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from semids.arrays import Codes, Vectors
from semids.centroids import move_codewords
from semids.memory import DRIVERS

if TYPE_CHECKING:
    import torch

    from semids.residual import ResidualCodebooks

DEVICE_SCORE_BYTES = 256 << 20
"""Largest scores, rows × codewords × paths, of a chunk on the device."""
STEP_BYTES = 4 * DEVICE_SCORE_BYTES
"""Most that a Lloyd step, or choosing what it starts from, holds on the device besides the rows."""
AT_A_TIME = 4
"""Threads that use the device at a time: enough for one to copy while another computes; each holds a chunk there."""


@functools.cache
def accelerator() -> torch.device | None:
    """Return the CUDA device that array work is done on, or None: then it is the processor's, through NumPy.

    CUDA_VISIBLE_DEVICES chooses the device; set to nothing, there is none.
    """
    if not any(driver.exists() for driver in DRIVERS):
        return None  # PyTorch takes seconds to import, which much of the package does without.
    import torch

    return torch.device("cuda") if torch.cuda.is_available() else None


def upload(rows: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return rows as a tensor on the device, in their own type: float16 crosses the bus at half the bytes."""
    import torch

    with warnings.catch_warnings():
        # The rows may be a read-only memory map, and are only read.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(np.ascontiguousarray(rows)).to(device)


class DeviceCodebooks:
    """The codebooks, potentials and prices of `ResidualCodebooks` on a device, and the same arithmetic on them.

    Codes are those of NumPy but for ties closer than float32 rounding. Products are in float32, never in TF32, whose
    ten bits would move one code in some hundred.
    """

    def __init__(self, books: ResidualCodebooks, device: torch.device) -> None:
        """Copy (K_l, d) codebooks, and what is computed from them alone, to the device as float32."""
        self.device, self.sizes, self.beam = device, books.sizes, books.beam
        self.codebooks = [upload(book, device) for book in books.codebooks]
        self.biases = [upload(bias, device) for bias in books.biases]
        self.products = {pair: upload(product, device) for pair, product in books.products.items()}
        self.scores = upload(books.stacked, device)
        self.prices = [
            (upload(table.prefixes, device), upload(table.values, device)) if len(table.prefixes) else None
            for table in books.prices
        ]
        ends = np.cumsum([0, *self.sizes]).tolist()
        self.columns = [slice(ends[level], ends[level + 1]) for level in range(len(self.sizes))]
        self.is_stacked = bool(self.products) or len(self.sizes) == 1
        self.turns = threading.BoundedSemaphore(AT_A_TIME)

    def assign(self, rows: Vectors) -> NDArray[np.int64]:
        """Return the (n, L) codes of (n, d) rows; see `ResidualCodebooks.assign`."""
        codewords = sum(self.sizes) if self.is_stacked else max(self.sizes)
        step = max(1, DEVICE_SCORE_BYTES // (4 * codewords * self.beam))
        codes = np.empty((len(rows), len(self.sizes)), np.int64)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            with self.turns:
                codes[part] = self._search(upload(rows[part], self.device).float()).cpu().numpy()
        return codes

    def _search(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the codes of the best of the `beam` paths that are kept at every level; of one path, the greedy's."""
        import torch

        last = len(self.sizes) - 1
        scores = vectors @ self.scores if self.is_stacked else None
        # (n, b) errors of the paths kept, less |x|², and their (n, b, L) codes: one empty path at first.
        errors = vectors.new_zeros((len(vectors), 1))
        codes = torch.zeros((len(vectors), 1, len(self.sizes)), dtype=torch.int64, device=self.device)
        for level, size in enumerate(self.sizes):
            candidates = self._candidates(vectors, scores, codes, level)
            if self.beam > 1:
                candidates += errors[:, :, None]
            flat = candidates.reshape(len(vectors), -1)
            kept, errors = _smallest(flat, min(self.beam if level < last else 1, flat.shape[1]))
            codes = codes.gather(1, (kept // size)[:, :, None].expand(-1, -1, len(self.sizes)))
            codes[:, :, level] = kept % size
        return codes[:, 0]

    def _candidates(
        self, vectors: torch.Tensor, scores: torch.Tensor | None, codes: torch.Tensor, level: int
    ) -> torch.Tensor:
        """Return the (n, b, K) costs of a level's codewords on every path, less a number of each path's own."""
        if scores is not None:
            found = scores[:, None, self.columns[level]].expand(-1, codes.shape[1], -1)
            terms = [self.products[before, level][codes[:, :, before]] for before in range(level)]
            found = sum(terms, found) if terms else found + self.biases[0]
        else:
            residuals = vectors[:, None].repeat(1, codes.shape[1], 1)
            for before in range(level):
                residuals -= self.codebooks[before][codes[:, :, before]]
            found = residuals @ self.scores[:, self.columns[level]] + self.biases[level]
        table = self.prices[level] if self.prices else None
        if table is not None:
            self._subtract_prices(found, codes, level, *table)
        return found

    def _subtract_prices(
        self, costs: torch.Tensor, codes: torch.Tensor, level: int, prefixes: torch.Tensor, values: torch.Tensor
    ) -> None:
        import torch

        numbers = torch.zeros(codes.shape[:2], dtype=torch.int64, device=self.device)
        for before in range(level):
            numbers = numbers * self.sizes[before] + codes[:, :, before]
        places = torch.searchsorted(prefixes, numbers).clamp_(max=len(prefixes) - 1)
        priced = prefixes[places] == numbers
        costs[priced] -= values[places[priced]]

    def costs(self, rows: Vectors, codes: Codes, level: int) -> NDArray[np.float32]:
        """Return the (n, K_l) costs of a level; see `ResidualCodebooks.costs`."""
        with self.turns:
            return self._costs(rows, codes, level).cpu().numpy()

    def _costs(self, rows: Vectors, codes: Codes, level: int) -> torch.Tensor:
        vectors = upload(rows, self.device).float()
        above = upload(codes[:, :level].astype(np.int64), self.device)
        if self.products or level == 0:
            found = vectors @ self.scores[:, self.columns[level]]
            if level == 0:
                found += self.biases[0]
            for before in range(level):
                found += self.products[before, level][above[:, before]]
        else:
            for before in range(level):
                vectors = vectors - self.codebooks[before][above[:, before]]
            found = vectors @ self.scores[:, self.columns[level]]
            found += self.biases[level]
        return found

    def squared_errors(self, rows: Vectors, codes: Codes) -> NDArray[np.float32]:
        """Return the (n, L) squared errors by depth; see `ResidualCodebooks.squared_errors`."""
        with self.turns:
            return self._squared_errors(rows, codes).cpu().numpy()

    def _squared_errors(self, rows: Vectors, codes: Codes) -> torch.Tensor:
        import torch

        left = upload(rows, self.device).float()
        chosen = upload(codes.astype(np.int64), self.device)
        errors: list[torch.Tensor] = []
        for level, codebook in enumerate(self.codebooks):
            left = left - codebook[chosen[:, level]]
            errors.append(left.square().sum(dim=1))
        return torch.stack(errors, dim=1)


class DeviceNetwork:
    """The layers of a `Network` on a device, and what rows become by them, in float32."""

    def __init__(
        self, weights: Sequence[NDArray[np.float32]], biases: Sequence[NDArray[np.float32]], device: torch.device
    ) -> None:
        """Copy (d_in, d_out) weights and (d_out,) biases to the device."""
        self.device = device
        self.weights, self.biases = (
            [upload(each, device) for each in weights],
            [upload(each, device) for each in biases],
        )
        self.widest = max(width for weight in weights for width in weight.shape)
        self.turns = threading.BoundedSemaphore(AT_A_TIME)

    def apply(self, rows: Vectors) -> NDArray[np.float32]:
        """Return what (n, d_in) rows become, (n, d_out); see `Network.apply`."""
        import torch

        out = np.empty((len(rows), len(self.biases[-1])), np.float32)
        step = max(1, DEVICE_SCORE_BYTES // (2 * 4 * self.widest))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            with self.turns:
                values = upload(rows[part], self.device).float()
                for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
                    values = torch.addmm(bias, values, weight)
                    if layer < len(self.weights) - 1:
                        values.relu_()
                out[part] = values.cpu().numpy()
        return out


def _smallest(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (n, count) columns of the smallest values of every row, ascending, and the values; spoils `values`."""
    import torch

    columns: list[torch.Tensor] = []
    smallest: list[torch.Tensor] = []
    for place in range(count):
        # Of equal values the first: a codeword that repeats another is never chosen.
        columns.append(values.argmin(dim=1, keepdim=True))
        smallest.append(values.gather(1, columns[-1]))
        if place < count - 1:
            values.scatter_(1, columns[-1], float("inf"))
    return torch.cat(columns, dim=1), torch.cat(smallest, dim=1)


@dataclass(frozen=True)
class DeviceRows:
    """Rows on a device that starts are chosen among; see `semids.starts`.

    Args:
        rows: (n, d) float32.
        norms: (n,) float32, their squared lengths.
        weights: (n,) float32, how often each counts.
    """

    rows: torch.Tensor
    norms: torch.Tensor
    weights: torch.Tensor

    def distances(self, chosen: NDArray[np.int64]) -> torch.Tensor:
        """Return the (m, n) float32 squared distances of m of the rows to all, to itself exactly 0."""
        numbers = upload(chosen, self.rows.device)
        products = self.rows[numbers] @ self.rows.T
        distances = products.mul_(-2).add_(self.norms).add_(self.norms[numbers, None]).clamp_(min=0)
        return distances.scatter_(1, numbers[:, None], 0)

    def to_host(self, values: torch.Tensor) -> NDArray[np.float32]:
        """Return (n,) values as an array of NumPy."""
        return values.cpu().numpy()


class DeviceLloyd:
    """Lloyd steps on rows that stay on a device: each moves every codeword to the mean of the rows nearest to it.

    Args:
        rows: (n, d) float32.
        size: K, codewords.
        weights: (n,) float32, how often each row counts; None is once.
    """

    def __init__(
        self, rows: NDArray[np.float32], size: int, weights: NDArray[np.float32] | None, device: torch.device
    ) -> None:
        self._rows, self._size = upload(rows, device), size
        self._norms = self._rows.square().sum(dim=1)
        self._weights = upload(np.ones(len(rows), np.float32) if weights is None else weights, device)

    def select(self, numbers: NDArray[np.int64]) -> DeviceRows:
        """Return some of the rows, to choose starts among."""
        chosen = upload(numbers, self._rows.device)
        return DeviceRows(self._rows[chosen], self._norms[chosen], self._weights[chosen])

    def step(self, centroids: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """Return the moved (K, d) centroids, and the rows' mean squared distance to those they were moved from."""
        import torch

        device = self._rows.device
        given = upload(centroids, device)
        sums = torch.zeros(given.shape, dtype=torch.float64, device=device)
        weights, errors = (torch.zeros(self._size, dtype=torch.float64, device=device) for _ in range(2))
        distances = torch.zeros((), dtype=torch.float64, device=device)
        step = max(1, DEVICE_SCORE_BYTES // (4 * self._size))
        for start in range(0, len(self._rows), step):
            part = slice(start, start + step)
            rows = self._rows[part]
            nearest, codes = (given.square().sum(dim=1) - 2 * (rows @ given.T)).min(dim=1)
            nearest.add_(self._norms[part]).clamp_(min=0)
            distances += nearest.double().sum()
            # A product instead of scattered additions, whose order differs from run to run on CUDA.
            chosen = torch.zeros((len(rows), self._size), device=device)
            chosen.scatter_(1, codes[:, None], self._weights[part, None])
            sums += (chosen.T @ rows).double()
            weights += chosen.sum(dim=0, dtype=torch.float64)
            errors += (nearest @ chosen).double()
        moved = move_codewords(centroids, *(each.cpu().numpy() for each in (sums, weights, errors)))
        return moved, float(distances) / len(self._rows)
