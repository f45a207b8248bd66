"""How an RQ-VAE is trained: batches, revival of dead codewords, evaluation on held-out rows, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from semids.errors import DataError
from semids.kmeans import Lloyd, fit_codebook, sample_rows, training_budget
from semids.quantizers._ranks import Ranks
from semids.quantizers._rqvae_evaluation import EVALUATION_ROWS, evaluate, rank_of
from semids.quantizers._rqvae_layers import nearest_codewords
from semids.quantizers._rqvae_memory import training_device_bytes
from semids.quantizers._rqvae_outcome import Trained
from semids.quantizers._rqvae_rows import (
    RowSource,
    StreamedRows,
    batch_places,
    epoch_orders,
    hold_out,
    open_rows,
    read_ahead,
)
from semids.quantizers._rqvae_state import Checkpoints, Training, TrainingState
from semids.quantizers._rqvae_steps import (
    count_codes,
    find_gradients,
    make_model,
    make_optimizer,
    rate_of,
    reset_moments,
)
from semids.shards import ShardedArray, ShardLayout

if TYPE_CHECKING:
    from semids.quantizers.rqvae import RqvaeSettings

REVIVAL_ROWS = 4096
"""Rows among which dead codewords find a new place, at least one a codeword."""

Told = Callable[[str, int, int], None]
"""Called as told(what, done, total)."""


@dataclass(frozen=True)
class Job:
    """A training that is to be done.

    Args:
        sizes: codebook sizes.
        vectors: (D, d), all contents.
        rows: (n,) int64, ascending: contents of the training split.
        folder: where checkpoints lie; None keeps none.
    """

    sizes: tuple[int, ...]
    settings: RqvaeSettings
    seed: int
    vectors: ShardedArray
    rows: NDArray[np.int64]
    folder: Path | None

    @property
    def layout(self) -> ShardLayout:
        """Of the vectors that are trained on, as if they were an array of their own."""
        return replace(self.vectors.layout, rows=len(self.rows))


def train(job: Job, told: Told, *, ranks: Ranks = Ranks(), device: torch.device | None = None) -> Trained:  # noqa: B008
    """Train an RQ-VAE, or go on where a killed training's last checkpoint is.

    With the same arguments, on the same machine with the same number of threads, the outcome is the same to the bit,
    however often it was interrupted.

    Args:
        ranks: this process's place among those that train together; each has a part of every batch.
        device: CUDA where there is a device, if not given.

    Raises:
        DataError: a loss that is no number; names contents of the batch.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = _Trainer(job, told, ranks, device)
    trainer.start()
    while not trainer.is_finished():
        trainer.run_epoch()
    trainer.save()
    if trainer.state.epoch < job.settings.epochs:
        # Patience ended it: these rows were all.
        rows = trainer.state.epoch * len(trainer.trained)
        told("train", rows, rows)
    return trainer.outcome()


class _Trainer:
    def __init__(self, job: Job, told: Told, ranks: Ranks, device: torch.device) -> None:
        self.job, self.told, self.ranks, self.device = job, told, ranks, device
        self.trained, self.held_out = hold_out(job.rows, seed=job.seed)
        p = job.settings
        model = make_model(job.sizes, p, job.vectors.layout.columns, seed=job.seed).to(device)
        model.ranks = ranks
        self.steps = -(-len(self.trained) // p.batch_size)
        self.training = Training(
            model,
            make_optimizer(p, model),
            TrainingState(revived=[0] * len(job.sizes)),
            [torch.zeros(size, dtype=torch.int64, device=device) for size in job.sizes],
        )
        # All ranks go on from what one of them writes.
        self.checkpoints = Checkpoints(job.folder)

    @property
    def state(self) -> TrainingState:
        return self.training.state

    def start(self) -> None:
        """Restore the last checkpoint, or begin."""
        if not self.checkpoints.load(self.training):
            if self.ranks.rank == 0:
                self._standardize()
            self._agree()
        epochs = range(self.state.epoch, self.job.settings.epochs)
        self.orders = epoch_orders(len(self.trained), epochs, seed=self.job.seed)
        needed = training_device_bytes(self.job.sizes, self.job.settings, self.job.layout)
        self.rows: RowSource = open_rows(self.job.vectors, self.trained, self.device, needed=needed)
        self.step_model: nn.Module = self.training.model
        if self.ranks.world > 1:
            # Scales and means never change: nothing to send along with the gradients.
            self.step_model = DistributedDataParallel(self.training.model, forward_sync_buffers=False)

    def _agree(self) -> None:
        """Give every rank the weights of rank 0."""
        for value in self.training.model.state_dict().values():
            self.ranks.broadcast(value)

    def _sample(self) -> Iterator[Tensor]:
        """Yield a seeded sample of the rows, part by part."""
        budget = training_budget(max(self.job.sizes), self.job.vectors.layout.columns)
        places = sample_rows(len(self.trained), budget, seed=self.job.seed)
        parts = [places[start : start + EVALUATION_ROWS] for start in range(0, len(places), EVALUATION_ROWS)]
        return read_ahead(StreamedRows(self.job.vectors, self.trained, self.device).read, parts, self.device)

    @torch.no_grad()
    def _standardize(self) -> None:
        """Set the mean and the scale of the rows."""
        model = self.training.model
        count, squares = 0, torch.zeros((), dtype=torch.float64, device=self.device)
        sums = torch.zeros(model.mean.shape, dtype=torch.float64, device=self.device)
        for rows in self._sample():
            count += len(rows)
            sums += rows.sum(dim=0, dtype=torch.float64)
            squares += rows.double().square().sum()
        mean = sums / count
        variance = float(squares / count - mean.square().sum()) / len(mean)
        model.mean.copy_(mean)
        # Rows that are all the same have nothing to tell apart; any scale will do.
        model.scale.fill_(1 / math.sqrt(variance) if variance > 1e-12 * float(mean.square().mean()) else 1.0)

    @torch.no_grad()
    def _start_codebooks(self) -> None:
        """Fit the codebooks to what the encoder makes of a sample, as residual k-means does, with no momentum."""
        p, model = self.job.settings, self.training.model
        if self.ranks.rank == 0:
            residuals = torch.cat([model.encode(rows) for rows in self._sample()])
            for level, codebook in enumerate(model.codebooks):
                found = fit_codebook(
                    residuals.cpu().numpy(),
                    len(codebook),
                    Lloyd(p.kmeans_iters, restarts=1),
                    rng=np.random.default_rng((self.job.seed, 1 + level)),
                    done=lambda steps, level=level: self.told(f"k-means of level {level + 1}", steps, p.kmeans_iters),
                )
                codebook.copy_(torch.from_numpy(found.codebook))
                for rows in residuals.split(EVALUATION_ROWS):
                    rows -= codebook[nearest_codewords(rows, codebook)]
        self._agree()
        for codebook in model.codebooks:
            for value in self.training.optimizer.state[codebook].values():
                value.zero_()

    def is_finished(self) -> bool:
        """True once all epochs are over, or so many evaluations found nothing better."""
        p = self.job.settings
        return self.state.epoch >= p.epochs or (0 < p.patience <= self.state.worse)

    def run_epoch(self) -> None:
        """Take the steps that are left of the epoch under way, and close it."""
        p, state = self.job.settings, self.state
        if p.kmeans_init and (state.epoch, state.step) == (p.warmup_epochs, 0):
            self._start_codebooks()
        order = next(self.orders)
        places = batch_places(order, p.batch_size, start=state.step, ranks=self.ranks)
        for rows in read_ahead(self.rows.read, places, self.device):
            self._take_step(rows, min(p.batch_size, len(order) - state.step * p.batch_size), order)
            if state.step < self.steps:
                self._save_now_and_then()
        self._close_epoch(len(order))
        self._save_now_and_then()

    def _take_step(self, rows: Tensor, whole: int, order: NDArray[np.uint32]) -> None:
        p, state, training = self.job.settings, self.state, self.training
        number = state.epoch * self.steps + state.step
        for group in training.optimizer.param_groups:
            group["lr"] = p.lr * rate_of(p, number, self.steps) * group["rate"]
        losses = self.step_model(rows, whole, quantized=not self._is_warming_up())
        norm = find_gradients(training.model, training.optimizer, losses, parts=self.ranks.world)
        counts = [count_codes(losses.codes[:, level], len(each)) for level, each in enumerate(training.counts)]
        shared = self.ranks.sum(torch.cat([losses.reconstruction[None], losses.quantization[None], *counts]).double())
        # Besides balanced assignment, the one place in a step that waits for a device.
        *parts, norm = torch.cat([shared[:2], norm[None].double()]).tolist()
        if not all(map(math.isfinite, (norm, *parts))):
            first = state.step * p.batch_size
            contents = np.sort(self.trained[order[first : first + p.batch_size]])
            raise DataError(
                f"the loss of epoch {state.epoch + 1}, step {state.step + 1} is no number (reconstruction {parts[0]}, "
                f"quantization {parts[1]}, gradient {norm}); its batch has the contents {contents[:5].tolist()} "
                f"and {max(0, len(contents) - 5)} more; lower lr, or look at their vectors"
            )
        training.optimizer.step()
        sizes = [len(level) for level in training.counts]
        for level, found in zip(training.counts, shared[2:].long().split(sizes), strict=True):
            level += found
        state.sums = [total + part * whole for total, part in zip(state.sums, parts, strict=True)]
        state.step += 1
        self.told("train", state.epoch * len(order) + min(state.step * p.batch_size, len(order)), p.epochs * len(order))

    def _is_warming_up(self) -> bool:
        """True while there are no codebooks: of an encoder that has learnt nothing they would be codebooks of noise."""
        p = self.job.settings
        return p.kmeans_init and self.state.epoch < p.warmup_epochs

    def _close_epoch(self, rows: int) -> None:
        state, training, p = self.state, self.training, self.job.settings
        quantized = not self._is_warming_up()
        state.losses.append([total / rows for total in state.sums])
        state.epoch += 1
        last = state.epoch == p.epochs
        if quantized and (state.epoch % p.eval_step == 0 or last):
            self._evaluate([int((level == 0).sum()) for level in training.counts])
        if quantized and not last:
            self._revive([torch.nonzero(level == 0)[:, 0] for level in training.counts])
        state.step, state.sums = 0, [0.0, 0.0]
        for level in training.counts:
            level.zero_()

    @torch.no_grad()
    def _revive(self, dead: Sequence[Tensor]) -> None:
        """Move codewords that no row had in the epoch to what rows have left over before their level."""
        if not any(map(len, dead)):
            return
        model, state = self.training.model, self.state
        wanted = max(REVIVAL_ROWS, max(map(len, dead)))
        chosen = sample_rows(len(self.trained), wanted, seed=self.job.seed + state.epoch)
        residuals = model.encode(self.rows.read(chosen).to(self.device))
        residuals = residuals[torch.randperm(len(residuals), generator=torch.Generator().manual_seed(state.epoch))]
        for level, codebook in enumerate(model.codebooks):
            # Fewer rows than dead codewords: the others stay where they are.
            moved = dead[level][: len(residuals)]
            codebook[moved] = residuals[: len(moved)]
            reset_moments(self.training.optimizer.state[codebook], moved)
            self.ranks.broadcast(codebook.data)
            state.revived[level] += len(moved)
            residuals = residuals - codebook[nearest_codewords(residuals, codebook)]

    def _evaluate(self, dead: list[int]) -> None:
        """Judge the network by the held-out rows, every rank for itself, and keep its weights if they are the best."""
        p, state = self.job.settings, self.state
        figures = evaluate(self.training.model, self.job.vectors, self.held_out, batch_size=p.batch_size)
        best = next((found for found in state.evaluations if found["epoch"] == state.best), None)
        state.evaluations.append({"epoch": state.epoch, **figures, "dead_codes": dead})
        better = torch.tensor(best is None or rank_of(p, figures) < rank_of(p, best), dtype=torch.uint8)
        better = better.to(self.device)
        # One verdict for all ranks: each judges for itself, and rounding may differ from device to device.
        self.ranks.broadcast(better)
        if better:
            state.best, state.worse = state.epoch, 0
            self.training.best_weights = {
                name: value.detach().clone() for name, value in self.training.model.state_dict().items()
            }
        else:
            state.worse += 1

    def _save_now_and_then(self) -> None:
        if self.ranks.rank == 0:
            self.checkpoints.save_now_and_then(self.training)

    def save(self) -> None:
        """Commit a checkpoint, as the one rank that writes."""
        if self.ranks.rank == 0:
            self.checkpoints.save(self.training)

    def outcome(self) -> Trained:
        """Return the best weights."""
        self.training.model.load_state_dict(self.training.best_weights)
        return Trained(self.training.model, self.state, len(self.trained), len(self.held_out))
