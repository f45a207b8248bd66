"""Build every combination of shapes, mappings and quantizers, and compare them.

Run it with `python -m flows.sweep CONFIG.yaml`, or from a deployment.
"""

from __future__ import annotations

import sys
from typing import Any, cast

from prefect import flow, task
from prefect.client.schemas.objects import State
from prefect.task_runners import ThreadPoolTaskRunner

from tasks.artifacts import compare, publish
from tasks.outcomes import CellOutcome, collect, own_run_folder, print_comparison, sweep_state
from tasks.parameters import BuildConfig, Ref, SweepConfig, start
from tasks.stages import assign_ids, encode_vectors, make_vectors, scan_catalogue, train_quantizer, write_report

CELLS_AT_A_TIME = 2


@flow(name="cell", flow_run_name="{config.label}", persist_result=False, result_serializer="json")
def cell(config: BuildConfig, items: Ref, vectors: Ref) -> CellOutcome:
    """Train, encode and report one configuration of a sweep, on the vectors that all cells share."""
    model = train_quantizer(config, items, vectors)
    codes = encode_vectors(config, items, vectors, model)
    ids = assign_ids(config, items, codes)
    report = write_report(config, items, vectors, model, codes)
    outcome = CellOutcome(label=config.label, model=model, ids=ids, report=report)
    return publish(config, outcome)


@task(task_run_name="cell {config.label}", persist_result=False, result_serializer="json")
def run_cell(config: BuildConfig, items: Ref, vectors: Ref) -> CellOutcome:
    """Run a cell as a flow with a page of its own.

    A sweep that is retried matches subflows by the order of their calls, which threads do not keep, and would hand a
    cell the kept result of another: neither cells nor these tasks keep theirs. Stages do, by what they depend on.
    """
    return cell(config, items, vectors)


@flow(
    name="sweep",
    flow_run_name="sweep · {config.label}",
    persist_result=False,
    result_serializer="json",
    task_runner=cast("Any", ThreadPoolTaskRunner(max_workers=CELLS_AT_A_TIME)),
)
def sweep(config: SweepConfig) -> State[Any]:
    """Build every combination of shapes, mappings and quantizers over one catalogue, and compare them.

    Args:
        config: What to compare and on which items. Further down is what seldom needs a change.
    """
    with own_run_folder(config):
        items = scan_catalogue(config)
        vectors = make_vectors(config, items)
        cells = config.cells()
        futures = [run_cell.submit(one, items, vectors) for one in cells]
        outcomes = collect(cells, futures)
        compare(config, outcomes)
    return sweep_state(outcomes)


if __name__ == "__main__":
    sys.exit(start(SweepConfig, lambda config: print_comparison(config, sweep(config, return_state=True))))
