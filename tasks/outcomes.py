"""What a configuration leaves, and what a flow that ran some of them ends with."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict

from semids import results
from semids.config import BuildConfig, CommonConfig, EncodeConfig, SweepConfig
from semids.errors import SemidsError
from semids.remote import place_of_copies
from semids.report import FailedCell, comparison_rows, format_table
from semids.reporting import read_report
from semids.stages import Ref
from semids.store import run_lock
from tasks.cluster import check_cluster
from tasks.tracking import told_losses


class CellOutcome(BaseModel):
    """What a configuration leaves: its name and references to its model, IDs and report."""

    model_config = ConfigDict(frozen=True)

    label: str
    model: Ref
    ids: Ref
    report: Ref
    artifact: str | None = None
    """The id of its report in the dashboard; None before it is shown there."""
    folder: str | None = None
    """Where the run folder shows it; None before it does."""

    def refs(self) -> results.CellRefs:
        """Return the references as the library holds them."""
        return results.CellRefs(self.model, self.ids, self.report)


@contextmanager
def own_run_folder(config: CommonConfig | EncodeConfig) -> Generator[None]:
    """Own the run folder for as long as the context lasts; a second owner is refused by name.

    Raises:
        UsageError: the configuration names a Ray cluster, and what speaks to it is not installed.
    """
    check_cluster(config)
    with run_lock(Path(config.out)), told_losses():
        yield


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
        return _say_why("The sweep did not reach its comparison", state)
    path = place_of_copies(config.catalogue.path, Path(config.out))
    catalogue = config.catalogue.model_copy(update={"path": path})
    folder = results.results_folder(config.model_copy(update={"catalogue": catalogue}))
    rows: list[dict[str, Any]] = json.loads((folder / "comparison.json").read_bytes())
    print(f"\n{format_table(rows)}\n")
    print(f"Comparison and plot   {folder / 'comparison.md'}")
    print(f"Reports, plots, IDs   {folder}/CELL/report.md, semantic_ids.parquet, tokens.json, …")
    return int(any(row["status"].startswith("failed") for row in rows))


def print_outcome(state: State[CellOutcome]) -> int:
    """Print a configuration's figures and where everything is; return the exit code, that of the error if it failed."""
    if state.is_failed() or state.is_crashed():
        return _say_why("The run did not finish", state)
    outcome = state.result()
    print(f"\n{format_table(comparison_rows([read_report(outcome.report)]))}\n")
    print(f"Report, plots, IDs, model   {outcome.folder}")
    return 0


def _say_why(what: str, state: State[Any]) -> int:
    """Tell what a run could not do, and return the exit code of its error."""
    print(f"{what}: {state.message}", file=sys.stderr)
    error: Any = state.result(raise_on_failure=False)
    return error.exit_code if isinstance(error, SemidsError) else 1
