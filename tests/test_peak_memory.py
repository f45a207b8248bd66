"""The memory that a piece of work takes is its own, and pages of files are not part of it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from semids import memory
from semids.memory import PeakMemory, available_bytes, held_bytes

MIB = 1 << 20


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_leaves_what_its_limit_does(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1 GiB, 512 MiB are used: 300 MiB of them pages of files, of which 100 MiB are shared memory and stay."""
    group = tmp_path / ("memory/job" if version == 1 else "job")
    group.mkdir(parents=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    for name, number in zip(names, (1024 * MIB, 512 * MIB), strict=True):
        (group / name).write_text(f"{number}\n")
    pages, shared = ("total_cache", "total_shmem") if version == 1 else ("file", "shmem")
    (group / "memory.stat").write_text(f"{pages} {300 * MIB}\n{shared} {100 * MIB}\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    own = "4:memory:/job\n3:cpu:/job\n\n" if version == 1 else "0::/job\n"
    (tmp_path / "cgroup").write_text(own)
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "cgroup")
    assert available_bytes() == 712 * MIB


def test_the_peak_of_a_stage_is_its_own(tmp_path: Path) -> None:
    with PeakMemory() as large:
        block = np.ones(64 * MIB // 8)
        time.sleep(0.1)
        del block
    with PeakMemory() as small:
        time.sleep(0.05)
    assert large.bytes - small.bytes > 50 * MIB
    assert small.bytes == pytest.approx(held_bytes(), abs=16 * MIB)
    assert not [thread for thread in threading.enumerate() if thread.name == "memory"]


def test_pages_of_mapped_files_are_not_counted(tmp_path: Path) -> None:
    np.save(tmp_path / "mapped.npy", np.ones(64 * MIB // 8))
    before = held_bytes()
    mapped = np.load(tmp_path / "mapped.npy", mmap_mode="r")
    with PeakMemory() as peak:
        assert mapped.sum() == len(mapped)
    assert peak.bytes - before < 16 * MIB


MANY_THREADS = """
import ctypes, sys, threading
from pathlib import Path
from semids.progress import silent
from semids.stages import Stage, run_stage
run_stage(Path(sys.argv[1]), Stage("s", "A stage", {}, lambda output: {}), silent)
libc, together = ctypes.CDLL(None), threading.Barrier(12)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
def allocate():
    together.wait()
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(12)]
for thread in threads: thread.start()
for thread in threads: thread.join()
file = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, file)
libc.fclose(file)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="the C library is not glibc")
def test_threads_share_the_heaps_of_the_c_library(tmp_path: Path) -> None:
    """Guard: `share_arenas` in `semids.stages`. Each of the 12 threads would have a heap of its own, for good."""
    command = [sys.executable, "-c", MANY_THREADS, str(tmp_path / "run"), str(tmp_path / "heaps")]
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "3"}, check=True)
    assert (tmp_path / "heaps").read_text().count("<heap nr=") == 3


def test_what_is_available_is_less_than_all_there_is() -> None:
    available = available_bytes()
    assert available is not None
    assert 0 < available < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
