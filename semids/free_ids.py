"""IDs that nobody has yet, for contents that come after the model was made: what the rule gives, or what is near."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from semids.arrays import Codes, capacity_of, check_vectors, code_dtype
from semids.blocks import READ_ROWS, Group, Take, blocks_of, over_groups
from semids.capacity import Costs, cheapest_children, round_to_loads
from semids.errors import UsageError
from semids.residual import ResidualCodebooks, prefix_numbers


def find_free_ids(take: Take, quantizer: ResidualCodebooks, given: Codes, *, rows: int) -> Codes:
    """Give every row an ID that neither a given code nor another row has.

    A row whose own ID, by the frozen rule, is free and asked for by no other has it. The others go down from the first
    level: a row takes the child that the rule gives it, unless all IDs below are taken, or asked for by rows that lose
    more elsewhere: then the best child with an ID left. A function of the vectors, the quantizer and the given codes
    alone.

    Args:
        take: returns the vectors of the given rows.
        quantizer: the frozen codebooks and prices.
        given: (m, L) codes that are taken already, repetitions allowed.
        rows: n.

    Returns:
        (n, L) codes, in the smallest unsigned type.

    Raises:
        UsageError: there are fewer free IDs than rows.
        ShapeError: the vectors have another width than the codebooks.
    """
    sizes = quantizer.sizes
    if rows:
        check_vectors(take(np.arange(1)), dimensions=quantizer.dimensions)
    taken = np.unique(given, axis=0)
    check_room(sizes, taken, rows)
    codes = np.zeros((rows, len(sizes)), dtype=code_dtype(sizes))
    for start in range(0, rows, READ_ROWS):
        codes[start : start + READ_ROWS] = quantizer.assign(take(np.arange(start, min(start + READ_ROWS, rows))))
    undecided = np.flatnonzero(~_asked_alone(codes, taken))
    taken = np.concatenate([taken, np.delete(codes, undecided, axis=0)])
    for level in range(len(sizes)):
        before = codes[undecided, :level]
        codes[undecided, level] = _place_level(lambda some: take(undecided[some]), quantizer, before, taken)
    return codes


def _asked_alone(codes: Codes, taken: Codes) -> NDArray[np.bool_]:
    """Return which of the (n, L) codes are neither taken nor another row's."""
    _, places, counts = np.unique(np.concatenate([taken, codes]), axis=0, return_inverse=True, return_counts=True)
    return counts[places[len(taken) :]] == 1


def _place_level(take: Take, quantizer: ResidualCodebooks, before: Codes, taken: Codes) -> NDArray[np.int64]:
    """Return the (n,) codes on the level after the (n, l) before it, so that every row has a free ID below its own."""
    sizes, level = quantizer.sizes, before.shape[1]
    size, below = sizes[level], capacity_of(sizes[level + 1 :])
    children, counts = np.unique(prefix_numbers(taken[:, : level + 1], sizes), return_counts=True)
    prices = quantizer.prices[level] if quantizer.prices else None
    prefixes = prefix_numbers(before, sizes)

    def assign(group: Group) -> NDArray[np.int64]:
        prefix = int(prefixes[group.rows[0]])
        room = below - _counts_of_children(prefix * size, size, children, counts)
        return _assign_free(group.costs, len(group.rows), room, prices.find(prefix) if prices is not None else None)

    codes = np.empty(len(before), np.int64)
    for block in blocks_of(take, quantizer, before, prefixes):
        groups = block.groups(block.read())
        for group, found in zip(groups, over_groups(assign, groups), strict=True):
            codes[group.rows] = found
    return codes


def check_room(sizes: Sequence[int], taken: Codes, rows: int) -> None:
    """Refuse to find free IDs for more rows than there are.

    Args:
        taken: (m, L) different codes.

    Raises:
        UsageError: there are fewer free IDs than rows.
    """
    free = capacity_of(sizes) - len(taken)
    if free < rows:
        raise UsageError(
            f"expected a free ID for each of {rows:,} new contents, got {free:,} free of {capacity_of(sizes):,}; "
            "train a larger shape, or encode without unique IDs"
        )


def _assign_free(
    costs: Costs, rows: int, room: NDArray[np.int64], prices: NDArray[np.float32] | None
) -> NDArray[np.int64]:
    def priced(some: NDArray[np.int64]) -> NDArray[np.float32]:
        return costs(some) if prices is None else costs(some) - prices

    ruled = cheapest_children(costs, rows, prices)
    return round_to_loads(priced, ruled, least=np.zeros_like(room), most=room)


def _counts_of_children(
    first: int, size: int, children: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return how many given IDs lie under each of `size` consecutive prefixes, of those that have any."""
    found = np.zeros(size, np.int64)
    here = slice(*np.searchsorted(children, [first, first + size]))
    found[children[here] - first] = counts[here]
    return found
