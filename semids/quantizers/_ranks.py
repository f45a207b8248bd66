"""The processes that train together: sums over them, and who writes."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """One process, or its place among those of the default group of `torch.distributed`.

    Args:
        rank: its number, from 0.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks; may overwrite."""
        if self.world > 1:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.SUM)
        return values

    def max(self, values: Tensor) -> Tensor:
        """Return the elementwise maximum over all ranks; may overwrite."""
        if self.world > 1:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return values

    def broadcast(self, values: Tensor) -> None:
        """Overwrite with the values of rank 0."""
        if self.world > 1:
            torch.distributed.broadcast(values, 0)
