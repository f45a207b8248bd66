"""What a run folder shows a person: `results/CATALOGUE-EMBEDDER/LABEL`, links into the stages."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from semids.config import BuildConfig, CommonConfig, write_config
from semids.errors import CorruptionError, StorageError, UsageError
from semids.items import is_vectors
from semids.plots import plot_comparison
from semids.readers import COMPRESSIONS, FORMATS
from semids.remote import push
from semids.report import FailedCell, Report, comparison_rows, render_comparison
from semids.reporting import read_report
from semids.stages import Ref, StageReader, reference
from semids.store import (
    TEMPORARY_PREFIX,
    FileRecord,
    commit_bytes,
    commit_sealed_json,
    digest_json,
    read_sealed_json,
)

RESULTS = "results"
RECORD = "record.json"
LONGEST_NAME = 100
CATALOGUE_SUFFIXES = {*FORMATS, *COMPRESSIONS}

log = logging.getLogger("semids")


@dataclass(frozen=True)
class CellRefs:
    """What a configuration leaves: references to its last stages."""

    model: Ref
    ids: Ref
    report: Ref


def results_folder(config: CommonConfig) -> Path:
    """Return where a run folder shows what a catalogue became: `results/CATALOGUE-EMBEDDER`."""
    path = Path(config.catalogue.path).resolve()
    name = path.parent.name if "*" in path.name else path.name
    while Path(name).suffix.lower() in CATALOGUE_SUFFIXES:
        name = Path(name).stem
    parts = [name] if is_vectors(config.catalogue) else [name, config.make_embedder().short_name]
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(parts)).strip("-.") or "catalogue"
    # Letters of other alphabets are left out: what is left may be that of another catalogue.
    if len(plain) > LONGEST_NAME or any(not letter.isascii() for letter in "".join(parts)):
        plain = f"{plain[:LONGEST_NAME]}-{digest_json(parts)[:8]}"
    return Path(config.out).resolve() / RESULTS / plain


def publish(config: BuildConfig, refs: CellRefs, *, encoded: bool = False) -> Path:
    """Show a configuration's outputs under its label: links into the stages, and the configuration.

    What is shown is on record, so that `check_results` finds what was put in its place.

    Args:
        encoded: the IDs are those that a frozen model gave to new items, not those it was trained on; their
            configuration alone does not make them, so none is written.

    Returns:
        The folder with the links.
    """
    shown = results_folder(config) / config.label
    links = {"model": Path(refs.model.path)}
    for ref in (refs.ids, refs.report):
        links |= {name: Path(ref.path) / name for name in StageReader(ref.path).manifest["files"]}
    made_by = config.model_dump(mode="json", exclude={"alarm_collision_rate", "copy_to", "ray"})
    made_by["options"] = {config.quantizer: made_by["options"][config.quantizer]}
    made_by |= {"model": refs.model.fingerprint} if encoded else {}
    record: dict[str, Any] = {"made_by": made_by, "links": {n: os.path.relpath(to, shown) for n, to in links.items()}}
    before = _read_record(shown)
    _warn_of_another(shown, before, made_by)
    files = {} if encoded else {"config.yaml": write_config(config).encode()}
    if before is None or {**before, "files": {}} != {**record, "files": {}}:
        # Until all of it is shown, nothing is on record.
        (shown / RECORD).unlink(missing_ok=True)
    try:
        shown.mkdir(parents=True, exist_ok=True)
        for abandoned in shown.glob(f"{TEMPORARY_PREFIX}*"):
            abandoned.unlink()
        for name, relative in record["links"].items():
            _link(shown / name, relative)
        if encoded:
            (shown / "config.yaml").unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot link the results in {shown}: {error.strerror}; run again") from error
    show_files(shown, files, record)
    copy_results(config, shown)
    return shown


@dataclass(frozen=True)
class Comparison:
    """The cells of a sweep beside each other.

    Args:
        rows: see `comparison_rows`.
        plot: PNG; None where no cell has what it shows.
        path: the page in the run folder.
    """

    rows: list[dict[str, Any]]
    plot: bytes | None
    path: Path


def compare(config: CommonConfig, cells: Iterable[Report | FailedCell]) -> Comparison:
    """Write the comparison of the cells of a sweep beside their results, as a page, a plot and JSON.

    Raises:
        StorageError: as `copy_results` does.
    """
    rows = comparison_rows(cells)
    plot = plot_comparison(rows)
    files = {
        "comparison.json": (json.dumps(rows, indent=1) + "\n").encode(),
        "comparison.md": render_comparison(rows, plot="comparison.png" if plot else None).encode(),
    } | ({"comparison.png": plot} if plot else {})
    folder = results_folder(config)
    show_files(folder, files)
    copy_results(config, folder)
    return Comparison(rows, plot, folder / "comparison.md")


def copy_results(config: CommonConfig, shown: Path) -> None:
    """Copy a folder of results to where the configuration says, if it does: what links lead to, not the links.

    Raises:
        StorageError: the store did not answer, or refused.
    """
    if not config.copy_to:
        return
    names = (path for path in shown.iterdir() if not path.name.startswith(TEMPORARY_PREFIX))
    files = {path.name: path for path in names if path.is_file()}
    files |= {f"model/{path.name}": path for path in (shown / "model").glob("[!.]*") if path.is_file()}
    place = shown.relative_to(Path(config.out).resolve() / RESULTS).as_posix()
    push(files, f"{config.copy_to.rstrip('/')}/{place}")
    log.info("Copied %d files to %s/%s", len(files), config.copy_to, place)


def show_files(shown: Path, files: Mapping[str, bytes], record: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Commit small files of results where they are not there already, and put them on record.

    Args:
        record: what else is to be on record, as JSON.
    """
    for name, data in files.items():
        if not (shown / name).is_file() or (shown / name).read_bytes() != data:
            commit_bytes(shown / name, data)
    digests = {name: vars(FileRecord(len(data), hashlib.sha256(data).hexdigest())) for name, data in files.items()}
    whole = {**record, "files": digests}
    if _read_record(shown) != whole:
        commit_sealed_json(shown / RECORD, whole)


def _link(link: Path, relative: str) -> None:
    if link.is_symlink() and os.readlink(link) == relative:  # noqa: PTH115
        return
    temporary = link.with_name(f"{TEMPORARY_PREFIX}{link.name}-{os.getpid()}")
    temporary.symlink_to(relative)
    temporary.replace(link)


def _read_record(shown: Path) -> dict[str, Any] | None:
    """Return what a folder of results shows; None where nothing tells, or what tells was changed."""
    try:
        return read_sealed_json(shown / RECORD) if (shown / RECORD).exists() else None
    except CorruptionError as error:
        log.warning("%s; it is written again", error)
        return None


def _warn_of_another(shown: Path, before: Mapping[str, Any] | None, made_by: Mapping[str, Any]) -> None:
    if before is None:
        return
    was, now = _leaves(before["made_by"]), _leaves(made_by)
    changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if changed:
        log.warning(
            "%s now shows another configuration (%s); what it showed before is still under stages, and running that "
            "configuration shows it again",
            shown,
            ", ".join(changed),
        )


def _leaves(values: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        leaves |= _leaves(value, f"{place}{name}.") if isinstance(value, dict) else {f"{place}{name}": value}
    return leaves


def published_reports(folder: Path) -> list[Report]:
    """Return the reports of the configurations that a run folder shows, by name.

    Raises:
        UsageError: the folder shows none.
    """
    links = sorted((folder / RESULTS).glob("*/*/report.json"))
    if not links:
        raise UsageError(f"{folder} is not a run folder with results: {RESULTS}/*/*/report.json is missing")
    return [read_report(reference(link.resolve().parent)) for link in links]
