"""Predictions before a run: what they say of its files, what they refuse, and where they are shown."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from conftest import clustered_vectors
from small_runs import tokenize_arguments, write_catalogue

from semids import runs
from semids.cli import main
from semids.config import BuildConfig
from semids.counts import count_catalogue, suppose_vectors
from semids.embedders.transformer import TransformerEmbedder
from semids.errors import UsageError
from semids.memory import available_bytes, held_bytes
from semids.plan import Finished, Plan, checking_runner, find_finished, plan_run
from semids.progress import silent
from semids.stages import StageReader, reference
from semids.work import Machine, Work

MIB = 1 << 20


@pytest.fixture
def vectors_file(tmp_path: Path) -> Path:
    rows = clustered_vectors(3000, 24).astype(np.float16)
    rows[1] = rows[0]
    np.save(tmp_path / "vectors.npy", rows)
    return tmp_path / "vectors.npy"


def configured(path: Path, shape: str = "8x6x4", **values: object) -> BuildConfig:
    options = {"residual_kmeans": {"iterations": 3, "restarts": 1}}
    given = {"catalogue": {"path": str(path)}, "shape": shape, "options": options, "out": str(path.parent / "run")}
    return BuildConfig.model_validate(given | values)


def plan_rows(rows: int, dimensions: int = 1024, shape: str = "256x256x256", **values: object) -> Plan:
    config = configured(Path("no-such-folder/vectors.npy"), shape, **values)
    return plan_run(config, suppose_vectors(rows, dimensions), None, Finished())


@pytest.mark.parametrize("mapping", ["nearest", "uniform", "capacity"])
def test_predicted_disk_is_what_a_run_writes(vectors_file: Path, mapping: str) -> None:
    config = configured(vectors_file, mapping=mapping)
    run = runs.local_runner(Path(config.out), silent)
    runs.build(config, run)
    counts = count_catalogue(config, run)
    assert counts.exact
    assert counts.contents == 2999
    predicted = {stage.title: stage for stage in plan_run(config, counts, None, Finished()).stages}
    found = {title: StageReader(ref.path).manifest for title, ref in find_finished(config).stages.items()}
    assert predicted.keys() == found.keys()
    # Small Parquet files are mostly footers, and plots follow the data: the vectors and codes must be exact.
    for title in ("Import the vectors", "Encode the vectors"):
        assert predicted[title].disk == sum(record["bytes"] for record in found[title]["files"].values())
    for title in ("Write the semantic IDs", "Freeze the model", "Fit codebook 1 (8 codewords)"):
        written = sum(record["bytes"] for record in found[title]["files"].values())
        assert predicted[title].disk == pytest.approx(written, rel=0.15)  # observed: within 8 %, headers


def test_the_costs_of_large_codebooks_are_those_that_are_held_at_once() -> None:
    """A million rows of the sample, the half of them that early re-fits see, and 1 GiB of costs: 7.9 GB by hand."""
    stages = {stage.title: stage.memory for stage in plan_rows(1_000_000, shape="4096x2", mapping="uniform").stages}
    assert 7e9 < stages["Balance level 1 (4096 codewords)"] < 9e9


class Watched(Machine):
    """A machine that notes what it is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: list[set[str]] = []

    def seconds(self, work: Work) -> float:
        self.asked.append({probe.name for probe in work.units})
        return 0.0


@pytest.mark.parametrize(("dtype", "first"), [("float16", "Read the catalogue"), ("float32", "Fit codebook 2")])
def test_pytorch_is_loaded_by_the_first_stage_that_needs_it(tmp_path: Path, dtype: str, first: str) -> None:
    np.save(tmp_path / "vectors.npy", clustered_vectors(3000, 24).astype(dtype))
    config = configured(tmp_path / "vectors.npy")
    machine = Watched(tmp_path)
    counts = count_catalogue(config, runs.local_runner(Path(config.out), silent))
    plan = plan_run(config, counts, machine, Finished())
    loading = [stage.title for stage, asked in zip(plan.stages, machine.asked, strict=True) if "load PyTorch" in asked]
    assert len(loading) == 1
    assert loading[0].startswith(first)


def test_predictions_scale_with_rows() -> None:
    small, large = plan_rows(1_000_000), plan_rows(10_000_000)
    for before, after in zip(small.stages, large.stages, strict=True):
        assert after.disk >= before.disk
        assert after.memory >= before.memory
    assert large.stages[1].disk == pytest.approx(10 * small.stages[1].disk, rel=1e-6)
    # Codebooks are fitted to a sample: more rows leave its size as it is.
    assert large.stages[2] == small.stages[2]


def test_rows_that_starts_are_chosen_among_are_a_copy() -> None:
    (stage,) = (one for one in plan_rows(100_000, shape="4096x2").stages if one.title.startswith("Fit codebook 1"))
    assert stage.memory >= 2 * 100_000 * 1024 * 4


def test_a_codebook_of_more_codewords_takes_more() -> None:
    small, large = plan_rows(10_000_000), plan_rows(10_000_000, shape="512x512x512")
    assert large.stages[2].memory > small.stages[2].memory
    assert large.total.disk > small.total.disk


def test_a_run_without_memory_is_refused_with_the_figure() -> None:
    available = available_bytes()
    assert available is not None
    dimensions = available // 60_000
    plan = plan_rows(100_000, dimensions, "8x6x4")
    assert plan.total.memory > available
    with pytest.raises(UsageError, match=r"'Write the report' needs \d+\.\d\d GiB of \d+\.\d\d GiB available"):
        plan.check()
    # Predictions come within a fifth: what is a tenth short is left to the run.
    near = replace(plan, available=round(plan.total.memory / 1.1), free=plan.total.disk)
    near.check()
    assert near.verdict().startswith("may fit: needs ")


def test_a_run_without_disk_is_refused_with_the_figure() -> None:
    plan = plan_rows(50_000_000_000)
    with pytest.raises(UsageError, match=r"writes [\d.]+ GiB and [\d.]+ GiB are free") as refused:
        # Memory of so many rows is short, too; disk alone is asked for here.
        replace(plan, available=None).check()
    assert "choose another --out" in str(refused.value)


def test_bounds_that_cannot_be_met_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--rows", "1000", "--dimensions", "8", "--shape", "4x4", "--mapping", "capacity"]
    out = ["--out", str(tmp_path / "run")]
    assert main([*arguments, "--set", "max_contents_per_id=1", *out]) == 64
    assert "max_contents_per_id of at least 63 for 1,000 distinct contents and 16 IDs" in capsys.readouterr().err


def test_a_shape_larger_than_the_training_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--rows", "100", "--dimensions", "8", "--shape", "128x4", "--out", str(tmp_path / "run")]
    assert main(arguments) == 64
    assert "got 100 items for 128 codewords" in capsys.readouterr().err


@pytest.mark.parametrize("numbers", [["--rows", "0"], ["--rows", "9", "--dimensions", "0"]])
def test_numbers_below_one_are_refused(tmp_path: Path, numbers: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "x.npy", *numbers, "--out", str(tmp_path / "run")]) == 64
    assert "of at least 1" in capsys.readouterr().err


def test_few_of_a_catalogue_of_equal_texts_are_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_models.build_bert(tmp_path / "model")
    lines = [json.dumps({"item_id": f"i{row}", "text": f"one of {row % 6}"}) for row in range(400)]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    options: dict[str, Any] = {"split_column": None, "brand_column": None, "category_column": None}
    arguments = tokenize_arguments(tmp_path / "items.jsonl", model, tmp_path / "run", text_column="text", **options)[1:]
    assert main(["plan", *arguments, "--rows", "20", "--shape", "2x2", "--mapping", "capacity"]) == 0
    assert "20 items, 1 contents, supposed" in capsys.readouterr().out
    assert main(["plan", *arguments, "--rows", "20", "--dimensions", "9"]) == 64
    assert "got one of texts" in capsys.readouterr().err


def test_a_damaged_plan_is_not_shown_and_stops_nothing(vectors_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = vectors_file.parent / "run"
    arguments = [str(vectors_file), "--shape", "8x6x4", "--out", str(out)]
    assert main(["plan", *arguments]) == 0
    (plan,) = (out / "plans").iterdir()
    plan.write_bytes(plan.read_bytes().replace(b'"items"', b'"itemz"'))
    assert main(["tokenize", *arguments]) == 0
    assert "is damaged; the report goes without it" in caplog.text
    (report,) = out.glob("results/*/*/report.json")
    assert json.loads(report.read_text())["planned"] == []


def test_disk_is_not_asked_for_what_may_be_there_after_a_lost_stage(
    vectors_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(vectors_file)
    run = runs.local_runner(Path(config.out), silent)
    runs.build(config, run)
    (codes,) = Path(config.out).glob("stages/codes-*")
    written = sum(path.stat().st_size for path in codes.iterdir())
    shutil.rmtree(codes)
    usage = shutil.disk_usage(config.out)._replace(free=2 * written)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert find_finished(config).stages.keys().isdisjoint({"Encode the vectors", "Write the semantic IDs"})
    runs.build(config, checking_runner([config], run))
    shutil.rmtree(codes)
    usage = usage._replace(free=written // 2)
    with pytest.raises(UsageError, match="fits the disk"):
        runs.build(config, checking_runner([config], run))


def test_a_model_that_does_not_name_its_dimensions_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_models.build_bert(tmp_path / "model")
    arguments = tokenize_arguments(write_catalogue(tmp_path / "items.jsonl"), model, tmp_path / "run")
    monkeypatch.setattr(TransformerEmbedder, "declared_dimensions", None)
    assert main(["plan", *arguments[1:]]) == 64
    assert "names its dimensions" in capsys.readouterr().err
    assert main(arguments) == 0


def test_dimensions_without_rows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "x.npy", "--dimensions", "8", "--out", str(tmp_path / "run")]) == 64
    assert "expected --rows" in capsys.readouterr().err


def test_tokenize_refuses_before_vectors_are_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prices of 65,536 codewords under the prefix of nearly every content are 256 KiB a content."""
    available = available_bytes()
    assert available is not None
    rows = max(65_536, round(1.3 * available / (4 * 65_536)))
    np.save(tmp_path / "vectors.npy", clustered_vectors(rows, 8))
    out = tmp_path / "run"
    shape = "65536x65536x65536x2"
    arguments = ["tokenize", str(tmp_path / "vectors.npy"), "--shape", shape, "--out", str(out)]
    assert main([*arguments, "--mapping", "capacity"]) == 64
    assert re.search(r"'Place every content on level 3' needs [\d.]+ GiB of [\d.]+ GiB", capsys.readouterr().err)
    assert {path.name.rpartition("-")[0] for path in (out / "stages").glob("[!.]*")} == {"items"}


def test_what_an_interrupted_run_left_is_not_asked_for_again(vectors_file: Path) -> None:
    config = configured(vectors_file)
    runs.build(config, runs.local_runner(Path(config.out), silent))
    codes = find_finished(config).stages["Encode the vectors"]
    written = sum(path.stat().st_size for path in Path(codes.path).glob("codes-*"))
    for path in [Path(codes.path) / "manifest.json", *Path(codes.path).glob("squared_errors-*")]:
        path.unlink()
    found = find_finished(config)
    assert found.stages.keys() & {"Encode the vectors", "Write the report"} == set()
    assert found.left == written
    counts = count_catalogue(config, runs.local_runner(Path(config.out), silent))
    plan = plan_run(config, counts, None, found)
    assert plan.total.disk == sum(stage.disk for stage in plan.stages[-3:]) - written


def test_a_plan_stands_beside_what_the_run_took(vectors_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = vectors_file.parent / "run"
    arguments = [str(vectors_file), "--shape", "8x6x4", "--out", str(out)]
    arguments += ["--set", "options.residual_kmeans.iterations=3"]
    assert main(["plan", *arguments]) == 0
    said = capsys.readouterr().out
    assert "3,000 items, 3,000 contents, supposed, 24 dimensions" in said
    assert "\nfits: needs " in said
    assert main(["tokenize", *arguments]) == 0
    (page,) = out.glob("results/*/*/report.md")
    assert "| stage | predicted time | took | predicted memory | peak | predicted disk | wrote |" in page.read_text()
    (report,) = out.glob("results/*/*/report.json")
    planned = json.loads(report.read_text())["planned"]
    assert planned[0]["stage"] == "Read the catalogue"
    assert all(stage["predicted_seconds"] > 0 and stage["seconds"] >= 0 for stage in planned)
    # The plan took the duplicate for a content of its own.
    vectors = next(stage for stage in planned if stage["stage"] == "Import the vectors")
    assert vectors["predicted_disk_bytes"] - vectors["written_bytes"] == 2 * 24
    capsys.readouterr()
    assert main(["plan", *arguments]) == 0
    assert "nothing to do: every stage is there" in capsys.readouterr().out


def test_texts_are_counted_and_timed_with_their_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_models.build_bert(tmp_path / "model")
    catalogue = write_catalogue(tmp_path / "items.jsonl")
    arguments = tokenize_arguments(catalogue, model, tmp_path / "run", text_column="text")[1:]
    assert main(["plan", *arguments]) == 0
    said = capsys.readouterr().out
    assert "160 items, 140 contents, 32 dimensions" in said
    assert "Read the catalogue  " in said
    assert main(["tokenize", *arguments]) == 0
    (report,) = (tmp_path / "run").glob("results/*/*/report.json")
    planned = {stage["stage"]: stage for stage in json.loads(report.read_text())["planned"]}
    # Reading was done by the plan.
    assert planned["Read the catalogue"]["predicted_seconds"] is None
    assert planned["Embed the texts"]["predicted_seconds"] > 0
    assert planned["Embed the texts"]["predicted_disk_bytes"] == planned["Embed the texts"]["written_bytes"]
    capsys.readouterr()
    assert main(["plan", *arguments, "--rows", "16000"]) == 0
    assert "16,000 items, 14,000 contents, supposed, 32 dimensions" in capsys.readouterr().out


def test_a_plan_of_another_configuration_is_not_shown(vectors_file: Path) -> None:
    out = vectors_file.parent / "run"
    arguments = [str(vectors_file), "--shape", "8x6x4", "--out", str(out)]
    assert main(["plan", *arguments, "--set", "options.residual_kmeans.iterations=4"]) == 0
    assert main(["tokenize", *arguments, "--set", "options.residual_kmeans.iterations=3"]) == 0
    (report,) = out.glob("results/*/*/report.json")
    assert json.loads(report.read_text())["planned"] == []


def test_manifests_tell_the_peak_of_their_stage(vectors_file: Path) -> None:
    config = configured(vectors_file)
    # What stays in memory, libraries above all, is there once a run was made.
    runs.build(config, runs.local_runner(vectors_file.parent / "before", silent))
    before = held_bytes()
    # The peak of the process, given back before any stage.
    np.ones(512 * MIB, np.uint8).sum()
    refs = runs.build(config, runs.local_runner(Path(config.out), silent))
    peak = StageReader(reference(refs.model.path).path).manifest["run"]["peak_rss_bytes"]
    assert before / 2 < peak < before + 256 * MIB
