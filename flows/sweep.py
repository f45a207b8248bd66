"""Build every combination of shapes, mappings and quantizers, and compare them.

Run it with `python -m flows.sweep CONFIG.yaml`, or from a deployment.
"""

from __future__ import annotations

import sys
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.cell import run_cell
from tasks.artifacts import compare
from tasks.cluster import cell_runner
from tasks.outcomes import collect, own_run_folder, print_comparison, sweep_state
from tasks.parameters import SweepConfig, start
from tasks.stages import fetch_catalogue, make_vectors, scan_catalogue


@flow(
    name="sweep",
    flow_run_name="sweep · {config.label}",
    persist_result=False,
    result_serializer="json",
)
def sweep(config: SweepConfig) -> State[Any]:
    """Build every combination of shapes, mappings and quantizers over one catalogue, and compare them.

    Args:
        config: What to compare and on which items. Further down is what seldom needs a change.
    """
    with own_run_folder(config):
        config = fetch_catalogue(config)
        items = scan_catalogue(config)
        vectors = make_vectors(config, items)
        cells = config.cells()
        with cell_runner(config) as runner:
            futures = [runner.submit(run_cell, {"config": one, "items": items, "vectors": vectors}) for one in cells]
            outcomes = collect(cells, futures)
        compare(config, outcomes)
    return sweep_state(outcomes)


if __name__ == "__main__":
    sys.exit(start(SweepConfig, lambda config: print_comparison(config, sweep(config, return_state=True))))
