"""How the training of a network went, as a section of a report: for quantizers that leave evaluations behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from semids.text import UNKNOWN, count_of, format_count, format_percent, format_rate, markdown_table

PLOT = "training"
MOST_ROWS = 12
HEADINGS = ("relative MSE", "collision rate", "floor", "excess", "codes used", "perplexity", "dead codes", "agreement")


def find_curves(training: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Return the note of the training step that left evaluations, or None."""
    return next((note for note in training if note.get("evaluations")), None)


def render_curves(note: Mapping[str, Any], image: Callable[[str], str]) -> str:
    """Return the section: a sentence, the plot, and a table of evaluations, the kept one in bold.

    Args:
        image: returns the address of the plot of the given name.
    """
    revived = sum(note["revived"])
    sentence = (
        f"{count_of(note['epochs'], 'epoch')} on {count_of(note['rows'], 'content')}; {note['held_out']:,} were "
        f"held out to judge by, and the weights of epoch {note['best_epoch']} were kept. "
        f"{count_of(revived, 'dead codeword')} found a new place."
    )
    rows = [_row(found, kept=found["epoch"] == note["best_epoch"]) for found in _thinned(note)]
    explained = (
        "Figures are of the held-out contents under the mapping nearest. Dead codes: codewords that no row had in the "
        "epoch. Agreement: contents whose codes in training, where assignment may be balanced, are those."
    )
    plot = f"![Losses, and error and collisions of held-out contents, by epoch]({image(PLOT)})"
    return "\n\n".join(["## Training", sentence, plot, markdown_table(["epoch", *HEADINGS], rows, left=()), explained])


def _thinned(note: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return evaluations evenly spaced from the first to the last, with the kept one among them."""
    found: Sequence[Mapping[str, Any]] = note["evaluations"]
    step = -(-len(found) // MOST_ROWS)
    last = len(found) - 1
    return [row for place, row in enumerate(found) if (last - place) % step == 0 or row["epoch"] == note["best_epoch"]]


def _row(found: Mapping[str, Any], *, kept: bool) -> list[str]:
    epoch = str(found["epoch"])
    return [
        f"**{epoch}**" if kept else epoch,
        UNKNOWN if found["relative_mse"] is None else format_rate(found["relative_mse"]),
        format_rate(found["collision_rate"]),
        format_rate(found["floor"]),
        format_count(found["excess_collisions"]),
        " / ".join(map(str, found["codes_used"])),
        " / ".join(f"{value:.0f}" for value in found["perplexity"]),
        " / ".join(map(str, found["dead_codes"])),
        format_percent(found["agreement"]),
    ]
