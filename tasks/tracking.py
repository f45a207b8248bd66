"""Compute does not wait for a Prefect server: where none answers, the work goes on and the end says what is lost."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import cache
from typing import TypeVar

import httpx
from prefect.events.clients import NullEventsClient
from prefect.events.worker import EventsWorker
from prefect.logging import get_run_logger
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks.server import start_own_server

ANSWER_SECONDS = 30.0
"""A server under load may be that slow."""
GLANCE_SECONDS, GLANCE_EVERY_SECONDS = 2.0, 10.0
"""Work that goes on without a server waits for it so long, so seldom."""
T = TypeVar("T")

_looked: dict[str, float] = {}
"""When servers that stopped answering were last looked at, by their addresses."""
_lost: set[str] = set()
"""Servers that stopped answering since the run began, those that answer again among them."""


def prefer_tracked(tracked: Callable[[], T], untracked: Callable[[], T]) -> T:
    """Return what `tracked` does; where the server stops answering on the way, what `untracked` does without it.

    Both must leave the same, so that the second finds what the first has done. While a server does not answer, only
    a glance at it is spent now and then, instead of all the time that Prefect's client would try for at each call.
    """
    address = _address()
    if not _is_lost(address):
        try:
            return tracked()
        except Exception as error:
            if not is_loss(error):
                raise
            get_run_logger().warning(
                "The Prefect server does not answer (%s): the work goes on without being shown there",
                type(error).__name__,
            )
            _go_quiet(address)
    return untracked()


def greet_server() -> None:
    """Return if there is a server, however slow; tasks without tags ask it for nothing by themselves.

    What they tell it is sent in the background, which tries seconds for each word, also at the end of the process.

    Raises:
        httpx.TransportError: nobody listens any more at its address.
    """
    if address := _address():
        with suppress(httpx.TimeoutException):
            _client().get(f"{address}/health", timeout=GLANCE_SECONDS)


@contextmanager
def told_losses() -> Generator[None]:
    """Say at the end of a run what its page lacks, if the server stopped answering on the way.

    Whoever started the run reads it: in the shell, or in what its worker says.
    """
    _lost.clear()
    try:
        yield
    finally:
        if _lost:
            get_run_logger().warning(
                "The Prefect server did not answer for a part of this run: states, logs and artifacts of that part are "
                "missing from its page. Results do not need it; the same run again shows what is done without "
                "computing it again"
            )


def is_loss(error: BaseException) -> bool:
    """Return True for an error that says that the Prefect server did not answer, or could not do what it was asked.

    Models are fetched by the same library: its errors count for requests to that server alone.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, httpx.TransportError | httpx.HTTPStatusError):
        cause = cause.__cause__
    if cause is None or not str(cause.request.url).startswith(_address() or "http"):
        return False
    return not isinstance(cause, httpx.HTTPStatusError) or cause.response.is_server_error


def run_tracked(run: Callable[[], T]) -> T:
    """Run a flow with the Prefect server that the settings name, or one of its own where they name none or it is gone.

    A server that goes away during the run loses the rest of its page. The flow then ends without a state, and is run
    again with a server of its own, which takes seconds: what is done is found by its files.
    A flow that is started from a deployment was asked for by a server that is there; this is for those that a shell
    starts.

    Raises:
        ServerError: no server of its own could be started.
    """
    address = PREFECT_API_URL.value()
    if address is None:
        with _own_server():
            return run_tracked(run)
    if _answers(address):
        try:
            return run()
        except Exception as error:
            if not is_loss(error):
                raise
        loss = "stopped answering during this run: its page there, logs and artifacts are not complete"
    else:
        loss = "knows nothing of this run: no page, logs or artifacts there"
    print(f"The Prefect server at {address} does not answer: going on with one of this run alone.", file=sys.stderr)
    try:
        # What is still to be sent to the one would be tried for minutes before what is for the other.
        _go_quiet(address)
        with _own_server():
            # Nobody will look at it: it is asked for no more than a flow needs to run.
            _looked[_address()] = math.inf
            return run()
    finally:
        print(
            f"The server at {address} {loss}. Results do not need it; run the same again once it answers, and it "
            "shows what is done without computing it again.",
            file=sys.stderr,
        )


@contextmanager
def _own_server() -> Generator[None]:
    # Processes that a run starts read the environment.
    named = os.environ.get("PREFECT_API_URL")
    os.environ["PREFECT_API_URL"] = address = start_own_server()
    try:
        with temporary_settings({PREFECT_API_URL: address}):
            yield
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        if named is not None:
            os.environ["PREFECT_API_URL"] = named


def _address() -> str:
    return PREFECT_API_URL.value() or ""


def _is_lost(address: str) -> bool:
    if address in _looked and time.monotonic() - _looked[address] > GLANCE_EVERY_SECONDS:
        _looked[address] = time.monotonic()
        if _answers(address, GLANCE_SECONDS):
            _speak_again(address)
    return address in _looked


def _go_quiet(address: str) -> None:
    """Drop events and logs for a server that does not answer: each would be tried for seconds, at the end as well."""
    _looked[address] = time.monotonic()
    _lost.add(address)
    EventsWorker.set_client_override(NullEventsClient)
    for handler in _log_handlers():
        handler.addFilter(_is_heard)


def _speak_again(address: str) -> None:
    _looked.pop(address, None)
    EventsWorker.set_client_override(None)
    for handler in _log_handlers():
        handler.removeFilter(_is_heard)


def _log_handlers() -> list[logging.Handler]:
    loggers = (logging.getLogger(f"prefect.{name}_runs") for name in ("flow", "task"))
    return [handler for logger in loggers for handler in logger.handlers if isinstance(handler, APILogHandler)]


def _is_heard(record: logging.LogRecord) -> bool:
    return False


@cache
def _client() -> httpx.Client:
    # Reading its certificates takes longer than asking.
    return httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))


def _answers(address: str, seconds: float = ANSWER_SECONDS) -> bool:
    try:
        return _client().get(f"{address}/health", timeout=seconds).is_success
    except httpx.TransportError:
        return False
