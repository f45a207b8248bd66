"""Array types, the checks at every public door, shapes written as `256x256x256`, and code packing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semids.errors import CodesError, ShapeError, UsageError

Vectors = NDArray[np.floating[Any]]
"""(n, d) float16 or float32 rows, one vector each."""

Codes = NDArray[np.unsignedinteger[Any]]
"""(n, L) unsigned codes, one column a level."""

# Squares of norms, and sums of them over 50M rows, must stay finite and normal in float32 and float64.
SMALLEST_NORM = 1e-12
LARGEST_NORM = 1e12
PART_ROWS = 4096
"""Rows that are looked at together."""
LARGEST_CODEBOOK = 1 << 16
WORD_BITS = 64


def parse_shape(shape: str) -> tuple[int, ...]:
    """Return the codebook sizes of a shape such as `256x256x128`, first level first.

    Raises:
        UsageError: not integers joined by `x`, no level, or a size outside [2, 65536].
    """
    parts = shape.strip().lower().split("x")
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"expected a shape such as 256x256x256 (one codebook size a level), got {shape!r}")
    sizes = tuple(int(part) for part in parts)
    for level, size in enumerate(sizes, start=1):
        if not 2 <= size <= LARGEST_CODEBOOK:
            raise UsageError(f"expected codebook sizes from 2 to {LARGEST_CODEBOOK}, got {size} on level {level}")
    return sizes


def format_shape(sizes: Sequence[int]) -> str:
    """Return codebook sizes as `256x256x128`."""
    return "x".join(str(size) for size in sizes)


def capacity_of(sizes: Sequence[int]) -> int:
    """Return the number of distinct IDs a shape allows: the product of its codebook sizes."""
    return math.prod(sizes)


def code_dtype(sizes: Sequence[int]) -> np.dtype[Any]:
    """Return the smallest unsigned dtype that holds every code of the codebook sizes."""
    return np.dtype(np.uint8 if max(sizes) <= 256 else np.uint16)


def check_vectors(vectors: NDArray[Any], *, dimensions: int | None = None) -> Vectors:
    """Return the (n, d) float array unchanged, once it is known to be one with usable rows.

    Raises:
        ShapeError: not 2-D, not floating point, another width than `dimensions`, no rows, or a row
            whose norm is not finite or lies outside [1e-12, 1e12].
    """
    if vectors.ndim != 2:
        raise ShapeError(f"expected vectors of shape (n, d), got {vectors.shape}")
    if not np.issubdtype(vectors.dtype, np.floating):
        raise ShapeError(f"expected floating-point vectors, got {vectors.dtype}")
    if dimensions is not None and vectors.shape[1] != dimensions:
        raise ShapeError(
            f"expected vectors of shape (n, {dimensions}), got {vectors.shape}: "
            "the quantizer was trained on another embedder; embed again with the one it was trained on"
        )
    if 0 in vectors.shape:
        raise ShapeError(f"expected at least one vector of at least one dimension, got shape {vectors.shape}")
    bad = unusable_rows(vectors)
    if bad.size:
        raise ShapeError(
            f"{bad.size} of {len(vectors)} vectors are not usable (not finite, zero, or of a norm outside "
            f"[{SMALLEST_NORM:g}, {LARGEST_NORM:g}]), first rows {bad[:5].tolist()}; drop or repair them"
        )
    return vectors


def unusable_rows(vectors: Vectors) -> NDArray[np.int64]:
    """Return the indices of rows that hold a non-finite value or have a norm outside [1e-12, 1e12]."""
    parts = [start + _unusable_rows(vectors[start : start + PART_ROWS]) for start in range(0, len(vectors), PART_ROWS)]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _unusable_rows(vectors: Vectors) -> NDArray[np.int64]:
    doubtful = np.arange(len(vectors))
    with np.errstate(over="ignore", invalid="ignore"):
        if vectors.dtype.name in ("float16", "float32"):
            # Faster, and enough for rows that are far within the bounds.
            rows = vectors if vectors.dtype == np.float32 else widen(vectors, out=np.empty(vectors.shape, np.float32))
            squares = np.einsum("nd,nd->n", rows, rows)
            doubtful = np.flatnonzero(~((squares > 100 * SMALLEST_NORM**2) & (squares < LARGEST_NORM**2 / 100)))
        some = vectors if len(doubtful) == len(vectors) else vectors[doubtful]
        # float64: the square of 1e20 overflows float32, and FAISS aborts the interpreter on such rows.
        norms = np.sqrt(np.einsum("nd,nd->n", some, some, dtype=np.float64, casting="unsafe"))
    usable = np.isfinite(norms) & (norms >= SMALLEST_NORM) & (norms <= LARGEST_NORM)
    return doubtful[~usable]


def widen(rows: Vectors, *, out: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `out`, (n, d) float32, filled with the (n, d) rows of any floating type."""
    if rows.dtype == np.float16 and min(rows.strides) >= 0:
        # PyTorch uses the processor's own conversion: 0.09 ns a number where NumPy takes 1.8. Imported here, since
        # it takes seconds and most of the package does without.
        import torch

        with warnings.catch_warnings():
            # The rows may be a read-only memory map, and are only read.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
            source = torch.from_numpy(rows)
        torch.from_numpy(out).copy_(source)
    else:
        out[...] = rows
    return out


def check_codes(codes: NDArray[Any], sizes: Sequence[int]) -> Codes:
    """Return (n, L) codes unchanged, once every code is known to lie in its codebook.

    Raises:
        CodesError: another number of levels than `sizes`, not integers, negative, or a code >= its codebook size.
    """
    if codes.ndim != 2 or codes.shape[1] != len(sizes):
        raise CodesError(f"expected codes of shape (n, {len(sizes)}) for {format_shape(sizes)}, got {codes.shape}")
    if not np.issubdtype(codes.dtype, np.integer):
        raise CodesError(f"expected integer codes, got {codes.dtype}")
    if len(codes):
        for level, size in enumerate(sizes):
            lowest, highest = int(codes[:, level].min()), int(codes[:, level].max())
            if lowest < 0 or highest >= size:
                raise CodesError(
                    f"expected codes from 0 to {size - 1} on level {level + 1} of {format_shape(sizes)}, "
                    f"got {lowest} to {highest}: is the shape right, or are these bit-packed bytes read as codes?"
                )
    return codes


def word_layout(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return, for each level, the (word, shift in bits) at which `pack_codes` puts its code.

    A level takes ceil(log2 K) bits and never straddles two words. Within a word, and from the first word
    to the last, earlier levels are more significant, so sorting packed rows sorts IDs by prefix.
    """
    bits = [(size - 1).bit_length() for size in sizes]
    words: list[list[int]] = [[]]
    for level, width in enumerate(bits):
        if sum(bits[other] for other in words[-1]) + width > WORD_BITS:
            words.append([])
        words[-1].append(level)
    layout: dict[int, tuple[int, int]] = {}
    for word, levels in enumerate(words):
        shift = 0
        for level in reversed(levels):
            layout[level] = (word, shift)
            shift += bits[level]
    return [layout[level] for level in range(len(sizes))]


def pack_codes(codes: Codes, sizes: Sequence[int]) -> NDArray[np.uint64]:
    """Pack (n, L) codes into (n, words) uint64 keys that sort as the IDs do; one word up to 64 bits.

    The codes must have passed `check_codes`: larger ones would spill into their neighbours.
    """
    layout = word_layout(sizes)
    packed = np.zeros((len(codes), layout[-1][0] + 1), dtype=np.uint64)
    for level, (word, shift) in enumerate(layout):
        packed[:, word] |= codes[:, level].astype(np.uint64) << np.uint64(shift)
    return packed


def unpack_codes(packed: NDArray[np.uint64], sizes: Sequence[int]) -> Codes:
    """Return the (n, L) codes that `pack_codes` packed, in the smallest unsigned dtype."""
    codes = np.empty((len(packed), len(sizes)), dtype=code_dtype(sizes))
    for level, (word, shift) in enumerate(word_layout(sizes)):
        mask = np.uint64((1 << (sizes[level] - 1).bit_length()) - 1)
        codes[:, level] = (packed[:, word] >> np.uint64(shift)) & mask
    return codes
