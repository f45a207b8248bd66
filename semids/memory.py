"""Memory: how much a piece of work takes at most, and how much there is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
import threading
from pathlib import Path
from typing import Any, Self

INTERVAL_S = 0.02
"""Between two looks at the process: arrays that count live longer, and a look takes 50 µs."""
STATUS = Path("/proc/self/status")
CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
M_ARENA_MAX = -8
"""Of malloc.h."""
DRIVERS = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))
"""Files of the drivers that PyTorch computes with: without one, it need not be imported to know that there is none."""


class PeakMemory:
    """The most memory that this process holds while the context lasts, in bytes.

    Anonymous memory alone is counted, several times a second: pages of mapped files are given back when others need
    the room. Whatever else the process does meanwhile counts too. Where the system does not tell (macOS), the figure
    is the largest resident memory since the process began.

    `device_bytes` is the most that PyTorch held meanwhile of the memory of this process's CUDA device, for whatever it
    did there; None in a process that has used none.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.device_bytes: int | None = None
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> Self:
        cuda = _cuda_in_use()
        if cuda is not None:
            cuda.reset_peak_memory_stats()
        self._look()
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()
        self._look()
        cuda = _cuda_in_use()
        if cuda is not None:
            self.device_bytes = cuda.max_memory_allocated()

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, held_bytes())


def _cuda_in_use() -> Any:
    """Return `torch.cuda` if this process computes with it, and None if not; imports nothing."""
    cuda: Any = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda if cuda is not None and cuda.is_initialized() else None


def device_free_bytes() -> int | None:
    """Return the memory of its CUDA device that this process has or may take, in bytes; None where there is none.

    What PyTorch holds counts as free: it is for later, or is given back by the time that another stage has its turn on
    the device. Asking makes the process one that uses the device, if there is one.
    """
    if not any(driver.exists() for driver in DRIVERS):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved()


def held_bytes() -> int:
    """Return the anonymous memory that this process holds, in bytes; see `PeakMemory`."""
    held = _field(STATUS, "RssAnon:")
    if held is not None:
        return held * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def share_arenas(count: int) -> None:
    """Have the C library (glibc) keep as many heaps for threads at most, unless MALLOC_ARENA_MAX says how many.

    It obeys until eight threads have had one: this is for a process that begins.
    It would keep eight a processor, each with tens of megabytes of what threads that have ended once used, which
    `release_memory` does not reach: on two processors, 0.6 GB before the report of 200,000 x 1,024 instead of 0.4.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, count)


def release_memory() -> None:
    """Give back to the system what was freed but is kept for later, where the C library can (glibc)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes() -> int | None:
    """Return the memory that this process may still take, in bytes; None where the system does not tell.

    It is what the machine has left, or what the control groups (version 1 or 2) that the process is in leave of their
    limits, whichever is least. Pages of files count as left: they are given back; shared memory is not.
    """
    available = _field(Path("/proc/meminfo"), "MemAvailable:")
    limits = [] if available is None else [available * 1024]
    for folder in _cgroups():
        most, used = (_number(folder, names) for names in (("memory.max", "memory.limit_in_bytes"), USAGE))
        if most is not None and used is not None:
            statistics = folder / "memory.stat"
            pages = _field(statistics, "file") or _field(statistics, "total_cache") or 0
            shared = _field(statistics, "shmem") or _field(statistics, "total_shmem") or 0
            limits.append(max(0, most - used + pages - shared))
    return min(limits, default=None)


USAGE = ("memory.current", "memory.usage_in_bytes")


def _cgroups() -> list[Path]:
    """Return the folders of the control groups that limit this process, its own first."""
    try:
        lines = OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        own = root / path.lstrip("/")
        folders += [own, *(parent for parent in own.parents if parent == root or root in parent.parents)]
    return folders


def _number(folder: Path, names: tuple[str, ...]) -> int | None:
    for name in names:
        try:
            return int((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # No such file, or "max".
            continue
    return None


def _field(path: Path, name: str) -> int | None:
    """Return the number after a name at the start of a line of a file, None where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)
