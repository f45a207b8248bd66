"""Probes that all stages share: files written and digested, rows of vectors read."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semids.memory import available_bytes
from semids.progress import silent
from semids.shards import ShardedArray, ShardLayout, shard_name, write_shards
from semids.store import commit_bytes, digest_file
from semids.work import Counts, Probe

WRITTEN_BYTES = 128 << 20
"""Bytes of a file that is written: a shard's. Smaller ones stay in what the disk buffers."""
PROBE_BYTES = 64 << 20
"""Bytes that are read."""
PROBE_ROWS = 8192
PROBE_ENTRIES = 1 << 21
"""Codewords × dimensions that are multiplied with rows at most: more only takes longer."""

Prepared = tuple[Callable[[], Any], float]


def draw_rows(rows: int, dimensions: int, itemsize: int = 4) -> NDArray[Any]:
    """Return (rows, d) unit vectors around centres of unequal popularity, as float16 or float32 by their itemsize."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, 65)
    centres = rng.standard_normal((64, dimensions), dtype=np.float32)
    vectors = centres[rng.choice(64, rows, p=popularity / popularity.sum())]
    vectors += rng.standard_normal((rows, dimensions), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(f"float{8 * itemsize}")


def writing() -> Probe:
    """Bytes committed: written, flushed and digested."""

    def prepare(folder: Path) -> Prepared:
        data = np.random.default_rng(0).bytes(WRITTEN_BYTES)
        # Each time a new file: what replaces a file finds its place on the disk taken already.
        numbers = itertools.count()
        return lambda: commit_bytes(folder / f"written-{next(numbers)}", data), WRITTEN_BYTES

    return Probe("write", prepare)


def digesting(*, cached: bool) -> Probe:
    """Bytes of files digested, which every stage does before it reads them.

    Args:
        cached: they are in memory; otherwise the disk is read.
    """

    def prepare(folder: Path) -> Prepared:
        path = folder / "read"
        commit_bytes(path, np.random.default_rng(0).bytes(PROBE_BYTES))

        def run() -> None:
            if not cached and hasattr(os, "posix_fadvise"):
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
            digest_file(path)

        return run, PROBE_BYTES

    return Probe(f"digest, {'in memory' if cached else 'on disk'}", prepare)


def loading_pytorch() -> Probe:
    """Loads of PyTorch, which takes a process that has not used it yet a second and more."""

    def prepare(folder: Path) -> Prepared:
        command = [sys.executable, "-c", "import torch"]
        return lambda: subprocess.run(command, check=True), 1

    return Probe("load PyTorch", prepare, once=True)


def reading(counts: Counts) -> Probe:
    """Bytes of vectors digested: from memory where they stay there from stage to stage, else from the disk."""
    available = available_bytes()
    return digesting(cached=available is None or 2 * counts.vector_bytes < available)


def taking(dimensions: int, itemsize: int) -> Probe:
    """Rows gathered from committed shards that were just opened: mapping their pages takes most of the time."""

    def prepare(folder: Path) -> Prepared:
        rows = max(1, min(4 * PROBE_ROWS, PROBE_BYTES // (dimensions * itemsize)))
        layout = ShardLayout(rows, dimensions, f"float{8 * itemsize}")
        zeros = np.zeros((rows, dimensions), layout.dtype)
        write_shards(folder, "rows", layout, lambda start, stop: zeros[start:stop], fingerprint="", progress=silent)
        each = np.arange(rows)
        return lambda: ShardedArray(layout, lambda shard: folder / shard_name("rows", shard)).take(each), rows

    return Probe(f"take rows of {dimensions} × {itemsize} bytes", prepare)
