"""The commit helper, sealed JSON, and the run lock."""

import errno
import multiprocessing
import os
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from semids import store
from semids.errors import BusyError, CorruptionError, StorageError
from semids.store import (
    FileRecord,
    check_file,
    check_file_once,
    commit,
    commit_bytes,
    commit_sealed_json,
    digest_file,
    read_sealed_json,
    run_lock,
)

fork = multiprocessing.get_context("fork")


def test_a_committed_file_has_the_recorded_size_and_digest(tmp_path: Path) -> None:
    record = commit_bytes(tmp_path / "a" / "file", b"content")
    assert record == FileRecord(7, digest_file(tmp_path / "a" / "file"))
    check_file(tmp_path / "a" / "file", record)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("step", ["_fill", "_flush", "_rename"])
def test_a_refused_step_names_the_path_and_leaves_the_old_file(
    code: int, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    commit_bytes(path, b"old")

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(store, step, refuse)
        with pytest.raises(StorageError, match=rf"cannot write {path}: .*finished work is kept"):
            commit_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    commit_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def _write_beyond_limit(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        commit_bytes(path, b"x" * 5000)
    except StorageError as error:
        os._exit(0 if str(path) in str(error) else 1)
    os._exit(2)


def test_a_short_write_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    child = fork.Process(target=_write_beyond_limit, args=(tmp_path / "file",))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_flushed_before_it_is_renamed_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    for name in ("_fill", "_flush", "_rename"):
        original = getattr(store, name)

        def record(*args: object, name: str = name, original: object = original) -> None:
            events.append(f"{name} {'folder' if args[0] == tmp_path else 'file'}")
            original(*args)  # type: ignore[operator]

        monkeypatch.setattr(store, name, record)
    commit_bytes(tmp_path / "file", b"x")
    assert events == ["_fill file", "_flush file", "_rename file", "_flush folder"]


def test_any_flipped_bit_of_a_sealed_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "sealed.json"
    body = {"name": "vectors é", "rows": 3, "list": [1, 2.5, None, True]}
    commit_sealed_json(path, body)
    assert read_sealed_json(path) == body
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(CorruptionError, match=r"sealed\.json"):
            read_sealed_json(path)


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "append", "remove"])
def test_a_changed_file_is_found_and_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    record = commit_bytes(path, b"0123456789")
    changed = {"flip": b"0123456788", "truncate": b"01234", "empty": b"", "append": b"01234567890"}
    path.unlink() if damage == "remove" else path.write_bytes(changed[damage])
    with pytest.raises(CorruptionError, match=r"file.*run again to rebuild"):
        check_file(path, record)


def _own(folder: Path, ready: object, seconds: float) -> None:
    with run_lock(folder):
        ready.set()  # type: ignore[attr-defined]
        time.sleep(seconds)


def test_a_second_owner_is_refused_by_name_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    ready = fork.Event()
    owner = fork.Process(target=_own, args=(tmp_path, ready, 60))
    owner.start()
    assert ready.wait(10)
    started = time.monotonic()
    with pytest.raises(BusyError, match=f"in use by process {owner.pid} on "), run_lock(tmp_path):
        pass
    assert time.monotonic() - started < 2
    os.kill(owner.pid, signal.SIGKILL)
    owner.join()
    with run_lock(tmp_path):
        pass


def test_threads_of_the_owner_share_its_lock(tmp_path: Path) -> None:
    with run_lock(tmp_path), run_lock(tmp_path):
        pass
    ready = fork.Event()
    other = fork.Process(target=_own, args=(tmp_path, ready, 0))
    other.start()
    assert ready.wait(10)
    other.join()


def test_an_error_inside_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("bad data")

    with pytest.raises(ValueError, match="bad data"):
        commit(tmp_path / "file", write)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were digested, in order."""
    digested: list[Path] = []

    def counted(path: Path) -> str:
        digested.append(path)
        return digest_file(path)

    monkeypatch.setattr(store, "digest_file", counted)
    return digested


def test_a_file_that_was_found_right_is_read_again_where_it_was_touched(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    record = commit_bytes(path, b"x" * 100)
    reads.clear()
    monkeypatch.setattr(store, "SETTLED_SECONDS", 1e6)
    check_file_once(path, record)
    check_file_once(path, record)
    assert len(reads) == 2, "the file is too new to be sure that its times would tell"
    monkeypatch.setattr(store, "SETTLED_SECONDS", -1)
    check_file_once(path, record)
    check_file_once(path, record)
    assert len(reads) == 3
    facts = path.stat()
    with path.open("r+b") as file:
        file.write(b"y")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))  # Less than a tick of the clock may have passed.
    with pytest.raises(CorruptionError, match="it was changed"):
        check_file_once(path, record)
    other = FileRecord(record.bytes, "0" * 64)
    path.write_bytes(b"x" * 100)
    check_file_once(path, record)
    with pytest.raises(CorruptionError, match="it was changed"):
        check_file_once(path, other)
    path.unlink()
    with pytest.raises(CorruptionError, match="is missing"):
        check_file_once(path, record)


def test_threads_that_need_a_file_read_it_once(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SETTLED_SECONDS", -1)
    record = commit_bytes(tmp_path / "file", b"x" * (1 << 22))
    reads.clear()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: check_file_once(tmp_path / "file", record), range(8)))
    assert len(reads) == 1
