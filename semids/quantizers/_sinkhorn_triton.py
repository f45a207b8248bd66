"""One pass of balanced assignment over a matrix on a CUDA device, which is otherwise read twice, and written first."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024
"""Parts that the rows are cut into: enough for every multiprocessor to have several."""
TILE = 2048
"""Numbers that a program works on at a time."""


def column_loads(logits: Tensor, potentials: Tensor) -> Tensor:
    """Return the (K,) column sums of the (n, K) softmax of `logits` + `potentials`, float32.

    They are summed in the same order in every run.

    Args:
        logits: (n, K) float32, contiguous.
        potentials: (K,) float32.
    """
    rows, size = logits.shape
    width = triton.next_power_of_2(size)
    height = max(1, TILE // width)
    part = triton.cdiv(triton.cdiv(rows, PROGRAMS), height) * height
    parts = triton.cdiv(rows, part) if rows else 0
    loads = torch.empty((parts, size), device=logits.device)
    if parts:
        kernel: Any = _add_up
        kernel[(parts,)](logits, potentials, loads, rows, size, PART=part, WIDTH=width, HEIGHT=height, num_warps=4)
    return loads.sum(dim=0)


@triton.jit
def _add_up(  # type: ignore[no-untyped-def]
    logits, potentials, loads, rows, size, PART: tl.constexpr, WIDTH: tl.constexpr, HEIGHT: tl.constexpr
):
    """Add up the softmax of PART rows, HEIGHT of them at a time."""
    columns = tl.arange(0, WIDTH)
    inside = columns < size
    potential = tl.load(potentials + columns, mask=inside, other=-float("inf"))
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for first in range(0, PART, HEIGHT):
        row = tl.program_id(0) * PART + first + tl.arange(0, HEIGHT)
        live = row < rows
        places = row.to(tl.int64)[:, None] * size + columns[None, :]
        values = tl.load(logits + places, mask=live[:, None] & inside[None, :], other=0.0) + potential[None, :]
        shares = tl.exp(values - tl.max(values, axis=1)[:, None])
        total += tl.where(live[:, None], shares / tl.sum(shares, axis=1)[:, None], 0.0)
    tl.store(loads + tl.program_id(0) * size + columns, tl.sum(total, axis=0), mask=inside)
