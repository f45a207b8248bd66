"""One configuration of a sweep, as a flow within it: a module of its own, which other machines import by its name."""

from __future__ import annotations

from prefect import flow, task

from tasks.artifacts import publish
from tasks.outcomes import CellOutcome
from tasks.parameters import BuildConfig, Ref
from tasks.stages import assign_ids, encode_vectors, train_quantizer, write_report
from tasks.tracking import prefer_tracked


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
    return call_cell(config, items, vectors)


def call_cell(config: BuildConfig, items: Ref, vectors: Ref) -> CellOutcome:
    """Call the flow, or its function where the Prefect server does not answer.

    Not within the task: that travels to other machines line by line, where its flow would not find the names it uses.
    """
    return prefer_tracked(lambda: cell(config, items, vectors), lambda: cell.fn(config, items, vectors))
