"""The rows an RQ-VAE is trained on: which are held out, in which order an epoch has them, and how they are read."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from semids.kmeans import sample_rows
from semids.parallel import thread_count
from semids.quantizers._ranks import Ranks
from semids.shards import ShardedArray, ShardLayout
from semids.work import fits_device

HELD_OUT_SHARE = 0.05
MOST_HELD_OUT = 1 << 18
BATCHES_AHEAD = 2
READERS = 8
"""Threads that read rows for a CUDA device: one alone reads a fraction of what training there consumes."""
READ_ROWS = 4096
"""Rows that such a thread reads at a time."""


def hold_out(rows: NDArray[np.int64], *, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows to train on, and those to judge by: another seeded 5 %, or all of them where they are few."""
    held = sample_rows(len(rows), min(round(HELD_OUT_SHARE * len(rows)), MOST_HELD_OUT), seed=seed)
    return (np.delete(rows, held), rows[held]) if len(held) else (rows, rows)


def epoch_order(rows: int, epoch: int, *, seed: int) -> NDArray[np.uint32]:
    """Return the places of the rows, uint32, in the order in which an epoch has them: a function of its arguments."""
    order = np.arange(rows, dtype=np.uint32)
    np.random.default_rng((seed, epoch)).shuffle(order)
    return order


def epoch_orders(rows: int, epochs: range, *, seed: int) -> Iterator[NDArray[np.uint32]]:
    """Yield the order of each epoch; another thread draws the next meanwhile, which holds 4 bytes a row more."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(epoch_order, rows, epochs.start, seed=seed)
        for epoch in epochs:
            order = following.result()
            if epoch + 1 in epochs:
                following = pool.submit(epoch_order, rows, epoch + 1, seed=seed)
            yield order
            # Not held while the one after the next is drawn.
            del order


def batch_places(order: NDArray[np.uint32], size: int, *, start: int, ranks: Ranks) -> Iterator[NDArray[np.int64]]:
    """Yield the places of each batch from batch `start` on, ascending: a rank's part of them, which may be empty."""
    for first in range(start * size, len(order), size):
        yield np.sort(order[first : first + size])[ranks.rank :: ranks.world].astype(np.int64)


class RowSource(Protocol):
    """Rows by their places."""

    def read(self, places: NDArray[np.int64]) -> Tensor:
        """Return the rows at (b,) ascending places as a (b, d) tensor; called from another thread."""
        ...


class StreamedRows:
    """Rows that are read from their files, whose pages the system keeps in memory as long as there is room.

    For a CUDA device they are read by several threads, and copied there while it computes.

    Args:
        rows: (n,) the rows of the array that places stand for.
        device: where they are wanted.
    """

    def __init__(self, vectors: ShardedArray, rows: NDArray[np.int64], device: torch.device) -> None:
        self._vectors, self._rows, self._device = vectors, rows, device

    def read(self, places: NDArray[np.int64]) -> Tensor:
        """Return the rows as they are stored."""
        rows, layout = self._rows[places], self._vectors.layout
        if self._device.type != "cuda":
            return torch.from_numpy(self._vectors.take(rows))
        # Of memory that the device reads by itself.
        found = torch.empty((len(rows), layout.columns), dtype=_stored_type(layout), pin_memory=True)

        def fetch(start: int) -> None:
            part = slice(start, start + READ_ROWS)
            self._vectors.take(rows[part], out=found[part].numpy())

        for _ in _readers().map(fetch, range(0, len(rows), READ_ROWS)):
            pass  # What a thread raised is raised here.
        copies = _copies(self._device)
        with torch.cuda.stream(copies):
            copied = found.to(self._device, non_blocking=True)
        copies.synchronize()
        # Its memory is not for another copy while what computes with it waits for its turn.
        copied.record_stream(torch.cuda.default_stream(self._device))
        return copied


@functools.cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(READERS, thread_count()))


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream that rows are copied on: PyTorch never gives what another had to a new one."""
    return torch.cuda.Stream(device)


class ResidentRows:
    """Rows that lie in a device's memory, as they are stored."""

    def __init__(self, vectors: ShardedArray, rows: NDArray[np.int64], device: torch.device) -> None:
        layout = vectors.layout
        self._values = torch.empty((len(rows), layout.columns), dtype=_stored_type(layout), device=device)
        source, step = StreamedRows(vectors, rows, device), layout.shard_rows
        for start in range(0, len(rows), step):
            part = np.arange(start, min(start + step, len(rows)))
            self._values[start : start + step] = source.read(part)

    def read(self, places: NDArray[np.int64]) -> Tensor:
        """Return the rows, gathered on the device."""
        return self._values.index_select(0, torch.from_numpy(places).to(self._values.device))


def open_rows(vectors: ShardedArray, rows: NDArray[np.int64], device: torch.device, *, needed: int) -> RowSource:
    """Return the rows, resident on a CUDA device where they fit there; else streamed.

    Args:
        needed: bytes of the device's memory that are needed besides.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch holds and does not use is free, too.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if fits_device(len(rows) * vectors.layout.row_bytes, needed, free):
            return ResidentRows(vectors, rows, device)
    return StreamedRows(vectors, rows, device)


def _stored_type(layout: ShardLayout) -> torch.dtype:
    return torch.float16 if layout.dtype == "float16" else torch.float32


def read_ahead(read: Callable[[Any], Tensor], items: Iterable[Any], device: torch.device) -> Iterator[Tensor]:
    """Yield `read(item)` for every item, in order, as stored, on the device; another thread reads what comes next."""
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > BATCHES_AHEAD:
                    yield waiting.popleft().result().to(device, non_blocking=True)
            while waiting:
                yield waiting.popleft().result().to(device, non_blocking=True)
        finally:
            for future in waiting:
                future.cancel()
