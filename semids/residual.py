"""Residual codebooks: every level quantizes what the levels before it left over."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from semids.arrays import Codes, Vectors, check_codes, check_vectors, code_dtype, widen
from semids.device import DeviceCodebooks, accelerator
from semids.errors import ShapeError
from semids.parallel import in_order, slices

PRODUCT_BYTES = 1 << 30
"""Largest products of codewords with those of other levels that are kept: enough for 8 levels of 3,000 codewords, or 2
of 16,384. Beyond, encoding subtracts what was chosen before each level, which is slower."""
CHUNK_ROWS = 2048
"""Most rows scored at a time."""
SCORE_BYTES = 16 << 20
"""Largest scores, rows × codewords, of a chunk: those of usual shapes stay in the processor's cache."""
PART_ROWS = 8 * CHUNK_ROWS
"""Rows that a thread encodes in one go, with the same arrays for all their chunks."""

_copying = threading.Lock()


def prefix_numbers(codes: NDArray[np.integer], sizes: Sequence[int]) -> NDArray[np.int64]:
    """Return (n,) prefixes as numbers of mixed radix: equal for equal rows of the (n, l) codes, 0 for no level."""
    numbers = np.zeros(len(codes), dtype=np.int64)
    for level in range(codes.shape[1]):
        numbers = numbers * sizes[level] + codes[:, level]
    return numbers


@dataclass(frozen=True)
class PriceTable:
    """The prices of a level's codewords under the prefixes where some are not zero.

    Args:
        prefixes: (m,) int64, ascending: the codes before the level, as one number of mixed radix.
        values: (m, K) float32, in squared units of the vectors.
    """

    prefixes: NDArray[np.int64]
    values: NDArray[np.float32]

    def find(self, prefix: int) -> NDArray[np.float32] | None:
        """Return the (K,) prices under a prefix, or None where all are zero."""
        place = int(np.searchsorted(self.prefixes, prefix))
        return self.values[place] if place < len(self.prefixes) and self.prefixes[place] == prefix else None

    def subtract(self, costs: NDArray[np.float32], prefixes: NDArray[np.int64]) -> None:
        """Subtract the prices of their prefixes from (n, K) costs, in place."""
        if len(self.prefixes):
            places = np.minimum(np.searchsorted(self.prefixes, prefixes), len(self.prefixes) - 1)
            priced = np.flatnonzero(self.prefixes[places] == prefixes)
            costs[priced] -= self.values[places[priced]]


@dataclass(frozen=True)
class ResidualCodebooks:
    """The codebooks of L levels and the potentials of their mapping.

    Args:
        codebooks: one (K_l, d) float32 array a level.
        potentials: one (K_l,) float32 array a level, in squared units of the vectors: the code of a residual is
            argmin(squared distance − potential). All zero is the nearest mapping.
        prices: none, or a table a level: what the code of a residual is charged under the prefix before it, besides.
        beam: paths kept at every level of the search for the least error (Babenko and Lempitsky 2014, section 3.1).
            1 is greedy: the code of a level is final. Larger finds lower errors in more time, and takes no prices.
        stacked: (d, ΣK) float32, the codewords of all levels times −2, made from them.
        products: twice the (K_before, K_level) products of every two levels' codewords, those of a level and the one
            before it with the level's biases; none where they would take more than PRODUCT_BYTES.
        biases: one (K_l,) float32 array a level, squared norms of codewords − potentials.

    Raises:
        ShapeError: no level, unequal widths, potentials or prices that do not match their codebook, or
            prices with a beam.
    """

    codebooks: tuple[NDArray[np.float32], ...]
    potentials: tuple[NDArray[np.float32], ...]
    prices: tuple[PriceTable, ...] = ()
    beam: int = 1
    stacked: NDArray[np.float32] = field(init=False, repr=False, compare=False)
    products: dict[tuple[int, int], NDArray[np.float32]] = field(init=False, repr=False, compare=False)
    biases: tuple[NDArray[np.float32], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.codebooks or len({codebook.shape[1] for codebook in self.codebooks}) != 1:
            raise ShapeError(f"expected codebooks of one width, got shapes {[c.shape for c in self.codebooks]}")
        if self.prices and self.beam > 1:
            raise ShapeError(f"expected no prices where codes are searched along {self.beam} paths")
        sizes = [len(codebook) for codebook in self.codebooks]
        if [potential.shape for potential in self.potentials] != [(size,) for size in sizes]:
            raise ShapeError(
                f"expected one potential for each of {sizes} codewords, got shapes {[p.shape for p in self.potentials]}"
            )
        if self.prices and [table.values.shape[1] for table in self.prices] != sizes:
            raise ShapeError(f"expected a table of prices for each of {sizes} codewords, got {len(self.prices)}")
        # |r − c|² − p = |r|² + (|c|² − p) − 2·x·c + 2·Σ(c_before·c): one product of the vectors with all
        # codewords, and products among codewords that do not depend on the vectors. Scaling by −2 is exact.
        object.__setattr__(self, "stacked", np.ascontiguousarray(-2 * np.concatenate(self.codebooks).T))
        pairs = [(before, level) for level in range(len(sizes)) for before in range(level)]
        fits = sum(4 * sizes[before] * sizes[level] for before, level in pairs) <= PRODUCT_BYTES
        products = {
            (before, level): 2 * self.codebooks[before] @ self.codebooks[level].T for before, level in pairs if fits
        }
        object.__setattr__(self, "products", products)
        biases = tuple(
            np.einsum("kd,kd->k", codebook, codebook) - potential
            for codebook, potential in zip(self.codebooks, self.potentials, strict=True)
        )
        for level in range(1, len(sizes)):
            if products:
                products[level - 1, level] += biases[level]  # One addition a row less.
        object.__setattr__(self, "biases", biases)

    @property
    def _on_device(self) -> DeviceCodebooks | None:
        """What does the arithmetic instead, where there is a device for it: one copy, whichever thread comes first."""
        with _copying:
            return self._device_copy

    @functools.cached_property
    def _device_copy(self) -> DeviceCodebooks | None:
        device = accelerator()
        return DeviceCodebooks(self, device) if device is not None else None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codebook size of each level."""
        return tuple(len(codebook) for codebook in self.codebooks)

    @property
    def dimensions(self) -> int:
        """Width d of the vectors."""
        return self.codebooks[0].shape[1]

    def encode(self, vectors: Vectors) -> Codes:
        """Return the (n, L) codes of (n, d) vectors in the smallest unsigned type.

        The code of a row is a function of that row and the codebooks alone, but for ties closer than
        float32 rounding, which may fall either way with the number of rows and threads of a product.

        Raises:
            ShapeError: another width than the codebooks', or rows that are not usable.
        """
        return self.assign(check_vectors(vectors, dimensions=self.dimensions))

    def assign(self, rows: Vectors) -> Codes:
        """Return the codes of rows that are known to be finite and of the right width; zero rows are fine."""
        codes = np.empty((len(rows), len(self.sizes)), dtype=code_dtype(self.sizes))
        parts = slices(len(rows), PART_ROWS)
        for part, found in zip(parts, in_order(lambda part: self._assign_part(rows[part]), parts), strict=True):
            codes[part] = found
        return codes

    def _assign_part(self, rows: Vectors) -> NDArray[np.integer]:
        if self._on_device is not None:
            return self._on_device.assign(rows)
        codes = np.empty((len(rows), len(self.sizes)), dtype=code_dtype(self.sizes))
        at_once = bool(self.products) or len(self.sizes) == 1
        greedily = self._encode_chunk if at_once else self._encode_residuals
        encode = self._search_chunk if self.beam > 1 else greedily
        # What is scored together: all levels, or one of them, for every path that is kept.
        codewords = self.stacked.shape[1] if at_once else max(self.sizes)
        step = min(CHUNK_ROWS, max(1, SCORE_BYTES // (4 * codewords * self.beam)), len(rows))
        # Scores go to one place, whose memory is touched once.
        scores = np.empty((step, codewords), np.float32)
        for part, chunk in _float32_chunks(rows, step):
            codes[part] = encode(chunk, scores[: len(chunk)])
        return codes

    def _encode_chunk(self, vectors: NDArray[np.float32], scores: NDArray[np.float32]) -> NDArray[np.int64]:
        np.matmul(vectors, self.stacked, out=scores)
        codes = np.empty((len(vectors), len(self.sizes)), dtype=np.int64)
        end = 0
        for level, size in enumerate(self.sizes):
            start, end = end, end + size
            level_scores = scores[:, start:end]
            if level == 0:
                level_scores += self.biases[0]
            for before in range(level):
                level_scores += self.products[before, level][codes[:, before]]
            codes[:, level] = self._choose(level_scores, codes, level)
        return codes

    def _choose(self, scores: NDArray[np.float32], codes: NDArray[np.int64], level: int) -> NDArray[np.int64]:
        if self.prices and len(self.prices[level].prefixes):
            self.prices[level].subtract(scores, prefix_numbers(codes[:, :level], self.sizes))
        return scores.argmin(axis=1)

    def _encode_residuals(self, vectors: NDArray[np.float32], scores: NDArray[np.float32]) -> NDArray[np.int64]:
        residuals = vectors.copy()
        codes = np.empty((len(vectors), len(self.sizes)), dtype=np.int64)
        for level in range(len(self.sizes)):
            level_scores = scores[:, : self.sizes[level]]
            np.matmul(residuals, self.stacked[:, self._columns(level)], out=level_scores)
            level_scores += self.biases[level]
            codes[:, level] = self._choose(level_scores, codes, level)
            residuals -= self.codebooks[level][codes[:, level]]
        return codes

    def _search_chunk(self, vectors: NDArray[np.float32], scores: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the codes of the best of the `beam` paths that are kept at every level."""
        rows, levels = np.arange(len(vectors))[:, None], len(self.sizes)
        if self.products:
            np.matmul(vectors, self.stacked, out=scores)
        # (n, b) errors of the paths kept, less |x|², and their (n, b, L) codes: one empty path at first.
        errors = np.zeros((len(vectors), 1), np.float32)
        codes = np.zeros((len(vectors), 1, levels), np.int64)
        for level, size in enumerate(self.sizes):
            if self.products:
                candidates = errors[:, :, None] + scores[:, None, self._columns(level)]
                if level == 0:
                    candidates += self.biases[0]
                for before in range(level):
                    candidates += self.products[before, level][codes[:, :, before]]
            else:
                residuals = np.repeat(vectors[:, None], codes.shape[1], axis=1)
                for before in range(level):
                    residuals -= self.codebooks[before][codes[:, :, before]]
                candidates = residuals @ self.stacked[:, self._columns(level)]
                candidates += self.biases[level]
                candidates += errors[:, :, None]
            flat = candidates.reshape(len(vectors), -1)
            kept, errors = _smallest(flat, min(self.beam if level < levels - 1 else 1, flat.shape[1]))
            codes = codes[rows, kept // size]
            codes[:, :, level] = kept % size
        return codes[:, 0]

    def costs(self, vectors: Vectors, codes: Codes, level: int) -> NDArray[np.float32]:
        """Return the (n, K_l) squared distances of residuals to a level's codewords, less a number of each row's own.

        Args:
            vectors: (n, d) rows.
            codes: (n, L), of which those before the level count.
        """
        if self._on_device is not None:
            return self._on_device.costs(vectors, codes, level)
        costs = np.empty((len(vectors), self.sizes[level]), np.float32)
        stacked = self.stacked[:, self._columns(level)]
        for part, chunk in _float32_chunks(vectors, CHUNK_ROWS, writable=not self.products and level > 0):
            here = costs[part]
            if self.products or level == 0:
                np.matmul(chunk, stacked, out=here)
                if level == 0:
                    here += self.biases[0]
                for before in range(level):
                    here += self.products[before, level][codes[part, before]]
            else:
                for before in range(level):
                    chunk -= self.codebooks[before][codes[part, before]]
                np.matmul(chunk, stacked, out=here)
                here += self.biases[level]
        return costs

    def _columns(self, level: int) -> slice:
        start = sum(self.sizes[:level])
        return slice(start, start + self.sizes[level])

    def decode(self, codes: Codes, *, depth: int | None = None) -> NDArray[np.float32]:
        """Return (n, d) float32 reconstructions: the sum of the codewords of the first `depth` levels (default all).

        Raises:
            CodesError: codes outside their codebooks.
        """
        check_codes(codes, self.sizes)
        total = np.zeros((len(codes), self.dimensions), dtype=np.float32)
        for level in range(len(self.sizes) if depth is None else depth):
            total += self.codebooks[level][codes[:, level]]
        return total

    def squared_errors(self, vectors: Vectors, codes: Codes) -> NDArray[np.float32]:
        """Return the (n, L) squared distances of vectors to their reconstructions by depth, squared vector units."""
        check_codes(codes, self.sizes)
        errors = np.empty(codes.shape, dtype=np.float32)
        parts = slices(len(vectors), PART_ROWS)
        found = in_order(lambda part: self._errors_of_part(vectors[part], codes[part]), parts)
        for part, part_errors in zip(parts, found, strict=True):
            errors[part] = part_errors
        return errors

    def _errors_of_part(self, vectors: Vectors, codes: Codes) -> NDArray[np.float32]:
        if self._on_device is not None:
            return self._on_device.squared_errors(vectors, codes)
        errors = np.empty(codes.shape, dtype=np.float32)
        for part, residual in _float32_chunks(vectors, CHUNK_ROWS, writable=True):
            for level, codebook in enumerate(self.codebooks):
                residual -= codebook[codes[part, level]]
                errors[part, level] = np.einsum("nd,nd->n", residual, residual)
        return errors

    def residuals(self, vectors: Vectors) -> NDArray[np.float32]:
        """Return (n, d) float32: the vectors minus their reconstructions."""
        residuals = np.empty(vectors.shape, np.float32)
        codes = self.encode(vectors)

        def fill(part: slice) -> None:
            widen(vectors[part], out=residuals[part])
            residuals[part] -= self.decode(codes[part])

        for _ in in_order(fill, slices(len(vectors), PART_ROWS)):
            pass
        return residuals


def _float32_chunks(rows: Vectors, step: int, *, writable: bool = False) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield (slice, its rows as float32) for every `step` rows; one array serves all, unless they are float32."""
    copied = writable or rows.dtype != np.float32
    buffer = np.empty((min(step, len(rows)), rows.shape[1]), np.float32) if copied else None
    for start in range(0, len(rows), step):
        part = slice(start, min(start + step, len(rows)))
        yield part, rows[part] if buffer is None else widen(rows[part], out=buffer[: part.stop - start])


def _smallest(values: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the (n, count) columns of the smallest values of every row, ascending, and the values; spoils `values`."""
    rows = np.arange(len(values))
    columns = np.empty((len(values), count), np.int64)
    smallest = np.empty((len(values), count), np.float32)
    for place in range(count):
        columns[:, place] = values.argmin(axis=1)
        smallest[:, place] = values[rows, columns[:, place]]
        values[rows, columns[:, place]] = np.inf
    return columns, smallest
