"""Cells: what a configuration leaves, how the dashboard shows it, and how a sweep compares several."""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict

from semids import results, runs
from semids.config import BuildConfig, CommonConfig, SweepConfig
from semids.errors import SemidsError
from semids.page import render_markdown
from semids.plots import plot_comparison
from semids.report import FailedCell, comparison_rows, format_table, render_comparison
from semids.reporting import read_report
from semids.stages import Ref, StageReader
from semids.store import run_lock

COMPARISON_KEY = "sweep-comparison"


class CellOutcome(BaseModel):
    """What a configuration leaves: its name and references to its model, IDs and report."""

    model_config = ConfigDict(frozen=True)

    label: str
    model: Ref
    ids: Ref
    report: Ref

    def refs(self) -> results.CellRefs:
        """Return the references as the library holds them."""
        return results.CellRefs(self.model, self.ids, self.report)


def own_run_folder(config: CommonConfig) -> AbstractContextManager[None]:
    """Own the run folder for as long as the context lasts; a second owner is refused by name."""
    return run_lock(Path(config.out))


def find_cell(config: BuildConfig, items: Ref, vectors: Ref) -> CellOutcome | None:
    """Return what an earlier run left of a cell, if every file of it is there and as it was written."""
    try:
        refs = runs.build_cell(config, items, vectors, runs.finding_runner(Path(config.out)))
    except runs.NotMadeError:
        return None
    get_run_logger().info("%s: nothing to do, every file is there", config.label)
    return CellOutcome(label=config.label, model=refs.model, ids=refs.ids, report=refs.report)


@task(task_run_name="publish {outcome.label}", cache_policy=NO_CACHE, result_serializer="json")
def publish(config: BuildConfig, outcome: CellOutcome) -> None:
    """Show a cell: links in the run folder's results, and its report as artifacts with stable keys."""
    results.publish(config, outcome.refs())
    reader = StageReader(outcome.report.path)
    report = read_report(outcome.report)

    def image(name: str) -> str:
        return _data_uri(reader.path(f"{name}.png").read_bytes())

    key = re.sub(r"[^a-z0-9]+", "-", outcome.label.lower())
    create_markdown_artifact(
        render_markdown(report, image), key=f"report-{key}", description=f"Collision report of {outcome.label}"
    )
    levels = [
        {name: value for name, value in level.items() if name != "load_curve"} for level in report.to_dict()["levels"]
    ]
    create_table_artifact(
        levels, key=f"levels-{key}", description=f"Codes used and load of each level, {outcome.label}"
    )


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _with_plot(table: str, image: str | None) -> str:
    return f"{table}\n![Collision rate against relative MSE]({image})\n" if image else table


def collect(
    cells: Sequence[BuildConfig], futures: Sequence[PrefectFuture[CellOutcome]]
) -> list[CellOutcome | FailedCell]:
    """Wait for every cell and return its outcome, or why it has none; one failed cell does not stop the others."""
    outcomes: list[CellOutcome | FailedCell] = []
    for config, future in zip(cells, futures, strict=True):
        future.wait()
        result: Any = future.state.result(raise_on_failure=False)
        if isinstance(result, CellOutcome):
            outcomes.append(result)
        else:
            outcomes.append(FailedCell(config.label, f"{type(result).__name__}: {result}"))
    return outcomes


@task(task_run_name="compare the cells", cache_policy=NO_CACHE, result_serializer="json")
def compare(config: SweepConfig, outcomes: Sequence[CellOutcome | FailedCell]) -> None:
    """Write the comparison beside the results, and show it under one key, whose page is the history of sweeps."""
    folder = results.results_folder(config)
    rows = comparison_rows(
        outcome if isinstance(outcome, FailedCell) else read_report(outcome.report) for outcome in outcomes
    )
    plot = plot_comparison(rows)
    table = render_comparison(rows)
    files = {
        "comparison.json": (json.dumps(rows, indent=1) + "\n").encode(),
        "comparison.md": _with_plot(table, "comparison.png" if plot else None).encode(),
    } | ({"comparison.png": plot} if plot else {})
    results.show_files(folder, files)
    create_markdown_artifact(
        _with_plot(table, _data_uri(plot) if plot else None),
        key=COMPARISON_KEY,
        description=f"Comparison of {len(rows)} cells",
    )
    create_table_artifact(rows, key=f"{COMPARISON_KEY}-table", description=f"Figures of {len(rows)} cells")
    get_run_logger().info("Compared %d cells: %s", len(rows), folder / "comparison.md")


def sweep_state(outcomes: Sequence[CellOutcome | FailedCell]) -> State[Any]:
    """Return the state a sweep ends in: failed only if no cell came through."""
    done = sum(isinstance(outcome, CellOutcome) for outcome in outcomes)
    message = f"{done} of {len(outcomes)} cells completed"
    if done == len(outcomes):
        return Completed(message=message)
    if done == 0:
        return Failed(message=message)
    return Completed(name="CompletedWithFailures", message=message)


def print_comparison(config: SweepConfig, state: State[Any]) -> int:
    """Print the comparison table and where everything is; return the exit code: 1 if a cell or the sweep failed."""
    if state.is_failed() and not (state.message or "").endswith("cells completed"):
        print(f"The sweep did not reach its comparison: {state.message}")
        return 1
    folder = results.results_folder(config)
    rows: list[dict[str, Any]] = json.loads((folder / "comparison.json").read_bytes())
    print(f"\n{format_table(rows)}\n")
    print(f"Comparison and plot   {folder / 'comparison.md'}")
    print(f"Reports, plots, IDs   {folder}/CELL/report.md, semantic_ids.parquet, tokens.json, …")
    return int(any(row["status"].startswith("failed") for row in rows))


def print_outcome(config: BuildConfig, state: State[CellOutcome]) -> int:
    """Print a configuration's figures and where everything is; return the exit code, that of the error if it failed."""
    if state.is_failed() or state.is_crashed():
        error = state.result(raise_on_failure=False)
        print(f"The build did not finish: {state.message}", file=sys.stderr)
        return error.exit_code if isinstance(error, SemidsError) else 1
    outcome = state.result()
    print(f"\n{format_table(comparison_rows([read_report(outcome.report)]))}\n")
    print(f"Report, plots, IDs, model   {results.results_folder(config) / outcome.label}")
    return 0
