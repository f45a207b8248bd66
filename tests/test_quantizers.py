"""The contract of the quantizer family: every member, present and future, keeps it under each of its mappings."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import clustered_vectors
from safetensors.numpy import load_file, save_file

from semids import kmeans
from semids.arrays import capacity_of
from semids.capacity import Bounds, resolve_bounds
from semids.errors import ShapeError
from semids.progress import silent
from semids.quantizers import residual_kmeans
from semids.quantizers.base import FrozenQuantizer, Quantizer, TrainingData, quantizer_types
from semids.shards import ShardedArray, ShardLayout

SIZES = (12, 9, 8)


class InMemory(ShardedArray):
    """Vectors in memory, as if they had been sharded."""

    def __init__(self, vectors: np.ndarray, folder: Path) -> None:
        np.save(folder / "vectors.npy", vectors)
        super().__init__(ShardLayout(*vectors.shape, str(vectors.dtype)), lambda _: folder / "vectors.npy")


def train(member: type[Quantizer], mapping: Any, array: ShardedArray, rows: np.ndarray, sizes: Any = SIZES) -> Any:
    bounds = resolve_bounds(array.layout.rows, capacity_of(sizes), least="auto", most="auto")
    quantizer = member(sizes, mapping, member.settings_type(), seed=5, bounds=bounds)
    outcomes: dict[str, Any] = {}
    spaces = {"": array}
    evidence = []
    for step in quantizer.training_steps():
        needed = {name: outcomes[name] for name in step.needs}
        outcome = quantizer.run_step(step, TrainingData(spaces[step.space], rows), needed, silent)
        if outcome.encoder is not None:
            folder = array.path(0).parent / f"space-{len(list(array.path(0).parent.iterdir()))}"
            folder.mkdir()
            spaces[step.name] = InMemory(outcome.encoder.apply(array.shard(0)), folder)
        outcomes[step.name] = outcome.tensors
        evidence.append(outcome.evidence)
    return quantizer.assemble(outcomes), evidence, quantizer.given_codes(outcomes)


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Any:
    member, mapping = request.param
    array = InMemory(vectors, tmp_path_factory.mktemp("contract"))
    return member, mapping, array, *train(member, mapping, array, np.arange(len(vectors)))


@pytest.fixture(scope="module")
def frozen(trained: Any) -> FrozenQuantizer:
    return trained[0].freeze(trained[3])


def test_every_level_draws_its_own_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, drawn = residual_kmeans.fit_codebook, [float(np.random.default_rng(5).random())]

    def watched(*given: Any, rng: np.random.Generator, **named: Any) -> kmeans.CodebookFit:
        drawn.append(float(copy.deepcopy(rng).random()))
        return fit(*given, rng=rng, **named)

    monkeypatch.setattr(residual_kmeans, "fit_codebook", watched)
    array = InMemory(clustered_vectors(200, 8), tmp_path)
    train(residual_kmeans.ResidualKMeans, "nearest", array, np.arange(200), sizes=(8, 8, 8))
    # The first is what the sample of the rows is drawn by.
    assert len(drawn) == len(set(drawn)) == 4


def test_more_codewords_than_rows_keep_an_error_as_low_as_without_bounds(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((300, 24)).astype(np.float32)
    array = InMemory(rows, tmp_path)
    errors: dict[str, float] = {}
    for mapping in ("nearest", "capacity"):
        member = residual_kmeans.ResidualKMeans
        tensors, _, _ = train(member, mapping, array, np.arange(len(rows)), sizes=(128, 128, 128))
        frozen = member.freeze(tensors)
        errors[mapping] = float(frozen.squared_errors(rows, frozen.encode(rows))[:, -1].mean())
    # Of rows 24 long, squared: rounding leaves 8e-15 of both. Least squares over 384 codewords left 8 times that.
    assert max(errors.values()) < 3e-14


def test_a_training_sample_is_bounded_in_bytes(
    vectors: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans, "SAMPLE_BYTES", 300 * 24 * 4)
    array = InMemory(vectors, tmp_path)
    _, evidence, _ = train(residual_kmeans.ResidualKMeans, "uniform", array, np.arange(len(vectors)))
    assert [step["rows"] for step in evidence] == 6 * [300]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trained" in metafunc.fixturenames:
        pairs = [(member, mapping) for member in quantizer_types().values() for mapping in member.mappings]
        ids = [f"{member.name}-{mapping}" for member, mapping in pairs]
        metafunc.parametrize("trained", pairs, indirect=True, ids=ids, scope="module")


def test_codes_have_a_column_a_level_within_their_codebooks(frozen: FrozenQuantizer, vectors: np.ndarray) -> None:
    codes = frozen.encode(vectors)
    assert frozen.sizes == SIZES
    assert frozen.dimensions == vectors.shape[1]
    assert codes.shape == (len(vectors), 3)
    assert codes.dtype == np.uint8
    assert (codes < np.array(SIZES)).all()


def test_equal_vectors_get_equal_codes_wherever_they_stand(frozen: FrozenQuantizer, vectors: np.ndarray) -> None:
    order = np.random.default_rng(0).permutation(len(vectors))
    codes = frozen.encode(vectors)
    assert np.array_equal(frozen.encode(vectors[order]), codes[order])
    assert np.array_equal(frozen.encode(np.concatenate([vectors[:50], vectors[:50]]))[50:], codes[:50])


def test_error_falls_with_depth_on_training_rows(frozen: FrozenQuantizer, vectors: np.ndarray) -> None:
    errors = frozen.squared_errors(vectors, frozen.encode(vectors)).mean(axis=0)
    total = ((vectors - vectors.mean(axis=0)) ** 2).sum(axis=1).mean()
    assert (np.diff([total, *errors]) < 0).all()


def test_squared_errors_are_distances_to_what_decode_returns(frozen: FrozenQuantizer, vectors: np.ndarray) -> None:
    codes = frozen.encode(vectors[:300])
    for depth in (1, 2, 3):
        distances = ((vectors[:300] - frozen.decode(codes, depth=depth)) ** 2).sum(axis=1)
        assert np.allclose(frozen.squared_errors(vectors[:300], codes)[:, depth - 1], distances, atol=1e-5)


def test_saving_and_loading_changes_no_code(trained: Any, vectors: np.ndarray, tmp_path: Path) -> None:
    member, _, _, tensors, *_ = trained
    save_file(tensors, tmp_path / "tensors.safetensors")
    loaded = member.freeze(load_file(tmp_path / "tensors.safetensors"))
    assert np.array_equal(loaded.encode(vectors), member.freeze(tensors).encode(vectors))


def test_training_twice_gives_the_same_bytes(trained: Any, vectors: np.ndarray) -> None:
    member, mapping, array, tensors, *_ = trained
    again, _, _ = train(member, mapping, array, np.arange(len(vectors)))
    assert {name: value.tobytes() for name, value in again.items()} == {
        name: value.tobytes() for name, value in tensors.items()
    }


def test_every_step_needs_only_earlier_ones_and_shorter_shapes_share_theirs(trained: Any) -> None:
    member, mapping, *_ = trained
    seen: set[str] = set()
    for step in member(SIZES, mapping, member.settings_type(), seed=1, bounds=Bounds(0, 1)).training_steps():
        assert seen.issuperset(step.needs)
        seen.add(step.name)


def test_vectors_of_another_width_are_refused(frozen: FrozenQuantizer) -> None:
    with pytest.raises(ShapeError, match="expected vectors of shape"):
        frozen.encode(np.ones((3, 7), dtype=np.float32))


def test_uniform_mappings_use_every_codeword_equally_often(trained: Any, vectors: np.ndarray) -> None:
    member, mapping, _, tensors, evidence, _ = trained
    if mapping != "uniform":
        pytest.skip("only a uniform mapping promises equal loads")
    codes = member.freeze(tensors).encode(vectors)
    for level, size in enumerate(SIZES):
        loads = np.bincount(codes[:, level], minlength=size) * size / len(vectors)
        assert loads.min() > 0.9
        assert loads.max() < 1.1
    assert all("converged" in notes for notes in evidence if "epsilon" in notes)


def test_the_mapping_capacity_gives_every_content_an_id_of_its_own(trained: Any, vectors: np.ndarray) -> None:
    member, mapping, _, tensors, _, given = trained
    if mapping != "capacity":
        pytest.skip("only the mapping capacity bounds what an ID has")
    capacity = capacity_of(SIZES)
    loads = np.unique(given, axis=0, return_counts=True)[1]
    assert len(loads) == capacity
    assert loads.max() == 3
    # 2,000 rows and 864 IDs: what later rows get by the rule alone lies nearly as evenly.
    ruled = member.freeze(tensors).encode(vectors)
    loads = np.bincount(ruled[:, 0], minlength=SIZES[0])
    assert loads.max() <= 1.05 * 3 * 72  # seen: 1.01
    assert loads.min() >= 0.95 * 72  # seen: 1.00


def test_shapes_with_a_common_beginning_share_its_steps() -> None:
    member = quantizer_types()["residual_kmeans"]
    for mapping in ("nearest", "uniform"):
        short, long = (
            {step.name: step for step in member(sizes, mapping, member.settings_type(), seed=0).training_steps()}
            for sizes in ((128, 128, 128), (128, 128, 128, 128))
        )
        assert short.items() <= long.items()
        assert len(short) == len(long) * 3 // 4


@pytest.mark.parametrize("distinct", [1, 8])
@pytest.mark.parametrize("mapping", ["nearest", "uniform", "capacity"])
def test_few_distinct_rows_still_train(distinct: int, mapping: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(distinct, 6)).astype(np.float32)[np.arange(100) % distinct]
    member = quantizer_types()["residual_kmeans"]
    tensors, evidence, given = train(member, mapping, InMemory(rows, tmp_path), np.arange(100), (32, 32))
    codes = member.freeze(tensors).encode(rows)
    assert np.isfinite(np.concatenate([value.ravel() for value in tensors.values()])).all()
    # Nothing can balance 8 points over 32 codewords: uniform may merge some, and reports its loads.
    if mapping == "capacity":
        # The rows are not distinct contents here: each is to have an ID of its own, and has.
        assert len(np.unique(given, axis=0)) == 100
    else:
        assert len(np.unique(codes, axis=0)) == distinct or (mapping == "uniform" and evidence[-1]["load_min"] == 0)
    assert evidence[0]["distinct_codewords"] == distinct
