"""What a run will take, stage by stage, and whether there is room for it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from semids import runs, stage_work
from semids.calibration import loading_pytorch
from semids.config import BuildConfig
from semids.counts import UnknownDimensionsError, read_counts
from semids.errors import UsageError
from semids.memory import available_bytes, device_free_bytes, held_bytes
from semids.pipeline import Runner, check_counts
from semids.reporting import plan_file, plan_name
from semids.stages import Ref, Stage, left_bytes, made_titles, peek_stage, title_of
from semids.store import commit_sealed_json
from semids.text import format_bytes, format_seconds, plain_table
from semids.work import MEASURED_BYTES, Counts, Machine, Work

READ, IMPORT, EMBED = "Read the catalogue", "Import the vectors", "Embed the texts"
PROCESS_BYTES, LIBRARY_BYTES = 145_000_000, 145_000_000
"""Memory of a process that has done nothing: its own, and that of the libraries that numbers need (PyTorch, FAISS),
which are loaded where vectors are first used."""
MARGIN = 1.2
"""Memory is predicted that well: what exceeds the memory at hand by less may fit."""
EMBEDDED_BYTES = 365_000_000
"""Memory that a process which has embedded texts does not give back."""


@dataclass(frozen=True)
class StagePlan:
    """What one stage will take.

    Args:
        title: of the stage, as manifests and reports have it.
        seconds: None where nothing was measured.
        memory: most bytes that the process holds meanwhile.
        disk: bytes that it leaves.
        device_memory: most bytes of a CUDA device's memory that it takes, where there is one.
        done: an earlier run left it; it takes nothing.
    """

    title: str
    seconds: float | None
    memory: int
    disk: int
    device_memory: int
    done: bool


@dataclass(frozen=True)
class Plan:
    """What a run will take, and what there is.

    Args:
        available: bytes of memory that a process may take; None where the system does not tell.
        left: bytes that an interrupted run left of the first stage to be done.
        free: bytes free on the disk of the run folder.
        folder: the run folder.
        device: bytes of a CUDA device's memory that may be taken; None where no stage to be done uses one.
    """

    counts: Counts
    stages: tuple[StagePlan, ...]
    available: int | None
    left: int
    free: int
    folder: str
    device: int | None = None

    @property
    def to_do(self) -> list[StagePlan]:
        """The stages that are not done."""
        return [stage for stage in self.stages if not stage.done]

    @property
    def total(self) -> StagePlan:
        """All stages that are to be done, as one."""
        times = [stage.seconds for stage in self.to_do]
        return StagePlan(
            title="all stages to be done",
            seconds=None if None in times else sum(time or 0 for time in times),
            memory=max((stage.memory for stage in self.to_do), default=0),
            disk=max(0, sum(stage.disk for stage in self.to_do) - self.left),
            device_memory=max((stage.device_memory for stage in self.to_do), default=0),
            done=not self.to_do,
        )

    @property
    def can_be_measured(self) -> bool:
        """Whether there is room to measure how long the stages take."""
        fits = self.available is None or MARGIN * self.available >= self.total.memory
        return fits and self.free > MEASURED_BYTES

    def check(self) -> None:
        """Refuse a run that has no room.

        Raises:
            UsageError: a stage needs clearly more memory than is available, of the machine or of its CUDA device, or
                all of them more disk than is free.
        """
        needs = max(self.to_do, key=lambda stage: stage.memory, default=self.total)
        if self.available is not None and needs.memory > MARGIN * self.available:
            raise UsageError(
                f"expected a run that fits the memory, but '{needs.title}' needs {format_bytes(needs.memory)} of "
                f"{format_bytes(self.available)} available; take a smaller shape or fewer dimensions, or a larger "
                "machine"
            )
        needs = max(self.to_do, key=lambda stage: stage.device_memory, default=self.total)
        if self.device is not None and needs.device_memory > MARGIN * self.device:
            raise UsageError(
                f"expected a run that fits the GPU's memory, but '{needs.title}' needs "
                f"{format_bytes(needs.device_memory)} of {format_bytes(self.device)} free there; take smaller batches "
                "(options.rqvae.batch_size, embedder.batch_tokens), a smaller network or model, or another GPU; with "
                "CUDA_VISIBLE_DEVICES= it runs on the CPU"
            )
        if self.total.disk > self.free:
            raise UsageError(
                f"expected a run that fits the disk, but it writes {format_bytes(self.total.disk)} and "
                f"{format_bytes(self.free)} are free in {self.folder}; free some, or choose another --out"
            )

    def describe(self) -> str:
        """Return the stages as a table, what they were predicted from, and whether they fit, for a terminal."""
        device = self.device is not None
        rows = [_row(stage, device=device) for stage in (*self.stages, self.total)]
        headings = ["stage", "time", "memory", *(["GPU memory"] if device else []), "disk"]
        counts = self.counts
        known = "" if counts.exact else ", supposed"
        return (
            f"{counts.items:,} items, {counts.contents:,} contents{known}, {counts.dimensions:,} dimensions\n\n"
            f"{plain_table(headings, rows, left=[0])}"
        )

    def verdict(self) -> str:
        """Return in a sentence what a run that is not refused needs."""
        total = self.total
        if total.done:
            return "nothing to do: every stage is there"
        of = "" if self.available is None else f" of {format_bytes(self.available)} available"
        tight = self.available is not None and total.memory > self.available
        device = ""
        if self.device is not None:
            tight = tight or total.device_memory > self.device
            device = f"{format_bytes(total.device_memory)} GPU memory of {format_bytes(self.device)} free, "
        return (
            f"{'may fit' if tight else 'fits'}: needs {format_bytes(total.memory)}{of}, {device}"
            f"{format_seconds(total.seconds)}, "
            f"{format_bytes(total.disk)} disk of {format_bytes(self.free)} free"
        )


def _row(stage: StagePlan, *, device: bool) -> list[str]:
    if stage.done:
        return [stage.title, "done", *[""] * (3 if device else 2)]
    return [
        stage.title,
        format_seconds(stage.seconds),
        format_bytes(stage.memory),
        *([format_bytes(stage.device_memory) if stage.device_memory else ""] if device else []),
        format_bytes(stage.disk),
    ]


@dataclass
class Finished:
    """What earlier runs left.

    Args:
        stages: references to whole stages, by title.
        perhaps: titles of stages that may be whole, which is known once those before them are made: they are asked for
            no disk until then.
        left: bytes of the first stage that is not whole.
    """

    stages: dict[str, Ref] = field(default_factory=dict[str, Ref])
    perhaps: frozenset[str] = frozenset()
    left: int = 0


def plan_run(config: BuildConfig, counts: Counts, machine: Machine | None, done: Finished) -> Plan:
    """Predict what each stage of a run takes.

    Args:
        machine: measures what time depends on, in some seconds; None leaves times out, and takes none.
        done: what earlier runs left; see `find_finished`.

    Raises:
        UsageError: a codebook is larger than the training split, or the contents cannot keep the bounds.
    """
    check_counts(config, counts.contents, counts.training_items)
    folder = Path(config.out).resolve()
    stages: list[StagePlan] = []
    works = _works(config, counts, done.stages)
    uses_device = any(work.device_memory for title, _, work in works if title not in done.stages)
    device = device_free_bytes() if uses_device else None
    # Among what a model's loading takes.
    loaded = counts.texts is not None and EMBED not in done.stages
    for title, base, work in works:
        finished = title in done.stages
        if base > PROCESS_BYTES and not finished and not loaded:
            work, loaded = work + Work({loading_pytorch(): 1}), True
        disk = 0 if title in done.perhaps else work.disk
        seconds = machine.seconds(work) if machine is not None and not finished else None
        stages.append(StagePlan(title, seconds, base + work.memory, disk, work.device_bytes(device), finished))
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    available = available_bytes()
    # What this process holds is in the predictions.
    available = None if available is None else available + held_bytes()
    disk = shutil.disk_usage(existing).free
    return Plan(counts, tuple(stages), available, done.left, disk, str(folder), device)


def _works(config: BuildConfig, counts: Counts, done: Mapping[str, Ref]) -> list[tuple[str, int, Work]]:
    """Return the title of every stage, the memory of the process before it, and its work."""
    base = PROCESS_BYTES + LIBRARY_BYTES
    # PyTorch converts float16 as it is read.
    first = base if counts.itemsize == 2 else PROCESS_BYTES
    quantizer = config.make_quantizer(counts.contents)
    encoding = quantizer.encoding_work(counts)
    if counts.texts is None:
        vectors = (IMPORT, first, stage_work.import_work(counts))
        read = first
    else:
        vectors = (EMBED, base, stage_work.embed_work(config, counts.texts, counts))
        base += 0 if EMBED in done else EMBEDDED_BYTES
        first, read = base, PROCESS_BYTES
    return [
        (READ, read, stage_work.scan_work(counts)),
        vectors,
        *((step.title, base if step.needs else first, step.work(counts)) for step in quantizer.training_steps()),
        ("Freeze the model", base, stage_work.freeze_work(config, counts, encoding.disk)),
        ("Encode the vectors", base, stage_work.encode_work(config, counts, encoding)),
        ("Write the semantic IDs", base, stage_work.assign_work(config, counts)),
        ("Write the report", base, stage_work.report_work(config, counts)),
    ]


def find_finished(config: BuildConfig) -> Finished:
    """Return what earlier runs left of a configuration, as far as manifests tell: up to the first that is not there.

    Those after it may be there as well, which is known once it is made: a plan is of the most that can be to do.
    """
    folder = Path(config.out)
    found = Finished()
    # To name a stage, the catalogue is digested: not where nothing can be found.
    if not (folder / "stages").is_dir():
        return found

    def peek(stage: Stage) -> Ref:
        ref = peek_stage(folder, stage)
        if ref is None:
            found.left = left_bytes(folder, stage)
            raise runs.NotMadeError(stage.title)
        found.stages[stage.title] = ref
        return ref

    with contextlib.suppress(runs.NotMadeError):
        runs.build(config, peek)
    return found


def checking_runner(configs: Sequence[BuildConfig], run: Runner, *, made: Sequence[Ref] = ()) -> Runner:
    """Return a runner that refuses a run without room before a stage after the catalogue's is made.

    Where nothing but the catalogue was read, that is before the first of them. A run whose dimensions are not known
    before a model is loaded is not refused.

    Args:
        configs: of the cells of a run over one catalogue, which is refused if none of them has room.
        made: references to stages that are made already, in their order.

    Raises, when it is called:
        UsageError: as `Plan.check` does.
    """
    folder = Path(configs[0].out)
    seen = Finished({title_of(ref): ref for ref in made})

    def run_checked(stage: Stage) -> Ref:
        if READ in seen.stages and peek_stage(folder, stage) is None:
            seen.left = left_bytes(folder, stage)
            seen.perhaps = made_titles(folder) - {stage.title}
            _check_cells(configs, seen)
        seen.stages[stage.title] = run(stage)
        return seen.stages[stage.title]

    return run_checked


def _check_cells(configs: Sequence[BuildConfig], seen: Finished) -> None:
    refused: UsageError | None = None
    for config in configs:
        try:
            plan = plan_run(config, read_counts(config, seen.stages[READ]), None, seen)
        except UnknownDimensionsError:
            return
        except UsageError:
            continue  # What the catalogue cannot fill is refused by itself; the other cells of a sweep need not be.
        try:
            plan.check()
        except UsageError as error:
            refused = refused or error
        else:
            return
    if refused is not None:
        raise refused


def leave_plan(config: BuildConfig, plan: Plan) -> Path:
    """Keep a plan in the run folder, where the report of the run finds it; return its file."""
    path = plan_file(config)
    figures = asdict(plan) | {"counts": {**asdict(plan.counts), "texts": str(plan.counts.texts or "")}}
    commit_sealed_json(path, {"plan_of": plan_name(config), **figures})
    return path
