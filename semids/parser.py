"""CPython's parser, which fails now and then where several threads parse: here they take turns, and try again.

CPython up to 3.11.7 and 3.12.1 counts the recursion of `ast.parse` in one place for all threads, and answers
"AST constructor recursion depth mismatch" (a SystemError) where another thread got a turn meanwhile:
https://github.com/python/cpython/issues/106905. NumPy parses the header of every .npy file so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

TRIES = 10
SECONDS_BETWEEN_TRIES = 0.01

T = TypeVar("T")

_turn = threading.RLock()


def parsing(parse: Callable[[], T]) -> T:
    """Return `parse()`, alone among the threads that come here, and again where a thread from elsewhere disturbs it.

    Raises:
        SystemError: it failed `TRIES` times.
    """
    tries = 0
    while True:
        try:
            with _turn:
                return parse()
        except SystemError:
            tries += 1
            if tries == TRIES:
                raise
        time.sleep(SECONDS_BETWEEN_TRIES)


def open_npy(path: Path) -> NDArray[Any]:
    """Return the array of a .npy file, memory-mapped read-only.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not an array of numbers.
    """
    return parsing(lambda: np.lib.format.open_memmap(path, mode="r"))
