"""Threads for array work, whose results do not depend on how many there are."""

from __future__ import annotations

import importlib
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from threadpoolctl import OpenBLASController, ThreadpoolController

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


def in_order(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `work(item)` for every item, in the order of the items, computed by threads ahead of their turn.

    Items are asked for by the thread that asks for results, a few ahead of them. A product of matrices by NumPy within
    `work` runs in its thread alone, so that its bytes are the same for any number of threads, and so does what PyTorch
    computes entry by entry. Called within `work`, this computes one item after the other.

    Raises:
        Exception: what `work` raised for the first item, in their order, that failed.
    """
    if getattr(_here, "is_worker", False):
        yield from map(work, items)
        return
    count = min(thread_count(), len(items)) if isinstance(items, Sized) else thread_count()
    with single_threaded_products():
        if count <= 1:
            yield from map(work, items)
            return
        _openmp()  # Not first by workers, all at once.
        waiting: deque[Future[Result]] = deque()
        with ThreadPoolExecutor(count, initializer=_become_worker) as pool:
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


def slices(rows: int, step: int) -> list[slice]:
    """Return the slices that divide so many rows into parts of `step` rows and a last one."""
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _become_worker() -> None:
    import torch

    _here.is_worker = True
    # For this thread alone; PyTorch, which first takes over what the process has, would set it for others, too.
    torch.get_num_threads()
    _openmp().limit(limits=1)


@cache
def _openmp() -> ThreadpoolController:
    # Otherwise its library, loaded later, would not be among those that are found.
    importlib.import_module("torch")
    return ThreadpoolController().select(user_api="openmp")


@cache
def _products() -> ThreadpoolController:
    importlib.import_module("scipy.linalg")
    loaded = ThreadpoolController()
    libraries = [library["filepath"] for library in loaded.info() if library["user_api"] == "blas"]
    return loaded.select(filepath=[path for path in libraries if "faiss" not in Path(path).parent.name])


def _take_control() -> None:
    """Have limits obeyed that this thread sets: from 3.8 on, threadpoolctl obeys the first thread that set some."""
    give_way = getattr(OpenBLASController, "clear_controlling_thread", None)
    if give_way is not None:
        give_way(force=True)


class _Limits:
    """How many regions need NumPy to keep to one thread each, and what undoes it when none is left."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.regions = 0
        self.undo: Callable[[], Any] = lambda: None


_limits = _Limits()


@contextmanager
def single_threaded_products() -> Generator[None]:
    """Have NumPy and SciPy compute every product of matrices in the thread that asks for it.

    The last bits of a product depend on how many threads share it, and that number is one for the whole process (in the
    wheels of both): cells of a sweep, which are threads of it, would change each other's results. FAISS's library is
    built with OpenMP, which has a number for each thread; see `kmeans`.
    """
    with _limits.lock:
        if not _limits.regions:
            _take_control()
            _limits.undo = _products().limit(limits=1).restore_original_limits
        _limits.regions += 1
    try:
        yield
    finally:
        with _limits.lock:
            _limits.regions -= 1
            if not _limits.regions:
                _take_control()
                _limits.undo()
                _take_control()
