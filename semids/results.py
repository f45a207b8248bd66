"""What a run folder shows a person: `results/CATALOGUE-EMBEDDER/LABEL`, links into the stages."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from semids.config import BuildConfig, CommonConfig, write_config
from semids.errors import StorageError, UsageError
from semids.items import is_vectors
from semids.readers import COMPRESSIONS, FORMATS
from semids.report import Report
from semids.reporting import read_report
from semids.stages import MANIFEST, Ref, StageReader, reference
from semids.store import TEMPORARY_PREFIX, commit_bytes

RESULTS = "results"
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
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(parts)).strip("-.")
    return Path(config.out).resolve() / RESULTS / (plain or "catalogue")


def publish(config: BuildConfig, refs: CellRefs) -> Path:
    """Show a configuration's outputs under its label: itself, and links into the stages, replaced one by one.

    Returns:
        The folder with the links.
    """
    shown = results_folder(config) / config.label
    links = {"model": Path(refs.model.path)}
    for ref in (refs.ids, refs.report):
        links |= {name: Path(ref.path) / name for name in StageReader(ref.path).manifest["files"]}
    try:
        shown.mkdir(parents=True, exist_ok=True)
        for abandoned in shown.glob(f"{TEMPORARY_PREFIX}*"):
            abandoned.unlink()
        for name, target in links.items():
            relative = os.path.relpath(target, shown)
            link = shown / name
            if link.is_symlink() and os.readlink(link) == relative:  # noqa: PTH115
                continue
            temporary = shown / f"{TEMPORARY_PREFIX}{name}-{os.getpid()}"
            temporary.symlink_to(relative)
            temporary.replace(link)
    except OSError as error:
        raise StorageError(f"cannot link the results in {shown}: {error.strerror}; run again") from error
    _record_config(shown / "config.yaml", config)
    return shown


def _record_config(path: Path, config: BuildConfig) -> None:
    text = write_config(config).encode()
    if path.exists():
        if path.read_bytes() == text:
            return
        before, now = (_leaves(yaml.safe_load(data)) for data in (path.read_bytes(), text))
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        log.warning(
            "%s now shows another configuration (%s); what it showed before is still under stages, and running that "
            "configuration shows it again",
            path.parent,
            ", ".join(changed),
        )
    commit_bytes(path, text)


def _leaves(values: dict[str, Any], place: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        leaves |= _leaves(value, f"{place}{name}.") if isinstance(value, dict) else {f"{place}{name}": value}
    return leaves


def broken_links(folder: Path) -> list[str]:
    """Return what is wrong with the results that a run folder shows, a line each."""
    faults: list[str] = []
    for link in sorted(path for path in (folder / RESULTS).glob("*/*/*") if path.is_symlink()):
        target = link.resolve()
        stage = target if link.name == "model" else target.parent
        if not target.exists() or not (stage / MANIFEST).exists():
            faults.append(f"{link} leads to {target}, which is missing or unfinished; run again to rebuild it")
    return faults


def published_reports(folder: Path) -> list[Report]:
    """Return the reports of the configurations that a run folder shows, by name.

    Raises:
        UsageError: the folder shows none.
    """
    links = sorted((folder / RESULTS).glob("*/*/report.json"))
    if not links:
        raise UsageError(f"{folder} is not a run folder with results: {RESULTS}/*/*/report.json is missing")
    return [read_report(reference(link.resolve().parent)) for link in links]
