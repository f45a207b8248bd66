"""A run whose Prefect server is not there computes the same, and says what is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import clustered_vectors
from dashboard import free_port
from small_runs import published

from semids.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("prefect")]


def test_a_flow_whose_server_is_absent_finishes_with_the_same_ids(tmp_path: Path) -> None:
    vectors = tmp_path / "vectors.npy"
    np.save(vectors, clustered_vectors(400, 16))
    values = {"catalogue": {"path": str(vectors)}, "shape": "8x8x8", "out": str(tmp_path / "flow")}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    assert main(["tokenize", "--config", str(config), "--out", str(tmp_path / "alone")]) == 0
    address = f"http://127.0.0.1:{free_port()}/api"
    named = {
        "PREFECT_API_URL": address,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    command = [sys.executable, "-m", "flows.build", str(config)]
    ended = subprocess.run(
        command, env={**os.environ, **named}, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert f"server at {address} knows nothing of this run" in ended.stderr
    alone, flow = (published(tmp_path / name) / "semantic_ids.parquet" for name in ("alone", "flow"))
    assert flow.read_bytes() == alone.read_bytes()
