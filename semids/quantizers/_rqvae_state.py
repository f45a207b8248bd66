"""What a training that was killed goes on from: everything that decides its later steps, in committed files."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from semids.errors import CorruptionError
from semids.quantizers._rqvae_model import RqvaeModel
from semids.store import FileRecord, check_file, commit, commit_sealed_json, read_sealed_json

KEPT = 2
"""Checkpoints of which the files are kept: the last, and the one before it."""
CHECKPOINT_SECONDS = 60.0
"""Least time between two checkpoints: what a kill costs at most, besides the step under way."""
CHECKPOINT_SHARE = 0.02
"""Part of the time that checkpoints may take: large networks are saved less often."""

log = logging.getLogger("semids")


class Resumable(Protocol):
    """What checkpoints keep: all that decides its later steps, as tensors and as facts in JSON."""

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that decides later steps, by name, on the CPU."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return what else decides them, as JSON."""
        ...

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take the values that `tensors` and `facts` returned."""
        ...


@dataclass
class TrainingState:
    """Where a training stands, besides weights. Learning rates and orders of rows are functions of it.

    Args:
        epoch: epochs that are finished.
        step: steps taken of the epoch under way.
        sums: reconstruction and quantization loss of that epoch, rows × mean.
        losses: mean reconstruction and quantization loss of every finished epoch.
        evaluations: figures of the held-out rows, one dictionary an evaluation.
        revived: dead codewords that were moved to a residual, by level.
        best: epoch of the evaluation whose weights are the best so far; 0 before the first.
        worse: evaluations since then.
    """

    epoch: int = 0
    step: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0])
    losses: list[list[float]] = field(default_factory=list[list[float]])
    evaluations: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    revived: list[int] = field(default_factory=list[int])
    best: int = 0
    worse: int = 0


@dataclass
class Training:
    """A training under way: the network, its optimizer, where it stands, and the best weights so far.

    Args:
        counts: rows that each codeword of a level got in the epoch under way, (K_l,) int64 a level.
        best_weights: the model's state at epoch `state.best`; empty before the first evaluation.
    """

    model: RqvaeModel
    optimizer: torch.optim.Optimizer
    state: TrainingState
    counts: list[Tensor]
    best_weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that decides later steps, by name."""
        found = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        found |= {f"best/{name}": value for name, value in self.best_weights.items()}
        found |= {f"counts/{level}": value for level, value in enumerate(self.counts)}
        found |= optimizer_tensors(self.optimizer)
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}

    def facts(self) -> dict[str, Any]:
        """Return where the training stands."""
        return asdict(self.state)

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take the values that `tensors` and `facts` returned."""
        parts = part_tensors(tensors)
        self.state = TrainingState(**facts)
        self.model.load_state_dict(parts["model"])
        self.best_weights = parts.get("best", {})
        self.counts = [parts["counts"][str(level)].to(old.device) for level, old in enumerate(self.counts)]
        restore_optimizer(self.optimizer, parts.get("optimizer", {}))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what an optimizer keeps of each parameter, as `optimizer/PLACE/NAME`."""
    return {
        f"optimizer/{place}/{name}": value
        for place, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take the values that `optimizer_tensors` returned, by names without their first part."""
    values: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        place, _, key = name.partition("/")
        values.setdefault(int(place), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": values})


def part_tensors(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return tensors by the first part of their names, and by the rest of them."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = value
    return parts


class Checkpoints:
    """The checkpoints of one training, in a folder of its own.

    Args:
        folder: None keeps none.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._number = 0
        self._saved = time.monotonic()
        self._pause = CHECKPOINT_SECONDS

    def save_now_and_then(self, training: Resumable) -> None:
        """Commit a checkpoint if the last one is a minute old; to be called after every step."""
        if time.monotonic() - self._saved >= self._pause:
            self.save(training)

    def save(self, training: Resumable) -> None:
        """Commit a checkpoint; a kill at any instant leaves it, or those before it, whole.

        Raises:
            StorageError: the file system refused.
        """
        if self._folder is None:
            return
        started = time.monotonic()
        self._number += 1
        path = self._folder / f"checkpoint-{self._number:08d}.safetensors"
        tensors = training.tensors()
        record = commit(path, lambda temporary: save_file(tensors, temporary))
        # The sealed file is the commit: tensors without it are those of a checkpoint that was not finished.
        commit_sealed_json(path.with_suffix(".json"), {**vars(record), "state": training.facts()})
        kept = {sealed.stem for sealed in sorted(self._folder.glob("checkpoint-*.json"))[-KEPT:]}
        # In the order of names: the sealed file before its tensors.
        for old in sorted(self._folder.glob("checkpoint-*")):
            if old.stem not in kept:
                old.unlink()
        self._saved = time.monotonic()
        self._pause = max(CHECKPOINT_SECONDS, (self._saved - started) / CHECKPOINT_SHARE)

    def load(self, training: Resumable) -> bool:
        """Bring a training to where the last whole checkpoint has it; False where there is none.

        A checkpoint that was changed is passed over for the one before it, which costs the steps in between.
        """
        if self._folder is None:
            return False
        found = sorted(self._folder.glob("checkpoint-*.json"), reverse=True)
        # Later ones are numbered on, so that damaged ones are the first to go.
        self._number = int(found[0].stem.rpartition("-")[2]) if found else 0
        for place, sealed in enumerate(found):
            path = sealed.with_suffix(".safetensors")
            try:
                body = read_sealed_json(sealed)
                check_file(path, FileRecord(body["bytes"], body["sha256"]))
                tensors = load_file(path)
            except (CorruptionError, SafetensorError) as error:
                onward = "going on from the checkpoint before it" if place < len(found) - 1 else "training begins anew"
                log.warning("a checkpoint cannot be used, %s: %s", onward, error)
                continue
            training.restore(tensors, body["state"])
            log.info("Training goes on from %s of %s", sealed.stem, self._folder.parent.name)
            return True
        return False
