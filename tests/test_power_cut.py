"""A power cut: what the disk holds at that moment, and not what the kernel would still have written, is all there is.

A run works on a file system in an image file. The image, copied in the middle of the run, is what a power cut leaves.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small_runs import WarmParent, check_same, stage_folders, tokenize_arguments, write_catalogue

from semids.cli import main
from semids.verification import verify_run

pytestmark = pytest.mark.xdist_group("warm-parent")

MOMENTS = 20
IMAGE_BYTES = 64 << 20
# The kernel would write to the disk on its own after 5 s.
MOUNT_OPTIONS = "loop,commit=300"
OWN = ("manifest.json", "report.json", "report.md", "record.json", "config.yaml")
"""Files that hold times or the run folder: two runs never write the same ones."""


@dataclass(frozen=True)
class Disk:
    """A run folder on an image that can be copied, and another place where copies can be looked at.

    Args:
        events: what an undisturbed run does, step by step; `undisturbed` is its folder.
    """

    folder: Path
    image: Path
    catalogue: Path
    undisturbed: Path
    events: list[str]


def call(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.strip()}")


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[Path]:
    """Have the file system in an image at a place, and let go of both whatever happens."""
    place.mkdir(exist_ok=True)
    for patience in (5, 4, 3, 2, 1, 0):
        try:
            call("mount", "-o", MOUNT_OPTIONS, image, place)
            break
        except OSError as error:
            # Another process may have taken the free device that was found, or the last one is not let go of yet.
            if "loop device" not in str(error) or not patience:
                raise
            time.sleep(0.2)
    try:
        yield place
    finally:
        try:
            call("umount", place)
        except OSError:
            call("umount", "--lazy", place)
            raise


def make_image(image: Path) -> None:
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    # Nothing is left for the kernel to write in the background.
    call("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)


@pytest.fixture(scope="module")
def can_mount(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where the machine lets nobody mount an image."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount an image")
    missing = [tool for tool in ("mkfs.ext4", "mount", "umount") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("probe")
    make_image(folder / "image")
    try:
        with mounted(folder / "image", folder / "disk"):
            pass
    except OSError as error:
        pytest.skip(f"this machine mounts no image: {error}")


@pytest.fixture
def disk(can_mount: None, warm_parent: WarmParent, quick_folder: Path) -> Disk:
    catalogue = write_catalogue(quick_folder / "catalogue.jsonl")
    undisturbed = quick_folder / "undisturbed"
    outcome = warm_parent.run(arguments(warm_parent, catalogue, undisturbed), plots=False)
    assert outcome.code == 0, outcome.said
    make_image(quick_folder / "image")
    return Disk(quick_folder, quick_folder / "image", catalogue, undisturbed, outcome.events)


def arguments(parent: WarmParent, catalogue: Path, run: Path) -> list[str]:
    return tokenize_arguments(catalogue, parent.model, run, mapping="capacity")


def moments(events: Sequence[str]) -> list[int]:
    """Return MOMENTS numbers of steps spread over the run: by turns a rename, and the flush of its folder after it."""
    renames = [number for number, event in enumerate(events) if event.startswith("_rename ")]
    chosen = [renames[nth * (len(renames) - 1) // (MOMENTS - 1)] for nth in range(MOMENTS)]
    return [number + nth % 2 for nth, number in enumerate(chosen)]


def run_and_cut(parent: WarmParent, disk: Disk, **orders: Any) -> dict[int, Path]:
    """Run on the image, and return its copies by the number of the step after which each was made."""
    cuts = disk.folder / "cuts"
    cuts.mkdir()
    at = moments(disk.events)
    with mounted(disk.image, disk.folder / "disk") as place:
        command = arguments(parent, disk.catalogue, place / "run")
        outcome = parent.run(command, plots=False, image=str(disk.image), cuts=str(cuts), cut_after=at, **orders)
    assert outcome.code == 0, outcome.said
    assert len(outcome.events) == len(disk.events)
    return {number: cuts / str(number) for number in at}


def final_files(run: Path) -> dict[str, Path]:
    """Return the files under their final names, by their place in the run folder."""
    found = {str(path.relative_to(run)): path for path in run.rglob("*") if path.is_file() and not path.is_symlink()}
    # Locks, temporary files, and folders of a stage's scratch files.
    return {name: path for name, path in found.items() if not any(part[0] == "." for part in Path(name).parts)}


def damaged(run: Path, undisturbed: Path) -> list[str]:
    """Return the files under a final name that are not whole: by their digests, and by what another run wrote."""
    expected = final_files(undisturbed)
    found = [
        name
        for name, path in final_files(run).items()
        if not path.stat().st_size or (path.name not in OWN and path.read_bytes() != expected[name].read_bytes())
    ]
    return found + verify_run(run).faults


def test_the_moments_are_in_every_part_of_a_run(disk: Disk) -> None:
    chosen = moments(disk.events)
    assert len(set(chosen)) == MOMENTS
    assert {disk.events[number].split()[0] for number in chosen} == {"_rename", "_flush"}
    for place in ("/items-", "/vectors-", "/train-", "/model-", "/codes-", "/ids-", "/report-", "/results/"):
        assert any(place in disk.events[number] for number in chosen), place


def test_after_a_power_cut_every_file_is_whole_what_was_finished_is_there_and_a_run_ends_with_the_same_ids(
    disk: Disk, warm_parent: WarmParent
) -> None:
    """Guards: `_flush` of the file before the rename in `store.commit` (see the next test), and of the folder after it,
    without which the last file before a cut is not there.
    """
    for number, image in run_and_cut(warm_parent, disk).items():
        where = f"after {disk.events[number]}"
        with mounted(image, disk.folder / "disk") as place:
            run = place / "run"
            assert damaged(run, disk.undisturbed) == [], where
            finished = [
                event.partition(" ")[2].removeprefix(f"{disk.undisturbed}/")
                for event in disk.events[:number]
                # What a stage keeps for an interrupted run goes once the stage is done.
                if event.startswith("_rename ") and "/.kept-" not in event
            ]
            assert set(finished) <= set(final_files(run)), where
            kept = stage_folders(run)
            command = arguments(warm_parent, disk.catalogue, run)
            again = warm_parent.run(command, plots=False)
            assert again.code == 0, f"{where}: {again.said}"
            assert not any(f"/{name}/" in event for event in again.events for name in kept), where
            check_same(run, disk.undisturbed)
            assert main(["verify", str(run)]) == 0
        image.unlink()


def test_without_the_flush_before_the_rename_files_are_empty_after_a_power_cut(
    disk: Disk, warm_parent: WarmParent
) -> None:
    """That the cut is one: this is what the flush of the file in `store.commit` is for."""
    empty: list[str] = []
    for image in run_and_cut(warm_parent, disk, flush_files=False).values():
        with mounted(image, disk.folder / "disk") as place:
            found = final_files(place / "run")
            empty += [name for name, path in found.items() if not path.stat().st_size]
            if found:
                assert damaged(place / "run", disk.undisturbed)
    assert len(empty) >= MOMENTS
