"""Every figure of codes: collisions, their floors, loads and buckets. Numbers in, numbers out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semids.arrays import LARGEST_CODEBOOK, Codes, capacity_of, check_codes
from semids.buckets import BucketFigures, BucketTally
from semids.errors import CodesError, ShapeError

# Rows per block: the temporaries of a block take some tens of megabytes, whatever the size of a chunk.
BLOCK_ROWS = 1 << 20
LOAD_CURVE_POINTS = 257


@dataclass(frozen=True)
class LevelFigures:
    """How evenly one level's codes are used. None: not known, or not defined for an empty split.

    Args:
        codebook_size: K, codewords of the level.
        codes_used: codes that at least one item has.
        utilization: codes_used / K.
        perplexity: exp(entropy in nats) of the codes' shares of the items, in [1, K].
        load_min: items on the code that has the fewest; 0 if a code is unused. None if K is not known.
        load_max: items on the code that has the most.
        load_min_contents: as load_min, in distinct contents.
        load_max_contents: as load_max, in distinct contents.
        load_curve: items per code, most first; every code (every used one, if K is not known) up to 257 of
            them, else 257 evenly spaced ones, first and last included.
    """

    codebook_size: int | None
    codes_used: int
    utilization: float | None
    perplexity: float | None
    load_min: int | None
    load_max: int
    load_min_contents: int | None
    load_max_contents: int | None
    load_curve: tuple[int, ...]


@dataclass(frozen=True)
class BucketBin:
    """IDs whose number of items lies in [smallest, largest], and the items that they have together."""

    smallest: int
    largest: int
    ids: int
    items: int


@dataclass(frozen=True)
class IdFigures:
    """What IDs do to a set of items: N items, D distinct contents, C possible IDs.

    None: not known (no contents, or no codebook sizes, were given), or not defined for 0 items.

    Args:
        items: N.
        distinct_contents: D.
        unique_ids: IDs that at least one item has.
        collision_rate: 1 − unique_ids / N (the definition of LC-Rec, arXiv 2311.09049, and of its evaluation code).
        colliding_share: items whose ID another item has / N.
        duplicate_floor: 1 − D/N; no code that is a function of content has a lower collision rate.
        excess_collisions: D − unique_ids.
        largest_bucket: items on the ID that has the most.
        largest_bucket_contents: distinct contents on the ID that has the most of them (perhaps another ID).
        capacity: C, the product of the codebook sizes.
        capacity_ratio: C/D.
        capacity_floor: max(0, 1 − C/N).
        floor: max(duplicate_floor, capacity_floor).
        uniform_hash_reference: 1 − C(1 − e^(−D/C))/N, the expected collision rate of IDs drawn at random
            for each content (the occupancy problem, in its Poisson limit).
        id_space_utilization: unique_ids / min(D, C).
        unique_prefixes: distinct prefixes of 1 to L codes.
        prefix_collision_rate: 1 − unique prefixes / N, for prefixes of 1 to L codes.
        levels: one entry a level, first level first.
        bucket_histogram: IDs by their number of items, fewest first, empty bins left out; exact up to 16 items
            an ID, then up to each power of two.
    """

    items: int
    distinct_contents: int | None
    unique_ids: int
    collision_rate: float | None
    colliding_share: float | None
    duplicate_floor: float | None
    excess_collisions: int | None
    largest_bucket: int
    largest_bucket_contents: int | None
    capacity: int | None
    capacity_ratio: float | None
    capacity_floor: float | None
    floor: float | None
    uniform_hash_reference: float | None
    id_space_utilization: float | None
    unique_prefixes: tuple[int, ...]
    prefix_collision_rate: tuple[float | None, ...]
    levels: tuple[LevelFigures, ...]
    bucket_histogram: tuple[BucketBin, ...]


def measure_ids(
    codes: Iterable[Codes],
    multiplicities: Iterable[NDArray[np.uint32]] | None,
    *,
    sizes: Sequence[int] | None,
) -> IdFigures:
    """Measure the IDs of one set of items, such as a split, from a stream of codes.

    Memory is 8 bytes per distinct content as long as the codes take at most 62 bits and no content has more
    items than the bits left can count (2^36 for 512x512x512); see `BucketTally` for what happens beyond.

    Args:
        codes: chunks of (n, L) codes of distinct contents; each content comes once.
        multiplicities: for each chunk of codes, the (n,) number of items with each content in the set that is
            measured; 0 leaves the content out. None: every row is an item and nothing is known of contents,
            as in a published index; figures of contents are then None.
        sizes: codebook sizes. None: not known; figures that need them are then None, and the chunks are held
            in memory, since the keys that are counted need a width.

    Raises:
        CodesError: a code lies outside its codebook (bit-packed bytes read as codes do), chunks differ in
            their number of levels, or there is no chunk and no `sizes` to tell the number of levels.
        ShapeError: multiplicities are not one non-negative integer a row.
    """
    packing = sizes
    if packing is None:
        codes = list(codes)
        packing = _observed_sizes(codes)
    tally = BucketTally(packing)
    item_loads = [np.zeros(size, dtype=np.int64) for size in packing]
    content_loads = [np.zeros(size, dtype=np.int64) for size in packing]
    for block, counts in _blocks(codes, multiplicities):
        check_codes(block, packing)
        present = counts > 0
        block, counts = (block, counts) if present.all() else (block[present], counts[present])
        tally.add(block, counts)
        for level, size in enumerate(packing):
            column = block[:, level].astype(np.intp)
            content_loads[level] += np.bincount(column, minlength=size)
            # float64 weights are exact: a load below 2^53 items.
            item_loads[level] += np.bincount(column, weights=counts, minlength=size).astype(np.int64)
    buckets = tally.finish()
    items = int(item_loads[0].sum())
    contents = None if multiplicities is None else int(content_loads[0].sum())
    levels = tuple(
        _level_figures(item_loads[level], None if contents is None else content_loads[level], known=sizes is not None)
        for level in range(len(packing))
    )
    return _id_figures(items, contents, None if sizes is None else capacity_of(sizes), buckets, levels)


def uniform_hash_rate(items: int, contents: int, capacity: int) -> float:
    """Return the collision rate expected if each content drew its ID at random: 1 − C(1 − e^(−D/C))/N.

    The expected number of occupied IDs is C(1 − (1 − 1/C)^D); e^(−D/C) is its limit for large C.
    """
    # expm1: at D/C = 1e-9, 1 - exp keeps seven digits and the product with C none that matter.
    return max(0.0, 1.0 + capacity * math.expm1(-contents / capacity) / items)


def _observed_sizes(chunks: Sequence[Codes]) -> list[int]:
    if not chunks:
        raise CodesError("expected at least one chunk of codes or the codebook sizes, got neither")
    levels = chunks[0].shape[-1]
    sizes = np.full(levels, 2, dtype=np.int64)
    for chunk in chunks:
        if chunk.ndim != 2 or chunk.shape[1] != levels or not levels:
            raise CodesError(f"expected chunks of codes of shape (n, {levels or 'L'}), got {chunk.shape}")
        if len(chunk):
            sizes = np.maximum(sizes, chunk.max(axis=0).astype(np.int64) + 1)
    if sizes.max() > LARGEST_CODEBOOK:
        level = int(sizes.argmax())
        raise CodesError(
            f"expected codes from 0 to {LARGEST_CODEBOOK - 1}, got {sizes[level] - 1} on level {level + 1}: "
            "are these codes, or packed or hashed IDs?"
        )
    return sizes.tolist()


def _blocks(
    codes: Iterable[Codes], multiplicities: Iterable[NDArray[np.uint32]] | None
) -> Iterator[tuple[Codes, NDArray[np.int64]]]:
    """Yield (codes, items of each row) in blocks of bounded size."""
    counts: Iterable[NDArray[Any] | None] = itertools.repeat(None) if multiplicities is None else multiplicities
    counts = iter(counts)
    for chunk in codes:
        chunk_counts = np.ones(len(chunk), dtype=np.uint32) if multiplicities is None else next(counts, None)
        if chunk_counts is None or chunk_counts.shape != chunk.shape[:1]:
            got = "none" if chunk_counts is None else f"shape {chunk_counts.shape}"
            raise ShapeError(f"expected multiplicities of shape {chunk.shape[:1]} beside the codes, got {got}")
        if chunk_counts.dtype.kind not in "iu" or (chunk_counts.dtype.kind == "i" and chunk_counts.min(initial=0) < 0):
            raise ShapeError(f"expected multiplicities as non-negative integers, got {chunk_counts.dtype}")
        for start in range(0, len(chunk), BLOCK_ROWS):
            stop = start + BLOCK_ROWS
            yield chunk[start:stop], chunk_counts[start:stop].astype(np.int64)
    if multiplicities is not None and next(counts, None) is not None:
        raise ShapeError("expected one chunk of multiplicities for each chunk of codes, got more")


def _level_figures(items: NDArray[np.int64], contents: NDArray[np.int64] | None, *, known: bool) -> LevelFigures:
    """Describe (K,) loads; `known`: K is the codebook's size, not just the largest code that was seen."""
    total, used = int(items.sum()), int(np.count_nonzero(items))
    shares = items[items > 0] / max(total, 1)
    curve = np.sort(items)[::-1] if known else np.sort(items[items > 0])[::-1]
    if len(curve) > LOAD_CURVE_POINTS:
        curve = curve[np.linspace(0, len(curve) - 1, LOAD_CURVE_POINTS).round().astype(np.intp)]
    return LevelFigures(
        codebook_size=len(items) if known else None,
        codes_used=used,
        utilization=used / len(items) if known else None,
        perplexity=float(np.exp(-np.sum(shares * np.log(shares)))) if total else None,
        load_min=int(items.min()) if known else None,
        load_max=int(items.max()),
        load_min_contents=int(contents.min()) if known and contents is not None else None,
        load_max_contents=int(contents.max()) if contents is not None else None,
        load_curve=tuple(curve.tolist()),
    )


def _id_figures(
    items: int,
    contents: int | None,
    capacity: int | None,
    buckets: BucketFigures,
    levels: tuple[LevelFigures, ...],
) -> IdFigures:
    unique = buckets.unique_prefixes[-1]
    duplicate_floor = 1 - contents / items if items and contents is not None else None
    capacity_floor = max(0.0, 1 - capacity / items) if items and capacity is not None else None
    floor = reference = ratio = utilization = None
    if items and contents is not None and capacity is not None:
        floor = max(1 - contents / items, 1 - capacity / items)
        reference = uniform_hash_rate(items, contents, capacity)
        ratio = capacity / contents
        utilization = unique / min(contents, capacity)
    return IdFigures(
        items=items,
        distinct_contents=contents,
        unique_ids=unique,
        collision_rate=1 - unique / items if items else None,
        colliding_share=buckets.colliding_items / items if items else None,
        duplicate_floor=duplicate_floor,
        excess_collisions=None if contents is None else contents - unique,
        largest_bucket=buckets.largest_items,
        largest_bucket_contents=None if contents is None else buckets.largest_contents,
        capacity=capacity,
        capacity_ratio=ratio,
        capacity_floor=capacity_floor,
        floor=floor,
        uniform_hash_reference=reference,
        id_space_utilization=utilization,
        unique_prefixes=buckets.unique_prefixes,
        prefix_collision_rate=tuple(1 - count / items if items else None for count in buckets.unique_prefixes),
        levels=levels,
        bucket_histogram=tuple(BucketBin(*entry) for entry in buckets.histogram),
    )
