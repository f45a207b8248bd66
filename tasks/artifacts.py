"""What the dashboard shows of a cell and of a sweep, and the events it raises."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Any, cast

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.logging import get_run_logger

from semids import results
from semids.config import BuildConfig, CommonConfig, SweepConfig
from semids.page import describe_collisions, render_markdown
from semids.report import FailedCell, Report, render_comparison
from semids.reporting import read_report
from semids.stages import StageReader
from semids.text import escape_markdown
from tasks.outcomes import CellOutcome
from tasks.stage import RETRIES
from tasks.tracking import prefer_tracked

TOO_MANY_COLLISIONS = "semids.collision-rate.exceeded"
NEEDLESS_COLLISIONS = "semids.excess-collisions.found"


@task(
    task_run_name="publish {outcome.label}",
    cache_policy=NO_CACHE,
    result_serializer="json",
    **RETRIES,
)
def publish(config: BuildConfig, outcome: CellOutcome, *, encoded: bool = False) -> CellOutcome:
    """Show a configuration: links in the run folder's results, and its report under a key that stays the same.

    Returns:
        The outcome with the artifact of its report, and the folder that shows it.

    Args:
        encoded: the IDs are those that a frozen model gave to new items.
    """
    folder = results.publish(config, outcome.refs(), encoded=encoded)
    report = read_report(outcome.report)
    reader = StageReader(outcome.report.path)
    artifact = _show(
        render_markdown(report, lambda name: _data_uri(reader.path(f"{name}.png").read_bytes())),
        key=_report_key(config, outcome.label, encoded=encoded),
        description=describe_collisions(report.overall.ids),
    )
    raise_alarms(config, report, encoded=encoded)
    return outcome.model_copy(update={"artifact": artifact, "folder": str(folder)})


def raise_alarms(config: BuildConfig, report: Report, *, encoded: bool = False) -> None:
    """Emit an event if more collide than the configuration allows, or than there need to.

    Args:
        encoded: the IDs are those that a frozen model gave to new items, which may share them.
    """
    ids = report.overall.ids
    resource = {
        "prefect.resource.id": f"semids.{_report_key(config, config.label, encoded=encoded)}",
        "prefect.resource.name": config.label,
    }
    figures = {"collision_rate": ids.collision_rate, "floor": ids.floor, "excess_collisions": ids.excess_collisions}
    if (ids.collision_rate or 0) > config.alarm_collision_rate:
        emit_event(TOO_MANY_COLLISIONS, resource, payload={**figures, "limit": config.alarm_collision_rate})
        get_run_logger().warning(
            "%s: the collision rate %.4f is above %g, the limit set for this run",
            config.label,
            ids.collision_rate,
            config.alarm_collision_rate,
        )
    each_its_own = not encoded and config.mapping == "capacity" and config.max_contents_per_id in ("auto", 1)
    if each_its_own and ids.capacity_ratio and ids.capacity_ratio >= 1 and ids.excess_collisions:
        emit_event(NEEDLESS_COLLISIONS, resource, payload=figures)
        get_run_logger().warning(
            "%s: %s distinct contents share an ID although there are enough", config.label, ids.excess_collisions
        )


@task(
    task_run_name="compare the cells",
    cache_policy=NO_CACHE,
    result_serializer="json",
    **RETRIES,
)
def compare(config: SweepConfig, outcomes: Sequence[CellOutcome | FailedCell]) -> None:
    """Write the comparison beside the results, and show it as the sweep's one artifact: table, plot, then reports.

    A run's page has no order of artifacts, so that those of the cells are on the cells' own pages.
    """
    cells = [outcome if isinstance(outcome, FailedCell) else read_report(outcome.report) for outcome in outcomes]
    comparison = results.compare(config, cells)
    image = _data_uri(comparison.plot) if comparison.plot else None
    done = [outcome for outcome in outcomes if isinstance(outcome, CellOutcome)]
    _show(
        f"# {escape_markdown(config.label)}\n\n" + render_comparison(comparison.rows, plot=image) + _list_reports(done),
        key=_key("comparison", config),
        description=_describe_comparison(comparison.rows),
    )
    get_run_logger().info("Compared %d cells: %s", len(cells), comparison.path)


def _show(markdown: str, *, key: str, description: str) -> str | None:
    """Show a page in the dashboard, and return its id; None where the server does not answer."""
    return prefer_tracked(
        lambda: str(cast("Any", create_markdown_artifact(markdown, key=key, description=description))), lambda: None
    )


def _describe_comparison(rows: Sequence[dict[str, Any]]) -> str:
    rates = sorted(row["collision_rate"] for row in rows if "collision_rate" in row)
    return f"{len(rows)} cells, collision rates {rates[0]:.4f} to {rates[-1]:.4f}" if rates else f"{len(rows)} cells"


def _list_reports(outcomes: Sequence[CellOutcome]) -> str:
    lines = [
        f"- {_link(outcome)}: {describe_collisions(read_report(outcome.report).overall.ids)}" for outcome in outcomes
    ]
    return "\n## Reports\n\n" + "\n".join(lines) + "\n" if lines else ""


def _link(outcome: CellOutcome) -> str:
    # Relative to the page of an artifact, in both dashboards.
    return f"[{outcome.label}](../artifact/{outcome.artifact})" if outcome.artifact else outcome.label


def _report_key(config: CommonConfig, label: str, *, encoded: bool) -> str:
    return _key("encoded" if encoded else "report", config, label)


def _key(kind: str, config: CommonConfig, *more: str) -> str:
    """Return a key that is the same in every run over the same catalogue and model."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join([kind, results.results_folder(config).name, *more]).lower()).strip("-")


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
