"""Bad input to the command line: refused with the exit code of sysexits(3) and a message that says what to do."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from conftest import clustered_vectors
from small_runs import ROOT, TIMEOUT_S, published, tokenize_arguments, write_catalogue

from semids import store
from semids.cli import main
from semids.store import run_lock
from semids.verification import verify_run

fork = multiprocessing.get_context("fork")
USAGE, DATA, STORAGE, BUSY = 64, 65, 74, 75
SECRET = "kQ7vXw2pLz9secret"


def vectors(rows: int = 200, *, bad: Any = None, share: float = 1.0, dtype: Any = np.float32) -> np.ndarray:
    """Return (rows, 8) vectors, the first `share` of them holding `bad`."""
    made = clustered_vectors(rows, 8).astype(dtype)
    if bad is not None:
        made[: round(share * rows)] = bad
    return made


# Options of a run on 200 vectors, the exit code and the message.
OPTIONS: list[tuple[list[str], int, str]] = [
    (["--shape", "256x4"], USAGE, "got 200 items for 256 codewords"),
    (["--shape", "4x201"], USAGE, "got 200 items for 201 codewords"),
    (["--shape", "1x4"], USAGE, "shape: expected codebook sizes from 2"),
    (["--shape", "4x1"], USAGE, "shape: expected codebook sizes from 2"),
    (["--shape", "0"], USAGE, "shape: expected codebook sizes from 2"),
    (["--shape", ""], USAGE, "shape: "),
    (["--shape", "x"], USAGE, "shape: "),
    (["--shape", "4x-4"], USAGE, "shape: "),
    (["--shape", "4.5x4"], USAGE, "shape: "),
    (["--shape", "4x99999999999999999999"], USAGE, "shape: "),
    (["--shape", "x".join(["2"] * 26)], USAGE, "shape: expected at most 25 levels .*, got 26"),
    (["--mapping", "capacity", "--shape", "x".join(["256"] * 8)], USAGE, "numbers IDs with 63 bits"),
    (["--mapping", "even"], USAGE, "mapping: Input should be 'nearest', 'uniform' or 'capacity'"),
    (["--quantizer", "rq"], USAGE, "quantizer: expected one of residual_kmeans, rqvae, got 'rq'"),
    (["--seed", "-1"], USAGE, "seed: Input should be greater than or equal to 0"),
    (["--seed", "x"], USAGE, "seed: Input should be a valid integer"),
    (["--out", "a\0b"], USAGE, "out: expected a folder, got an empty name or one with a NUL character"),
    (["--out", " "], USAGE, "out: expected a folder"),
    (["--set", "option.residual_kmeans.restarts=2"], USAGE, "option: Extra inputs are not permitted"),
    (["--set", "options.residual_kmeans.restart=2"], USAGE, r"options\.residual_kmeans\.restart: Extra inputs"),
    (["--set", "options.residual_kmeans.restarts=0"], USAGE, r"restarts: Input should be greater than or equal to 1"),
    (["--set", "seed"], USAGE, "expected --set KEY=VALUE, got 'seed'"),
    (["--set", "seed=[1"], USAGE, r"expected YAML after seed=, got '\[1'"),
    (["--set", "catalogue=5"], USAGE, "catalogue: "),
    (["--set", "seed.deeper=5"], USAGE, "seed: Input should be a valid integer"),
    (["--seed", "1", "--set", "seed.deeper=5"], USAGE, "got 'seed.deeper': 'seed' has nothing inside"),
    (["--set", "catalogue.path.deeper=5"], USAGE, "'path' has nothing inside"),
    (["--set", "=5"], USAGE, "expected --set KEY=VALUE, got"),
    (["--set", "catalogue.max_quarantine_fraction=2"], USAGE, "less than or equal to 1"),
    (["--text-column", "text"], USAGE, ".npy files have no columns, got text_column"),
    (["--nonsense"], USAGE, "unrecognized arguments: --nonsense"),
    (["--config", "absent.yaml"], USAGE, "cannot read the configuration absent.yaml"),
]


@pytest.mark.parametrize(("options", "code", "message"), OPTIONS, ids=[" ".join(row[0])[:40] for row in OPTIONS])
def test_impossible_options_are_refused_before_any_work(
    options: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "vectors.npy", vectors())
    started = time.monotonic()
    arguments = ["tokenize", str(tmp_path / "vectors.npy"), "--out", str(tmp_path / "run"), *options]
    assert main(arguments) == code
    assert re.search(message, capsys.readouterr().err)
    assert time.monotonic() - started < 2
    assert not list(tmp_path.glob("run/stages/train-*"))


ARRAYS: list[tuple[str, Callable[[], np.ndarray], int, str]] = [
    ("no row", lambda: vectors(0), DATA, "expected items, got none|expected vectors, got none"),
    ("one row", lambda: vectors(1), USAGE, "got 1 items for 8 codewords"),
    ("one dimension", lambda: vectors()[:, 0], DATA, r"vectors\.npy"),
    ("three dimensions", lambda: vectors()[:, :, None], DATA, r"vectors\.npy"),
    ("integers", lambda: np.ones((200, 8), np.int64), DATA, "int64"),
    ("complex", lambda: vectors().astype(np.complex64), DATA, "complex64"),
    ("text", lambda: vectors().astype("U9"), DATA, r"vectors\.npy"),
    ("NaN", lambda: vectors(bad=np.nan, share=0.1), DATA, "20 of 200 items are unusable .*non-finite"),
    ("infinity", lambda: vectors(bad=np.inf, share=0.1), DATA, "20 of 200 items are unusable .*non-finite"),
    ("all NaN", lambda: vectors(bad=np.nan), DATA, "200 of 200 items are unusable"),
    ("zeros", lambda: vectors(bad=0, share=0.1), DATA, "20 of 200 items are unusable"),
    ("1e20", lambda: vectors(bad=1e20, share=0.1), DATA, "20 of 200 items are unusable"),
    ("1e-25", lambda: vectors(bad=1e-25, share=0.1), DATA, "20 of 200 items are unusable"),
    ("1e300", lambda: vectors(bad=1e300, share=0.1, dtype=np.float64), DATA, "20 of 200 items are unusable"),
]


@pytest.mark.parametrize(("make", "code", "message"), [row[1:] for row in ARRAYS], ids=[row[0] for row in ARRAYS])
def test_unusable_vectors_are_refused(
    make: Callable[[], np.ndarray], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "vectors.npy", make())
    arguments = ["tokenize", str(tmp_path / "vectors.npy"), "--shape", "8x4", "--out", str(tmp_path / "run")]
    assert main(arguments) == code
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run" / "results").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20, 1e-25, 0.0])
def test_a_few_unusable_vectors_are_set_aside_and_counted(bad: float, tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", vectors(bad=bad, share=0.01))
    arguments = ["tokenize", str(tmp_path / "vectors.npy"), "--shape", "8x4", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    report = json.loads((published(tmp_path / "run") / "report.json").read_text())
    assert (report["catalogue"]["items"], report["catalogue"]["quarantined"]) == (198, 2)


def test_vectors_of_unequal_width_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "parts").mkdir()
    np.save(tmp_path / "parts" / "a.npy", vectors())
    np.save(tmp_path / "parts" / "b.npy", vectors()[:, :5])
    assert main(["tokenize", str(tmp_path / "parts"), "--shape", "8x4", "--out", str(tmp_path / "run")]) == DATA
    assert re.search(r"expected 8 dimensions .*a\.npy, got 5 .*b\.npy", capsys.readouterr().err)


ROW = '{"item_id": "%s", "text": "%s"}\n'
CATALOGUES: list[tuple[str, bytes, int, str]] = [
    ("empty", b"", USAGE, "cannot tell which of the columns|no column"),
    ("no id", b'{"text": "a"}\n', USAGE, "no column 'item_id'"),
    ("not JSON", b"hello\n", DATA, r"catalogue\.jsonl, line 1: not JSON"),
    ("cut off", (ROW % ("a", "b")).encode() + b'{"item_id": "b", "te', DATA, r"line 2: not JSON .*cut off"),
    ("not UTF-8", b'{"item_id": "a", "text": "\xff"}\n', DATA, "line 1: not UTF-8"),
    ("ids twice", (ROW % ("a", "b")).encode() * 3, DATA, "got 2 repeats in 'item_id', among them 'a'"),
    ("blank text", (ROW % ("a", " ")).encode(), DATA, "1 of 1 items are unusable .*no text.*'a'"),
    ("NUL in a text", b'{"item_id": "a", "text": "b\\u0000c"}\n', DATA, "control character in text"),
    ("lone surrogate", b'{"item_id": "a", "text": "b\\ud800c"}\n', DATA, "lone surrogate in text"),
    ("nested", b'{"item_id": "a", "text": {"b": 1}}\n', USAGE, "expected text or numbers in 'text'"),
    ("huge text", (ROW % ("a", "b" * (10 << 20))).encode(), DATA, "text over 1 MiB"),
]


@pytest.mark.parametrize(
    ("content", "code", "message"), [row[1:] for row in CATALOGUES], ids=[row[0] for row in CATALOGUES]
)
def test_unusable_catalogues_are_refused(
    content: bytes, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "catalogue.jsonl").write_bytes(content)
    assert main(["tokenize", str(tmp_path / "catalogue.jsonl"), "--out", str(tmp_path / "run")]) == code
    assert re.search(message, capsys.readouterr().err)


def test_an_unknown_key_of_a_configuration_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("catalogue: {path: x.npy, max_quarantine: 1}\nshap: 4x4\n")
    assert main(["tokenize", "--config", str(tmp_path / "run.yaml")]) == USAGE
    said = capsys.readouterr().err
    assert "catalogue.max_quarantine: Extra inputs are not permitted" in said
    assert "shap: Extra inputs are not permitted" in said


ABSENT_MODELS = ["*.npy", "no/such/checkpoint", "../x", "~", "~nobody-has-this-name/x", "a" * 300, "package:os"]


@pytest.mark.parametrize("name", ABSENT_MODELS)
def test_a_model_that_is_not_there_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    catalogue = write_catalogue(tmp_path / "catalogue.jsonl")
    assert main(tokenize_arguments(catalogue, Path(name), tmp_path / "run")) in (USAGE, DATA)
    assert re.search("expected|no such", capsys.readouterr().err)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_bert(tmp_path_factory.mktemp("checkpoint"))


HOSTILE_IDS = [
    "../../x",
    "/etc/passwd",
    "~",
    "~/x",
    "a" * 300,
    "..",
    "C:\\x",
    "$(touch x)",
    "<script>",
    "=cmd()",
    "x\n",
]


def test_hostile_ids_stay_inert(checkpoint: Path, tmp_path: Path) -> None:
    changes = {number: {"item_id": name, "brand": name, "category": name} for number, name in enumerate(HOSTILE_IDS)}
    changes |= {number: {"split": f"../{'s' * 200}"} for number in range(40, 80)}
    catalogue = write_catalogue(tmp_path / "place" / "catalogue.jsonl", changes=changes)
    assert main(tokenize_arguments(catalogue, checkpoint, tmp_path / "place" / "run")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place"]
    assert sorted(path.name for path in (tmp_path / "place").iterdir()) == ["catalogue.jsonl", "run"]
    run = tmp_path / "place" / "run"
    assert {path.name for path in run.iterdir()} == {".lock", "stages", "results"}
    names = {path.name for path in run.rglob("*")}
    assert not any(name in part for part in names for name in ("aaaa", "script", "passwd", "ssss", "touch"))
    tokens = json.loads((published(run) / "tokens.json").read_text())
    assert set(HOSTILE_IDS) <= tokens.keys()


def _hold(folder: Path, ready: Any) -> None:
    with run_lock(folder):
        ready.set()
        time.sleep(TIMEOUT_S)


def test_a_second_run_on_a_busy_folder_ends_with_75_within_2_seconds_and_names_the_owner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guard: `run_lock` in the command line."""
    np.save(tmp_path / "vectors.npy", vectors())
    arguments = ["tokenize", str(tmp_path / "vectors.npy"), "--shape", "8x4", "--out", str(tmp_path / "run")]
    ready = fork.Event()
    owner = fork.Process(target=_hold, args=(tmp_path / "run", ready))
    owner.start()
    assert ready.wait(10)
    started = time.monotonic()
    assert main(arguments) == BUSY
    assert time.monotonic() - started < 2
    assert f"in use by process {owner.pid} on " in capsys.readouterr().err
    assert not (tmp_path / "run" / "stages").exists()
    owner.kill()
    owner.join()
    assert main(arguments) == 0


@pytest.mark.parametrize("step", ["_fill", "_flush", "_rename"])
@pytest.mark.parametrize("number", [0, 4, 9, 14, 18])
def test_a_full_disk_ends_with_74_and_names_the_path_and_a_re_run_succeeds(
    step: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guard: `store.commit` turns a refusal into a StorageError and removes what it had begun."""
    np.save(tmp_path / "vectors.npy", vectors())
    arguments = ["tokenize", str(tmp_path / "vectors.npy"), "--shape", "8x4", "--out", str(tmp_path / "run")]
    original = getattr(store, step)
    calls = 0
    refused: list[Path] = []

    def fill_the_disk(path: Path, *others: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > number:
            if step == "_fill":
                path.write_bytes(b"half")
            refused.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, *others)

    with monkeypatch.context() as patch:
        patch.setattr(store, step, fill_the_disk)
        assert main(arguments) == STORAGE
    name = refused[0].name.removeprefix(".tmp-").rsplit("-", 2)[0]
    said = capsys.readouterr().err
    assert re.search(rf"cannot write {re.escape(str(refused[0].parent))}.*: No space left on device; free some", said)
    assert name in said
    assert not list((tmp_path / "run").rglob(".tmp-*"))
    assert main(arguments) == 0
    assert verify_run(tmp_path / "run").faults == []


def test_a_file_where_the_run_folder_should_be_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "vectors.npy", vectors())
    (tmp_path / "file").write_text("in the way")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        arguments = ["tokenize", str(tmp_path / "vectors.npy"), "--shape", "8x4", "--out", str(out)]
        assert main(arguments) == USAGE
        assert f"expected a folder to work in, got {out}: a file lies there" in capsys.readouterr().err


WATCHED = """
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"):
        address = arguments[1] if event.startswith(("socket.connect", "socket.send")) else arguments[0]
        host = address[0] if isinstance(address, tuple) else address
        print("tried", event, host, flush=True)
        if host not in ("127.0.0.1", "::1", "localhost"):
            import os
            os._exit(99)
sys.addaudithook(watch)
from semids.cli import main
sys.exit(main(sys.argv[1:]))
"""


def watched_run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command line where a connection outside loopback ends the process, with a secret in the environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    secrets = {"HF_TOKEN": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET, "DATABASE_URL": f"postgres://u:{SECRET}@db/x"}
    return subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments],
        cwd=ROOT,
        env=environment | secrets,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def test_a_run_tries_no_connection_and_leaves_no_secret_behind(checkpoint: Path, tmp_path: Path) -> None:
    """Guards: `local_files_only` where a checkpoint is loaded, and that no environment is kept in a manifest."""
    catalogue = write_catalogue(tmp_path / "catalogue.jsonl")
    done = watched_run([*tokenize_arguments(catalogue, checkpoint, tmp_path / "run", mapping="uniform"), "--suffix"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tried" not in done.stdout
    assert SECRET not in done.stdout + done.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 30
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
    failed = watched_run(tokenize_arguments(catalogue, tmp_path, tmp_path / "other"))
    assert failed.returncode == DATA
    assert SECRET not in failed.stdout + failed.stderr


def test_the_watched_run_would_see_a_connection() -> None:
    code = WATCHED.replace("from semids.cli import main", "import socket").replace(
        "sys.exit(main(sys.argv[1:]))", "socket.create_connection(('192.0.2.1', 9), timeout=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 99
    assert "tried" in done.stdout
