"""What a stage asks of a machine: time in units that are measured there, memory and disk in bytes."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from semids.parallel import single_threaded_products

ENOUGH_S = 0.25
"""A measurement is repeated until it has taken this long, and the median counts."""
MOST_REPETITIONS = 5
TEMPORARY = ".tmp-plan-"
MEASURED_BYTES = 1 << 30
"""Memory and disk that measuring takes at most."""
DEVICE_BYTES = 64 << 20
"""Of a CUDA device's memory: what PyTorch sets aside for matrix products, some tens of MB by the kind of device."""
DEVICE_MARGIN = 1.25
"""Rows stay on a device where, besides them, there is this much room for what is needed there anyway."""


@dataclass(frozen=True)
class Counts:
    """How large a run is.

    Args:
        items: N.
        contents: D, distinct contents.
        training: contents of the training split.
        training_items: items of it.
        splits: how many there are.
        dimensions: d.
        itemsize: bytes of a number of a vector as it is stored, 2 or 4.
        id_bytes: mean length of an item's id in UTF-8.
        texts: the file of the contents' texts; None where the catalogue holds vectors.
        exact: True where the catalogue was read, False where they are supposed.
    """

    items: int
    contents: int
    training: int
    training_items: int
    splits: int
    dimensions: int
    itemsize: int
    id_bytes: float
    texts: Path | None
    exact: bool

    @property
    def vector_bytes(self) -> int:
        """Size of all vectors."""
        return self.contents * self.dimensions * self.itemsize


@dataclass(frozen=True)
class Probe:
    """A kind of work that can be timed in a part of a second.

    Args:
        name: equal for what takes equal time.
        prepare: makes what the work needs, given an empty folder on the disk of the run; returns the work, and how
            many units of it that is.
        once: the first time counts, for work that is done once in a run, libraries and all, or takes seconds.
    """

    name: str
    prepare: Callable[[Path], tuple[Callable[[], Any], float]] = field(compare=False, repr=False)
    once: bool = False


@dataclass(frozen=True)
class Work:
    """What a stage, or a part of it, asks of a machine.

    Args:
        units: how much of each kind of work.
        memory: the most bytes it holds at a time, beyond what a process has that has done nothing yet.
        disk: bytes it leaves in the run folder.
        device_memory: bytes of a CUDA device's memory that it needs where there is such a device, rows left out.
        device_rows: bytes of rows that it keeps there, too, where there is room; see `fits_device`.
    """

    units: Mapping[Probe, float] = field(default_factory=dict[Probe, float])
    memory: int = 0
    disk: int = 0
    device_memory: int = 0
    device_rows: int = 0

    def __add__(self, other: Work) -> Work:
        """Return both, one after the other."""
        units = dict(self.units)
        for probe, amount in other.units.items():
            units[probe] = units.get(probe, 0) + amount
        return Work(
            units,
            max(self.memory, other.memory),
            self.disk + other.disk,
            max(self.device_memory, other.device_memory),
            max(self.device_rows, other.device_rows),
        )

    def device_bytes(self, free: int | None) -> int:
        """Return the memory that it takes of a CUDA device with so many bytes free; None stands for one of any size."""
        resident = free is not None and fits_device(self.device_rows, self.device_memory, free)
        return self.device_memory + (self.device_rows if resident else 0)


def fits_device(rows: int, needed: int, free: int) -> bool:
    """Return whether rows of so many bytes fit into what is free of a device, besides what is needed there anyway."""
    return rows + DEVICE_MARGIN * needed <= free


class Machine:
    """How long units of work take here; each kind is measured when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        """Measure with temporary files in `folder`, which exists and no other process measures in."""
        self._folder = folder
        for left in folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(left, ignore_errors=True)
        self._rates: dict[Probe, float] = {}

    def seconds(self, work: Work) -> float:
        """Return how long the work takes."""
        return sum(amount * self._rate(probe) for probe, amount in work.units.items() if amount)

    def _rate(self, probe: Probe) -> float:
        if probe not in self._rates:
            self._rates[probe] = self._measure(probe)
        return self._rates[probe]

    def _measure(self, probe: Probe) -> float:
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=TEMPORARY) as folder:
            run, units = probe.prepare(Path(folder))
            # The first time, libraries are imported and memory is touched.
            taken = [_time(run)]
            if not probe.once:
                taken = [_time(run)]
            while sum(taken) < ENOUGH_S and len(taken) < MOST_REPETITIONS and not probe.once:
                taken.append(_time(run))
        return statistics.median(taken) / units


def _time(run: Callable[[], Any]) -> float:
    with single_threaded_products():
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
