"""The section of a report that shows how a network was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from conftest import clustered_vectors

from semids.cli import main
from semids.curves import MOST_ROWS, find_curves, render_curves
from semids.plots import plot_training
from semids.text import UNKNOWN


def note_of(evaluations: int, *, best: int) -> dict[str, Any]:
    figures = {
        "contents": 100,
        "collision_rate": 0.01,
        "floor": 0.0,
        "excess_collisions": 1,
        "codes_used": [90, 80],
        "perplexity": [70.4, 60.2],
        "relative_mse": 0.5,
        "agreement": 0.875,
        "dead_codes": [3, 0],
    }
    found = [{"epoch": 10 * (place + 1), **figures} for place in range(evaluations)]
    losses = [[1.0 / epoch, 0.0 if epoch < 5 else 0.3] for epoch in range(1, 10 * evaluations + 1)]
    common = {"rows": 1900, "held_out": 100, "epochs": 10 * evaluations, "revived": [1, 4]}
    return {"step": "network", "evaluations": found, "losses": losses, "best_epoch": best, **common}


def test_the_kept_and_the_last_evaluation_are_among_those_shown() -> None:
    page = render_curves(note_of(100, best=70), lambda name: f"{name}.png")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "%" in line]
    assert len(rows) <= MOST_ROWS + 1
    kept = [row for row in rows if "**" in row]
    assert [row.split("|")[1].strip() for row in (rows[-1], *kept)] == ["1000", "**70**"]
    assert "90 / 80 | 70 / 60 | 3 / 0 | 88 % |" in rows[-1]
    assert "1,000 epochs on 1,900 contents; 100 were held out to judge by, and the weights of epoch 70" in page
    assert "5 dead codewords found a new place." in page
    assert "(training.png)" in page


def test_equal_notes_give_equal_plots_and_no_error_is_no_obstacle() -> None:
    note = note_of(3, best=20)
    assert plot_training(note) == plot_training(note)
    note["evaluations"][1]["relative_mse"] = None
    assert plot_training(note).startswith(b"\x89PNG")
    assert UNKNOWN in render_curves(note, str)


def test_only_trained_networks_have_the_section(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", clustered_vectors(300, 12))
    for quantizer in ("residual_kmeans", "rqvae"):
        arguments = ["--shape", "8x8", "--quantizer", quantizer, "--out", str(tmp_path / quantizer)]
        arguments += ["--set", "options.rqvae.epochs=6", "--set", "options.rqvae.warmup_epochs=2"]
        assert main(["tokenize", str(tmp_path / "vectors.npy"), *arguments]) == 0
        (shown,) = (tmp_path / quantizer).glob("results/*/*")
        assert ("## Training" in (shown / "report.md").read_text()) == (quantizer == "rqvae")
        assert (shown / "training.png").exists() == (quantizer == "rqvae")
    assert find_curves([{"step": "codebook-1"}]) is None
