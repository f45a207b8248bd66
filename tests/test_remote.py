"""Catalogues on an object store and results on it, with a server on loopback that speaks S3."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import clustered_vectors
from small_runs import published

from semids.cli import main
from semids.errors import StorageError, UsageError
from semids.remote import DIGESTS, INPUTS, fetch, push
from tasks.server import free_port

moto_server = pytest.importorskip("moto.server", reason="the extra `dev` brings what speaks S3")
s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: the extra `s3` brings it")

SECRET = "not-to-be-seen"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=free_port())
    running.start()
    yield "http://{}:{}".format(*running.get_host_and_port())
    running.stop()


@pytest.fixture(autouse=True)
def store(server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store with the empty buckets `items` and `ids`, told by the environment alone."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem()
    for bucket in ("items", "ids"):
        if filesystem.exists(bucket):
            filesystem.rm(bucket, recursive=True)
        filesystem.mkdir(bucket)
    return filesystem


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    np.save(tmp_path / "vectors.npy", clustered_vectors(400, 16))
    return tmp_path / "vectors.npy"


def times_of(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and "lock" not in path.parent.name + path.name)
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


def test_ids_of_a_catalogue_on_a_store_are_those_of_a_local_one_and_lie_there(
    store: Any, vectors: Path, tmp_path: Path
) -> None:
    store.put_file(str(vectors), "items/parts/vectors.npy")
    options = ["--shape", "8x8x8", "--mapping", "capacity"]
    assert main(["tokenize", str(vectors), *options, "--out", str(tmp_path / "local")]) == 0
    arguments = ["tokenize", "s3://items/parts/vectors.npy", *options, "--set", "copy_to=s3://ids/today"]
    arguments += ["--out", str(tmp_path / "remote")]
    assert main(arguments) == 0
    shown = published(tmp_path / "local")
    assert (published(tmp_path / "remote") / "semantic_ids.parquet").read_bytes() == (
        shown / "semantic_ids.parquet"
    ).read_bytes()
    place = f"ids/today/vectors/{shown.name}"
    for name in ("semantic_ids.parquet", "tokens.json", "model/tensors.safetensors", "model/manifest.json"):
        assert store.cat_file(f"{place}/{name}") == (published(tmp_path / "remote") / name).read_bytes()
    listed = json.loads(store.cat_file(f"{place}/{DIGESTS}"))
    assert sorted([*listed, DIGESTS]) == sorted(path.removeprefix(f"{place}/") for path in store.find(place))
    # Again: nothing is copied in either direction.
    before, written = times_of(tmp_path / "remote"), store.find("ids", detail=True)
    assert main(arguments) == 0
    assert times_of(tmp_path / "remote") == before
    store.invalidate_cache()
    assert store.find("ids", detail=True) == written


def test_new_items_on_a_store_get_their_ids(store: Any, vectors: Path, tmp_path: Path) -> None:
    assert main(["tokenize", str(vectors), "--shape", "8x8x8", "--out", str(tmp_path / "run")]) == 0
    model = str(published(tmp_path / "run") / "model")
    np.save(tmp_path / "new.npy", clustered_vectors(50, 16, seed=1))
    store.put_file(str(tmp_path / "new.npy"), "items/new.npy")
    for name, place in (("near", str(tmp_path / "new.npy")), ("far", "s3://items/new.npy")):
        assert main(["encode", model, place, "--out", str(tmp_path / name)]) == 0
    near, far = (published(tmp_path / name) / "semantic_ids.parquet" for name in ("near", "far"))
    assert near.read_bytes() == far.read_bytes()


@pytest.mark.parametrize("pattern", ["s3://items/parts", "s3://items/parts/*.npy"])
def test_copies_follow_what_is_on_the_store(pattern: str, store: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        store.pipe_file(f"items/parts/{name}.npy", name.encode())
    place = tmp_path / INPUTS / "s3" / "items" / "parts"
    assert fetch(pattern, tmp_path) == str(tmp_path / INPUTS / "s3" / pattern.removeprefix("s3://"))
    assert {path.name: path.read_bytes() for path in place.glob("*.npy")} == {"a.npy": b"a", "b.npy": b"b"}
    before = times_of(place)
    time.sleep(1.1)  # A store tells times in seconds.
    store.pipe_file("items/parts/a.npy", b"another")
    store.rm("items/parts/b.npy")
    store.pipe_file("items/parts/c.npy", b"c")
    fetch(pattern, tmp_path)
    assert {path.name: path.read_bytes() for path in place.glob("*.npy")} == {"a.npy": b"another", "c.npy": b"c"}
    assert not set(times_of(place).items()) & set(before.items())


def test_a_changed_copy_is_fetched_again(store: Any, tmp_path: Path) -> None:
    store.pipe_file("items/a.npy", b"right")
    copy = Path(fetch("s3://items/a.npy", tmp_path))
    copy.write_bytes(b"wrong")
    fetch("s3://items/a.npy", tmp_path)
    assert copy.read_bytes() == b"right"


def test_what_is_overwritten_is_not_on_record_meanwhile(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: tmp_path / name for name in ("kept", "changed")}
    for path in files.values():
        path.write_text("first")
    push(files, "s3://ids/run")
    files["changed"].write_text("second")

    def fail(*arguments: Any, **named: Any) -> None:
        raise OSError("the connection is gone")

    with monkeypatch.context() as patch:
        patch.setattr(store, "put_file", fail)
        with pytest.raises(StorageError, match="cannot reach s3://ids/run: OSError: the connection is gone"):
            push(files, "s3://ids/run")
    assert list(json.loads(store.cat_file(f"ids/run/{DIGESTS}"))) == ["kept"]
    push(files, "s3://ids/run")
    assert store.cat_file("ids/run/changed") == b"second"
    assert sorted(json.loads(store.cat_file(f"ids/run/{DIGESTS}"))) == ["changed", "kept"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("s3://items/none.npy", "no file matches 's3://items/none.npy'"),
        ("s3://nobody-has-this/*.npy", "no file matches 's3://nobody-has-this/"),
        ("nothing://items/a.npy", "cannot open 'nothing://items/a.npy'"),
    ],
)
def test_a_url_that_leads_nowhere_is_wrong_usage(
    place: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokenize", place, "--shape", "8x8x8", "--out", str(tmp_path / "run")]) == 64
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../outside.npy", "a/./b.npy"])
def test_no_name_on_a_store_leads_out_of_the_run_folder(name: str, store: Any, tmp_path: Path) -> None:
    store.pipe_file(f"items/{name}", b"x")
    with pytest.raises(UsageError, match=r"without '\.' and '\.\.'"):
        fetch(f"s3://items/{name}", tmp_path / "run")
    assert not list(tmp_path.rglob("*.npy"))


def test_a_store_that_does_not_answer_is_named_and_no_secret_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    assert main(["tokenize", "s3://items/a.npy", "--shape", "8x8x8", "--out", str(tmp_path / "run")]) == 74
    told = capsys.readouterr()
    assert "cannot reach s3://items/a.npy" in told.err
    assert SECRET not in told.err + told.out


def test_a_place_for_copies_is_checked_before_work_starts(
    vectors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tokenize", str(vectors), "--shape", "8x8x8", "--out", str(tmp_path / "run")]
    assert main([*arguments, "--set", "copy_to=/somewhere"]) == 64
    assert "expected a URL such as s3://bucket/folder, got '/somewhere'" in capsys.readouterr().err
    assert main([*arguments, "--set", "copy_to=nothing://ids"]) == 64
    assert not (tmp_path / "run" / "stages").exists()
