"""Residual codebooks and k-means on a device of PyTorch, against NumPy and FAISS: the same code runs on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import load_file
from small_runs import published

from semids import balance, kmeans, network, residual
from semids.balance import fit_potentials
from semids.cli import main
from semids.device import DeviceCodebooks, DeviceLloyd, DeviceNetwork, accelerator, upload
from semids.kmeans import Lloyd, fit_codebook
from semids.network import Network
from semids.quantizers.rqvae import Rqvae
from semids.residual import PriceTable, ResidualCodebooks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = (16, 12, 20)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have array work done by PyTorch, on CUDA where there is a device."""
    for module in (residual, kmeans, network, balance):
        monkeypatch.setattr(module, "accelerator", lambda: DEVICE)


def make_books(*, priced: bool = False, beam: int = 1, sizes: tuple[int, ...] = SIZES) -> ResidualCodebooks:
    rng = np.random.default_rng(3)
    books = tuple(rng.normal(size=(size, 24)).astype(np.float32) / 2**level for level, size in enumerate(sizes))
    potentials = tuple((0.3 * rng.normal(size=size)).astype(np.float32) for size in sizes)
    prices = ()
    if priced:
        tables = [np.zeros(1, np.int64), np.array([2, 5, 11]), np.array([0, 7, 150])]
        prices = tuple(
            PriceTable(prefixes, 3 * rng.normal(size=(len(prefixes), size)).astype(np.float32))
            for prefixes, size in zip(tables, sizes, strict=True)
        )
    return ResidualCodebooks(books, potentials, prices, beam)


@pytest.mark.parametrize("products", [True, False])
@pytest.mark.parametrize("kind", ["greedy", "priced", "beam"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_codes_costs_and_errors_are_those_of_numpy(
    dtype: type, kind: str, products: bool, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not products:
        monkeypatch.setattr(residual, "PRODUCT_BYTES", 0)
    books = make_books(priced=kind == "priced", beam=5 if kind == "beam" else 1)
    twin = DeviceCodebooks(books, DEVICE)
    rows = vectors.astype(dtype)
    codes = books.assign(rows)
    found = twin.assign(rows)
    different = (codes != found).any(axis=1)
    assert different.sum() <= 2  # near-ties; seen: 0
    assert np.allclose(twin.squared_errors(rows, codes), books.squared_errors(rows, codes), rtol=1e-5, atol=1e-6)
    for level in range(len(SIZES)):
        assert np.allclose(twin.costs(rows, codes, level), books.costs(rows, codes, level), rtol=1e-4, atol=1e-4)


def test_codes_on_a_device_do_not_depend_on_the_rows_of_a_chunk(
    vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = DeviceCodebooks(make_books(), DEVICE).assign(vectors)
    monkeypatch.setattr("semids.device.DEVICE_SCORE_BYTES", 7 * 4 * sum(SIZES))
    assert (DeviceCodebooks(make_books(), DEVICE).assign(vectors) != whole).any(axis=1).sum() <= 2  # seen: 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_rows_become_is_what_numpy_makes_of_them(
    dtype: type, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    weights = tuple(rng.normal(size=shape).astype(np.float32) for shape in ((24, 40), (40, 12), (12, 7)))
    made = Network(weights, tuple(rng.normal(size=len(weight.T)).astype(np.float32) for weight in weights))
    rows = vectors.astype(dtype)
    monkeypatch.setattr(network, "accelerator", lambda: None)
    expected = made.apply(rows)
    monkeypatch.setattr("semids.device.DEVICE_SCORE_BYTES", 8 * 40 * 100)
    found = DeviceNetwork(made.weights, made.biases, DEVICE).apply(rows)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_of_equal_codewords_the_first_is_chosen(vectors: np.ndarray) -> None:
    book = np.repeat(vectors[:4], 3, axis=0).astype(np.float32)
    books = ResidualCodebooks((book,), (np.zeros(12, np.float32),))
    assert set(np.unique(DeviceCodebooks(books, DEVICE).assign(vectors))) <= {0, 3, 6, 9}


def test_a_lloyd_step_moves_codewords_as_the_processor_does(vectors: np.ndarray) -> None:
    rows, start = vectors.astype(np.float32), vectors[:8].astype(np.float32)
    weights = np.random.default_rng(0).integers(1, 9, len(rows)).astype(np.float32)
    for given in (None, weights):
        moved, error = DeviceLloyd(rows, 8, given, DEVICE).step(start)
        expected, expected_error = kmeans._FaissLloyd(rows, 8, given).step(start)
        assert np.allclose(moved, expected, atol=1e-5)
        assert error == pytest.approx(expected_error, rel=1e-5)


def on_cpu(rows: np.ndarray, size: int, weights: np.ndarray | None) -> kmeans.LloydStepper:
    return kmeans._FaissLloyd(rows, size, weights)


def on_a_device(rows: np.ndarray, size: int, weights: np.ndarray | None) -> kmeans.LloydStepper:
    return DeviceLloyd(rows, size, weights, DEVICE)


@pytest.mark.parametrize("stepper_of", [on_cpu, on_a_device])
def test_codewords_without_rows_split_where_there_is_something_to_split(
    stepper_of: Callable[[np.ndarray, int, np.ndarray | None], kmeans.LloydStepper], vectors: np.ndarray
) -> None:
    # The codeword of most weight has rows that are all the same: its half would have none for ever.
    rows = np.concatenate([np.full((3000, vectors.shape[1]), 30), vectors]).astype(np.float32)
    centroids = np.concatenate([rows[:1], vectors[:3], np.full((3, rows.shape[1]), 1e3)]).astype(np.float32)
    stepper = stepper_of(rows, 7, None)
    for _ in range(4):
        centroids, _ = stepper.step(centroids)
    codes = ResidualCodebooks((centroids,), (np.zeros(7, np.float32),)).assign(rows)
    assert np.bincount(codes[:, 0], minlength=7).min() > 0


def test_codewords_that_leave_no_error_stay_where_they_are() -> None:
    rows = np.eye(4, dtype=np.float32)
    centroids = np.concatenate([rows, np.full((2, 4), 9, np.float32)])
    for stepper in (on_cpu(rows, 6, None), on_a_device(rows, 6, None)):
        moved, error = stepper.step(centroids)
        assert np.array_equal(moved, centroids)
        assert error == 0


def test_codebooks_of_a_device_are_as_good_as_faiss_s(vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fit_codebook(vectors, 32, Lloyd(25, 3), rng=np.random.default_rng(1))
    monkeypatch.setattr(kmeans, "accelerator", lambda: DEVICE)
    told: list[int] = []
    found = fit_codebook(vectors, 32, Lloyd(25, 3), rng=np.random.default_rng(1), done=told.append)
    again = fit_codebook(vectors, 32, Lloyd(25, 3), rng=np.random.default_rng(1))
    assert np.array_equal(found.codebook, again.codebook)
    assert found.mean_squared_error <= 1.01 * expected.mean_squared_error  # seen: 1.000
    assert told == list(range(1, 76))


@pytest.mark.parametrize("mapping", ["nearest", "uniform", "capacity"])
def test_a_run_on_a_device_gives_ids_within_the_same_bounds(
    mapping: str, on_device: None, tmp_path: Path, vectors: np.ndarray
) -> None:
    catalogue = tmp_path / "vectors.npy"
    np.save(catalogue, vectors.astype(np.float16))
    arguments = ["tokenize", str(catalogue), "--shape", "8x8x8", "--mapping", mapping, "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    ids = pl.read_parquet(published(tmp_path / "run") / "semantic_ids.parquet").select("c0", "c1", "c2")
    loads = ids.group_by("c0", "c1", "c2").len()["len"]
    if mapping == "capacity":
        assert loads.max() <= -(-len(ids) // 8**3)
    if mapping == "uniform":
        level = ids.group_by("c0").len()["len"]
        assert level.min() >= 0.8 * len(ids) / 8
    assert len(loads) > 100


def test_an_rqvae_encodes_by_a_device_as_it_does_by_the_processor(
    on_device: None, tmp_path: Path, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = tmp_path / "vectors.npy"
    np.save(catalogue, vectors.astype(np.float16))
    settings = {"layers": "[16]", "e_dim": 8, "batch_size": 256, "epochs": 4, "warmup_epochs": 1, "kmeans_iters": 3}
    sets = [part for name, value in settings.items() for part in ("--set", f"options.rqvae.{name}={value}")]
    asked: list[int] = []
    apply = DeviceNetwork.apply
    monkeypatch.setattr(DeviceNetwork, "apply", lambda self, rows: asked.append(len(rows)) or apply(self, rows))
    run = ["tokenize", str(catalogue), "--shape", "8x8x8", "--quantizer", "rqvae", "--out", str(tmp_path / "run")]
    assert main([*run, *sets]) == 0
    assert sum(asked) >= 2 * len(np.unique(vectors.astype(np.float16), axis=0))  # to latent vectors, and back
    (model,) = (tmp_path / "run" / "stages").glob("model-*")
    quantizer = Rqvae.freeze(load_file(model / "tensors.safetensors"))
    codes = quantizer.encode(vectors)
    errors = quantizer.squared_errors(vectors, codes)
    for module in (residual, network):
        monkeypatch.setattr(module, "accelerator", lambda: None)
    by_processor = Rqvae.freeze(load_file(model / "tensors.safetensors"))
    assert (by_processor.encode(vectors) != codes).any(axis=1).sum() <= 2  # near-ties; seen: 0
    assert np.allclose(by_processor.squared_errors(vectors, codes), errors, rtol=1e-4, atol=1e-5)


def test_without_a_driver_the_processor_does_it() -> None:
    if not torch.cuda.is_available():
        assert accelerator() is None


@pytest.mark.parametrize("newton", [True, False])
def test_potentials_are_those_of_the_processor(newton: bool, on_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    costs = rng.gamma(2, size=(3000, 40)).astype(np.float32)
    if not newton:
        monkeypatch.setattr(balance, "NEWTON_CODEWORDS", 0)
    here = fit_potentials(costs, epsilon=0.05, max_iterations=60)
    moved: list[str] = []
    monkeypatch.setattr(balance, "DEVICE_ENTRIES", 0)
    monkeypatch.setattr(balance, "DEVICE_BLOCK_ENTRIES", 40_000)
    monkeypatch.setattr(balance, "upload", lambda rows, device: (moved.append(device.type), upload(rows, device))[1])
    there = fit_potentials(costs, epsilon=0.05, max_iterations=60)
    assert moved == [DEVICE.type]
    assert here.converged
    assert there.converged
    assert np.abs(here.values - there.values).max() < 2e-3 * np.abs(here.values).max()
