"""A run killed at any step of the commit helper, and run again, ends as if nothing had happened."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from small_runs import (
    WarmParent,
    check_same,
    committed_files,
    copy_run,
    tokenize_arguments,
    write_catalogue,
)

pytestmark = pytest.mark.xdist_group("warm-parent")

POINTS = 204
CHUNKS = 12
WHOLE_RUNS = 5
"""Every fifth run that is killed begins from nothing, the others where an undisturbed one begins a stage."""
KILLED = -9
STAGES = (
    "items",
    "vectors",
    "train-codebook-1",
    "train-codebook-3",
    "train-bounded",
    "train-placed-1",
    "train-placed-3",
    "train-settled",
    "model",
    "codes",
    "ids",
    "report",
)


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing interrupted.

    Args:
        points: (number of the step, `before`, `half` or `after`): every place where a run can be killed.
        begun: copies of the run folder as it was before a stage was begun, by the number of the step that began it.
    """

    folder: Path
    catalogue: Path
    events: list[str]
    points: list[tuple[int, str]]
    begun: dict[int, Path]


@pytest.fixture(scope="module")
def undisturbed(warm_parent: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    catalogue = write_catalogue(folder / "catalogue.jsonl")
    arguments = tokenize_arguments(catalogue, warm_parent.model, folder / "run", mapping="capacity")
    outcome = warm_parent.run(arguments, copied=str(folder / "run"), copies=str(folder / "begun"))
    assert outcome.code == 0, outcome.said
    points = [
        (number, kill)
        for number, event in enumerate(outcome.events)
        for kill in ("before", "half", "after")
        if kill != "half" or event.startswith("_fill ")
    ]
    begun = {int(copy.name): copy for copy in (folder / "begun").iterdir()}
    return Undisturbed(folder / "run", catalogue, outcome.events, points, begun)


def chosen_points(undisturbed: Undisturbed) -> list[tuple[int, str]]:
    """Return POINTS of the points, one in each of as many equal parts, at a place that differs from part to part."""
    # The golden ratio's multiples fall in no rhythm with the few points that every commit has.
    within = np.arange(POINTS) * (math.sqrt(5) - 1) / 2 % 1
    places = ((np.arange(POINTS) + within) * len(undisturbed.points) / POINTS).astype(int)
    return [undisturbed.points[place] for place in places]


def steps(events: list[str], run: Path) -> list[str]:
    """Return events without the run folder, and without the process and thread in the names of temporary files."""
    return [re.sub(r"-\d+(-\d+)?$", "", event.replace(str(run), "")) for event in events]


def finished_files(run: Path) -> dict[Path, tuple[int, int]]:
    """Return the identity and time of every file that must outlive a kill: finished stages and finished shards."""
    kept: list[Path] = []
    if not (run / "stages").is_dir():
        return {}
    for folder in (run / "stages").glob("[!.]*"):
        if (folder / "manifest.json").exists():
            # What an interrupted run would have gone on from goes once the stage is done.
            kept += [path for path in folder.iterdir() if path.name[0] != "."]
            continue
        for sidecar in folder.glob("*-[0-9]*.json"):
            kept += [sidecar, sidecar.with_suffix(".npy")]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in kept}


def test_the_points_cover_every_stage_and_every_way_to_be_killed(undisturbed: Undisturbed) -> None:
    chosen = chosen_points(undisturbed)
    assert len(set(chosen)) == POINTS
    ways = {(undisturbed.events[number].split()[0], kill) for number, kill in chosen}
    steps = ("_fill", "_flush", "_rename")
    assert ways > {(step, kill) for step in steps for kill in ("before", "after")} | {("_fill", "half")}
    for place in (*(f"/stages/{stage}-" for stage in STAGES), "/results/"):
        assert sum(place in undisturbed.events[number] for number, _ in chosen) >= 2, place
    shards = [path for path in committed_files(undisturbed.folder) if path.name.startswith("vectors-0")]
    assert len(shards) == 2 * 5


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_killed_run_goes_on_to_the_same_ids_and_keeps_what_was_finished(
    chunk: int, undisturbed: Undisturbed, warm_parent: WarmParent, quick_folder: Path
) -> None:
    """Guards: the temporary file and the rename in `store.commit` (without them, a killed write leaves half a file
    under the final name), the sidecar last in `shards.write_shards`, the manifest last in `stages._make`, and
    `stages._remove_folders`.
    """
    for nth, (number, kill) in enumerate(chosen_points(undisturbed)[chunk::CHUNKS]):
        where = f"{kill} {undisturbed.events[number]}"
        run = quick_folder / f"{number}-{kill}"
        begin = 0
        if nth % WHOLE_RUNS:
            begin = max(begun for begun in undisturbed.begun if begun <= number)
            copy_run(undisturbed.begun[begin], run)
        arguments = tokenize_arguments(undisturbed.catalogue, warm_parent.model, run, mapping="capacity")
        killed = warm_parent.run(arguments, kill_at=number - begin, kill=kill, plots=False)
        assert killed.code == KILLED, f"{where}: {killed.said}"
        assert steps(killed.events, run) == steps(undisturbed.events[begin : number + 1], undisturbed.folder), where
        kept = finished_files(run)
        again = warm_parent.run(arguments, plots=False)
        assert again.code == 0, f"{where}: {again.said}"
        for path, identity in kept.items():
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == identity, f"{where}: {path} was made again"
        check_same(run, undisturbed.folder)
        shutil.rmtree(run)


def test_a_run_killed_again_and_again_ends_with_the_same_ids(
    undisturbed: Undisturbed, warm_parent: WarmParent, tmp_path: Path
) -> None:
    """Guard: `stages._remove_folders`, and that each re-run keeps what the ones before it finished."""
    arguments = tokenize_arguments(undisturbed.catalogue, warm_parent.model, tmp_path / "run", mapping="capacity")
    kills = 0
    while (outcome := warm_parent.run(arguments, kill_at=23, kill=("before", "after")[kills % 2])).code == KILLED:
        kills += 1
        assert kills < 30, "no progress"
    assert outcome.code == 0, outcome.said
    assert kills >= 8
    check_same(tmp_path / "run", undisturbed.folder)
