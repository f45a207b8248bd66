"""What flows take as parameters, and how they are started from a shell."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from semids import runs
from semids.cli import exit_code_of
from semids.config import BuildConfig, EncodeConfig, SweepConfig, make_config, read_config
from semids.errors import UsageError
from semids.stages import Ref
from tasks.server import ServerError
from tasks.tracking import run_tracked

HEARTBEAT_SECONDS = 30
"""As deployments set it: the automation that finds dead runs listens for these."""

__all__ = ["BuildConfig", "EncodeConfig", "Ref", "SweepConfig", "configure_encoding", "start"]


def configure_encoding(config: EncodeConfig) -> BuildConfig:
    """Return the configuration that gives new items their IDs as the model's own items got theirs.

    Raises:
        UsageError: the folder holds something other than a model, or there are no new items.
        CorruptionError: the folder holds no whole model.
    """
    values = runs.encoding_config(Path(config.model), config.new_items)
    chosen = config.model_dump(include={"out", "copy_to", "ray"})
    return make_config(BuildConfig, values | chosen, source=config.model)


def start(kind: type[BuildConfig | SweepConfig | EncodeConfig], run: Callable[[Any], int]) -> int:
    """Run a flow on the configuration file that the command line names, and return the exit code.

    Wrong usage ends with the command line's own code and message; an error within the flow, which Prefect has logged,
    with 1.
    """

    def run_configured() -> int:
        if len(sys.argv) != 2:
            raise UsageError("expected one argument, the YAML file of the configuration")
        config = read_config(sys.argv[1], kind)
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: HEARTBEAT_SECONDS}):
            return run_tracked(lambda: run(config))

    try:
        return exit_code_of(run_configured)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
