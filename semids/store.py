"""Files that are either whole or absent: the one commit helper, sealed JSON, digests, and the run lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from semids.errors import BusyError, CorruptionError, StorageError, UsageError

TEMPORARY_PREFIX = ".tmp-"
SETTLED_SECONDS = 3
"""Age at which a file's times tell whether it was changed since: clocks of file systems tick every few ms to 2 s."""


@dataclass(frozen=True)
class FileRecord:
    """What is known of a committed file: its size in bytes and its SHA-256 as 64 hex digits."""

    bytes: int
    sha256: str


def commit(path: Path, write: Callable[[Path], None]) -> FileRecord:
    """Write a file so that `path` either holds all of it, durably, or is as it was before.

    `write` fills a temporary file in the same folder; it is then flushed to disk, digested and renamed,
    and the folder is flushed, so that neither a kill nor a power cut leaves a part under the final name.

    Raises:
        StorageError: the file system refused (disk full, read-only, I/O error). Names `path`.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _fill(temporary, write)
        _flush(temporary)
        record = FileRecord(temporary.stat().st_size, digest_file(temporary))
        _rename(temporary, path)
        _flush(path.parent)
    except OSError as error:
        raise _storage_error("write", path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return record


def commit_bytes(path: Path, data: bytes) -> FileRecord:
    """Commit a small file held in memory; see `commit`."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(data)

    return commit(path, write)


def _fill(path: Path, write: Callable[[Path], None]) -> None:
    write(path)


def _rename(temporary: Path, path: Path) -> None:
    temporary.replace(path)


def _flush(path: Path) -> None:
    # Without this a power cut after the rename leaves an empty file under the final name.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_error(verb: str, path: Path, error: OSError) -> StorageError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    advice = (
        "free some space and run the same command again: finished work is kept"
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else "run the same command again once the file system answers: finished work is kept"
    )
    return StorageError(f"cannot {verb} {path}: {reason}; {advice}")


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits.

    Raises:
        StorageError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _storage_error("read", path, error) from error


def digest_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form (sorted keys, no spaces) as 64 hex digits."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def check_file(path: Path, record: FileRecord) -> None:
    """Compare a committed file with its record.

    Raises:
        CorruptionError: it is missing, or its size or digest differs.
        StorageError: it cannot be read.
    """
    remedy = "delete its folder and run again to rebuild it"
    if not path.is_file():
        raise CorruptionError(f"{path} is missing; {remedy}")
    size = path.stat().st_size
    if size != record.bytes:
        raise CorruptionError(f"{path}: expected {record.bytes} bytes, got {size}; {remedy}")
    found = digest_file(path)
    if found != record.sha256:
        raise CorruptionError(
            f"{path}: expected SHA-256 {record.sha256[:16]}…, got {found[:16]}…: it was changed after it was "
            f"written; {remedy}"
        )


_found_right: dict[str, tuple[int | str, ...]] = {}
"""Files that were found right, as they were then."""
_turns = [threading.Lock() for _ in range(256)]
"""Locks that files share: enough for threads to seldom wait for one that reads another file."""


def check_file_once(path: Path, record: FileRecord) -> None:
    """As `check_file`, but a file that this process found right is not read again while it stays untouched.

    A file is touched where its number, its size or its times are not what they were; what a disk loses without them is
    found by the next process. Threads that need the same file wait for the one that reads it.

    Raises:
        CorruptionError, StorageError: as `check_file` does.
    """
    with _turns[hash(path) % len(_turns)]:
        started = time.time()
        try:
            # Of the open file: network file systems answer for a path from memory.
            with path.open("rb") as file:
                facts = os.fstat(file.fileno())
        except OSError:
            check_file(path, record)
            return
        known = (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, record.sha256)
        if _found_right.get(str(path)) == known:
            return
        check_file(path, record)
        # What was touched a moment ago could be touched again without a change of its times.
        if started - facts.st_ctime > SETTLED_SECONDS:
            _found_right[str(path)] = known


def commit_sealed_json(path: Path, body: dict[str, Any]) -> FileRecord:
    """Commit a JSON object together with its own digest, so that one flipped bit anywhere in it is found."""
    return commit_bytes(path, _seal(body))


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Return the object that `commit_sealed_json` wrote.

    Raises:
        CorruptionError: the file's bytes are not exactly what was written.
        StorageError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _storage_error("read", path, error) from error
    try:
        sealed: Any = json.loads(data)
        body = cast("dict[str, Any]", sealed["body"])
        intact = _seal(body) == data
    except (ValueError, KeyError, TypeError):
        intact, body = False, {}
    if not intact:
        raise CorruptionError(
            f"{path}: its content does not match its own digest: it was changed after it was written; "
            "delete its folder and run again to rebuild it"
        )
    return body


def _seal(body: dict[str, Any]) -> bytes:
    return (json.dumps({"sha256": digest_json(body), "body": body}, indent=1) + "\n").encode()


@dataclass
class _HeldLock:
    descriptor: int
    holders: int


_held_locks: dict[Path, _HeldLock] = {}
_held_locks_guard = threading.Lock()


@contextlib.contextmanager
def run_lock(folder: Path) -> Generator[None]:
    """Own a run folder for as long as the context lasts; other threads of the owning process may join.

    The kernel drops the lock when its owner dies, however it dies, so a killed run never blocks the next.

    Raises:
        BusyError: another process owns the folder. Names it.
        UsageError: a file lies where the folder should.
    """
    folder = folder.resolve()
    with _held_locks_guard:
        if folder not in _held_locks:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                _held_locks[folder] = _HeldLock(_take_lock(folder), holders=0)
            except (FileExistsError, NotADirectoryError) as error:
                raise UsageError(f"expected a folder to work in, got {folder}: a file lies there") from error
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    raise UsageError(
                        f"expected a folder to work in, got a name too long for the disk: {folder}"
                    ) from error
                raise _storage_error("lock", folder, error) from error
        _held_locks[folder].holders += 1
    try:
        yield
    finally:
        with _held_locks_guard:
            lock = _held_locks[folder]
            lock.holders -= 1
            if lock.holders == 0:
                os.close(lock.descriptor)
                del _held_locks[folder]


def _take_lock(folder: Path) -> int:
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 4096, 0).decode(errors="replace").strip() or "an unnamed process"
        os.close(descriptor)
        raise BusyError(f"{folder} is in use by {owner}; wait for it to end, or choose another folder") from None
    # The command's arguments stay out: they may hold what the owner would not show to others.
    owner = (
        f"process {os.getpid()} on {socket.gethostname()} ({Path(sys.argv[0]).name}, since {time.strftime('%F %T')})"
    )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, owner.encode(), 0)
    return descriptor


@contextlib.contextmanager
def wait_for_lock(path: Path) -> Generator[None]:
    """Hold an exclusive lock on the file `path`, waiting for whoever has it, in this process or another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
