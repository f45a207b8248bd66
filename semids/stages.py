"""Stages: steps of work that leave a folder of digested files, run once for one fingerprint."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from semids.errors import CorruptionError
from semids.memory import PeakMemory, release_memory, share_arenas
from semids.parallel import single_threaded_products, thread_count
from semids.progress import Progress, silent
from semids.shards import COMPUTED, EVERY, ShardedArray, ShardLayout, check_origin, shard_name, write_shards
from semids.store import (
    TEMPORARY_PREFIX,
    FileRecord,
    check_file_once,
    commit,
    commit_bytes,
    commit_sealed_json,
    digest_json,
    read_sealed_json,
    wait_for_lock,
)

MANIFEST = "manifest.json"
KEPT_PREFIX = ".kept-"
LIBRARIES = ("faiss-cpu", "faiss-gpu", "numpy", "polars", "pyarrow", "semids", "torch", "transformers")

log = logging.getLogger("semids")
# Now, not by the first stage: Prefect may have started its threads by then.
share_arenas(thread_count())


class Ref(BaseModel):
    """A small, JSON-able reference to a finished stage: what tasks exchange instead of data."""

    model_config = ConfigDict(frozen=True)

    stage: str
    path: str
    """Absolute folder. Where it lies decides nothing: fingerprints are made of digests."""
    fingerprint: str
    digest: str
    """Of every output file. Equal digests mean equal outputs, whatever made them."""

    def is_present(self) -> bool:
        """True if the folder still holds exactly this stage's files, every byte as recorded."""
        try:
            manifest = read_manifest(Path(self.path))
            if manifest is None or manifest["digest"] != self.digest:
                return False
            _check_files(Path(self.path), manifest)
        except CorruptionError:
            return False
        return True


@dataclass(frozen=True)
class Stage:
    """A step to run: what it is called, all that decides its output, and the function that makes it.

    Args:
        ingredients: input digests, parameters, model and code digests, as JSON; hashed to the fingerprint
            and kept in the manifest, so that two runs can be compared ingredient by ingredient.
        build: writes the outputs and returns a summary, as JSON, that depends on nothing but the ingredients.
        origin: where the outputs come from, if this stage does not compute them; what another origin left
            unfinished is refused.
        shards: of each array, where `build` does nothing but write arrays of as many shards, each of which can be
            made without the others; or parts that it keeps, and finds again when it makes the whole; see `make_shards`.
    """

    name: str
    title: str
    ingredients: Mapping[str, Any]
    build: Callable[[StageOutput], dict[str, Any]] = field(repr=False)
    origin: str = COMPUTED
    shards: int = 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the name and the ingredients, 64 hex digits."""
        return digest_json({"stage": self.name, **self.ingredients})


class StageOutput:
    """Where a stage's build function writes: every file goes through the commit helper and is recorded.

    Args:
        lot: which shards of every array are written, of the list of them; all by default.
    """

    def __init__(
        self, folder: Path, fingerprint: str, progress: Progress, origin: str = COMPUTED, lot: slice = EVERY
    ) -> None:
        self.lot = lot
        self.origin = origin
        self.folder = folder
        self.fingerprint = fingerprint
        self.progress = progress
        self.files: dict[str, FileRecord] = {}
        self.arrays: dict[str, ShardLayout] = {}
        self.remembered: dict[str, Any] = {}

    def remember(self, **facts: Any) -> None:
        """Keep facts that decide nothing, as JSON: they are in the manifest's `run` and in no digest of outputs."""
        self.remembered |= facts

    def commit(self, name: str, write: Callable[[Path], None]) -> None:
        """Commit the file that `write` makes at the path it is given."""
        self.files[name] = commit(self.folder / name, write)

    def commit_bytes(self, name: str, data: bytes) -> None:
        """Commit a small file held in memory."""
        self.files[name] = commit_bytes(self.folder / name, data)

    def write_shards(self, name: str, layout: ShardLayout, produce: Callable[[int, int], NDArray[Any]]) -> None:
        """Commit a sharded array, keeping shards that an interrupted run finished; see `shards.write_shards`."""
        self.arrays[name] = layout
        self.files |= write_shards(
            self.folder,
            name,
            layout,
            produce,
            fingerprint=self.fingerprint,
            origin=self.origin,
            progress=self.progress,
            lot=self.lot,
        )

    def scratch(self, name: str) -> Path:
        """Return a path for intermediate data; nothing under it outlives the stage."""
        return self.folder / f"{TEMPORARY_PREFIX}{name}"

    def kept(self, name: str) -> Path:
        """Return a folder, not made yet, for what a killed run goes on from; it is removed when the stage is done."""
        return self.folder / f"{KEPT_PREFIX}{name}"


class StageReader:
    """A finished stage, opened to be read: every file's digest is checked before it is handed out."""

    def __init__(self, folder: Path | str) -> None:
        """Open a finished stage's folder.

        Raises:
            CorruptionError: there is no manifest, or it was changed after it was written.
        """
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise CorruptionError(f"{self.folder} holds no finished stage: {MANIFEST} is missing; run again")
        self.manifest = manifest
        self.summary: dict[str, Any] = manifest["summary"]
        self._checked: set[str] = set()
        _warn_of_strangers(self.folder, manifest)

    def path(self, name: str) -> Path:
        """Return the path of an output file whose digest is right.

        Raises:
            CorruptionError: the file is missing or was changed.
        """
        if name not in self._checked:
            check_file_once(self.folder / name, FileRecord(**self.manifest["files"][name]))
            self._checked.add(name)
        return self.folder / name

    def array(self, name: str) -> ShardedArray:
        """Open a sharded array of the stage; each shard is checked when it is first read."""
        layout = ShardLayout(**self.manifest["arrays"][name])
        return ShardedArray(layout, lambda shard: self.path(shard_name(name, shard)))


def run_stage(folder: Path, stage: Stage, progress: Progress = silent) -> Ref:
    """Return a reference to the stage's outputs under `folder`, making them only if they are not there.

    Present and equal: skipped, after every digest was checked. Interrupted: finished shards are kept.
    A missing output file is made again.

    Raises:
        CorruptionError: an output file was changed after it was written; names it.
        StorageError: the file system refused.
    """
    target = _folder_of(folder, stage)
    # Two cells of a sweep may need the same stage at the same time: the second waits and finds it made.
    with wait_for_lock(target.parent / ".locks" / target.name):
        found = find_stage(folder, stage)
        if found is not None:
            log.info("%s: reused %s", stage.title, target.name)
            _remove_folders(target, KEPT_PREFIX)
            return found
        manifest = _make(target, stage, progress)
    return Ref(stage=stage.name, path=str(target), fingerprint=stage.fingerprint, digest=manifest["digest"])


def make_shards(folder: Path, stage: Stage, *, lot: int, lots: int, progress: Progress = silent) -> None:
    """Make every `lots`-th shard of a stage, from shard `lot` on; `run_stage` then finds them, and makes what is left.

    Lots may be made at a time, by processes on machines that share `folder`.

    Raises:
        StorageError: the file system refused.
    """
    target = _folder_of(folder, stage)
    with single_threaded_products():
        stage.build(StageOutput(target, stage.fingerprint, progress, stage.origin, slice(lot, None, lots)))


def find_stage(folder: Path, stage: Stage) -> Ref | None:
    """Return the reference to a stage's outputs under `folder` if all of them are there, every byte as recorded.

    Raises:
        CorruptionError: an output file was changed after it was written, or the folder holds another stage's.
    """
    target = _folder_of(folder, stage)
    manifest = read_manifest(target)
    if manifest is None:
        return None
    if manifest["fingerprint"] != stage.fingerprint:
        raise CorruptionError(stranger_message(target))
    if _missing_files(target, manifest):
        return None
    _check_files(target, manifest)
    _warn_of_strangers(target, manifest)
    return Ref(stage=stage.name, path=str(target), fingerprint=stage.fingerprint, digest=manifest["digest"])


def peek_stage(folder: Path, stage: Stage) -> Ref | None:
    """Return the reference to a stage's outputs under `folder` if its manifest says that they were made.

    The files themselves are not read: see `find_stage`.
    """
    target = _folder_of(folder, stage)
    manifest = read_manifest(target)
    if manifest is None or manifest["fingerprint"] != stage.fingerprint:
        return None
    return Ref(stage=stage.name, path=str(target), fingerprint=stage.fingerprint, digest=manifest["digest"])


def made_titles(folder: Path) -> frozenset[str]:
    """Return the titles of all stages under `folder` that are whole, of whatever configuration."""
    manifests = (read_manifest(target) for target in folder.glob("stages/*"))
    return frozenset(manifest["title"] for manifest in manifests if manifest is not None)


def title_of(ref: Ref) -> str:
    """Return the title of the stage that a reference leads to."""
    return StageReader(ref.path).manifest["title"]


def left_bytes(folder: Path, stage: Stage) -> int:
    """Return the size of what an interrupted run left of a stage."""
    sizes = 0
    for path in _folder_of(folder, stage).glob("*"):
        # Another cell of a sweep may be making the stage, and its temporary files come and go.
        with contextlib.suppress(FileNotFoundError):
            sizes += path.stat().st_size if path.is_file() else 0
    return sizes


def _folder_of(folder: Path, stage: Stage) -> Path:
    return folder.resolve() / "stages" / f"{stage.name}-{stage.fingerprint[:16]}"


def stranger_message(target: Path) -> str:
    """Return what to say of a folder whose manifest is that of another stage."""
    return f"{target / MANIFEST} is that of another stage, moved here; delete its folder and run again to rebuild it"


def _make(target: Path, stage: Stage, progress: Progress) -> dict[str, Any]:
    check_origin(target, stage.fingerprint, stage.origin)
    (target / MANIFEST).unlink(missing_ok=True)
    _remove_folders(target, TEMPORARY_PREFIX)
    output = StageOutput(target, stage.fingerprint, progress, stage.origin)
    with single_threaded_products():
        started = time.monotonic()
        with PeakMemory() as peak:
            summary = stage.build(output)
    # Threads and training steps leave hundreds of megabytes freed but kept, which later stages would be charged for.
    release_memory()
    _remove_folders(target, TEMPORARY_PREFIX)
    seconds = time.monotonic() - started
    outputs = {
        "files": {name: vars(record) for name, record in sorted(output.files.items())},
        "arrays": {name: vars(layout) for name, layout in sorted(output.arrays.items())},
        "summary": summary,
    }
    manifest = {
        "stage": stage.name,
        "title": stage.title,
        "fingerprint": stage.fingerprint,
        "ingredients": dict(stage.ingredients),
        **outputs,
        "digest": digest_json(outputs),
        "run": {
            "seconds": round(seconds, 3),
            "peak_rss_bytes": peak.bytes,
            **({} if peak.device_bytes is None else {"peak_device_bytes": peak.device_bytes}),
            "versions": library_versions(),
            **output.remembered,
        },
    }
    commit_sealed_json(target / MANIFEST, manifest)
    # Not before: without the manifest, the stage would begin anew.
    _remove_folders(target, KEPT_PREFIX)
    log.info("%s: made %s in %.1f s", stage.title, target.name, seconds)
    return manifest


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed libraries that numbers depend on."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def read_manifest(target: Path) -> dict[str, Any] | None:
    """Return the manifest in a stage's folder, None where the stage is not finished.

    Raises:
        CorruptionError: it was changed.
    """
    path = target / MANIFEST
    return read_sealed_json(path) if path.exists() else None


def _missing_files(target: Path, manifest: dict[str, Any]) -> list[str]:
    return [name for name in manifest["files"] if not (target / name).exists()]


def _check_files(target: Path, manifest: dict[str, Any]) -> None:
    def check(file: tuple[str, dict[str, Any]]) -> None:
        check_file_once(target / file[0], FileRecord(**file[1]))

    # Reading and digesting leave other threads to run.
    with ThreadPoolExecutor(thread_count()) as pool:
        for _ in pool.map(check, manifest["files"].items()):
            pass


def _warn_of_strangers(target: Path, manifest: dict[str, Any]) -> None:
    sidecars = {str(Path(name).with_suffix(".json")) for name in manifest["files"] if name.endswith(".npy")}
    known = {MANIFEST, *manifest["files"], *sidecars}
    names = sorted(path.name for path in target.iterdir())
    strangers = [name for name in names if name not in known and not name.startswith(KEPT_PREFIX)]
    if strangers:
        log.warning("%s: ignored files that the stage did not write: %s", target, ", ".join(strangers[:5]))


def _remove_folders(target: Path, prefix: str) -> None:
    for path in target.glob(f"{prefix}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def reference(folder: Path | str) -> Ref:
    """Return the reference to the finished stage in a folder.

    Raises:
        CorruptionError: there is none, or its manifest was changed.
    """
    reader = StageReader(folder)
    return Ref(
        stage=reader.manifest["stage"],
        path=str(reader.folder.resolve()),
        fingerprint=reader.manifest["fingerprint"],
        digest=reader.manifest["digest"],
    )
