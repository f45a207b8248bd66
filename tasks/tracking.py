"""Compute does not wait for a Prefect server: where the named one does not answer, a temporary one takes its place."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager

import httpx
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings

ANSWER_SECONDS = 30
"""A server under load may be that slow."""


@contextmanager
def server_or_substitute() -> Generator[None]:
    """Use the Prefect server that the settings name if it answers, else a temporary one, and say what that loses.

    A flow that is started from a deployment was asked for by a server that is there; this is for those that a shell
    starts.
    """
    address = PREFECT_API_URL.value()
    if address is None or _answers(address):
        yield
        return
    print(f"The Prefect server at {address} does not answer: going on with a temporary one.", file=sys.stderr)
    os.environ.pop("PREFECT_API_URL", None)
    try:
        with temporary_settings({PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True}, restore_defaults={PREFECT_API_URL}):
            yield
    finally:
        os.environ["PREFECT_API_URL"] = address
        print(
            f"The server at {address} knows nothing of this run: no page, logs or artifacts there. Results do not need "
            "it; run the same again once it answers, and it shows what is done without computing it again.",
            file=sys.stderr,
        )


def _answers(address: str) -> bool:
    try:
        httpx.get(f"{address}/health", timeout=ANSWER_SECONDS)
    except httpx.TransportError:
        return False
    return True
