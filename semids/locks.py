"""Who holds a run folder's locks, told without touching them: nothing is locked, opened for writing or made."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TABLE = Path("/proc/locks")
LockState = Literal["held", "free", "unknown"]
_OWNER = re.compile(r"process (?P<process>\d+) on (?P<host>.+) \((?P<program>.*), since (?P<since>[-\d]+ [:\d]+)\)")


@dataclass(frozen=True)
class Owner:
    """Who a lock's text names: the last process that took it, whether or not it still has it.

    Args:
        since: local time of the owner's machine.
    """

    process: int
    host: str
    program: str
    since: str


@dataclass(frozen=True)
class Lock:
    """A lock file as it is found.

    Args:
        named: the file's text, as it is; empty where there is none.
        process: who holds it, as the kernel numbers it here; None unless it is held and the kernel tells.
    """

    state: LockState
    named: str = ""
    owner: Owner | None = None
    process: int | None = None

    def describe_owner(self) -> str:
        """Return who holds the lock, or held it last, untrusted as it is read."""
        # A process that has just taken it has not put its name there yet. In a container it has another number.
        here = self.owner is None or self.owner.host == socket.gethostname()
        if here and self.process is not None and (self.owner is None or self.owner.process != self.process):
            return f"process {self.process}"
        return self.named or "an unnamed process"


# Why a table and no probe: a lock that is taken to see whether it is free, shared and for a microsecond, refuses the
# run that starts within it, and F_GETLK and F_OFD_GETLK do not see the locks of flock(2). The kernel's table shows
# them to whoever reads it. What it does not show: holders on other machines and in other containers.
@dataclass(frozen=True)
class LockTable:
    """The flock locks that the kernel says are held: (device, inode, process) each."""

    held: frozenset[tuple[str, int, int]]

    def holder(self, path: Path, process: int | None = None) -> int | None:
        """Return the process that holds a lock on a file; None where nobody does, or there is no such file.

        Args:
            process: who is said to hold it.
        """
        try:
            found = path.stat()
        except OSError:
            return None
        device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
        for where, inode, holder in self.held:
            # Btrfs and overlays show another device in the table than in stat(2).
            if inode == found.st_ino and (where == device or holder == process):
                return holder
        return None


def read_table() -> LockTable | None:
    """Return the locks that are held, None where the system does not tell (macOS, some sandboxes)."""
    if not hasattr(os, "memfd_create"):
        return None
    # A lock of our own, on a file that exists for nobody else, shows whether the table can be believed.
    with contextlib.ExitStack() as closing:
        try:
            probe = os.memfd_create("semids-status")
            closing.callback(os.close, probe)
            fcntl.flock(probe, fcntl.LOCK_EX)
            lines = TABLE.read_text(encoding="utf-8").splitlines()
            inode = os.fstat(probe).st_ino
        except OSError:
            return None
    table = LockTable(frozenset(lock for line in lines if (lock := _parse(line)) is not None))
    return table if any(lock[1:] == (inode, os.getpid()) for lock in table.held) else None


def _parse(line: str) -> tuple[str, int, int] | None:
    """Return what a line such as `1: FLOCK ADVISORY WRITE 18087 fe:00:2990740 0 EOF` says is held."""
    # Those who wait have `->` in the second place.
    fields = line.split()
    if len(fields) < 6 or fields[1] != "FLOCK":
        return None
    device, _, inode = fields[5].rpartition(":")
    return (device, int(inode), int(fields[4])) if inode.isdigit() else None


def look_at_lock(path: Path, table: LockTable | None) -> Lock:
    """Return the state of a lock whose text names its owner, as `store.run_lock` leaves it.

    Without a table, a lock is free if the process that its text names is gone, else nothing is known. A holder on
    another machine, or in another container, is in no table here: a lock whose text names another host is unknown.
    """
    try:
        text = path.read_bytes()[:4096].decode(errors="replace").strip()
    except OSError:
        return Lock("unknown" if path.exists() else "free")
    match = _OWNER.fullmatch(text)
    owner = Owner(int(match["process"]), match["host"], match["program"], match["since"]) if match else None
    holder = table.holder(path, owner.process if owner else None) if table is not None else None
    if holder is not None:
        return Lock("held", text, owner, holder)
    if owner is not None and owner.host != socket.gethostname():
        return Lock("unknown", text, owner)
    gone = table is not None or (owner is not None and not _exists(owner.process))
    return Lock("free" if gone else "unknown", text, owner)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
