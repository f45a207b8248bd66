"""The flows on a real, temporary Prefect server: artifacts, caching, retries, failing cells."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from conftest import clustered_vectors
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterType,
    FlowRunFilter,
    FlowRunFilterParentFlowRunId,
)
from prefect.events.clients import AssertingEventsClient
from prefect.events.worker import EventsWorker
from prefect.logging import disable_run_logger
from prefect.results import ResultRecord
from prefect.serializers import PickleSerializer
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from prefect.testing.utilities import prefect_test_harness

from deployments.automations import FLOWS, SILENCE, alarm_on_collisions
from flows.build import build
from flows.cell import cell
from flows.encode_new_items import encode_new_items
from flows.sweep import sweep
from semids import store
from semids.config import BuildConfig, EncodeConfig, SweepConfig
from semids.errors import UsageError
from semids.quantizers import _rqvae_train
from semids.reporting import read_report
from semids.results import results_folder
from semids.stages import StageReader
from semids.store import run_lock
from tasks import stage
from tasks.artifacts import NEEDLESS_COLLISIONS, TOO_MANY_COLLISIONS, raise_alarms
from tasks.outcomes import print_outcome
from tasks.parameters import start

# One server for the module: starting one takes ten seconds and more.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("prefect")]


@pytest.fixture(scope="module", autouse=True)
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A server for the module, and the folder in which Prefect keeps results."""
    folder = tmp_path_factory.mktemp("results")
    with prefect_test_harness(server_startup_timeout=180), temporary_settings({PREFECT_LOCAL_STORAGE_PATH: folder}):
        yield folder


@pytest.fixture
def catalogue(tmp_path: Path) -> dict[str, str]:
    np.save(tmp_path / "vectors.npy", clustered_vectors(400, 16))
    return {"path": str(tmp_path / "vectors.npy")}


def build_config(catalogue: dict[str, str], tmp_path: Path, **changes: Any) -> BuildConfig:
    values: dict[str, Any] = {"catalogue": catalogue, "shape": "8x8x8", "out": str(tmp_path / "run")}
    return BuildConfig(**(values | changes))


def artifacts_of(run_ids: list[Any]) -> dict[str, Any]:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=run_ids)), limit=200
        )
    return {artifact.key: artifact for artifact in found if artifact.key}


def cells_of(state: Any) -> list[Any]:
    """Return the ids of the flow runs of a sweep's cells."""
    parent = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        return [run.id for run in client.read_flow_runs(flow_run_filter=parent)]


def task_states(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return (task, how its run ended), in order, since the log was last cleared; the server's own list lags."""
    return [
        (record.task_run_name, record.getMessage().removeprefix("Finished in state ").split("(")[0])
        for record in caplog.records
        if hasattr(record, "task_run_name") and record.getMessage().startswith("Finished in state")
    ]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file() and ".lock" not in str(path)]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_build_leaves_ids_and_artifacts_and_a_second_one_changes_no_file(
    catalogue: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = build_config(catalogue, tmp_path)
    first = build(config, return_state=True)
    assert first.is_completed()
    results = results_folder(config) / config.label
    assert {path.name for path in results.iterdir()} >= {"report.md", "semantic_ids.parquet", "tokens.json", "model"}
    before = snapshot(tmp_path / "run")
    caplog.clear()
    second = build(config, return_state=True)
    assert second.is_completed()
    assert snapshot(tmp_path / "run") == before
    assert second.result().refs() == first.result().refs()
    states = task_states(caplog)
    assert len(states) == 10
    assert [name for name, state in states if state != "Cached"] == [f"publish {config.label}"]
    artifacts = artifacts_of([second.state_details.flow_run_id])
    assert list(artifacts) == ["report-vectors-8x8x8-nearest-residual-kmeans"]
    report = artifacts["report-vectors-8x8x8-nearest-residual-kmeans"]
    assert "data:image/png;base64," in report.data
    rate = json.loads((results / "report.json").read_text())["collision_rate"]
    assert f"{rate:.4f}" in report.data
    assert f"the collision rate is {rate:.4f}" in report.description


def test_the_training_of_an_rqvae_moves_its_progress_artifact_to_the_end(
    catalogue: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FIRST_PROGRESS_SECONDS", "PROGRESS_EVERY_SECONDS"):
        monkeypatch.setattr(stage, name, 0.0)
    progress = ArtifactFilter(type=ArtifactFilterType(any_=["progress"]))

    def shown() -> list[Any]:
        with get_client(sync_client=True) as client:
            found = client.read_artifacts(artifact_filter=progress, limit=200)
        return [artifact for artifact in found if str(artifact.description).startswith("Train the RQ-VAE")]

    seen: list[float] = []
    run_epoch = _rqvae_train._Trainer.run_epoch

    def watched(trainer: Any) -> None:
        run_epoch(trainer)
        seen.extend(artifact.data for artifact in shown())

    monkeypatch.setattr(_rqvae_train._Trainer, "run_epoch", watched)
    options = {"rqvae": {"layers": [8], "e_dim": 4, "batch_size": 100, "epochs": 5, "warmup_epochs": 1}}
    config = build_config(catalogue, tmp_path, quantizer="rqvae", options=options)
    assert build(config, return_state=True).is_completed()
    assert seen == pytest.approx([20, 40, 60, 80, 100])
    (artifact,) = shown()
    assert artifact.description.startswith("Train the RQ-VAE: 1,900 of 1,900 rows, ")


def test_a_sweep_shares_levels_and_survives_a_cell_that_fails(catalogue: dict[str, str], tmp_path: Path) -> None:
    config = SweepConfig(
        catalogue=catalogue, shapes=["8x8", "8x8x8", "512x8"], mappings=["nearest"], out=str(tmp_path / "run")
    )
    state = sweep(config, return_state=True)
    assert state.is_completed()
    assert (state.name, state.message) == ("CompletedWithFailures", "2 of 3 cells completed")
    rows = {row["cell"]: row for row in json.loads((results_folder(config) / "comparison.json").read_text())}
    assert rows["8x8-nearest-residual-kmeans"]["status"] == "ok"
    reason = rows["512x8-nearest-residual-kmeans"]["status"]
    assert "got 400 items for 512 codewords" in reason
    stages = [path.name.rsplit("-", 1)[0] for path in (tmp_path / "run" / "stages").iterdir()]
    assert stages.count("vectors") == 1
    assert stages.count("train-codebook-1") == stages.count("train-codebook-2") == stages.count("train-codebook-3") == 1
    artifacts = artifacts_of([state.state_details.flow_run_id])
    assert list(artifacts) == ["comparison-vectors"]
    page = artifacts["comparison-vectors"].data
    assert "got 400 items" in page
    assert page.index("| cell |") < page.index("data:image/png") < page.index("## Reports")
    reports = artifacts_of(cells_of(state))
    for label in ("8x8-nearest-residual-kmeans", "8x8x8-nearest-residual-kmeans"):
        report = reports[f"report-vectors-{label}"]
        assert f"[{label}](../artifact/{report.id})" in page
        assert f"# {label}" in report.data


def test_a_run_without_room_is_refused_before_its_vectors_are_made(
    catalogue: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guard: `checking_runner` in `tasks.stages`."""
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    config = build_config(catalogue, tmp_path)
    cells = SweepConfig(catalogue=catalogue, shapes=["8x8", "8x8x8"], mappings=["nearest"], out=config.out)
    for state in (build(config, return_state=True), sweep(cells, return_state=True)):
        assert state.is_failed()
        with pytest.raises(UsageError, match="expected a run that fits the disk, but it writes"):
            state.result()
    assert list((tmp_path / "run" / "stages").glob("vectors-*")) == []


def test_a_sweep_over_limits_shows_what_fewer_collisions_cost(catalogue: dict[str, str], tmp_path: Path) -> None:
    config = SweepConfig(
        catalogue=catalogue,
        shapes=["8x8x8"],
        mappings=["nearest", "capacity"],
        max_contents_per_id=[1, "4", "none"],
        out=str(tmp_path / "run"),
    )
    assert config.label == "vectors · 1 shape × 2 mappings × 3 limits"
    assert sweep(config, return_state=True).is_completed()
    rows = json.loads((results_folder(config) / "comparison.json").read_text())
    labels = [row["cell"].removeprefix("8x8x8-").removesuffix("-residual-kmeans") for row in rows]
    assert labels == ["nearest", "capacity-max1", "capacity-max4", "capacity-maxnone"]
    rates = [row["collision_rate"] for row in rows[1:]]
    assert rates == sorted(rates)
    assert rates[0] == rows[1]["floor"] < rates[-1]


def test_a_sweep_of_which_every_cell_fails_has_failed(catalogue: dict[str, str], tmp_path: Path) -> None:
    config = SweepConfig(catalogue=catalogue, shapes=["512x8"], mappings=["nearest"], out=str(tmp_path / "run"))
    state = sweep(config, return_state=True)
    assert state.is_failed()
    assert state.message == "0 of 1 cells completed"


def test_a_cached_answer_whose_files_are_gone_is_not_believed(
    catalogue: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = build_config(catalogue, tmp_path)
    outcome = build(config)
    ids = Path(outcome.ids.path) / "semantic_ids.parquet"
    original = ids.read_bytes()
    ids.unlink()
    caplog.clear()
    assert build(config, return_state=True).is_completed()
    assert ids.read_bytes() == original
    states = [state for name, state in task_states(caplog) if name == "Write the semantic IDs"]
    assert states == ["Cached", "Completed"]


def test_an_io_error_is_retried_and_bad_data_is_not(
    catalogue: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Path] = []
    fill = store._fill

    def fail_once(path: Path, write: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.EIO, "Input/output error")
        fill(path, write)

    monkeypatch.setattr(store, "_fill", fail_once)
    config = build_config(catalogue, tmp_path)
    state = build(config, return_state=True)
    assert state.is_completed()
    assert len(calls) > 3
    broken = np.load(catalogue["path"])
    broken[::2] = np.nan
    np.save(catalogue["path"], broken)
    retried = [record for record in caplog.records if "Retry" in record.getMessage()]
    assert retried
    caplog.clear()
    assert build(config, return_state=True).is_failed()
    assert [state for _, state in task_states(caplog)] == ["Failed"]
    assert not [record for record in caplog.records if "Retry 1/" in record.getMessage()]


def test_new_items_get_the_ids_of_a_build_and_a_page_of_their_own(catalogue: dict[str, str], tmp_path: Path) -> None:
    config = build_config(catalogue, tmp_path, mapping="capacity")
    ids = pl.read_parquet(Path(build(config).ids.path) / "semantic_ids.parquet")
    new = tmp_path / "vectors 2.npy"
    np.save(new, np.load(catalogue["path"])[::-1][:50])
    model = results_folder(config) / config.label / "model"
    encoding = EncodeConfig(new_items=str(new), model=str(model), out=str(tmp_path / "encoded"))
    state = encode_new_items(encoding, return_state=True)
    outcome = state.result()
    given = pl.read_parquet(Path(outcome.ids.path) / "semantic_ids.parquet")
    assert given.drop("item_id").equals(ids.drop("item_id").reverse().head(50))
    assert Path(outcome.folder).is_relative_to(tmp_path / "encoded" / "results")
    # The key of the build's reports goes on telling how the build's collision rate moves.
    assert list(artifacts_of([state.state_details.flow_run_id])) == ["encoded-vectors-2-8x8x8-capacity-residual-kmeans"]


def test_new_items_without_a_model_end_with_the_code_of_their_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"new_items": "new.npy", "model": str(tmp_path / "absent"), "out": str(tmp_path / "encoded")}
    (tmp_path / "encode.json").write_text(json.dumps(values))
    monkeypatch.setattr("sys.argv", ["encode_new_items", str(tmp_path / "encode.json")])
    code = start(EncodeConfig, lambda config: print_outcome(encode_new_items(config, return_state=True)))
    assert code == UsageError.exit_code
    assert "absent" in capsys.readouterr().err


def test_runs_from_a_shell_send_the_heartbeats_that_the_automation_waits_for(
    catalogue: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "build.json").write_text(json.dumps({"catalogue": catalogue}))
    monkeypatch.setattr("sys.argv", ["build", str(tmp_path / "build.json")])
    seconds = start(BuildConfig, lambda config: PREFECT_FLOWS_HEARTBEAT_FREQUENCY.value())
    assert 2 * seconds < SILENCE.total_seconds()
    assert {flow.name for flow in (build, sweep, cell, encode_new_items)} == set(FLOWS)


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


def test_a_folder_in_use_by_another_process_is_refused(catalogue: dict[str, str], tmp_path: Path) -> None:
    config = build_config(catalogue, tmp_path)
    with run_lock(Path(config.out)):
        child = os.fork()
        if child == 0:
            store._held_locks.clear()
            state = build(config, return_state=True)
            message = str(state.result(raise_on_failure=False))
            os._exit(0 if state.is_failed() and f"process {os.getppid()}" in message else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_results_and_errors_are_stored_as_json_and_never_as_pickle(
    catalogue: dict[str, str], tmp_path: Path, storage: Path
) -> None:
    outcome = build(build_config(catalogue, tmp_path))
    assert build(build_config(catalogue, tmp_path, shape="512x8"), return_state=True).is_failed()
    stored = [json.loads(path.read_text()) for path in storage.rglob("*") if path.is_file()]
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
    catalogue: dict[str, str], tmp_path: Path, storage: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Guard: `refuse_foreign_record` in `StageFingerprint.compute_key`."""
    config = build_config(catalogue, tmp_path)
    known = set(storage.rglob("*"))
    first = build(config)
    results = [path for path in storage.rglob("*") if path not in known and path.is_file()]
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


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 64, "expected one argument, the YAML file of the configuration"),
        (["absent.yaml"], 64, "cannot read the configuration absent.yaml"),
        (["list.yaml"], 64, "expected keys and values, got list"),
    ],
)
def test_wrong_usage_of_a_flow_ends_as_that_of_the_command_line_does(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "list.yaml").write_text("- 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["flows.build", *arguments])
    assert start(BuildConfig, lambda config: pytest.fail("the flow was started")) == code
    assert message in capsys.readouterr().err
