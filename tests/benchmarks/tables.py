"""The README's tables, from the raw results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

from tests.benchmarks import encode, mapping, rqvae, training
from tests.benchmarks.measure import record_path

Contenders = dict[str, dict[str, Any]]


def format_part(part: str) -> str:
    """Return a part's Markdown table with a caption, or what is to be run where it was not measured yet."""
    path = record_path(part)
    if not path.exists():
        return f"Not measured: run `python -m tests.benchmarks {part}`."
    body = json.loads(path.read_text(encoding="utf-8"))
    formats: dict[str, Callable[[dict[str, Any]], tuple[str, list[list[str]]]]] = {
        encode.PART: _encode_rows,
        training.PART: _training_rows,
        mapping.PART: _mapping_rows,
        rqvae.PART: _rqvae_rows,
    }
    title, rows = formats[part](body)
    head, *lines = rows
    rule = ["---", *("--:" for _ in head[1:])]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))
    limits = ", ".join(f"{name}={value}" for name, value in body["threads"].items())
    return f"{title} Commit {body['commit']}, {body['machine']}, {limits}.\n\n{table}"


def _encode_rows(body: dict[str, Any]) -> tuple[str, list[list[str]]]:
    contenders: Contenders = body["contenders"]
    product = _median(contenders[encode.PRODUCT], "wall")
    head = ["encoding", "median", "rows a second", "of the product's rate", "codes unlike FAISS's", "beyond ties"]
    rows = [head]
    for name, contender in contenders.items():
        seconds = _median(contender, "wall")
        figures = contender["figures"]
        unlike = ("rows_unlike_faiss", "rows_unlike_faiss_beyond_ties")
        rows.append(
            [
                name,
                f"{seconds:.2f} s",
                f"{body['rows'] / seconds:,.0f}",
                f"{product / seconds:.2f}",
                *(f"{figures[key]:,}" if key in figures else "" for key in unlike),
            ]
        )
    return f"{_size(body, body['rows'])}, medians of {encode.REPETITIONS} interleaved repetitions.", rows


def _training_rows(body: dict[str, Any]) -> tuple[str, list[list[str]]]:
    head = ["training", "rows", "runs", "CPU", "relative MSE, beam 1", "beam 5"]
    rows = [head]
    for name, contender in body["contenders"].items():
        figures = contender["figures"]
        rows.append(
            [
                name,
                f"{figures['training_rows']:,}",
                f"{len(contender['runs'])}",
                f"{_median(contender, 'cpu'):.1f} s",
                f"{figures['relative_mse_beam_1']:.4f}",
                f"{figures['relative_mse_beam_5']:.4f}",
            ]
        )
    return f"{_size(body, body['held_out_rows'])} held out, medians of the CPU time of all threads.", rows


def _mapping_rows(body: dict[str, Any]) -> tuple[str, list[list[str]]]:
    head = ["mapping", "time", "CPU", "relative MSE", "unique IDs", "collision rate", "largest bucket", "loads"]
    rows = [head]
    for name, contender in body["contenders"].items():
        figures = contender["figures"]
        loads = [load for level in figures["level_loads"] for load in level]
        rows.append(
            [
                name,
                f"{_median(contender, 'wall'):.1f} s",
                f"{_median(contender, 'cpu'):.1f} s",
                f"{figures['relative_mse']:.4f}",
                f"{figures['unique_ids']:,}",
                f"{figures['collision_rate']:.4f}",
                f"{figures['largest_bucket']:,}",
                f"{min(loads):,} to {max(loads):,}",
            ]
        )
    return f"{_size(body, body['rows'])}, of them {body['distinct_contents']:,} distinct.", rows


def _rqvae_rows(body: dict[str, Any]) -> tuple[str, list[list[str]]]:
    contenders: Contenders = body["contenders"]
    rows = [["RQ-VAE training", rqvae.SEMIDS, rqvae.PUBLISHED, "published / semids"]]

    def add(name: str, ours: float, theirs: float) -> None:
        rows.append([name, f"{ours:.3f} s", f"{theirs:.3f} s", f"{theirs / ours:.1f}"])

    for what in ("steps", "loading"):
        each = [contenders[f"{who}, {what}"] for who in (rqvae.SEMIDS, rqvae.PUBLISHED)]
        ours, theirs = (_median(contender, "wall") / contender["figures"]["batches"] for contender in each)
        add("a step" if what == "steps" else "loading a batch, alone", ours, theirs)
    parts = [contenders[f"{who}, steps"]["figures"]["parts"] for who in (rqvae.SEMIDS, rqvae.PUBLISHED)]
    for name in parts[0]:
        if name != "whole":
            add(f"of a step without loading: {name}", parts[0][name], parts[1][name])
    size = f"{_size(body, body['rows'])}, batches of {body['batch_size']:,}"
    return f"{size}, medians of {rqvae.REPETITIONS} interleaved repetitions.", rows


def _size(body: dict[str, Any], rows: int) -> str:
    return f"{rows:,} × {body['dimensions']:,} at {'x'.join(map(str, body['sizes']))}"


def _median(contender: dict[str, Any], clock: str) -> float:
    return statistics.median(run[clock] for run in contender["runs"])
