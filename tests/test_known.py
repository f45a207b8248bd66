"""Contents that have an ID keep it, in train, test and later."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_models
from conftest import clustered_vectors
from small_runs import published, tokenize_arguments, write_catalogue

from semids.cli import main
from semids.contents import digest_array, read_digests
from semids.known import KnownCodes, write_known


def write_digests(path: Path, words: np.ndarray) -> Path:
    pq.write_table(pa.table({"digest": digest_array(words), "other": np.arange(len(words))}), path)
    return path


def test_codes_are_found_by_digest_in_any_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 63, (500, 2), dtype=np.uint64)
    words[100:110, 0] = words[100, 0]  # the first 8 bytes alone do not tell these apart
    codes = rng.integers(0, 200, (500, 3)).astype(np.uint8)
    contents = write_digests(tmp_path / "contents.parquet", words)
    assert np.array_equal(read_digests(contents), words)
    write_known(tmp_path / "known.parquet", words[:300], codes[:300])
    write_known(tmp_path / "known-2.parquet", words[300:], codes[300:])
    known = KnownCodes([tmp_path / "known.parquet", tmp_path / "known-2.parquet"])
    order = rng.permutation(500)
    strangers = np.array([[0, 0], [words[100, 0], 0], [words[100, 0], (1 << 64) - 1], [(1 << 64) - 1, 5]], np.uint64)
    found_codes, found = known.find(np.concatenate([words[order], strangers]))
    assert found.tolist() == [True] * 500 + [False] * 4
    assert np.array_equal(found_codes[:500], codes[order])
    digests = pl.read_parquet(tmp_path / "known.parquet")["digest"].to_list()
    assert digests == sorted(digests)


def test_capacity_reaches_the_floor_and_keeps_known_ids_when_items_come_later(tmp_path: Path) -> None:
    encoder = tiny_models.build_bert(tmp_path / "encoder")
    catalogue = write_catalogue(tmp_path / "items.jsonl")
    assert main(tokenize_arguments(catalogue, encoder, tmp_path / "run", mapping="capacity")) == 0
    report = json.loads((published(tmp_path / "run") / "report.json").read_text())
    # 140 contents, 192 IDs: none collide; 20 repeated texts share theirs.
    assert report["excess_collisions"] == 0
    assert report["unique_ids"] == report["distinct_contents"] == 140
    assert report["collision_rate"] == report["floor"] == 0.125
    tokens = json.loads((published(tmp_path / "run") / "tokens.json").read_text())
    assert tokens["item-7"] == tokens["item-3"]
    # Later: the old items in another order and with others among them.
    later = write_catalogue(tmp_path / "later.jsonl", items=200)
    later.write_text("".join(reversed(later.read_text().splitlines(keepends=True))))
    model = published(tmp_path / "run") / "model"
    assert main(["encode", str(model), str(later), "--out", str(tmp_path / "new")]) == 0
    new = json.loads((published(tmp_path / "new") / "tokens.json").read_text())
    assert {item: new[item] for item in tokens} == tokens
    assert len(new) == 200


@pytest.mark.parametrize(
    ("shape", "settings", "largest", "unique"),
    [
        ("6x5x4", [], 5, 120),
        ("6x5x4", ["max_contents_per_id=7"], 7, 120),
        ("6x5x4", ["max_contents_per_id=null", "min_contents_per_id=0"], None, None),
        ("6x5x4", ["max_contents_per_id=20", "min_contents_per_id=2"], 20, 120),
        ("16x8x8", [], 1, 500),
        ("16x8x8", ["max_contents_per_id=3"], 3, None),
    ],
)
def test_bounds_hold_for_every_id(
    shape: str, settings: list[str], largest: int | None, unique: int | None, tmp_path: Path
) -> None:
    np.save(tmp_path / "vectors.npy", clustered_vectors(500, 12))
    options = [part for setting in settings for part in ("--set", setting)]
    arguments = ["tokenize", str(tmp_path / "vectors.npy"), "--shape", shape, "--mapping", "capacity", *options]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    report = json.loads((published(tmp_path / "run") / "report.json").read_text())
    assert largest is None or report["largest_bucket_contents"] <= largest
    assert unique is None or report["unique_ids"] == unique
    assert main(["verify", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_contents_per_id=4", "expected max_contents_per_id of at least 5 for 500 distinct contents and 120 IDs"),
        ("min_contents_per_id=5", "expected min_contents_per_id of at most 4 for 500 distinct contents and 120 IDs"),
        ("max_contents_per_id=0", "max_contents_per_id"),
    ],
)
def test_bounds_that_cannot_be_kept_are_refused_before_training(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "vectors.npy", clustered_vectors(500, 12))
    arguments = ["tokenize", str(tmp_path / "vectors.npy"), "--shape", "6x5x4", "--mapping", "capacity"]
    assert main([*arguments, "--set", setting, "--out", str(tmp_path / "run")]) == 64
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("run/stages/vectors-*"))
