"""Items with equal content: one ID, or IDs of their own; and how much they weigh in the codebooks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tiny_models
from small_runs import published

from semids.cli import main
from semids.contents import digest_content, digest_of_item
from semids.kmeans import Lloyd, fit_codebook
from semids.prefixes import nearest_quantizer
from semids.refits import refit_jointly, refit_last

BUILD = ("--shape", "6x6x6")
COPIES = 5


@pytest.fixture
def catalogue(vectors: np.ndarray, tmp_path: Path) -> Path:
    """150 vectors, of which the first 10 are five items' each: 190 items."""
    rows = np.concatenate([np.arange(150), np.repeat(np.arange(10), COPIES - 1)])
    path = tmp_path / "items.parquet"
    frame = pl.DataFrame({"item_id": [f"i{number}" for number in range(len(rows))], "vector": vectors[rows].tolist()})
    frame.with_columns(pl.col("vector").cast(pl.Array(pl.Float32, vectors.shape[1]))).write_parquet(path)
    return path


def tokenize(catalogue: Path, out: Path, *options: str) -> pl.DataFrame:
    assert main(["tokenize", str(catalogue), *BUILD, "--out", str(out), *options]) == 0
    return pl.read_parquet(published(out) / "semantic_ids.parquet")


def stage_of(run: Path, name: str) -> Path:
    (folder,) = (run / "stages").glob(f"{name}-*/")
    return folder


@pytest.mark.parametrize(("duplicates", "ids"), [("share", 150), ("split", 190)])
def test_equal_contents_share_an_id_unless_they_are_split(
    duplicates: str, ids: int, catalogue: Path, tmp_path: Path
) -> None:
    option = ("--mapping", "capacity", "--set", f"catalogue.duplicates={duplicates}")
    found = tokenize(catalogue, tmp_path / "run", *option)
    assert len(found.select("c0", "c1", "c2").unique()) == ids
    assert len(found) == 190


def test_split_duplicates_keep_their_ids_and_new_copies_get_free_ones(catalogue: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    option = ("--mapping", "capacity", "--set", "catalogue.duplicates=split", "--set", "max_contents_per_id=1")
    before = tokenize(catalogue, run, *option)
    later = tmp_path / "later.parquet"
    frame = pl.read_parquet(catalogue)
    copies = frame.head(3).with_columns(pl.Series("item_id", ["x0", "x1", "x2"]))
    pl.concat([frame.head(20), copies]).write_parquet(later)
    model = str(published(run) / "model")
    assert main(["encode", model, str(later), "--unique", "--out", str(tmp_path / "new")]) == 0
    after = pl.read_parquet(published(tmp_path / "new") / "semantic_ids.parquet")
    assert after.head(20).equals(before.head(20))
    everything = pl.concat([before, after.tail(3)]).select("c0", "c1", "c2")
    assert everything.is_unique().all()


def test_equal_texts_that_are_split_are_embedded_once(tmp_path: Path) -> None:
    checkpoint = tiny_models.build_bert(tmp_path / "checkpoint")
    texts = [f"item number {number % 40}" for number in range(120)]
    catalogue = tmp_path / "items.parquet"
    pl.DataFrame({"item_id": range(120), "text": texts}).write_parquet(catalogue)
    embedded = tokenize(
        catalogue,
        tmp_path / "run",
        *("--model", str(checkpoint), "--mapping", "capacity", "--set", "catalogue.duplicates=split"),
    )
    assert embedded.select("c0", "c1", "c2").is_unique().all()
    vectors = np.load(stage_of(tmp_path / "run", "vectors") / "vectors-00000.npy")
    assert len(vectors) == 120
    assert len(np.unique(vectors, axis=0)) == 40
    contents = pl.read_parquet(stage_of(tmp_path / "run", "items") / "contents.parquet")
    assert contents["text"].rle().struct.field("len").to_list() == [3] * 40


def test_weighted_codebooks_are_those_of_repeated_rows(vectors: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    rows, weights = vectors[:300], rng.integers(1, 6, 300)
    books = tuple(rng.normal(size=(size, rows.shape[1])).astype(np.float32) for size in (7, 5))
    codes = nearest_quantizer(books).encode(rows)
    repeated = np.repeat(np.arange(300), weights)
    for refit in (refit_jointly, refit_last):
        found = refit(lambda some: rows[some], codes, books, weights=weights.astype(np.float32))
        expected = refit(lambda some: rows[repeated[some]], codes[repeated], books)
        for one, other in zip(found, expected, strict=True):
            assert np.allclose(one, other, atol=1e-4)


def test_a_heavy_row_draws_its_codeword(vectors: np.ndarray) -> None:
    rows, weights = vectors[:200], np.ones(200, np.float32)
    weights[17] = 1e4
    codebook = fit_codebook(rows, 8, Lloyd(10, 2), rng=np.random.default_rng(0), weights=weights).codebook
    assert np.square(codebook - rows[17]).sum(axis=1).min() < 1e-3


def test_an_item_s_own_content_is_the_same_whether_its_id_is_a_number_or_text() -> None:
    digest = digest_content(b"a text")
    assert digest_of_item(digest, 5) == digest_of_item(digest, "5") != digest_of_item(digest, 6)
    assert digest_of_item(digest, 5)[:8] == digest[:8]


@pytest.mark.parametrize("mapping", ["nearest", "uniform", "capacity"])
def test_weights_of_items_bring_popular_contents_closer(mapping: str, catalogue: Path, tmp_path: Path) -> None:
    errors = {}
    for weights in ("contents", "items"):
        option = ("--mapping", mapping, "--set", f"options.residual_kmeans.weights={weights}")
        run = tmp_path / weights
        tokenize(catalogue, run, *option)
        found = np.load(stage_of(run, "codes") / "squared_errors-00000.npy")[:, -1]
        errors[weights] = found[:10].mean() / found.mean()
    assert errors["items"] < errors["contents"]


def test_one_more_duplicate_trains_again_only_where_it_weighs(catalogue: Path, tmp_path: Path) -> None:
    """Guard: `TrainingStep.weighted`, by which `pipeline.train_step` depends on the items and not on contents alone."""
    frame = pl.read_parquet(catalogue)
    more = tmp_path / "more" / "items.parquet"
    more.parent.mkdir()
    pl.concat([frame, frame.head(1).with_columns(pl.lit("again").alias("item_id"))]).write_parquet(more)
    for weights, again in (("contents", False), ("items", True)):
        run = tmp_path / weights
        option = ("--mapping", "uniform", "--set", f"options.residual_kmeans.weights={weights}")
        tokenize(catalogue, run, *option)
        trained = {path.name for path in (run / "stages").glob("train-*")}
        tokenize(more, run, *option)
        assert ({path.name for path in (run / "stages").glob("train-*")} > trained) == again
