"""Damage to what a run left: found where it is, refused or mended, and never used; and nothing in it is executed."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiny_models
from small_runs import (
    committed_files,
    copy_run,
    published,
    tokenize_arguments,
    use_small_shards,
    write_catalogue,
)

from semids import pipeline, shards
from semids.cli import main
from semids.errors import CorruptionError
from semids.progress import silent
from semids.shards import ShardLayout
from semids.stages import StageReader
from semids.verification import verify_run

FLIPS_A_FILE = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """A finished run, and the command line that made it."""
    folder = tmp_path_factory.mktemp("made")
    catalogue = write_catalogue(folder / "catalogue.jsonl")
    arguments = tokenize_arguments(catalogue, tiny_models.build_bert(folder / "model"), folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((pipeline, "ShardLayout"), (shards, "SHARD_ROWS")):
            patch.setattr(owner, name, getattr(owner, name))
        use_small_shards()
        assert main(arguments) == 0
        yield folder / "run", arguments


@pytest.fixture
def run(made: tuple[Path, list[str]], tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy of the finished run to damage, and the command line that makes it again."""
    original, arguments = made
    copy = copy_run(original, tmp_path / "run")
    return copy, [str(copy) if part == str(original) else part for part in arguments]


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def find(run: Path, pattern: str) -> Path:
    (path,) = (run / "stages").glob(pattern)
    return path


def times(run: Path) -> dict[str, int]:
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in committed_files(run)}


def made_again(run: Path, before: dict[str, int]) -> set[str]:
    """Return the files that are new or newer than before, by name within their stage's folder."""
    return {Path(name).name for name, time in times(run).items() if before.get(name) != time}


def ids(run: Path) -> list[bytes]:
    return [(published(run) / name).read_bytes() for name in ("semantic_ids.parquet", "tokens.json")]


def test_verify_finds_every_flipped_bit_and_names_its_file(run: tuple[Path, list[str]]) -> None:
    """Guard: the comparison of digests in `store.check_file`, and of the whole text in `store.read_sealed_json`."""
    rng = np.random.default_rng(0)
    files = committed_files(run[0])
    assert {path.suffix for path in files} == {".json", ".npy", ".parquet", ".safetensors", ".png", ".md"}
    assert verify_run(run[0]).faults == []
    tried = 0
    for path in files:
        for bit in rng.integers(8 * path.stat().st_size, size=FLIPS_A_FILE).tolist():
            flip(path, bit)
            faults = verify_run(run[0]).faults
            assert any(str(path) in fault for fault in faults), f"bit {bit} of {path}"
            flip(path, bit)
            tried += 1
    assert tried >= 200
    assert verify_run(run[0]).faults == []


def test_an_ordinary_run_ends_with_65_and_names_the_file_with_a_flipped_bit(
    run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guard: `_check_files` in `stages.find_stage`."""
    folder, arguments = run
    rng = np.random.default_rng(1)
    # A finished stage's sidecars only serve to go on after a kill; see the next test.
    files = [
        path
        for path in committed_files(folder)
        if not list(path.parent.glob(f"{path.stem}.npy")) or path.suffix == ".npy"
    ]
    kinds = {path.suffix for path in files}
    chosen = [
        *rng.choice(np.array(files, dtype=object), 18, replace=False),
        *(next(path for path in files if path.suffix == kind) for kind in sorted(kinds)),
    ]
    for path in dict.fromkeys(chosen):
        bit = int(rng.integers(8 * path.stat().st_size))
        flip(path, bit)
        assert main(arguments) == 65, path
        assert str(path) in capsys.readouterr().err
        assert main(["verify", str(folder)]) == 65
        assert str(path) in capsys.readouterr().err
        flip(path, bit)
    assert main(arguments) == 0


def test_a_changed_sidecar_is_refused_when_its_shard_has_to_be_judged_by_it(
    run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guard: the seal that `shards._finished_shard` reads; unsealed, a changed sidecar could vouch for any shard."""
    folder, arguments = run
    sidecar = find(folder, "vectors-*/vectors-00001.json")
    (sidecar.parent / "manifest.json").unlink()
    sidecar.write_bytes(sidecar.read_bytes().replace(b'"rows": 32', b'"rows": 31'))
    assert main(arguments) == 65
    assert str(sidecar) in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "empty", "longer"])
@pytest.mark.parametrize("name", ["vectors-*/vectors-00002.npy", "codes-*/codes-00000.npy", "model-*/tensors.*"])
def test_a_file_of_another_length_is_refused_by_name(
    name: str, damage: str, run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guard: the comparison of sizes and digests in `store.check_file`."""
    folder, arguments = run
    path = find(folder, name)
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-7], "empty": b"", "longer": data + b"\0"}[damage])
    for command in (arguments, ["verify", str(folder)]):
        assert main(command) == 65
        assert str(path) in capsys.readouterr().err
    with pytest.raises(CorruptionError, match=r"expected \d+ bytes, got \d+"):
        StageReader(path.parent).path(path.name)


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("vectors-*/vectors-00002.npy", {"vectors-00002.npy", "vectors-00002.json", "manifest.json"}),
        (
            "codes-*/squared_errors-00004.npy",
            {"squared_errors-00004.npy", "squared_errors-00004.json", "manifest.json"},
        ),
        ("train-codebook-2-*/tensors.safetensors", {"tensors.safetensors", "manifest.json"}),
        ("ids-*/tokens.json", {"semantic_ids.parquet", "tokens.json", "vocabulary.json", "manifest.json"}),
        ("model-*/manifest.json", {"tensors.safetensors", "manifest.json"}),
        ("ids-*/manifest.json", {"semantic_ids.parquet", "tokens.json", "vocabulary.json", "manifest.json"}),
    ],
)
def test_a_missing_file_is_made_again_with_no_other_shard(
    name: str, again: set[str], run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guard: `_missing_files` in `stages.find_stage`, and `shards._finished_shard` for the other shards."""
    folder, arguments = run
    expected, before = ids(folder), times(folder)
    path = find(folder, name)
    path.unlink()
    assert main(["verify", str(folder)]) == 65
    found = f"{path.parent} is unfinished" if path.name == "manifest.json" else f"{path}"
    assert found in capsys.readouterr().err
    assert main(arguments) == 0
    assert made_again(folder, before) == again
    assert ids(folder) == expected
    assert verify_run(folder).faults == []


def test_a_shard_made_again_to_other_bytes_is_not_judged_by_its_old_sidecar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guard: `sidecar.unlink` in `shards.write_shards`; a run that ended between the two was refused for good."""
    layout = ShardLayout(4, 2, "float32")

    def write(value: float) -> None:
        rows = np.full((4, 2), value, dtype=np.float32)
        shards.write_shards(tmp_path, "x", layout, lambda *_: rows, fingerprint="f", progress=silent)

    write(1)
    (tmp_path / "x-00000.npy").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(shards, "commit_sealed_json", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(2)
    write(3)
    assert (np.load(tmp_path / "x-00000.npy") == 3).all()


def test_a_deleted_stage_is_made_again_alone(run: tuple[Path, list[str]]) -> None:
    folder, arguments = run
    expected, before = ids(folder), times(folder)
    for path in find(folder, "codes-*").iterdir():
        path.unlink()
    assert main(arguments) == 0
    again = made_again(folder, before)
    assert all(name.startswith(("codes-", "squared_errors-", "manifest")) for name in again)
    assert ids(folder) == expected


def test_an_extra_shard_is_ignored_with_a_warning(
    run: tuple[Path, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, arguments = run
    expected, before = ids(folder), times(folder)
    extra = find(folder, "vectors-*") / "vectors-00005.npy"
    extra.write_bytes(find(folder, "vectors-*/vectors-00000.npy").read_bytes())
    assert main(arguments) == 0
    assert made_again(folder, before) == {"vectors-00005.npy"}
    assert "ignored files that the stage did not write: vectors-00005.npy" in caplog.text
    assert ids(folder) == expected


def test_outputs_of_another_stage_put_in_a_stages_place_are_refused(
    run: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Guard: the comparison of fingerprints in `stages.find_stage`: these files match their own manifest."""
    folder, arguments = run
    other = [str(folder / "other") if part == str(folder) else part for part in arguments]
    assert main([*other, "--seed", "1"]) == 0
    here, there = find(folder, "train-codebook-1-*"), find(folder / "other", "train-codebook-1-*")
    copy_run(there, here)
    assert main(arguments) == 65
    assert f"{here / 'manifest.json'}" in capsys.readouterr().err
    assert main(["verify", str(folder)]) == 65
    assert str(here) in capsys.readouterr().err


class Explosive:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.mark), 0o755)


def object_array(mark: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Explosive(mark)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def test_the_planted_pickle_would_act(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Explosive(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()
    np.load(io.BytesIO(object_array(tmp_path / "second")), allow_pickle=True)
    assert (tmp_path / "second").exists()


@pytest.mark.parametrize("form", ["pickle", "npy"])
def test_a_planted_pickle_is_not_executed_in_place_of_any_committed_file(
    form: str, run: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guard: digests are compared before a file is opened, and `allow_pickle=False` behind them."""
    folder, arguments = run
    mark = tmp_path / "executed"
    planted = pickle.dumps(Explosive(mark)) if form == "pickle" else object_array(mark)
    for path in committed_files(folder):
        original = path.read_bytes()
        path.write_bytes(planted)
        code = main(arguments)
        is_sidecar = path.suffix == ".json" and path.with_suffix(".npy").exists()
        assert code == (0 if is_sidecar else 65), path
        assert main(["verify", str(folder)]) == 65
        assert str(path) in capsys.readouterr().err
        path.write_bytes(original)
    assert not mark.exists()


@pytest.mark.parametrize("form", ["pickle", "npy"])
def test_a_pickle_with_the_right_digest_is_refused_and_not_executed(
    form: str,
    run: tuple[Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Guard: `allow_pickle=False` in `shards.ShardedArray.shard`; the digest is no help against who can write it."""
    folder, arguments = run
    mark = tmp_path / "executed"
    planted = pickle.dumps(Explosive(mark)) if form == "pickle" else object_array(mark)
    monkeypatch.setattr("semids.stages.check_file_once", lambda path, record: None)
    (find(folder, "codes-*") / "manifest.json").unlink()
    for path in find(folder, "codes-*").glob("*.npy"):
        path.unlink()
    for name in ("vectors-*/vectors-00000.npy", "model-*/tensors.safetensors"):
        path = find(folder, name)
        original = path.read_bytes()
        path.write_bytes(planted)
        assert main(arguments) == 65
        assert str(path) in capsys.readouterr().err
        path.write_bytes(original)
    assert not mark.exists()


@pytest.mark.parametrize("form", ["pickle", "npy"])
def test_a_pickle_given_as_vectors_is_refused_and_not_executed(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "executed"
    planted = pickle.dumps(Explosive(mark)) if form == "pickle" else object_array(mark)
    (tmp_path / "vectors.npy").write_bytes(planted)
    code = main(["tokenize", str(tmp_path / "vectors.npy"), "--shape", "4x4", "--out", str(tmp_path / "run")])
    assert code == 65
    assert "vectors.npy" in capsys.readouterr().err
    assert not mark.exists()
