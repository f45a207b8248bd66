"""Register everything with the Prefect server: work pools, the GPU's limit, automations and deployments.

    python -m deployments.apply

Runs will work in the folder that it is called from. Calling it again brings to the server what has changed in
`prefect.yaml`; schedules that are there, automations that were switched off, pools and limits stay as they were set.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.exceptions import ObjectAlreadyExists

from deployments.automations import alarm_on_collisions, crash_silent_runs, find_notification, put_automation

PREFECT_FILE = Path(__file__).parent / "prefect.yaml"
PROCESS_POOL = "semids-process"
DOCKER_POOL = "semids-docker"
CONTAINERS = {
    "image": "semids:cpu",
    "image_pull_policy": "IfNotPresent",
    "networks": ["semids_control"],
    "volumes": ["semids_runs:/app/runs", "semids_models:/models"],
    "env": {"PREFECT_API_URL": "http://server:4200/api"},
}
"""Defaults of runs in containers of their own: what docker/compose.yaml makes, so that they share its runs."""
GPU_LIMIT = "tag:gpu"
"""Limits the task runs with the tag gpu; a killed one frees its slot within a minute."""


def make_pools() -> None:
    """Create the work pools that are not there; those that are keep what was set in the dashboard."""
    with get_client(sync_client=True) as client:
        metadata = client.read_worker_metadata()
        docker: dict[str, Any] = metadata["prefect-docker"]["docker"]["default_base_job_configuration"]
        for name, value in CONTAINERS.items():
            docker["variables"]["properties"][name]["default"] = value
        pools = {
            PROCESS_POOL: ("process", metadata["prefect"]["process"]["default_base_job_configuration"]),
            DOCKER_POOL: ("docker", docker),
        }
        for name, (kind, template) in pools.items():
            try:
                client.create_work_pool(WorkPoolCreate(name=name, type=kind, base_job_template=template))
            except ObjectAlreadyExists:
                continue


def limit_gpu() -> None:
    """Let one stage at a time use the GPU; a limit that is there stays as it is."""
    with get_client(sync_client=True) as client:
        # Creating one that is there would be refused too, with a traceback in the server's log.
        if GPU_LIMIT not in {limit.name for limit in client.read_global_concurrency_limits(limit=200)}:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=GPU_LIMIT, limit=1))


def deploy() -> int:
    """Register the deployments of prefect.yaml and return the exit code; what Prefect says is shown if it fails."""
    content: dict[str, Any] = yaml.safe_load(PREFECT_FILE.read_text())
    with get_client(sync_client=True) as client:
        there = client.read_deployments(limit=200)
    scheduled = {(deployment.name, deployment.entrypoint) for deployment in there if deployment.schedules}
    for deployment in content["deployments"]:
        if (deployment["name"], deployment["entrypoint"]) in scheduled:
            # Prefect would switch the schedule off again, and delete those that were made in the dashboard.
            deployment.pop("schedules", None)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(content, file)
        file.flush()
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", file.name]
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if ended.returncode:
        print(ended.stdout, file=sys.stderr)
        return ended.returncode
    print(f"Registered: {', '.join(deployment['name'] for deployment in content['deployments'])}.")
    return 0


def main() -> int:
    """Register everything and return the exit code."""
    make_pools()
    limit_gpu()
    put_automation(crash_silent_runs())
    put_automation(alarm_on_collisions(find_notification()))
    return deploy()


if __name__ == "__main__":
    sys.exit(main())
