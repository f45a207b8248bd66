"""New items get their IDs from a frozen model."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tiny_models
from conftest import clustered_vectors
from safetensors.numpy import load_file, save_file
from small_runs import published, tokenize_arguments, write_catalogue

from semids.cli import main
from semids.stages import StageReader


@pytest.fixture
def vectors_file(tmp_path: Path) -> Path:
    np.save(tmp_path / "vectors.npy", clustered_vectors(500, 12))
    return tmp_path / "vectors.npy"


def test_new_items_get_the_ids_the_frozen_model_gives(vectors_file: Path, tmp_path: Path) -> None:
    assert main(["tokenize", str(vectors_file), "--shape", "8x4", "--out", str(tmp_path / "old")]) == 0
    old = np.load(vectors_file)
    np.save(tmp_path / "new.npy", np.concatenate([clustered_vectors(50, 12, seed=9), old[:20]]))
    model = published(tmp_path / "old") / "model"
    assert main(["encode", str(model), str(tmp_path / "new.npy"), "--out", str(tmp_path / "new")]) == 0
    new = pl.read_parquet(published(tmp_path / "new") / "semantic_ids.parquet").select("c0", "c1")
    before = pl.read_parquet(published(tmp_path / "old") / "semantic_ids.parquet").select("c0", "c1")
    assert new[50:].equals(before[:20])
    report = json.loads((published(tmp_path / "new") / "report.json").read_text())
    assert list(report["splits"]) == ["new"]


def test_new_items_of_another_width_are_refused(
    vectors_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["tokenize", str(vectors_file), "--shape", "8x4", "--out", str(tmp_path / "old")]) == 0
    np.save(tmp_path / "new.npy", clustered_vectors(50, 7))
    model = str(published(tmp_path / "old") / "model")
    assert main(["encode", model, str(tmp_path / "new.npy"), "--out", str(tmp_path / "new")]) == 65
    assert "the quantizer was trained on another embedder" in capsys.readouterr().err
    stage = str(next((tmp_path / "old" / "stages").glob("codes-*")))
    assert main(["encode", stage, str(vectors_file), "--out", str(tmp_path / "new")]) == 64


@dataclass(frozen=True)
class Trained:
    """A run of a small catalogue, and the encoder that embedded it."""

    catalogue: Path
    encoder: Path
    out: Path

    @property
    def model(self) -> str:
        return str(published(self.out) / "model")


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    run = Trained(tmp_path / "items.jsonl", tmp_path / "encoder", tmp_path / "run")
    write_catalogue(run.catalogue)
    tiny_models.build_bert(run.encoder)
    assert main(tokenize_arguments(run.catalogue, run.encoder, run.out, text_column="text")) == 0
    return run


def test_new_items_need_no_column_but_id_and_text(trained: Trained, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in trained.catalogue.read_text().splitlines()[:20]]
    new = tmp_path / "new.jsonl"
    new.write_text("".join(json.dumps({"item_id": row["item_id"], "text": row["text"]}) + "\n" for row in rows))
    assert main(["encode", trained.model, str(new), "--out", str(tmp_path / "new")]) == 0
    known = json.loads((published(trained.out) / "tokens.json").read_text())
    given = json.loads((published(tmp_path / "new") / "tokens.json").read_text())
    assert given == {row["item_id"]: known[row["item_id"]] for row in rows}


def test_a_model_whose_encoder_has_moved_takes_it_from_its_new_place(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    moved = trained.encoder.rename(tmp_path / "elsewhere")
    arguments = ["encode", trained.model, str(trained.catalogue), "--out", str(tmp_path / "new")]
    assert main(arguments) == 64
    assert str(trained.encoder) in capsys.readouterr().err
    assert main([*arguments, "--model", str(moved)]) == 0
    written = [(published(folder) / "tokens.json").read_bytes() for folder in (trained.out, tmp_path / "new")]
    assert written[0] == written[1]


def test_another_encoder_is_refused(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = Path(shutil.copytree(trained.encoder, tmp_path / "other")) / "model.safetensors"
    tensors = load_file(other)
    tensors["encoder.layer.0.output.dense.bias"][0] += 0.5
    save_file(tensors, other, metadata={"format": "pt"})
    arguments = ["encode", trained.model, str(trained.catalogue), "--out", str(tmp_path / "new")]
    assert main([*arguments, "--model", str(tmp_path / "other")]) == 65
    assert "they differ in files" in capsys.readouterr().err


def test_a_models_digest_does_not_tell_where_its_catalogue_and_encoder_lay(trained: Trained, tmp_path: Path) -> None:
    catalogue = Path(shutil.copy(trained.catalogue, tmp_path / "copy.jsonl"))
    encoder = Path(shutil.copytree(trained.encoder, tmp_path / "copy of encoder"))
    assert main(tokenize_arguments(catalogue, encoder, tmp_path / "second", text_column="text")) == 0
    folders = trained.out, tmp_path / "second"
    digests = [StageReader(published(folder) / "model").manifest["digest"] for folder in folders]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("setting", ["shape=2x2", "mapping=uniform", "quantizer=other", "seed=4", "suffix=true"])
def test_what_the_model_decides_cannot_be_told_otherwise(
    setting: str, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["encode", trained.model, str(trained.catalogue), "--out", str(tmp_path / "new"), "--set", setting]
    assert main(arguments) == 64
    assert f"encode cannot set {setting.partition('=')[0]}: codes come from the model" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_vectors_are_refused_where_the_model_was_trained_on_texts(
    trained: Trained, vectors_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["encode", trained.model, str(vectors_file), "--set", "catalogue.text_column=null"]
    assert main([*arguments, "--out", str(tmp_path / "new")]) == 65
    assert "expected texts as the model was trained on, got vectors" in capsys.readouterr().err


@pytest.mark.parametrize(("first", "second"), [("npy", "parquet"), ("parquet", "npy"), ("parquet", "renamed")])
def test_vectors_may_come_in_another_file_format_than_those_trained_on(
    first: str, second: str, vectors_file: Path, tmp_path: Path
) -> None:
    vectors = np.load(vectors_file)
    inputs = {"npy": [str(vectors_file)]}
    for name, column in (("parquet", "vector"), ("renamed", "embedding")):
        frame = pl.DataFrame({"item_id": np.arange(500)})
        frame = frame.with_columns(pl.Series(column, vectors, dtype=pl.Array(pl.Float32, 12)))
        frame.write_parquet(tmp_path / f"{name}.parquet")
        inputs[name] = [str(tmp_path / f"{name}.parquet"), "--vector-column", column]
    assert main(["tokenize", *inputs[first], "--shape", "8x4", "--out", str(tmp_path / "old")]) == 0
    model = str(published(tmp_path / "old") / "model")
    assert main(["encode", model, *inputs[second], "--out", str(tmp_path / "new")]) == 0
    written = [(published(tmp_path / name) / "semantic_ids.parquet").read_bytes() for name in ("old", "new")]
    assert written[0] == written[1]


def test_ids_that_another_model_gave_are_not_replaced_in_silence(
    vectors_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = []
    for seed in (1, 2):
        np.save(tmp_path / f"train{seed}.npy", clustered_vectors(300, 12, seed=seed))
        out = tmp_path / f"run{seed}"
        assert main(["tokenize", str(tmp_path / f"train{seed}.npy"), "--shape", "8x4", "--out", str(out)]) == 0
        models.append(str(published(out) / "model"))
    arguments = [str(vectors_file), "--out", str(tmp_path / "new")]
    for model in (models[0], models[0]):
        assert main(["encode", model, *arguments]) == 0
    assert not caplog.messages
    assert main(["encode", models[1], *arguments]) == 0
    (warning,) = caplog.messages
    assert "now shows another configuration (model)" in warning
    # What tokenize would make of this configuration is something else.
    assert not (published(tmp_path / "new") / "config.yaml").exists()
    assert main(["verify", str(tmp_path / "new")]) == 0


@pytest.mark.parametrize("place", ["nowhere", "run/results"])
def test_what_is_no_model_is_a_usage_error(
    place: str, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / place if place == "nowhere" else published(trained.out)
    assert main(["encode", str(folder), str(trained.catalogue), "--out", str(tmp_path / "new")]) == 64
    hint = f"; did you mean {folder / 'model'}?" if place != "nowhere" else ""
    assert f"expected a model folder, got {folder}, which holds no finished stage{hint}" in capsys.readouterr().err
