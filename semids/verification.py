"""Is everything as it was written: every file of every stage, and what the results show, against their digests."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from semids.errors import CorruptionError, StorageError
from semids.results import RECORD, RESULTS
from semids.stages import MANIFEST, read_manifest, stranger_message
from semids.store import FileRecord, check_file, read_sealed_json


@dataclass
class Verification:
    """What a look at every committed file found.

    Args:
        checked: number of files.
        faults: what is wrong, a line each.
        unfinished: folders of stages without a manifest: interrupted, or under way.
    """

    checked: int = 0
    faults: list[str] = field(default_factory=list[str])
    unfinished: list[Path] = field(default_factory=list[Path])


def verify_run(folder: Path) -> Verification:
    """Check every committed file under a run folder, and every link among its results."""
    found = Verification()
    for target in sorted(path for path in (folder / "stages").glob("[!.]*") if path.is_dir()):
        _verify_stage(target, found)
    _verify_results(folder, found)
    return found


def _verify_stage(target: Path, found: Verification) -> None:
    sidecars = {path.name for path in target.glob("*-[0-9]*.json")}
    records: dict[str, FileRecord] = {}
    try:
        manifest = read_manifest(target)
        if manifest is None:
            found.unfinished.append(target)
        else:
            found.checked += 1
            if target.name != f"{manifest['stage']}-{manifest['fingerprint'][:16]}":
                found.faults.append(stranger_message(target))
            records = {name: FileRecord(**record) for name, record in manifest["files"].items()}
    except CorruptionError as error:
        found.faults.append(str(error))
    # Sidecars first: without a manifest they say what the shards were.
    for name in [*sorted(sidecars), *sorted({str(Path(name).with_suffix(".npy")) for name in sidecars} | {*records})]:
        try:
            if name in sidecars:
                found.checked += 1
                body = read_sealed_json(target / name)
                records.setdefault(str(Path(name).with_suffix(".npy")), FileRecord(body["bytes"], body["sha256"]))
            elif name in records:
                found.checked += 1
                check_file(target / name, records[name])
        except (CorruptionError, StorageError) as error:
            found.faults.append(str(error))


def _verify_results(folder: Path, found: Verification) -> None:
    for path in sorted((folder / RESULTS).glob(f"**/{RECORD}")):
        found.checked += 1
        try:
            record = read_sealed_json(path)
        except CorruptionError as error:
            found.faults.append(str(error))
            continue
        for name, digest in record["files"].items():
            found.checked += 1
            try:
                check_file(path.parent / name, FileRecord(**digest))
            except CorruptionError as error:
                found.faults.append(str(error))
        for name, relative in record.get("links", {}).items():
            found.checked += 1
            fault = _link_fault(path.parent / name, relative)
            if fault:
                found.faults.append(f"{path.parent / name} {fault}; run again to show it anew")


def _link_fault(link: Path, relative: str) -> str | None:
    if not link.is_symlink() or os.readlink(link) != relative:  # noqa: PTH115
        return f"is no longer the link to {relative} that it was"
    target = link.resolve()
    stage = target if link.name == "model" else target.parent
    whole = target.exists() and (stage / MANIFEST).exists()
    return None if whole else f"leads to {target}, which is missing or unfinished"
