"""The same input gives the same bytes; other batches, shards and threads change nothing but near-ties."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from small_runs import TIMEOUT_S, published, stage_folders, tokenize_arguments, use_small_shards, write_catalogue

from semids import pipeline, shards
from semids.cli import main
from semids.config import BuildConfig, make_config
from semids.embedders.transformer import TransformerEmbedder
from semids.encoding import encode_vectors, read_codes
from semids.pipeline import make_vectors, read_quantizer
from semids.quantizers.base import FrozenQuantizer
from semids.stages import StageReader, make_shards, reference, run_stage
from semids.store import read_sealed_json

SHARD_ROWS = 32
NEAR_TIE = 1e-5
"""Squared distances of unit vectors closer than this may fall either way: float32 keeps 6e-8 of 1, and a squared
distance is a difference of sums of d terms."""
MOST_NEAR_TIES = 2
"""Of 140 texts; none was seen."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    shard_sizes(monkeypatch, SHARD_ROWS)


def shard_sizes(patch: pytest.MonkeyPatch, rows: int) -> None:
    for owner, name in ((pipeline, "ShardLayout"), (shards, "SHARD_ROWS")):
        patch.setattr(owner, name, getattr(owner, name))
    use_small_shards(rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run under the nearest mapping, `run`, of its catalogue and of its model."""
    folder = tmp_path_factory.mktemp("made")
    tiny_models.build_bert(folder / "model")
    write_catalogue(folder / "catalogue.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        shard_sizes(patch, SHARD_ROWS)
        assert main(tokenize_arguments(folder / "catalogue.jsonl", folder / "model", folder / "run")) == 0
    return folder


def stage(run: Path, name: str) -> Path:
    (found,) = (path for folder, path in stage_folders(run).items() if folder.startswith(f"{name}-"))
    return found


def read_vectors(run: Path) -> np.ndarray:
    array = StageReader(stage(run, "vectors")).array("vectors")
    return array.take(np.arange(array.layout.rows)).astype(np.float32)


def count_near_ties(quantizer: FrozenQuantizer, vectors: np.ndarray, codes: np.ndarray, others: np.ndarray) -> int:
    """Return how many rows have other codes, once all of them are known to be ties within rounding."""
    different = np.flatnonzero((codes != others).any(axis=1))
    levels = (codes[different] != others[different]).argmax(axis=1)
    errors = [quantizer.squared_errors(vectors, each)[different, levels] for each in (codes, others)]
    assert (np.abs(errors[0] - errors[1]) < NEAR_TIE).all()
    return len(different)


@pytest.mark.parametrize("mapping", ["nearest", "uniform", "capacity"])
def test_the_same_seed_gives_the_same_bytes(mapping: str, made: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        arguments = tokenize_arguments(
            made / "catalogue.jsonl", made / "model", tmp_path / name, mapping=mapping, seed=5
        )
        assert main([*arguments, "--suffix"]) == 0
    one, two = tmp_path / "one", tmp_path / "two"
    assert stage_folders(one).keys() == stage_folders(two).keys()
    compared = 0
    for folder in stage_folders(one):
        for path in (one / "stages" / folder).iterdir():
            # Reports and manifests tell how long things took.
            if path.suffix not in (".md",) and path.name not in ("manifest.json", "report.json"):
                assert path.read_bytes() == (two / "stages" / folder / path.name).read_bytes(), path
                compared += 1
    assert compared > 25
    digests = [
        {
            name: read_sealed_json(path / "manifest.json")["digest"]
            for name, path in stage_folders(run).items()
            if not name.startswith("report-")
        }
        for run in (one, two)
    ]
    assert digests[0] == digests[1]


def test_another_seed_gives_other_codebooks(made: Path, tmp_path: Path) -> None:
    assert main(tokenize_arguments(made / "catalogue.jsonl", made / "model", tmp_path / "run", seed=1)) == 0
    models = [published(run) / "model" / "tensors.safetensors" for run in (made / "run", tmp_path / "run")]
    assert models[0].read_bytes() != models[1].read_bytes()


@pytest.mark.parametrize("rows", [1, 37, 4096])
def test_other_batches_change_vectors_by_less_than_1e_5(rows: int, made: Path) -> None:
    texts = [f"a red shoe, size {number}, " * (number % 7 + 1) for number in range(60)]
    settings = TransformerEmbedder.settings_type
    whole, parts = (
        TransformerEmbedder(settings(model=str(made / "model"), batch_tokens=tokens)) for tokens in (16_384, 16 * rows)
    )
    whole.load()
    parts.load()
    in_parts = np.concatenate([parts.embed(texts[start : start + rows]) for start in range(0, len(texts), rows)])
    assert np.abs(whole.embed(texts) - in_parts).max() < 1e-5  # 9e-8 seen


@pytest.mark.parametrize("rows", [1, 37, 4096])
def test_other_batches_change_no_code_but_near_ties(rows: int, made: Path) -> None:
    model = reference(stage(made / "run", "model"))
    quantizer, vectors = read_quantizer(model), read_vectors(made / "run")
    starts = range(0, len(vectors), rows)
    in_parts = np.concatenate([quantizer.encode(vectors[start : start + rows]) for start in starts])
    assert count_near_ties(quantizer, vectors, quantizer.encode(vectors), in_parts) <= MOST_NEAR_TIES


@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_other_shards_change_no_code_but_near_ties(
    rows: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard_sizes(monkeypatch, rows)
    model = stage(made / "run", "model")
    command = ["encode", str(model), str(made / "catalogue.jsonl"), "--out", str(tmp_path / "run")]
    assert main(command) == 0
    codes, _ = read_codes(reference(stage(made / "run", "codes")))
    others, _ = read_codes(reference(stage(tmp_path / "run", "codes")))
    assert len(list(stage(tmp_path / "run", "codes").glob("codes-*.npy"))) == -(-len(codes) // rows)
    vectors = read_vectors(made / "run")
    # float16 keeps 11 bits: two vectors within 1e-5 may be rounded to neighbours.
    assert np.abs(vectors - read_vectors(tmp_path / "run")).max() <= 2**-11
    assert count_near_ties(read_quantizer(reference(model)), vectors, codes, others) <= MOST_NEAR_TIES


WITH_THREADS = """
import sys
import numpy as np
import torch
from semids.embedders.transformer import TransformerEmbedder
from semids.pipeline import read_quantizer
from semids.stages import reference
checkpoint, model, vectors, out, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
embedder = TransformerEmbedder(TransformerEmbedder.settings_type(model=checkpoint))
embedder.load()
embedded = embedder.embed([f"a red shoe, size {number}, " * (number % 7 + 1) for number in range(200)])
codes = read_quantizer(reference(model)).encode(np.tile(np.load(vectors), (20, 1)))
np.savez(out, embedded=embedded, codes=codes)
"""


def test_other_numbers_of_threads_change_no_code_but_near_ties(made: Path, tmp_path: Path) -> None:
    vectors, model = read_vectors(made / "run"), stage(made / "run", "model")
    np.save(tmp_path / "vectors.npy", vectors)
    for threads in ("1", "2", "4"):
        places = (made / "model", model, tmp_path / "vectors.npy", tmp_path / f"{threads}.npz")
        done = subprocess.run(
            [sys.executable, "-c", WITH_THREADS, *map(str, places), threads],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr
    results = {threads: np.load(tmp_path / f"{threads}.npz", allow_pickle=False) for threads in "124"}
    tiled = np.tile(vectors, (20, 1))
    quantizer = read_quantizer(reference(model))
    for threads in "24":
        assert np.abs(results[threads]["embedded"] - results["1"]["embedded"]).max() < 1e-5  # 0 seen
        ties = count_near_ties(quantizer, tiled, results[threads]["codes"], results["1"]["codes"])
        assert ties <= 20 * MOST_NEAR_TIES


@pytest.mark.parametrize("made_stage", ["vectors", "codes"])
def test_shards_made_in_lots_are_those_that_one_process_makes(made_stage: str, made: Path, tmp_path: Path) -> None:
    run = made / "run"
    items, vectors, model = (reference(stage(run, name)) for name in ("items", "vectors", "model"))
    config = make_config(BuildConfig, StageReader(model.path).manifest["run"]["config"], source="the run")
    spread = make_vectors(config, items) if made_stage == "vectors" else encode_vectors(items, vectors, model)
    for lot in (1, 2, 0):
        make_shards(tmp_path, spread, lot=lot, lots=3)
    (folder,) = (tmp_path / "stages").glob(f"{made_stage}-*")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len([path for path in before if path.suffix == ".npy"]) == {"vectors": 5, "codes": 10}[made_stage]
    assert run_stage(tmp_path, spread).digest == reference(stage(run, made_stage)).digest
    assert {path: path.stat().st_mtime_ns for path in before} == before
