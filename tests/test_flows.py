"""The flows on a real Prefect server: artifacts, caching, retries, failing cells, object stores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import polars as pl
import pytest
from flow_runs import (
    artifacts_of,
    assert_refused_while_in_use,
    build_config,
    cells_of,
    fail_third_call,
    snapshot,
    task_states,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterType
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY

from deployments.automations import FLOWS, SILENCE
from flows.build import build
from flows.cell import cell
from flows.encode_new_items import encode_new_items
from flows.sweep import sweep
from semids import store
from semids.config import BuildConfig, EncodeConfig, SweepConfig
from semids.errors import UsageError
from semids.quantizers import _rqvae_train
from semids.results import results_folder
from tasks import stage
from tasks.outcomes import print_comparison, print_outcome
from tasks.parameters import start

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("prefect"), pytest.mark.usefixtures("prefect_storage")]


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
    calls = fail_third_call(monkeypatch, store, "_fill")
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


def test_showing_a_cell_is_tried_again_after_an_io_error(
    catalogue: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Guard: the retries of `tasks.artifacts.publish`."""
    calls = fail_third_call(monkeypatch, Path, "symlink_to")
    config = build_config(catalogue, tmp_path)
    assert build(config, return_state=True).is_completed()
    assert len(calls) > 3
    retries = [record.task_run_name for record in caplog.records if "Retry 1/" in record.getMessage()]
    assert retries == [f"publish {config.label}"]
    shown = results_folder(config) / config.label
    assert {"semantic_ids.parquet", "report.md", "model"} <= {path.name for path in shown.iterdir() if path.exists()}


def test_inputs_come_from_a_store_and_results_go_there(
    catalogue: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By fsspec's store in memory: `tests/test_remote.py` speaks S3 with a server."""
    shop = fsspec.filesystem("memory")
    for name, rows in (("vectors", slice(None)), ("later", slice(50))):
        with shop.open(f"/shop/{name}.npy", "wb") as file:
            np.save(file, np.load(catalogue["path"])[rows])
    config = SweepConfig(
        catalogue=catalogue | {"path": "memory://shop/vectors.npy"},
        shapes=["8x8"],
        mappings=["nearest"],
        out=str(tmp_path / "run"),
        copy_to="memory://ids/today",
    )
    state = sweep(config, return_state=True)
    assert state.is_completed()
    shown = tmp_path / "run" / "results" / "vectors"
    assert print_comparison(config, state) == 0
    assert str(shown / "comparison.md") in capsys.readouterr().out
    copied = "/ids/today/vectors"
    for name in ("comparison.md", "comparison.json", "8x8-nearest-residual-kmeans/semantic_ids.parquet"):
        assert shop.cat_file(f"{copied}/{name}") == (shown / name).read_bytes()
    encoding = EncodeConfig(
        new_items="memory://shop/later.npy",
        model=str(shown / "8x8-nearest-residual-kmeans" / "model"),
        out=str(tmp_path / "encoded"),
        copy_to="memory://ids/later",
    )
    outcome = encode_new_items(encoding)
    given = (Path(outcome.ids.path) / "semantic_ids.parquet").read_bytes()
    assert shop.cat_file("/ids/later/later/8x8-nearest-residual-kmeans/semantic_ids.parquet") == given


def test_new_items_are_not_copied_to_a_folder_in_use(tmp_path: Path) -> None:
    """Guard: `own_run_folder` before `fetch_new_items` in the flow."""
    (tmp_path / "model").mkdir()
    encoding = EncodeConfig(new_items="memory://shop/x.npy", model=str(tmp_path / "model"), out=str(tmp_path / "out"))
    assert_refused_while_in_use(tmp_path / "out", lambda: encode_new_items(encoding, return_state=True))
    assert not (tmp_path / "out" / "inputs").exists()


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


def test_a_folder_in_use_by_another_process_is_refused(catalogue: dict[str, str], tmp_path: Path) -> None:
    config = build_config(catalogue, tmp_path)
    assert_refused_while_in_use(Path(config.out), lambda: build(config, return_state=True))


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
