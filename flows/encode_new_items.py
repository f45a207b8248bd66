"""Give new items their IDs from a model that is there.

Run it with `python -m flows.encode_new_items CONFIG.yaml`, or from a deployment.
"""

from __future__ import annotations

import sys

from prefect import flow

from tasks.artifacts import publish
from tasks.outcomes import CellOutcome, own_run_folder, print_outcome
from tasks.parameters import EncodeConfig, configure_encoding, start
from tasks.stages import encode_items, fetch_new_items


@flow(
    name="encode-new-items",
    flow_run_name="encode · {config.label}",
    persist_result=False,
    result_serializer="json",
)
def encode_new_items(config: EncodeConfig) -> CellOutcome:
    """Give new items their IDs, as the items that a model was trained on got theirs; none of those moves.

    Args:
        config: The new items, and the model.
    """
    with own_run_folder(config):
        config = fetch_new_items(config)
        build = configure_encoding(config)
        refs = encode_items(build, config.model, unique=config.unique)
        outcome = CellOutcome(label=build.label, model=refs.model, ids=refs.ids, report=refs.report)
        return publish(build, outcome, encoded=True)


if __name__ == "__main__":
    sys.exit(start(EncodeConfig, lambda config: print_outcome(encode_new_items(config, return_state=True))))
