"""How a run folder stands, from its files alone: what is done, under way, dead or waits to be gone on with.

Nothing is changed, locked or digested but manifests, sidecars and reports, so that it can be asked at any time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from semids.errors import CorruptionError, DataError, StorageError, UsageError
from semids.locks import Lock, LockTable, look_at_lock, read_table
from semids.reporting import read_report
from semids.results import RECORD, RESULTS
from semids.stages import KEPT_PREFIX, MANIFEST, read_manifest, reference
from semids.store import read_sealed_json
from semids.text import UNKNOWN, count_of, format_bytes, format_rate, format_seconds, plain_table, printable

LOOKS = 3
"""How often a folder is looked at, if its locks change hands meanwhile."""

State = Literal["done", "running", "interrupted", "incomplete", "damaged", "unknown"]
UNFINISHED: tuple[State, ...] = ("interrupted", "incomplete", "unknown")
STATES: dict[State, str] = {
    "done": "done",
    "running": "running",
    "interrupted": "interrupted, resumable",
    "incomplete": "files missing, resumable",
    "damaged": "DAMAGED",
    "unknown": "unfinished",
}


@dataclass(frozen=True)
class StageStatus:
    """How a stage stands.

    Args:
        folder: its name under `stages`.
        title: its name where no manifest tells its title.
        state: `unknown` is unfinished where the locks do not tell whether someone is at work on it.
        written: when the manifest was written, or anything where there is none, in seconds since 1970.
        seconds, peak_bytes: what it took; None until it is done.
        bytes: of its outputs, or of what is left of it.
        shards: of an unfinished stage, by array: shards that are whole, and how many there will be if that is known.
        epoch: epochs that the last checkpoint of a network's training has behind it.
    """

    folder: str
    title: str
    state: State
    written: float | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    bytes: int = 0
    shards: dict[str, tuple[int, int | None]] = field(default_factory=dict[str, tuple[int, int | None]])
    epoch: int | None = None


@dataclass(frozen=True)
class ShownCell:
    """A configuration's results: where they are shown, and their report's figures, None where it cannot be read."""

    place: str
    collision_rate: float | None
    floor: float | None


@dataclass(frozen=True)
class RunStatus:
    """How a run folder stands.

    Args:
        lock: of the folder: `held` while a run is under way.
        faults: what is damaged, a line each.
    """

    folder: Path
    lock: Lock
    stages: tuple[StageStatus, ...]
    cells: tuple[ShownCell, ...]
    faults: tuple[str, ...]

    def counts(self, *states: State) -> int:
        """Return the number of stages in the given states."""
        return sum(stage.state in states for stage in self.stages)

    def to_json(self) -> str:
        """Return everything as JSON; times are seconds since 1970."""
        lock = asdict(self.lock) | {"who": self.lock.describe_owner() if self.lock.named or self.lock.process else None}
        figures = {"folder": str(self.folder), "lock": lock, "advice": self.advice(), "faults": self.faults}
        rows = {"stages": [asdict(stage) for stage in self.stages], "results": [asdict(cell) for cell in self.cells]}
        return json.dumps(figures | rows, indent=1)

    def describe(self) -> str:
        """Return who uses the folder, the stages, the results and what to do, for a terminal."""
        headings = ["stage", "state", "written", "time", "memory", "size", "so far", "folder"]
        parts = [self._describe_use()]
        if self.stages:
            parts.append(plain_table(headings, [_row(stage) for stage in self.stages], left=[0, 1, 2, 6, 7]))
        if self.cells:
            rows = [[cell.place, format_rate(cell.collision_rate), format_rate(cell.floor)] for cell in self.cells]
            parts.append(plain_table(["results", "collision rate", "floor"], rows, left=[0]))
        parts.append(self.advice())
        return "\n\n".join(parts)

    def _describe_use(self) -> str:
        folder, who = printable(str(self.folder)), printable(self.lock.describe_owner())
        if self.lock.state == "held":
            return f"{folder} is in use by {who}"
        if self.lock.state == "unknown":
            return f"{folder} was last taken by {who}; whether it still runs cannot be told from here"
        if not self.lock.named:
            return f"{folder} is not in use"
        ended = "; its run ended without finishing" if self.counts(*UNFINISHED) else ""
        return f"{folder} is not in use; it was last by {who}{ended}"

    def advice(self) -> str:
        """Return what a person should do, in a sentence or two."""
        unfinished = self.counts(*UNFINISHED)
        stages = f"{count_of(unfinished, 'stage')} {'is' if unfinished == 1 else 'are'} unfinished"
        on = "run the same command again, and it goes on there"
        if self.lock.state == "held":
            running = self.counts("running")
            now = f"{count_of(running, 'stage')} under way" if running else "between two stages"
            said = f"A run is under way, {now}: wait for it to end."
        elif self.lock.state == "unknown":
            said = f"If nothing runs there any more, {on}." if unfinished else "Every stage that was begun is done."
        elif unfinished:
            said = f"Nothing is running. {stages}: {on}."
        elif self.counts("damaged"):
            said = "Nothing is running."
        elif self.cells:
            said = "Nothing is running, and every stage that was begun is done: there is nothing to do."
        else:
            said = f"Nothing is running, and no results are shown yet: if there should be some, {on}."
        if self.faults:
            said += f" {count_of(len(self.faults), 'fault')}: delete what is named, and run the same command again."
        return said


def _row(stage: StageStatus) -> list[str]:
    so_far = [
        f"{name} {done:,}{'' if total is None else f' of {total:,}'} shards"
        for name, (done, total) in stage.shards.items()
    ]
    if stage.epoch is not None:
        so_far.append(f"checkpoint after epoch {stage.epoch:,}")
    written = UNKNOWN if stage.written is None else time.strftime("%F %T", time.localtime(stage.written))
    took = [format_seconds(stage.seconds), format_bytes(stage.peak_bytes), format_bytes(stage.bytes)]
    return [stage.title, STATES[stage.state], written, *took, ", ".join(so_far), stage.folder]


def read_status(folder: Path) -> RunStatus:
    """Return how a run folder stands.

    Raises:
        UsageError: it is not a run folder.
    """
    stages = folder / "stages"
    if not stages.is_dir():
        raise UsageError(f"{folder} is not a run folder: it has no stages folder")
    # A stage that ends between a look at its files and one at its lock would seem interrupted: the locks are the same
    # before and after, or everything is looked at again.
    locks, found = _read_locks(folder), _look(folder)
    for _ in range(LOOKS - 1):
        again = _read_locks(folder)
        if again == locks:
            break
        locks, found = again, _look(folder)
    lock, at_work = locks
    placed = [_with_lock(row, lock, at_work) for row in found.stages]
    placed.sort(key=lambda row: (row.state not in ("done", "damaged"), row.written or float("inf"), row.folder))
    return RunStatus(folder, lock, tuple(placed), found.cells, found.faults)


def _look(folder: Path) -> RunStatus:
    """Return what a run folder's files tell, without its locks."""
    faults: list[str] = []
    stages = folder / "stages"
    manifests = {name: _read_manifest(stages / name, faults) for name in _stage_names(folder)}
    contents = _distinct_contents(manifests)
    rows = [_stage_status(stages / name, found, contents, faults) for name, found in manifests.items()]
    cells = list(_shown_cells(folder, faults))
    return RunStatus(folder, Lock("unknown"), tuple(rows), tuple(cells), tuple(dict.fromkeys(faults)))


def _stage_names(folder: Path) -> list[str]:
    """Return the names of the stages that were begun: of those that have written nothing yet there is only a lock."""
    folders = {path.name for path in (folder / "stages").glob("[!.]*") if path.is_dir()}
    return sorted(folders | {path.name for path in (folder / "stages" / ".locks").glob("[!.]*")})


def _read_locks(folder: Path) -> tuple[Lock, frozenset[str]]:
    """Return the run's lock, and the names of the stages that someone holds the lock of."""
    table: LockTable | None = read_table()
    locks = (folder / "stages" / ".locks").glob("[!.]*") if table is not None else []
    held = frozenset(path.name for path in locks if table is not None and table.holder(path) is not None)
    return look_at_lock(folder / ".lock", table), held


def _read_manifest(target: Path, faults: list[str]) -> dict[str, Any] | Literal["damaged"] | None:
    try:
        return read_manifest(target)
    except CorruptionError as error:
        faults.append(str(error))
        return "damaged"
    except StorageError as error:
        if not (target / MANIFEST).exists():  # A run has just taken it away, to make the stage anew.
            return None
        faults.append(str(error))
        return "damaged"


def _distinct_contents(manifests: dict[str, Any]) -> int | None:
    """Return how many rows the arrays of all stages have; None where several catalogues leave it open."""
    found = {
        manifest.get("summary", {}).get("distinct_contents")
        for manifest in manifests.values()
        if isinstance(manifest, dict) and manifest.get("stage") == "items"
    }
    only = found.pop() if len(found) == 1 else None
    return only if isinstance(only, int) else None


def _stage_status(target: Path, manifest: Any, contents: int | None, faults: list[str]) -> StageStatus:
    if isinstance(manifest, dict):
        try:
            return _finished_status(target, manifest, faults)
        except (KeyError, TypeError, ValueError, AttributeError):
            faults.append(f"{target / MANIFEST} is not the manifest of a stage; delete its folder and run again")
    files = list(_files(target))
    title = target.name.rpartition("-")[0] or target.name
    return StageStatus(
        folder=target.name,
        title=title,
        state="interrupted" if manifest is None else "damaged",
        written=max((written for written, _ in files), default=None),
        bytes=sum(size for _, size in files),
        shards=_count_shards(target, contents, faults) if manifest is None else {},
        epoch=_last_epoch(target),
    )


def _finished_status(target: Path, manifest: dict[str, Any], faults: list[str]) -> StageStatus:
    files: dict[str, dict[str, Any]] = manifest["files"]
    state: State = "done"
    for name, record in files.items():
        found = _stat(target / name)
        if found is None:
            state = "incomplete" if state == "done" else state
        elif found[1] != record["bytes"]:
            faults.append(f"{target / name}: expected {record['bytes']} bytes, got {found[1]}; delete its folder")
            state = "damaged"
    ended = _stat(target / MANIFEST)
    return StageStatus(
        folder=target.name,
        title=str(manifest["title"]),
        state=state,
        written=ended[0] if ended else None,
        seconds=float(manifest["run"]["seconds"]),
        peak_bytes=int(manifest["run"]["peak_rss_bytes"]),
        bytes=sum(int(record["bytes"]) for record in files.values()),
    )


def _with_lock(row: StageStatus, lock: Lock, at_work: frozenset[str]) -> StageStatus:
    """Return a stage's row in the light of its own lock and that of the run."""
    if row.state not in ("interrupted", "incomplete"):
        return row
    if row.folder in at_work:
        return replace(row, state="running")
    return replace(row, state="unknown") if lock.state == "unknown" else row


def _stat(path: Path) -> tuple[float, int] | None:
    """Return when a file was written and its bytes; None where it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime, found.st_size


def _files(target: Path) -> Iterator[tuple[float, int]]:
    # A run under way takes files away while they are counted.
    found = (_stat(path) for path in target.rglob("*") if path.is_file())
    return (each for each in found if each is not None)


def _count_shards(target: Path, contents: int | None, faults: list[str]) -> dict[str, tuple[int, int | None]]:
    counts: dict[str, tuple[int, int | None]] = {}
    for sidecar in sorted(target.glob("*-[0-9]*.json")):
        name, _, number = sidecar.stem.rpartition("-")
        done, total = counts.get(name, (0, None))
        if contents is not None and number.strip("0") == "":
            # Every array has a row for each content, and its first shard is a full one.
            try:
                total = -(-contents // int(read_sealed_json(sidecar)["rows"]))
            except (CorruptionError, KeyError, TypeError, ValueError, ZeroDivisionError):
                faults.append(f"{sidecar} was changed after it was written; delete its folder and run again")
            except StorageError:
                continue
        counts[name] = (done + sidecar.with_suffix(".npy").exists(), total)
    return counts


def _last_epoch(target: Path) -> int | None:
    """Return the epochs behind the last checkpoint that can be used, as a run that goes on would find it."""
    for sealed in sorted(target.glob(f"{KEPT_PREFIX}*/checkpoint-*.json"), reverse=True):
        try:
            return int(read_sealed_json(sealed)["state"]["epoch"])
        except (CorruptionError, StorageError, KeyError, TypeError, ValueError):
            continue
    return None


def _shown_cells(folder: Path, faults: list[str]) -> Iterator[ShownCell]:
    for record in sorted((folder / RESULTS).glob(f"*/*/{RECORD}")):
        place = str(record.parent.relative_to(folder / RESULTS))
        try:
            ids = read_report(reference((record.parent / "report.json").resolve().parent)).overall.ids
            yield ShownCell(place, ids.collision_rate, ids.floor)
        except (DataError, StorageError) as error:
            faults.append(str(error))
            yield ShownCell(place, None, None)
