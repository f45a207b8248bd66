"""An RQ-VAE whose training is killed at any step, or while it writes a checkpoint, ends as if nothing had happened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import Outcome, WarmParent, published, stage_folders

from semids.store import read_sealed_json

pytestmark = pytest.mark.xdist_group("warm-parent")

KILLED = -9
OPTIONS = {
    "layers": [8],
    "e_dim": 4,
    "batch_size": 40,
    "epochs": 9,
    "warmup_epochs": 2,
    "eval_step": 2,
    "kmeans_iters": 3,
    "sk_epsilons": [0.0, 0.05, 0.0],
}
STEPS = 9 * 5
"""Of the network, and of the decoder that is fitted to the codes of the mapping."""
NETWORK, DECODER = "_take_step", "take_step"
CHECKPOINT_EVERY = 3
CHUNKS = 4


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing interrupted, and the (number of the step, `before`, `half` or `after`) to kill others at."""

    folder: Path
    vectors: Path
    events: list[str]
    points: list[tuple[int, str]]


def run(parent: WarmParent, vectors: Path, out: Path, **orders: Any) -> Outcome:
    sets = [part for name, value in OPTIONS.items() for part in ("--set", f"options.rqvae.{name}={value}")]
    command = ["tokenize", vectors, "--shape", "8x6x4", "--mapping", "capacity", "--quantizer", "rqvae", "--out", out]
    return parent.run([*command, *sets], checkpoint_every=CHECKPOINT_EVERY, plots=False, shard_rows=64, **orders)


@pytest.fixture(scope="module")
def undisturbed(warm_parent: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 10))[rng.integers(0, 12, 190)] + 0.3 * rng.normal(size=(190, 10))
    np.save(folder / "vectors.npy", rows.astype(np.float32))
    outcome = run(warm_parent, folder / "vectors.npy", folder / "run")
    assert outcome.code == 0, outcome.said
    points: list[tuple[int, str]] = []
    for kind, wanted in ((NETWORK, 20), (DECODER, 8)):
        steps = [number for number, event in enumerate(outcome.events) if event.startswith(kind)]
        assert len(steps) == STEPS
        drawn = rng.choice(STEPS, wanted, replace=False)
        points += [(steps[place], ("before", "after")[number % 2]) for number, place in enumerate(drawn)]
    # Every place in the writing of two checkpoints of the network, early and late.
    saves = [number for number, event in enumerate(outcome.events) if "network" in event and "checkpoint-" in event]
    saves = [number for number in saves if any(f"checkpoint-{nth:08d}" in outcome.events[number] for nth in (2, 13))]
    for number in saves:
        kills = ("before", "half", "after") if outcome.events[number].startswith("_fill") else ("after",)
        points += [(number, kill) for kill in kills]
    return Undisturbed(folder / "run", folder / "vectors.npy", outcome.events, points)


def digests(folder: Path) -> dict[str, str]:
    return {
        name: read_sealed_json(path / "manifest.json")["digest"]
        for name, path in stage_folders(folder).items()
        if not name.startswith("report-")
    }


def test_the_points_are_in_training_steps_and_in_checkpoints(undisturbed: Undisturbed) -> None:
    kinds = {(undisturbed.events[number].split()[0], kill) for number, kill in undisturbed.points}
    assert kinds == {
        *((step, kill) for step in (NETWORK, DECODER) for kill in ("before", "after")),
        *(("_fill", kill) for kill in ("before", "half", "after")),
        ("_flush", "after"),
        ("_rename", "after"),
    }
    assert len(undisturbed.points) >= 20 + 8 + 2 * 2 * 5


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_killed_training_goes_on_to_the_same_weights_losses_and_codes(
    chunk: int, undisturbed: Undisturbed, warm_parent: WarmParent, tmp_path: Path
) -> None:
    """Guards: what `Training.tensors`, `TrainingState` and `_DecoderFit` hold, and the sealed file last in `save`."""
    for number, kill in undisturbed.points[chunk::CHUNKS]:
        where = f"{kill} {undisturbed.events[number]}"
        out = tmp_path / f"{number}-{kill}"
        killed = run(warm_parent, undisturbed.vectors, out, kill_at=number, kill=kill)
        assert killed.code == KILLED, f"{where}: {killed.said}"
        again = run(warm_parent, undisturbed.vectors, out)
        assert again.code == 0, f"{where}: {again.said}"
        # What was saved is not done again.
        for kind in (NETWORK, DECODER):
            taken = sum(event.startswith(kind) for event in (*killed.events, *again.events))
            assert STEPS <= taken <= STEPS + 2 * CHECKPOINT_EVERY, where
        # The digest of a stage is that of its tensors and of its summary, which has every loss.
        assert digests(out) == digests(undisturbed.folder), where
        for name in ("semantic_ids.parquet", "tokens.json"):
            assert (published(out) / name).read_bytes() == (published(undisturbed.folder) / name).read_bytes()
        assert not list(out.rglob(".kept-*")), where
