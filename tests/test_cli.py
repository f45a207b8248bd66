"""The command line and the configuration it shares with the flows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from conftest import clustered_vectors

from semids.cli import main
from semids.config import SIX_SHAPES, BuildConfig, SweepConfig, make_config, read_config, write_config
from semids.errors import UsageError

CONFIGS = Path(__file__).parent.parent / "deployments" / "configs"


@pytest.fixture
def vectors_file(tmp_path: Path) -> Path:
    np.save(tmp_path / "vectors.npy", clustered_vectors(500, 12))
    return tmp_path / "vectors.npy"


def results(folder: Path) -> Path:
    (found,) = (folder / "results").glob("*/*/")
    return found


def test_defaults_are_those_of_the_original_sheet() -> None:
    config = BuildConfig.model_validate({"catalogue": {"path": "x.npy"}})
    assert (config.shape, config.mapping, config.quantizer) == ("256x256x256", "nearest", "residual_kmeans")
    cells = SweepConfig.model_validate({"catalogue": {"path": "x.npy"}}).cells()
    assert {cell.shape for cell in cells} == set(SIX_SHAPES)
    assert len(SIX_SHAPES) == 6
    assert len(cells) == 18


LIMITS: list[tuple[dict[str, Any], str]] = [
    ({"shapes": ["8x8", "x".join(["256"] * 8)]}, "numbers IDs with 63 bits"),
    ({"min_contents_per_id": 5, "max_contents_per_id": ["none", "1"]}, "at most max_contents_per_id, 1, got 5"),
]


@pytest.mark.parametrize(("values", "message"), LIMITS)
def test_a_sweep_refuses_what_capacity_cannot_do_before_any_work(values: dict[str, Any], message: str) -> None:
    common = {"catalogue": {"path": "x.npy"}, "shapes": ["8x8"]}
    with pytest.raises(UsageError, match=message):
        make_config(SweepConfig, common | values, source="here")
    make_config(SweepConfig, common | values | {"mappings": ["nearest"]}, source="here")


def test_committed_configurations_read_and_write_back() -> None:
    paths = sorted(CONFIGS.glob("*.yaml"))
    assert len(paths) >= 5
    for path in paths:
        kind = SweepConfig if "sweep" in path.name else BuildConfig
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
        ("catalogue: {path: x.npy}\nquantizer: rq", "quantizer: expected one of residual_kmeans, rqvae, got 'rq'"),
        ("catalogue: {path: x.npy}\nmapping: even", "mapping: Input should be 'nearest', 'uniform' or 'capacity'"),
        ("catalogue: {path: x.npy}\nseed: -1", "seed: Input should be greater than or equal to 0"),
        ("catalogue: {path: x.npy}\noptions: {residual_kmeans: {restarts: 0}}", r"options\.residual_kmeans\.restarts"),
        ("shape: 4x4", "catalogue: Field required"),
        ("catalogue: {path: x.npy}\n7: seven", "7: Keys should be strings"),
        ("catalogue: {path: x.npy}\nshape: true", "shape: Input should be a valid string"),
        ("- a list", "expected keys and values, got list"),
        ("a: b: c", "is not YAML"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_field(yaml: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml)
    with pytest.raises(UsageError, match=message):
        read_config(tmp_path / "config.yaml", BuildConfig)


def test_a_shape_of_one_level_needs_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("catalogue: {path: x.npy}\nshapes: [256, 4x4]\n")
    assert read_config(tmp_path / "config.yaml", SweepConfig).shapes == ["256", "4x4"]


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


def test_usage_errors_end_with_64_and_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, message in (
        ([], "see semids --help"),
        (["tokenize"], "command line: expected a catalogue: give INPUT"),
        (["tokenize", "x.npy", "--set", "seed"], "expected --set KEY=VALUE"),
        (["tokenize", str(tmp_path / "absent.npy")], "absent.npy"),
        (["verify", str(tmp_path)], "is not a run folder"),
        (["report", str(tmp_path)], "is not a run folder with results"),
        (["frobnicate"], "invalid choice"),
    ):
        assert main(arguments) == 64, arguments
        assert message in capsys.readouterr().err


def test_the_sample_is_written_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["sample", str(tmp_path / "new" / "sample.parquet")]) == 0
    assert pl.scan_parquet(tmp_path / "new" / "sample.parquet").select(pl.len()).collect().item() == 3000
    assert main(["sample", str(tmp_path / "new")]) == 64
    assert "expected a file to write, got the folder" in capsys.readouterr().err
