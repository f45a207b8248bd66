"""What the deployments promise: parameters that hold, one schedule that is off, registration that can be repeated."""

from __future__ import annotations

import importlib
import inspect
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import UUID

import polars as pl
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.schedules import CronSchedule
from prefect.settings import PREFECT_API_URL
from servers import make_server

from deployments import apply
from deployments.automations import alarm_on_collisions
from semids.config import BuildConfig, EncodeConfig, SweepConfig
from semids.results import results_folder
from semids.settings import Settings

DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load(apply.PREFECT_FILE.read_text())["deployments"]
CONFIGS = {"build": BuildConfig, "sweep": SweepConfig, "encode_new_items": EncodeConfig}


def test_names_are_distinct() -> None:
    names = [deployment["name"] for deployment in DEPLOYMENTS]
    assert {"build", "sweep", "quick-look", "original-cells", "floor-reaching", "encode-new-items"} == set(names)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_a_deployment_names_a_flow_whose_parameters_it_fills(deployment: dict[str, Any]) -> None:
    module, name = deployment["entrypoint"].rsplit(".", 1)
    flow = getattr(importlib.import_module(module), name)
    assert list(inspect.signature(flow.fn).parameters) == ["config"]
    CONFIGS[name](**deployment["parameters"]["config"])
    assert deployment["version"] == version("semids")
    assert "semids" in deployment["tags"]
    assert deployment["description"]


def test_the_default_sweep_is_six_shapes_by_three_mappings_on_a_schedule_that_is_off() -> None:
    sweep = next(deployment for deployment in DEPLOYMENTS if deployment["name"] == "sweep")
    cells = SweepConfig(**sweep["parameters"]["config"]).cells()
    assert len(cells) == 18
    assert [schedule["active"] for schedule in sweep["schedules"]] == [False]
    assert not any(deployment.get("schedules") for deployment in DEPLOYMENTS if deployment is not sweep)


@pytest.mark.slow
@pytest.mark.xdist_group("prefect")
@pytest.mark.usefixtures("prefect_storage")
def test_registering_twice_leaves_one_of_each() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
        assert apply.main() == 0
        assert apply.main() == 0
    with get_client(sync_client=True) as client:
        deployed = [deployment.name for deployment in client.read_deployments(limit=200)]
        pools = [pool.name for pool in client.read_work_pools()]
        template = client.read_work_pool(apply.DOCKER_POOL).base_job_template["variables"]["properties"]
        automations = [automation.name for automation in client.read_automations()]
        limits = [limit.name for limit in client.read_global_concurrency_limits()]
    assert sorted(deployed) == sorted(deployment["name"] for deployment in DEPLOYMENTS)
    assert sorted(pools) == sorted([apply.PROCESS_POOL, apply.DOCKER_POOL])
    assert sum(name.startswith("semids") for name in automations) == 2
    assert limits == [apply.GPU_LIMIT]
    compose = yaml.safe_load((Path(__file__).parents[1] / "docker" / "compose.yaml").read_text())
    made = {f"{compose['name']}_{name}" for kind in ("networks", "volumes") for name in compose[kind]}
    assert {volume.partition(":")[0] for volume in template["volumes"]["default"]} <= made
    assert set(template["networks"]["default"]) <= made
    assert template["image"]["default"] == compose["services"]["worker"]["image"]
    assert (
        template["env"]["default"]["PREFECT_API_URL"]
        == (compose["services"]["worker"]["environment"]["PREFECT_API_URL"])
    )


@pytest.mark.slow
@pytest.mark.xdist_group("prefect")
@pytest.mark.usefixtures("prefect_storage")
def test_registering_again_leaves_what_was_set_in_the_dashboard() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
        assert apply.main() == 0
        with get_client(sync_client=True) as client:
            sweep, build = (client.read_deployment_by_name(name) for name in ("sweep/sweep", "build/build"))
            client.update_deployment_schedule(sweep.id, sweep.schedules[0].id, active=True)
            for deployment in (sweep, build):
                client.create_deployment_schedules(deployment.id, [(CronSchedule(cron="0 4 * * *"), True)])
            (alarm,) = client.read_automations_by_name(alarm_on_collisions(None).name)
            client.pause_automation(alarm.id)
        before = settings_of([sweep.id, build.id])
        assert apply.main() == 0
    assert settings_of([sweep.id, build.id]) == before
    assert [len(schedules) for schedules in before[0]] == [2, 1]
    assert all(active for schedules in before[0] for _, active in schedules)
    assert not before[1]


def settings_of(deployments: list[UUID]) -> tuple[list[list[tuple[UUID, bool]]], bool]:
    """Return the schedules of deployments, and whether the alarm is on."""
    with get_client(sync_client=True) as client:
        schedules = [
            sorted((schedule.id, schedule.active) for schedule in client.read_deployment_schedules(deployment))
            for deployment in deployments
        ]
        (alarm,) = client.read_automations_by_name(alarm_on_collisions(None).name)
    return schedules, alarm.enabled


def test_the_default_model_of_new_items_is_what_the_default_build_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parameters = {deployment["name"]: deployment["parameters"]["config"] for deployment in DEPLOYMENTS}
    build = BuildConfig(**parameters["build"])
    Path(build.catalogue.path).parent.mkdir()
    columns = ("item_id", "title", "brand", "description", "split", "category")
    pl.DataFrame({name: ["a"] for name in columns}).write_parquet(build.catalogue.path)
    assert Path(parameters["encode-new-items"]["model"]).absolute() == results_folder(build) / build.label / "model"


def test_a_port_that_somebody_else_s_server_has_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment = make_server(tmp_path).environment | {"PREFECT_SERVER_API_PORT": port}
        command = [sys.executable, "-m", "deployments.up"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert f"Something listens at http://127.0.0.1:{port} already" in ended.stderr


@pytest.mark.parametrize("kind", CONFIGS.values(), ids=CONFIGS)
def test_every_field_of_a_form_has_a_title_and_a_sentence_and_none_is_a_box_of_json(kind: type[Settings]) -> None:
    schema = kind.model_json_schema()
    for name, definition in {kind.__name__: schema, **schema.get("$defs", {})}.items():
        for key, field in definition.get("properties", {}).items():
            place = f"{name}.{key}"
            if "const" in field:
                continue
            # What is not said of the field is said where its own fields are.
            inner = schema["$defs"][field["$ref"].rpartition("/")[2]] if "$ref" in field else {}
            assert field.get("title", inner.get("title")), place
            assert len(field.get("description", inner.get("description", "")).split()) > 2, place
            assert field.get("type") or "$ref" in field or "anyOf" in field or "oneOf" in field, place
            if field.get("type") == "object":
                assert field.get("properties"), place
            if field.get("type") == "array":
                assert field["items"].get("type") in {"string", "integer", "number"}, place
