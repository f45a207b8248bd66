"""Predictions of a CUDA device's memory, held against what PyTorch allocates for the same work on the CPU."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from allocations import peak_allocated
from test_rqvae_training import Array, silently

from semids.config import BuildConfig
from semids.counts import suppose_vectors
from semids.embedders.transformer import TransformerEmbedder, TransformerSettings
from semids.errors import UsageError
from semids.memory import PeakMemory, device_free_bytes
from semids.metrics import measure_ids
from semids.page import render_markdown
from semids.plan import Finished, Plan, plan_run
from semids.quantizers import _rqvae_decoder, _rqvae_evaluation, _rqvae_layers, _rqvae_train
from semids.quantizers._rqvae_decoder import DecoderJob, fit_decoder
from semids.quantizers._rqvae_memory import decoder_device_bytes, training_device_bytes
from semids.quantizers._rqvae_rows import read_ahead
from semids.quantizers._rqvae_train import Job, train
from semids.quantizers.base import TrainingData
from semids.quantizers.rqvae import RqvaeSettings
from semids.report import Report, SplitFigures
from semids.reporting import compare_stage
from semids.residual import ResidualCodebooks
from semids.work import DEVICE_BYTES, Work

SHORT: dict[str, Any] = {"epochs": 3, "warmup_epochs": 1, "eval_step": 1, "kmeans_iters": 2}
# By what takes the most: rows, dimensions, codebooks, settings.
CASES: dict[str, tuple[int, int, tuple[int, ...], dict[str, Any]]] = {
    "the batch": (4000, 512, (64, 64), {"layers": (256, 128), "e_dim": 32, "batch_size": 2048}),
    "balancing": (3000, 64, (512, 256), {"layers": (64,), "e_dim": 16, "batch_size": 2048, "sk_epsilons": (0.1, 0.1)}),
    "distances": (3000, 64, (1024, 256), {"layers": (64,), "e_dim": 16, "batch_size": 2048}),
    "weights": (1000, 512, (64, 64), {"layers": (1024, 512), "e_dim": 64, "batch_size": 64}),
    "measuring": (9000, 256, (64, 64), {"layers": (32,), "e_dim": 8, "batch_size": 1024}),
    "starting": (9000, 16, (256,), {"layers": (16,), "e_dim": 256, "batch_size": 1024}),
    "layers": (3000, 256, (64, 64), {"layers": (512, 512), "e_dim": 64, "batch_size": 512, "optimizer": "SGD"}),
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute on the CPU, whose allocations are counted, in the precision of a CUDA device and with copies of rows."""
    for module in (_rqvae_train, _rqvae_decoder, _rqvae_evaluation):
        monkeypatch.setattr(module, "read_ahead", lambda *given: (rows.clone() for rows in read_ahead(*given)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(_rqvae_layers, "MIXED_ON", frozenset({"cpu"}))


@pytest.mark.parametrize("case", CASES)
def test_training_allocates_what_is_predicted(case: str, tmp_path: Path) -> None:
    rows, dimensions, sizes, options = CASES[case]
    vectors = np.random.default_rng(0).normal(size=(rows, dimensions)).astype(np.float16)
    array, settings = Array(vectors, tmp_path), RqvaeSettings(**SHORT | options)
    job = Job(sizes, settings, 0, array, np.arange(rows), None)
    taken = peak_allocated(lambda: train(job, silently))
    predicted = training_device_bytes(sizes, settings, array.layout) - DEVICE_BYTES
    assert taken / 1.3 < predicted < 1.3 * taken  # seen: 1.01 to 1.20


@pytest.mark.parametrize("case", [case for case in CASES if case != "starting"])
def test_fitting_the_decoder_allocates_what_is_predicted(case: str, tmp_path: Path) -> None:
    rows, dimensions, sizes, options = CASES[case]
    vectors = np.random.default_rng(0).normal(size=(rows, dimensions)).astype(np.float16)
    settings = RqvaeSettings(**SHORT | options)
    widths = (settings.e_dim, *settings.layers[::-1], dimensions)
    network = {"mean": np.zeros(dimensions, np.float32), "scale": np.ones((), np.float32)}
    for layer, shape in enumerate(itertools.pairwise(widths), start=1):
        network |= {
            f"decoder_weight_{layer}": np.ones(shape, np.float32),
            f"decoder_bias_{layer}": np.ones(shape[1], np.float32),
        }
    books = tuple(np.ones((size, settings.e_dim), np.float32) for size in sizes)
    codebooks = ResidualCodebooks(books, tuple(np.zeros(size, np.float32) for size in sizes))
    codes = np.zeros((rows, len(sizes)), np.uint16)
    data = TrainingData(Array(vectors, tmp_path), np.arange(rows))
    job = DecoderJob(network, codebooks, codes, data, settings, 0)
    taken = peak_allocated(lambda: fit_decoder(job, lambda taken, steps: None))
    predicted = decoder_device_bytes(settings, data.vectors.layout) - DEVICE_BYTES
    assert taken / 1.3 < predicted < 1.3 * taken  # seen: 1.03 to 1.14


@pytest.mark.parametrize("build", [tiny_models.build_bert, tiny_models.build_qwen3, tiny_models.build_gemma3])
def test_embedding_allocates_what_is_predicted(build: Any, tmp_path: Path) -> None:
    embedder = TransformerEmbedder(TransformerSettings(model=str(build(tmp_path / "model", pooling="mean"))))
    embedder.load()
    weights = sum(value.nbytes for value in embedder._loaded.model.parameters())
    texts = ["red leather shoe of the best kind for the winter"] * 1024
    taken = weights + peak_allocated(lambda: embedder.embed(texts))
    predicted = embedder.device_bytes - DEVICE_BYTES
    assert taken / 1.3 < predicted < 1.3 * taken  # seen: 1.00 to 1.18


def plan_of(tmp_path: Path, **values: Any) -> Plan:
    given = {"catalogue": {"path": "vectors.npy"}, "shape": "256x256x256", "out": str(tmp_path / "run")}
    config = BuildConfig.model_validate(given | values)
    return plan_run(config, suppose_vectors(1_000_000, 1024), None, Finished())


def test_a_run_without_memory_of_the_device_is_refused_with_the_figure(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, quantizer="rqvae", options={"rqvae": {"batch_size": 65_536}})
    (training,) = [stage for stage in plan.stages if stage.title == "Train the RQ-VAE"]
    assert plan.total.device_memory == training.device_memory > 1 << 30
    plan = replace(plan, available=None, free=1 << 60)
    plan.check()
    small = replace(plan, device=round(training.device_memory / 1.3))
    with pytest.raises(
        UsageError, match=r"'Train the RQ-VAE' needs \d\.\d\d GiB of \d\.\d\d GiB free there; take smaller"
    ):
        small.check()
    # As for the machine's memory: what is a tenth short is left to the run.
    near = replace(plan, device=round(training.device_memory / 1.1))
    near.check()
    assert re.search(r"may fit: needs .*, [\d.]+ GiB GPU memory of [\d.]+ GiB free, ", near.verdict())


def test_a_plan_names_the_memory_of_a_device_where_there_is_one(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, quantizer="rqvae", mapping="capacity")
    assert "GPU" not in plan.describe() + plan.verdict()
    with_device = replace(plan, device=80 << 30).describe().splitlines()
    assert re.search("time +memory +GPU memory +disk", with_device[2])
    (training,) = [line for line in with_device if line.startswith("Train the RQ-VAE")]
    (vectors,) = [line for line in with_device if line.startswith("Import the vectors")]
    assert (training.count("iB"), vectors.count("iB")) == (3, 2)
    assert plan_of(tmp_path).total.device_memory == 0


def test_rows_are_counted_where_they_fit_beside_what_is_needed() -> None:
    work = Work(device_memory=3, device_rows=50) + Work(device_memory=4)
    assert [work.device_bytes(free) for free in (None, 54, 55)] == [4, 4, 54]


def test_what_a_device_gave_is_shown_beside_what_was_predicted() -> None:
    planned = {"title": "Train the RQ-VAE", "seconds": 1.0, "memory": 1, "disk": 1, "device_memory": 3 << 30}
    run = {"seconds": 1.0, "peak_rss_bytes": 1}
    without = compare_stage(planned, {"run": run, "files": {}})
    assert "peak_device_bytes" not in without
    found = compare_stage(planned, {"run": run | {"peak_device_bytes": 2 << 30}, "files": {}})
    ids = measure_ids([np.array([[0, 1]])], None, sizes=(2, 2))
    report = Report("cell", SplitFigures(ids), planned=(without | {"stage": "Import"}, found))
    page = render_markdown(Report.from_json(report.to_json()), str)
    assert "| predicted disk | wrote | predicted GPU memory | peak GPU memory |" in page
    assert "| 3.00 GiB | 2.00 GiB |" in page
    assert "GPU" not in render_markdown(replace(report, planned=(without,)), str)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_nothing_is_recorded() -> None:
    with PeakMemory() as peak:
        torch.zeros(8).sum()
    assert peak.device_bytes is None
    assert device_free_bytes() is None
