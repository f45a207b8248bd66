"""The report of a run: every figure in one JSON object, and a table that compares reports."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from semids.distortion import NeighbourFigures
from semids.errors import DataError
from semids.metrics import IdFigures
from semids.text import (
    UNKNOWN,
    escape_markdown,
    format_count,
    format_rate,
    format_ratio,
    format_seconds,
    markdown_table,
    plain_table,
    printable,
    shorten,
)

LONGEST_CELL = 60


@dataclass(frozen=True)
class SplitFigures:
    """The figures of one split, or of all splits together.

    Args:
        ids: collisions and loads.
        relative_mse: Σ‖x − x̂‖² / Σ‖x − x̄‖² at depths 1 to L, x̄ the mean of the split; None if not known or not
            defined.
        relative_mse_undefined: why there is no relative MSE, for a person; None if there is one.
    """

    ids: IdFigures
    relative_mse: tuple[float, ...] | None = None
    relative_mse_undefined: str | None = None


@dataclass(frozen=True)
class Report:
    """All that is known of a run's IDs. Its JSON form has the figures of all splits together at the top level.

    Args:
        title: what a person calls the run; in a comparison, the name of the cell.
        overall: figures over all splits.
        splits: figures of each split, by its name.
        shape: for example 256x256x256; None if the codebook sizes are not known.
        mapping: how codes were chosen.
        quantizer: which member of the family made them.
        neighbours: figures of a sample; None if not measured.
        training: notes of the solvers, free-form JSON, usually one entry a level; `converged: false` is shown as a
            warning, with the whole entry.
        catalogue: what came in, free-form JSON; shown are `items`, `quarantined`, `distinct_texts`,
            `distinct_products`, and `splits`: the same by split.
        timings: seconds by stage.
        peak_rss_bytes: largest anonymous memory of the stages before the report.
        planned: by stage before the report, free-form JSON, what a plan predicted and what was: `stage`,
            `predicted_seconds`, `seconds`, `predicted_memory_bytes`, `peak_bytes`, `predicted_disk_bytes`,
            `written_bytes`, and of a stage that used a CUDA device `predicted_device_bytes` and `peak_device_bytes`;
            empty without a plan.
        versions: of Python and the libraries.
        fingerprint: of the step that made the codes.
    """

    title: str
    overall: SplitFigures
    splits: Mapping[str, SplitFigures] = field(default_factory=dict[str, SplitFigures])
    shape: str | None = None
    mapping: str | None = None
    quantizer: str | None = None
    neighbours: NeighbourFigures | None = None
    training: tuple[Mapping[str, Any], ...] = ()
    catalogue: Mapping[str, Any] = field(default_factory=dict[str, Any])
    timings: Mapping[str, float] = field(default_factory=dict[str, float])
    peak_rss_bytes: int | None = None
    planned: tuple[Mapping[str, Any], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    fingerprint: str | None = None

    @property
    def converged(self) -> bool:
        """False if a solver's notes say that it did not converge."""
        return not any(note.get("converged") is False for note in self.training)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; numbers that JSON lacks, such as NaN, become strings."""
        return plain_json(
            {
                "title": self.title,
                "shape": self.shape,
                "mapping": self.mapping,
                "quantizer": self.quantizer,
                **_flat(self.overall),
                "neighbours": None if self.neighbours is None else asdict(self.neighbours),
                "training": list(self.training),
                "catalogue": self.catalogue,
                "splits": {name: _flat(split) for name, split in self.splits.items()},
                "timings": self.timings,
                "peak_rss_bytes": self.peak_rss_bytes,
                "planned": list(self.planned),
                "versions": self.versions,
                "fingerprint": self.fingerprint,
            }
        )

    def to_json(self) -> str:
        """Return the report as JSON text, UTF-8 safe, ending in a newline."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Return the report whose `to_dict` gave these values.

        Raises:
            DataError: a figure is missing or of the wrong type.
        """
        try:
            own = {entry.name for entry in fields(cls)} - {"overall", "splits"}
            nested = {name: value for name, value in values.items() if name in own} | {
                "overall": _nested(values),
                "splits": {name: _nested(split) for name, split in values["splits"].items()},
            }
            return TypeAdapter(cls).validate_python(nested)
        except (ValidationError, KeyError, AttributeError) as error:
            raise DataError(f"expected the JSON of a report, got something else: {error}") from error

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Return the report whose `to_json` gave this text.

        Raises:
            DataError: not JSON, or not that of a report.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(f"expected the JSON of a report, got text that is not JSON: {error}") from error
        return cls.from_dict(values)


@dataclass(frozen=True)
class FailedCell:
    """A cell of a comparison that has no report: what it is called, and why it has none."""

    cell: str
    reason: str


def comparison_rows(cells: Iterable[Report | FailedCell]) -> list[dict[str, Any]]:
    """Return one JSON-able row a cell, in the order given; a failed cell has only `cell` and `status`."""
    rows: list[dict[str, Any]] = []
    for cell in cells:
        if isinstance(cell, FailedCell):
            rows.append({"cell": cell.cell, "status": f"failed: {cell.reason}"})
            continue
        ids, relative_mse = cell.overall.ids, cell.overall.relative_mse
        row = {
            "cell": cell.title,
            "shape": cell.shape,
            "mapping": cell.mapping,
            "quantizer": cell.quantizer,
            "capacity_ratio": ids.capacity_ratio,
            "unique_ids": ids.unique_ids,
            "collision_rate": ids.collision_rate,
            "floor": ids.floor,
            "excess_collisions": ids.excess_collisions,
            "uniform_hash_reference": ids.uniform_hash_reference,
            "relative_mse": relative_mse[-1] if relative_mse else None,
            "recall": cell.neighbours.recall if cell.neighbours else None,
            "codes_used": [level.codes_used for level in ids.levels],
            "seconds": math.fsum(cell.timings.values()) if cell.timings else None,
            "status": "ok" if cell.converged else "a solver did not converge",
        }
        rows.append(plain_json(row))
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of `comparison_rows` as a table for a terminal, aligned; columns that no row has are left out."""
    columns = _columns(rows)
    cells = [[_format_cell(row, key) for key in columns] for row in rows]
    return plain_table([HEADINGS[key] for key in columns], cells, left=_text_columns(columns))


def render_comparison(rows: Sequence[Mapping[str, Any]], *, plot: str | None = None) -> str:
    """Return rows of `comparison_rows` as a Markdown table, then a list of the cells that failed, then their plot.

    Args:
        plot: the address of the picture; None shows none.
    """
    finished = [row for row in rows if "collision_rate" in row]
    failed = [row for row in rows if "collision_rate" not in row]
    parts: list[str] = []
    if finished:
        # The dashboard's column is narrow: the cell's name says the first three, its report the fourth.
        left_out = {"shape", "mapping", "quantizer", "codes_used"}
        if all(row.get("status") == "ok" for row in finished):
            left_out.add("status")
        columns = [key for key in _columns(finished) if key not in left_out]
        named, quantizer = _leave_out_quantizer(finished)
        cells = [[_unbroken(escape_markdown(_format_cell(row, key))) for key in columns] for row in named]
        parts.append(markdown_table([HEADINGS[key] for key in columns], cells, left=_text_columns(columns)))
        parts.append(
            f"{quantizer}Floor: the lowest collision rate that duplicates and capacity allow. Excess: distinct "
            "contents without an ID of their own. Uniform hashing: what IDs drawn at random would give. Relative MSE "
            "at full depth, 0 is perfect. Recall: share of an item's 10 nearest that survive quantization, 1 is "
            "perfect."
        )
    if failed:
        parts.append(f"**{len(failed)} of {len(rows)} cells have no report:**")
        parts.append("\n".join(f"- {escape_markdown(_text(row, 'cell'))}: {_reason(row)}" for row in failed))
    if plot:
        parts.append(f"![Collision rate against relative MSE]({plot})")
    return "\n\n".join(parts or ["No cells."]) + "\n"


def _leave_out_quantizer(rows: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Return the rows, their names shorter by the quantizer that all have, and a sentence that names it, or none."""
    quantizer, *others = {row.get("quantizer") for row in rows}
    if quantizer is None or others:
        return [dict(row) for row in rows], ""
    part = f"-{quantizer.replace('_', '-')}"
    shorter = [{**row, "cell": str(row["cell"]).replace(part, "")} for row in rows]
    return shorter, f"Quantizer of all cells: {escape_markdown(quantizer)}. "


def _unbroken(text: str) -> str:
    """Return text that breaks no line between a number and its unit."""
    return re.sub(r"(?<=\d) (?=[a-z])", "\N{NO-BREAK SPACE}", text)


HEADINGS = {
    "cell": "cell",
    "shape": "shape",
    "mapping": "mapping",
    "quantizer": "quantizer",
    "collision_rate": "collision rate",
    "floor": "floor",
    "uniform_hash_reference": "uniform hashing",
    "excess_collisions": "excess",
    "unique_ids": "unique IDs",
    "capacity_ratio": "capacity",
    "relative_mse": "relative MSE",
    "recall": "10-NN recall",
    "codes_used": "codes used",
    "seconds": "time",
    "status": "status",
}
TEXT_COLUMNS = ("cell", "shape", "mapping", "quantizer", "status")


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key in HEADINGS if key == "cell" or any(row.get(key) is not None for row in rows)]


def _text_columns(columns: Sequence[str]) -> list[int]:
    return [index for index, key in enumerate(columns) if key in TEXT_COLUMNS]


def _format_cell(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return "" if "collision_rate" not in row else UNKNOWN
    match key:
        case "capacity_ratio":
            return format_ratio(value)
        case "unique_ids" | "excess_collisions":
            return format_count(value)
        case "codes_used":
            return "/".join(str(count) for count in value)
        case "seconds":
            return format_seconds(value)
        case "cell" | "shape" | "mapping" | "quantizer":
            return shorten(printable(str(value)), LONGEST_CELL)
        case "status":
            return printable(str(value))
        case _:
            return format_rate(value)


def _text(row: Mapping[str, Any], key: str) -> str:
    return str(row.get(key) or UNKNOWN)


def _reason(row: Mapping[str, Any]) -> str:
    return escape_markdown(_text(row, "status"))


def _flat(split: SplitFigures) -> dict[str, Any]:
    """Return a split's figures without the nesting, `ids` included."""
    return asdict(split.ids) | {
        "relative_mse": split.relative_mse,
        "relative_mse_undefined": split.relative_mse_undefined,
    }


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "ids": {entry.name: values[entry.name] for entry in fields(IdFigures)},
        "relative_mse": values["relative_mse"],
        "relative_mse_undefined": values["relative_mse_undefined"],
    }


def plain_json(value: Any) -> Any:
    """Return the value in JSON's own types: no NumPy numbers or arrays, no tuples, NaN and infinities as strings."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(entry) for key, entry in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain_json(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
