"""Threads for array work, whose results do not depend on how many there are."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

AHEAD = 2
"""Items a thread that are at work or done before their turn: what they hold in memory is bounded."""

Item = TypeVar("Item")
Result = TypeVar("Result")

_here = threading.local()


def thread_count() -> int:
    """Return how many threads work at a time: OMP_NUM_THREADS where it is set, else the processors at hand."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield `work(item)` for every item, in the order of the items, computed by threads ahead of their turn.

    A product of matrices within `work` runs in its thread alone, so that its bytes are the same for any number of
    threads. Called within `work`, this computes one item after the other.

    Raises:
        Exception: what `work` raised for the first item, in their order, that failed.
    """
    count = min(thread_count(), len(items))
    if count <= 1 or getattr(_here, "is_worker", False):
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    with _single_threaded_libraries(), ThreadPoolExecutor(count, initializer=_become_worker) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) == AHEAD * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _become_worker() -> None:
    _here.is_worker = True


class _Limits:
    """How many regions need libraries to keep to one thread each, and what to undo when none is left."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.regions = 0
        self.undo: list[Callable[[], Any]] = []


_limits = _Limits()


@contextmanager
def _single_threaded_libraries() -> Generator[None]:
    # The setting is one for the whole process, and cells of a sweep are threads of it: the last region restores it.
    # Imported here: most of the package does without.
    import torch
    from threadpoolctl import ThreadpoolController

    with _limits.lock:
        if not _limits.regions:
            limiter = ThreadpoolController().limit(limits=1, user_api="blas")
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            _limits.undo = [limiter.restore_original_limits, lambda: torch.set_num_threads(threads)]
        _limits.regions += 1
    try:
        yield
    finally:
        with _limits.lock:
            _limits.regions -= 1
            if not _limits.regions:
                for step in _limits.undo:
                    step()
