"""Files on an object store, or wherever fsspec reaches: catalogues are copied from there, and results to there."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from semids.errors import CorruptionError, StorageError, UsageError
from semids.store import FileRecord, check_file, commit, commit_sealed_json, digest_file, read_sealed_json

INPUTS = "inputs"
DIGESTS = "digests.json"


def is_remote(place: str) -> bool:
    """Return True for a URL, such as s3://bucket/items/*.parquet, and False for a path."""
    return "://" in place


def check_place(place: str) -> None:
    """Refuse a URL that nothing installed can open.

    Raises:
        UsageError: names the URL and what is missing.
    """
    protocol = place.partition("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise UsageError(f"cannot open {place!r}: {error}; for s3://, pip install 'semids[s3]'") from error


def fetch(pattern: str, folder: Path) -> str:
    """Copy the files that a URL names to `folder`, and return the path, folder or glob of the copies.

    A path is returned as it is. A copy stays while the store tells the same of its file (size, time, tag), and goes
    when its file does.

    Args:
        pattern: URL of a file, of a folder, or with wildcards.

    Raises:
        UsageError: nothing matches, or nothing installed opens such a URL.
        StorageError: the store did not answer, or refused.
    """
    if not is_remote(pattern):
        return pattern
    check_place(pattern)
    root = _root_of_copies(pattern, folder)
    with _told(pattern):
        filesystem, path = url_to_fs(pattern)
        is_folder = not _has_wildcards(path) and filesystem.isdir(path)
        found = filesystem.find(path) if is_folder else filesystem.glob(path, maxdepth=None)
        sources: list[str] = sorted(source for source in found if not filesystem.isdir(source))
        if not sources:
            raise UsageError(f"no file matches {pattern!r}")
        copies = {_place_of(root, source): source for source in sources}
        for copy, source in copies.items():
            _fetch_file(filesystem, source, copy)
    for stranger in set(root.rglob("*")) - {*copies, *map(_record_of, copies)}:
        if stranger.is_file():
            stranger.unlink()
    return place_of_copies(pattern, folder)


def place_of_copies(pattern: str, folder: Path) -> str:
    """Return what `fetch` returns, and ask no store for anything."""
    if not is_remote(pattern):
        return pattern
    return str(_place_of(_root_of_copies(pattern, folder), pattern.partition("://")[2]))


def push(files: Mapping[str, Path], url: str) -> None:
    """Copy files to where a URL points, by name below it; those that are there with the same digest stay.

    Their digests come last, in `digests.json`: where that names a file, all of it is there.

    Raises:
        UsageError: nothing installed opens such a URL.
        StorageError: the store did not answer, or refused.
    """
    check_place(url)
    digests = {name: digest_file(path) for name, path in sorted(files.items())}
    with _told(url):
        filesystem, root = url_to_fs(url)
        record = f"{root}/{DIGESTS}"
        there = json.loads(filesystem.cat_file(record)) if filesystem.exists(record) else {}
        changed = [name for name, digest in digests.items() if there.get(name) != digest]
        if not changed and there == digests:
            return
        kept = {name: digest for name, digest in there.items() if digests.get(name) == digest}
        if there != kept:
            # What is about to be overwritten must not be on record meanwhile.
            filesystem.pipe_file(record, _json(kept))
        for name in changed:
            filesystem.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
            filesystem.put_file(str(files[name]), f"{root}/{name}")
        filesystem.pipe_file(record, _json(digests))


def _fetch_file(filesystem: Any, source: str, copy: Path) -> None:
    state = filesystem.ukey(source)
    record = _record_of(copy)
    if record.exists() and copy.exists():
        try:
            body = read_sealed_json(record)
            if body["state"] == state:
                check_file(copy, FileRecord(body["bytes"], body["sha256"]))
                return
        except CorruptionError:
            # It is only a copy.
            pass
    record.unlink(missing_ok=True)
    written = commit(copy, lambda temporary: filesystem.get_file(source, str(temporary)))
    commit_sealed_json(record, {"state": state, **vars(written)})


def _root_of_copies(pattern: str, folder: Path) -> Path:
    return folder / INPUTS / pattern.partition("://")[0]


def _place_of(root: Path, source: str) -> Path:
    parts = [part for part in source.split("/") if part]
    if not parts or ".." in parts or "." in parts or "\0" in source:
        raise UsageError(f"expected a URL without '.' and '..' in its path, got {source!r}")
    return root.joinpath(*parts)


def _record_of(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.json")


def _has_wildcards(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


@contextmanager
def _told(url: str) -> Generator[None]:
    """Turn whatever a store's library raises into one error that names the URL."""
    try:
        yield
    except (UsageError, StorageError):
        raise
    except FileNotFoundError as error:
        raise UsageError(f"no file matches {url!r}: {error}") from error
    except Exception as error:
        raise StorageError(f"cannot reach {url}: {type(error).__name__}: {error}; run the same again") from error
