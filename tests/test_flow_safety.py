"""A whole flow with a secret in its environment and hostile names in its catalogue: what leaks, connects or acts."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models
import yaml
from small_runs import write_catalogue

from tasks.stages import GPU

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("flow-safety")]

SECRET = "kQ7vXw2pLz9secret"
HOSTILE = "~ =cmd() <img src=x onerror=alert(1)> ![](http:evil) \x1b[31mred"
IDS = [
    "../../x",
    "~",
    "a" * 300,
    "=cmd()",
    "<script>alert(1)</script>",
    "![x](http://evil.example/x.png)",
    "a|b",
    "x\n",
]
TIMEOUT_S = 300
# Every process of the run imports it, those of its server as well.
WATCH = """
import os, sys
def write(*words):
    descriptor = os.open(os.environ["WATCHED"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(descriptor, (" ".join(map(str, (os.getpid(), *words))) + "\\n").encode())
    os.close(descriptor)
def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[1] if event.startswith(("socket.connect", "socket.send")) else arguments[0]
        host = address[0] if isinstance(address, tuple) else address
        write(event, repr(host))
write("process")
sys.addaudithook(watch)
"""
LOOPBACK = {"'127.0.0.1'", "'::1'", "'localhost'", "b'127.0.0.1'", "b'localhost'", "None"}


@dataclass(frozen=True)
class Flow:
    """A sweep that ended, one of its two cells having failed: its folder and what it said."""

    folder: Path
    run: Path
    said: str

    @property
    def watched(self) -> list[str]:
        """A line for each process, and for each connection that it tried: its number, the kind, and the host."""
        return (self.folder / "watched").read_text().splitlines()

    def select(self, query: str) -> list[tuple[str, ...]]:
        """Ask the server's database."""
        with sqlite3.connect(self.folder / "prefect" / "prefect.db") as database:
            return database.execute(query).fetchall()


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    folder = tmp_path_factory.mktemp("flow")
    for name in ("watch", "home", "work"):
        (folder / name).mkdir()
    (folder / "watch" / "sitecustomize.py").write_text(WATCH)
    changes = {number: {"item_id": name, "brand": name, "category": name} for number, name in enumerate(IDS)}
    catalogue = write_catalogue(folder / "work" / f"{HOSTILE}.jsonl", changes=changes)
    columns = {"path": str(catalogue), "brand_column": "brand", "category_column": "category"}
    values = {
        "catalogue": columns | {"split_column": "split"},
        "embedder": {"model": str(tiny_models.build_bert(folder / "model"))},
        "shapes": ["8x6x4", "512x8"],
        "mappings": ["uniform"],
        "out": "~/../~/run",
    }
    (folder / "work" / "sweep.yaml").write_text(yaml.safe_dump(values))
    others = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "HF_"))}
    environment = {
        "HOME": str(folder / "home"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "semids",
        "PREFECT_LOGGING_COLORS": "false",
        "PYTHONPATH": os.pathsep.join([str(folder / "watch"), str(Path(__file__).parent.parent)]),
        "WATCHED": str(folder / "watched"),
        "HF_TOKEN": SECRET,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "DATABASE_URL": f"postgres://user:{SECRET}@db/x",
    }
    done = subprocess.run(
        [sys.executable, "-m", "flows.sweep", "sweep.yaml"],
        cwd=folder / "work",
        env=others | environment,
        capture_output=True,
        timeout=TIMEOUT_S,
    )
    said = (done.stdout + done.stderr).decode(errors="surrogateescape")
    assert "1 of 2 cells completed" in said, said
    return Flow(folder, folder / "work" / "~" / "run", said)


def test_a_secret_in_the_environment_is_nowhere_in_what_a_flow_leaves(flow: Flow) -> None:
    """Guard: nothing puts the environment into a manifest, a log, an artifact or an error."""
    assert SECRET not in flow.said
    files = [path for path in flow.folder.rglob("*") if path.is_file()]
    assert any(path.name == "prefect.db" for path in files)
    assert len(list(flow.run.rglob("*"))) > 60
    assert len(list((flow.folder / "prefect" / "storage").iterdir())) >= 8
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    # The failed cell's error is in the log of its run, and what was told last is written down, too.
    assert {state for (state,) in flow.select("select distinct state_type from task_run")} == {"COMPLETED", "FAILED"}
    assert any("got 120 items for 512 codewords" in message for (message,) in flow.select("select message from log"))


def test_no_task_has_a_tag_but_those_that_use_a_gpu(flow: Flow) -> None:
    """Guard: a task with tags asks the server before it runs, which `greet_server` does for less."""
    tags = {tag for (listed,) in flow.select("select distinct tags from task_run") for tag in json.loads(listed)}
    assert tags == set(GPU)


def test_a_flow_and_its_server_connect_to_loopback_alone(flow: Flow) -> None:
    """Guard: `local_files_only` where a checkpoint is loaded, and analytics that are switched off."""
    processes = {line.split()[0] for line in flow.watched if line.split()[1] == "process"}
    tried = [line.split(" ", 2) for line in flow.watched if line.split()[1] != "process"]
    assert len(processes) >= 2
    assert tried
    assert [line for line in tried if line[2] not in LOOPBACK] == []


def test_hostile_names_make_no_file_outside_the_run_folder(flow: Flow) -> None:
    """Guard: results are named by what `results.results_folder` leaves of a catalogue's name."""
    assert sorted(path.name for path in (flow.folder / "work").iterdir()) == sorted(
        [f"{HOSTILE}.jsonl", "sweep.yaml", "~"]
    )
    assert [path.name for path in (flow.folder / "work" / "~").iterdir()] == ["run"]
    assert {path.name for path in flow.run.iterdir()} == {".lock", "stages", "results"}
    assert list((flow.folder / "home").rglob("run")) == []
    (results,) = (flow.run / "results").iterdir()
    assert set(results.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.()=~ ")
    tokens = json.loads(next(results.glob("*/tokens.json")).read_text())
    assert set(IDS) <= tokens.keys()


def test_hostile_names_are_escaped_in_artifacts_and_logs(flow: Flow) -> None:
    """Guard: `escape_markdown` in pages and artifacts, `printable` in what is logged or printed."""
    pages = flow.select("select key, data, description from artifact where type = 'markdown'")
    assert {key.partition("-")[0] for key, *_ in pages} == {"comparison", "report"}
    for _, data, description in pages:
        for text in (data, description):
            assert "\x1b" not in text
            assert "<img src" not in text.replace("\\<", "")
            assert "![](http" not in text
            assert "<script" not in text.replace("\\<", "")
    for (message,) in flow.select("select message from log"):
        assert "\x1b" not in message
    for name in ("flow_run", "task_run"):
        for (title,) in flow.select(f"select name from {name}"):
            assert "\x1b" not in title
    assert "\x1b" not in flow.said
    assert list(flow.run.rglob("*.csv")) == []
