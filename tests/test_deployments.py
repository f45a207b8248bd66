"""What the deployments promise: parameters that hold, one schedule that is off, registration that can be repeated."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness
from servers import make_server

from deployments import apply
from semids.config import BuildConfig, EncodeConfig, SweepConfig

DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load(apply.PREFECT_FILE.read_text())["deployments"]
CONFIGS = {"build": BuildConfig, "sweep": SweepConfig, "encode_new_items": EncodeConfig}


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        yield


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
@pytest.mark.usefixtures("server")
def test_registering_twice_leaves_one_of_each() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
        assert apply.main() == 0
        assert apply.main() == 0
    with get_client(sync_client=True) as client:
        deployed = [deployment.name for deployment in client.read_deployments(limit=200)]
        pools = [pool.name for pool in client.read_work_pools()]
        automations = [automation.name for automation in client.read_automations()]
        limits = [limit.name for limit in client.read_global_concurrency_limits()]
    assert sorted(deployed) == sorted(deployment["name"] for deployment in DEPLOYMENTS)
    assert sorted(pools) == sorted([apply.PROCESS_POOL, apply.DOCKER_POOL])
    assert sum(name.startswith("semids") for name in automations) == 2
    assert limits == [apply.GPU_LIMIT]


@pytest.mark.slow
@pytest.mark.xdist_group("prefect")
def test_a_flow_runs_beside_a_server_of_its_own_and_its_exit_code_is_returned(tmp_path: Path) -> None:
    environment = make_server(tmp_path).environment
    # The address that is set answers nobody: the one of the new server must take its place.
    for arguments, code in ((["work-pool", "ls"], 0), (["work-pool", "inspect", "absent"], 1)):
        command = [sys.executable, "-m", "deployments.run", "prefect", *arguments]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert ended.returncode == code, ended.stdout + ended.stderr
        assert "Can't connect" not in ended.stdout + ended.stderr
