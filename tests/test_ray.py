"""A sweep and a build on a Ray cluster of two workers give the IDs that one process gives."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import clustered_vectors
from servers import Server, make_server, started_cluster
from small_runs import published

from semids.cli import main

ray = pytest.importorskip("ray", reason="Ray is not installed: the extra `ray` brings it")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]

SHARDS = 2
ROWS = 70_000
PATIENCE_SECONDS = 400
MAPPINGS = ["nearest", "capacity"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a head and of a worker that joined it, one processor each."""
    with started_cluster(workers=2) as address:
        yield address


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> Iterator[Server]:
    """A Prefect server that runs, and in its folder vectors of several shards."""
    folder = tmp_path_factory.mktemp("spread")
    np.save(folder / "vectors.npy", clustered_vectors(ROWS, 16).astype(np.float16))
    server = make_server(folder, database=prefect_database)
    with server.running():
        yield server


def run_flow(server: Server, flow: str, values: dict[str, Any], name: str = "", **settings: str) -> Path:
    folder = server.folder
    out = folder / (name or flow)
    config = folder / f"{name or flow}.yaml"
    config.write_text(yaml.safe_dump({"catalogue": {"path": str(folder / "vectors.npy")}, "out": str(out)} | values))
    ended = subprocess.run(
        [sys.executable, "-m", f"flows.{flow}", str(config)],
        env=server.environment | settings,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return out


def task_runs(server: Server, name: str) -> list[str]:
    found = server.post("task_runs/filter", {"task_runs": {"name": {"like_": name}}, "limit": 200})
    return [run["name"] for run in found if run["state_type"] == "COMPLETED"]


def test_shards_and_cells_on_a_cluster_give_the_ids_of_one_process(server: Server, cluster: str) -> None:
    folder = server.folder
    sweep = run_flow(server, "sweep", {"shapes": ["32x32x64"], "mappings": MAPPINGS, "ray": cluster})
    # As Ray's own commands find their cluster.
    values = {"shape": "32x32x64", "mapping": "nearest", "ray": "auto"}
    build = run_flow(server, "build", values, RAY_ADDRESS=cluster)
    for mapping in MAPPINGS:
        alone = folder / mapping
        arguments = [str(folder / "vectors.npy"), "--shape", "32x32x64", "--mapping", mapping, "--out", str(alone)]
        assert main(["tokenize", *arguments]) == 0
        ids = (published(alone) / "semantic_ids.parquet").read_bytes()
        cell = sweep / "results" / "vectors" / f"32x32x64-{mapping}-residual-kmeans"
        assert (cell / "semantic_ids.parquet").read_bytes() == ids
        assert mapping != "nearest" or (published(build) / "semantic_ids.parquet").read_bytes() == ids
    lots = [f"{stage}, lot {lot} of {SHARDS}" for stage in ("Import the vectors",) * 2 for lot in range(SHARDS)]
    lots += [f"Encode the vectors, lot {lot} of {SHARDS}" for lot in range(SHARDS)]
    deadline = time.monotonic() + 30
    while sorted(task_runs(server, "lot")) != sorted(lots):
        assert time.monotonic() < deadline, task_runs(server, "lot")
        time.sleep(0.5)


def test_prefixes_are_placed_on_a_cluster_as_one_process_places_them(server: Server, cluster: str) -> None:
    folder = server.folder
    values = {
        "shape": "8x2048",
        "mapping": "capacity",
        "min_contents_per_id": 0,
        "max_contents_per_id": None,
        "options": {"residual_kmeans": {"restarts": 1, "iterations": 2}},
    }
    config = folder / "alone.yaml"
    described = {"catalogue": {"path": str(folder / "vectors.npy")}, "out": str(folder / "alone")}
    config.write_text(yaml.safe_dump(described | values))
    assert main(["tokenize", "--config", str(config)]) == 0
    spread = run_flow(server, "build", values | {"ray": cluster}, name="placed")
    ids = [(published(out) / "semantic_ids.parquet").read_bytes() for out in (folder / "alone", spread)]
    assert ids[0] == ids[1]
    lots = [f"Place every content on level 2, lot {lot} of 2" for lot in range(2)]
    deadline = time.monotonic() + 30
    while sorted(task_runs(server, "Place every content on level 2, lot")) != lots:
        assert time.monotonic() < deadline, task_runs(server, "lot")
        time.sleep(0.5)
