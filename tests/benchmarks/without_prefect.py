"""Run the cells of a sweep in threads of one process that knows nothing of Prefect.

`python -m tests.benchmarks.without_prefect CELLS_AT_A_TIME CONFIG.yaml`
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from semids import pipeline, results
from semids.config import SweepConfig, read_config
from semids.progress import silent
from semids.reporting import read_report
from semids.runs import build_cell, local_runner


def main(cells_at_a_time: int, path: str) -> None:
    """Build and publish every cell of the sweep that the file describes, and compare them."""
    config = read_config(path, SweepConfig)
    run = local_runner(Path(config.out), silent)
    items = run(pipeline.scan_catalogue(config))
    vectors = run(pipeline.make_vectors(config, items))
    with ThreadPoolExecutor(cells_at_a_time) as pool:
        cells = [(one, pool.submit(build_cell, one, items, vectors, run)) for one in config.cells()]
        for one, built in cells:
            results.publish(one, built.result())
    results.compare(config, [read_report(built.result().report) for _, built in cells])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
