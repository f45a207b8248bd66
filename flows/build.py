"""Build one configuration, from a catalogue to semantic IDs and a report.

Run it with `python -m flows.build CONFIG.yaml`, or from a deployment.
"""

from __future__ import annotations

import sys

from prefect import flow

from tasks.artifacts import publish
from tasks.outcomes import CellOutcome, own_run_folder, print_outcome
from tasks.parameters import BuildConfig, start
from tasks.stages import (
    assign_ids,
    encode_vectors,
    fetch_catalogue,
    make_vectors,
    scan_catalogue,
    train_quantizer,
    write_report,
)


@flow(name="build", flow_run_name="build · {config.label}", persist_result=False, result_serializer="json")
def build(config: BuildConfig) -> CellOutcome:
    """Turn a catalogue into semantic IDs under one configuration.

    Args:
        config: What to make of which items. Further down is what seldom needs a change.
    """
    with own_run_folder(config):
        config = fetch_catalogue(config)
        items = scan_catalogue(config)
        vectors = make_vectors(config, items)
        model = train_quantizer(config, items, vectors)
        codes = encode_vectors(config, items, vectors, model)
        ids = assign_ids(config, items, codes)
        report = write_report(config, items, vectors, model, codes)
        outcome = CellOutcome(label=config.label, model=model, ids=ids, report=report)
        return publish(config, outcome)


if __name__ == "__main__":
    sys.exit(start(BuildConfig, lambda config: print_outcome(build(config, return_state=True))))
