"""Encoding and placing within bounds hold no more memory for eight times the rows."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SMALL, LARGE, DIMENSIONS = 20_000, 160_000, 512
TIMEOUT_S = 240
CHILD = """
import json, sys, threading, time
from pathlib import Path
import numpy as np
from semids.capacity import resolve_bounds
from semids.prefixes import assign_level, nearest_quantizer
from semids.shards import ShardedArray, ShardLayout

path, most = sys.argv[1], {"RssAnon": 0, "VmData": 0}

def watch():
    while True:
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in most:
                most[name] = max(most[name], int(value.split()[0]) * 1024)
        time.sleep(0.01)

threading.Thread(target=watch, daemon=True).start()
shape = np.load(path, mmap_mode="r").shape
array = ShardedArray(ShardLayout(*shape, "float16", shard_rows=shape[0]), lambda _: path)
books = [array.take(np.arange(level, level + 16)).astype(np.float32) / 2**level for level in range(3)]
quantizer = nearest_quantizer(books)
for start, rows in array.chunks(8192):
    quantizer.encode(rows)
bounds = resolve_bounds(shape[0], 16**3, least="auto", most="auto")
codes = np.zeros((shape[0], 3), np.uint8)
for level in range(3):
    codes[:, level] = assign_level(array.take, quantizer, codes[:, :level], bounds, contents=shape[0]).codes
loads = np.unique(codes, axis=0, return_counts=True)[1]
assert len(loads) == 16**3 and loads.max() <= bounds.most
print(json.dumps(most))
"""


def memory_of(path: Path, *, limit: int | None = None) -> dict[str, int]:
    """Return the most anonymous and the most reserved private memory of a process that encodes a file, in bytes."""

    def set_limit() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        preexec_fn=set_limit,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Guards: the memory maps of `ShardedArray`, the chunks of `residual` and `prefixes`."""
    rows = np.random.default_rng(0).standard_normal((LARGE, DIMENSIONS), dtype=np.float32).astype(np.float16)
    np.save(tmp_path / "large.npy", rows)
    np.save(tmp_path / "small.npy", rows[:SMALL])
    small = memory_of(tmp_path / "small.npy")
    # The vectors alone, 164 MB, would not fit into what the limit leaves.
    large = memory_of(tmp_path / "large.npy", limit=round(1.1 * small["VmData"]))
    assert large["RssAnon"] <= 1.1 * small["RssAnon"], (large, small)
    assert rows.nbytes > 0.1 * small["VmData"]
