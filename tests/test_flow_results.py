"""What Prefect keeps of tasks, of which nothing is executed or believed blindly, and the events that flows raise."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from flow_runs import build_config, task_states
from prefect import flow
from prefect.events.clients import AssertingEventsClient
from prefect.events.worker import EventsWorker
from prefect.logging import disable_run_logger
from prefect.results import ResultRecord
from prefect.serializers import PickleSerializer
from prefect.settings import PREFECT_API_URL

from deployments.automations import alarm_on_collisions
from flows.build import build
from semids.reporting import read_report
from semids.stages import StageReader
from tasks import tracking
from tasks.artifacts import NEEDLESS_COLLISIONS, TOO_MANY_COLLISIONS, raise_alarms

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("prefect"), pytest.mark.usefixtures("prefect_storage")]


def test_results_and_errors_are_stored_as_json_and_never_as_pickle(
    catalogue: dict[str, str], tmp_path: Path, prefect_storage: Path
) -> None:
    outcome = build(build_config(catalogue, tmp_path))
    assert build(build_config(catalogue, tmp_path, shape="512x8"), return_state=True).is_failed()
    stored = [json.loads(path.read_text()) for path in prefect_storage.rglob("*") if path.is_file()]
    kept = [body["metadata"]["serializer"]["type"] for body in stored if "metadata" in body]
    assert kept
    assert set(kept) == {"json"}
    assert StageReader(outcome.report.path).summary["title"] == outcome.label


class Explosive:
    """Leaves a folder where it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.mark,)


def pickled_record(mark: Path) -> dict[str, Any]:
    return {
        "metadata": {"serializer": {"type": "pickle"}},
        "result": PickleSerializer().dumps(Explosive(str(mark))).decode(),
    }


def unnamed_record(mark: Path) -> dict[str, Any]:
    """What Prefect takes for a pickle, since it does not say."""
    return {"metadata": {}, "result": pickled_record(mark)["result"]}


def decoded_record(mark: Path) -> dict[str, Any]:
    """JSON whose objects are handed to a function that the record names."""
    decoder = {"type": "json", "object_decoder": "subprocess.call"}
    return {"metadata": {"serializer": decoder}, "result": json.dumps({"mkdir": 1, str(mark): 1})}


RECORDS = [pickled_record, unnamed_record, decoded_record]


@pytest.mark.parametrize("record", RECORDS)
def test_the_planted_result_would_act(record: Any, tmp_path: Path) -> None:
    with contextlib.suppress(ValueError):
        ResultRecord.deserialize(json.dumps(record(tmp_path / "mark")).encode())
    assert (tmp_path / "mark").exists()


def test_a_pickle_planted_among_prefect_s_results_is_not_executed(
    catalogue: dict[str, str], tmp_path: Path, prefect_storage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Guard: `refuse_foreign_record` in `StageFingerprint.compute_key`."""
    config = build_config(catalogue, tmp_path)
    known = set(prefect_storage.rglob("*"))
    first = build(config)
    results = [path for path in prefect_storage.rglob("*") if path not in known and path.is_file()]
    assert len(results) >= 9
    for number, path in enumerate(results):
        record = RECORDS[number % len(RECORDS)](tmp_path / f"mark-{number}")
        path.write_text(json.dumps(json.loads(path.read_text()) | record))
    caplog.clear()
    assert build(config).refs() == first.refs()
    assert list(tmp_path.glob("mark-*")) == []
    assert "Cached" not in {state for _, state in task_states(caplog)}
    for path in results:
        assert f"expected a result in JSON in {path}, got one for another serializer" in caplog.text


def test_prefect_never_answers_with_the_files_of_another_folder(
    catalogue: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guard: the whole folder in `StageFingerprint.compute_key`; a relative `out` is another folder elsewhere."""
    for place, out in (("first", "runs/s"), ("second", "runs/s"), ("second", "runs-s")):
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        outcome = build(build_config(catalogue, tmp_path).model_copy(update={"out": out}))
        for ref in (outcome.model, outcome.ids, outcome.report):
            assert Path(ref.path).is_relative_to(tmp_path / place / out)
            assert ref.is_present()


def test_a_run_says_at_its_end_that_the_server_was_away_for_a_while(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guard: `told_losses`. The server is there: what it is asked for the first time fails as if it were not."""
    monkeypatch.setattr(tracking, "GLANCE_EVERY_SECONDS", 0.0)
    shown: list[str] = []

    def fail() -> None:
        raise httpx.ConnectError("refused", request=httpx.Request("POST", f"{PREFECT_API_URL.value()}/artifacts"))

    @flow(name="tracked")
    def tracked() -> None:
        with tracking.told_losses():
            tracking.prefer_tracked(fail, lambda: shown.append("without"))
            tracking.prefer_tracked(lambda: shown.append("with"), fail)
            assert "missing from its page" not in caplog.text

    tracked()
    assert shown == ["without", "with"]
    assert caplog.text.count("missing from its page") == 1
    caplog.clear()
    with disable_run_logger(), tracking.told_losses():
        pass
    assert "missing from its page" not in caplog.text


@pytest.fixture
def emitted() -> Iterator[Callable[[], dict[str, Any]]]:
    """What was emitted since: payloads by the name of the event."""
    EventsWorker.drain_all()
    EventsWorker.set_client_override(AssertingEventsClient)
    AssertingEventsClient.reset()

    def events() -> dict[str, Any]:
        EventsWorker.drain_all()
        return {event.event: event.payload for client in AssertingEventsClient.all for event in client.events}

    yield events
    EventsWorker.drain_all()
    EventsWorker.set_client_override(None)


def test_needless_collisions_under_capacity_raise_an_alarm_unless_a_frozen_model_made_them(
    catalogue: dict[str, str], tmp_path: Path, emitted: Callable[[], dict[str, Any]]
) -> None:
    config = build_config(catalogue, tmp_path, mapping="capacity")
    report = read_report(build(config).report)
    with disable_run_logger():
        raise_alarms(config, report)
        assert not {NEEDLESS_COLLISIONS, TOO_MANY_COLLISIONS} & set(emitted())
        ids = replace(report.overall.ids, excess_collisions=3)
        needless = replace(report, overall=replace(report.overall, ids=ids))
        raise_alarms(config, needless, encoded=True)
        raise_alarms(build_config(catalogue, tmp_path), needless)
        assert NEEDLESS_COLLISIONS not in emitted()
        raise_alarms(config, needless)
    assert emitted()[NEEDLESS_COLLISIONS]["excess_collisions"] == 3
    assert alarm_on_collisions(None).trigger.expect == {NEEDLESS_COLLISIONS, TOO_MANY_COLLISIONS}
