"""Residual codebooks against FAISS and against brute force; codebooks of degenerate data."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semids import residual
from semids.errors import CodesError, ShapeError
from semids.kmeans import Lloyd, _FaissLloyd, distinct_rows, draw_starts, fit_codebook, lloyd_stepper, sample_rows
from semids.residual import PriceTable, ResidualCodebooks


def make_codebooks(sizes: tuple[int, ...], dimensions: int, *, seed: int = 0, spread: float = 0.0) -> ResidualCodebooks:
    rng = np.random.default_rng(seed)
    books = tuple(rng.normal(size=(size, dimensions)).astype(np.float32) / 2**level for level, size in enumerate(sizes))
    potentials = tuple((spread * rng.normal(size=size)).astype(np.float32) for size in sizes)
    return ResidualCodebooks(books, potentials)


def codes_by_brute_force(vectors: np.ndarray, books: ResidualCodebooks) -> np.ndarray:
    left = vectors.astype(np.float64)
    codes = []
    for codebook, potential in zip(books.codebooks, books.potentials, strict=True):
        costs = ((left[:, None] - codebook[None].astype(np.float64)) ** 2).sum(axis=2) - potential
        codes.append(costs.argmin(axis=1))
        left = left - codebook[codes[-1]]
    return np.column_stack(codes)


@pytest.mark.parametrize("product_bytes", [residual.PRODUCT_BYTES, 0])
@pytest.mark.parametrize("spread", [0.0, 0.5])
@pytest.mark.parametrize("sizes", [(16, 16, 16), (3, 50, 7), (300, 2), (40,)])
def test_codes_equal_those_of_brute_force(
    sizes: tuple[int, ...], spread: float, product_bytes: int, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residual, "PRODUCT_BYTES", product_bytes)
    books = make_codebooks(sizes, 24, spread=spread)
    assert np.array_equal(books.encode(vectors[:400]), codes_by_brute_force(vectors[:400], books))


def test_codes_equal_faiss_at_beam_one(vectors: np.ndarray) -> None:
    books = make_codebooks((16, 16, 16), 24)
    quantizer = faiss.ResidualQuantizer(24, 3, 4)
    quantizer.max_beam_size = 1
    faiss.copy_array_to_vector(np.concatenate(books.codebooks).ravel(), quantizer.codebooks)
    quantizer.is_trained = True
    packed = quantizer.compute_codes(vectors)
    bits = np.unpackbits(packed, axis=1, bitorder="little")[:, :12].reshape(-1, 3, 4)
    assert np.array_equal(books.encode(vectors), bits @ np.array([1, 2, 4, 8], dtype=np.uint8))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 600))
def test_permuting_or_splitting_rows_permutes_their_codes(rows: int) -> None:
    rng = np.random.default_rng(rows)
    vectors = rng.normal(size=(rows, 8)).astype(np.float32)
    books = make_codebooks((16, 16), 8)
    codes = books.encode(vectors)
    order = rng.permutation(rows)
    assert np.array_equal(books.encode(vectors[order]), codes[order])
    parts = [books.encode(part) for part in np.array_split(vectors, min(rows, 5))]
    assert np.array_equal(np.concatenate(parts), codes)


@pytest.mark.parametrize("batch", [1, 37, 4096])
def test_batch_size_changes_only_near_ties(batch: int, vectors: np.ndarray) -> None:
    books = make_codebooks((64, 64), 24)
    whole = books.encode(vectors)
    batched = np.concatenate([books.encode(vectors[i : i + batch]) for i in range(0, len(vectors), batch)])
    different = np.flatnonzero((whole != batched).any(axis=1))
    errors = books.squared_errors(vectors[different], whole[different])
    other = books.squared_errors(vectors[different], batched[different])
    assert np.allclose(errors, other, atol=1e-5)
    assert len(different) <= 2  # seen: 0


def test_decoding_sums_codewords_and_errors_are_distances_to_it(vectors: np.ndarray) -> None:
    books = make_codebooks((8, 9, 10), 24)
    codes = books.encode(vectors)
    expected = sum(book[codes[:, level]].astype(np.float64) for level, book in enumerate(books.codebooks))
    assert np.allclose(books.decode(codes), expected, atol=1e-6)
    for depth in (1, 2, 3):
        distances = ((vectors - books.decode(codes, depth=depth)) ** 2).sum(axis=1)
        assert np.allclose(books.squared_errors(vectors, codes)[:, depth - 1], distances, atol=1e-5)


def test_rows_are_read_in_whatever_order_memory_has_them() -> None:
    quantizer = make_codebooks((8, 8), 6)
    rows = np.random.default_rng(1).normal(size=(50, 6)).astype(np.float16)
    for view in (rows[::-1], rows[:, ::-1], np.asfortranarray(rows), rows[::2]):
        assert np.array_equal(quantizer.encode(view), quantizer.encode(np.ascontiguousarray(view)))


def test_codebooks_of_unequal_width_and_misfit_potentials_are_refused() -> None:
    a, b = np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)
    with pytest.raises(ShapeError, match="expected codebooks of one width"):
        ResidualCodebooks((a, b), (np.zeros(4, np.float32),) * 2)
    with pytest.raises(ShapeError, match="expected one potential for each of"):
        ResidualCodebooks((a, a), (np.zeros(4, np.float32),))
    priced = PriceTable(np.array([0]), np.ones((1, 4), np.float32))
    with pytest.raises(ShapeError, match="expected no prices where codes are searched along 5 paths"):
        ResidualCodebooks((a,), (np.zeros(4, np.float32),), (priced,), beam=5)
    with pytest.raises(ShapeError, match="the quantizer was trained on another embedder"):
        ResidualCodebooks((a,), (np.zeros(4, np.float32),)).encode(np.ones((2, 5), np.float32))
    with pytest.raises(CodesError, match="expected codes from 0 to 3"):
        ResidualCodebooks((a,), (np.zeros(4, np.float32),)).decode(np.array([[4]], dtype=np.uint8))


@pytest.mark.parametrize("distinct", [1, 8, 32])
def test_fewer_distinct_rows_than_codewords_become_the_codebook(distinct: int) -> None:
    rows = np.random.default_rng(0).normal(size=(distinct, 4)).astype(np.float32)
    fit = fit_codebook(rows[np.arange(500) % distinct], 32, Lloyd(5, 1), rng=np.random.default_rng(0))
    assert fit.distinct_codewords == distinct
    assert fit.mean_squared_error == 0
    assert fit.codebook.shape == (32, 4)
    assert distinct_rows(fit.codebook, at_most=32).shape == (distinct, 4)


@pytest.mark.parametrize("weighted", [False, True])
def test_steps_are_those_of_faiss_and_every_step_is_told(vectors: np.ndarray, weighted: bool) -> None:
    given = np.random.default_rng(4).integers(1, 9, len(vectors)).astype(np.float32) if weighted else None
    told: list[int] = []
    fit = fit_codebook(vectors, 48, Lloyd(7, 3), rng=np.random.default_rng(11), weights=given, done=told.append)
    assert told == list(range(1, 22))
    rng, stepper = np.random.default_rng(11), lloyd_stepper(vectors, 48, given)
    runs: list[tuple[float, np.ndarray]] = []
    for _ in range(3):
        starts = draw_starts(stepper, vectors, 48, rng=rng)
        kmeans = faiss.Kmeans(24, 48, niter=7, max_points_per_centroid=2000, min_points_per_centroid=1)
        objective = kmeans.train(vectors, weights=given, init_centroids=vectors[starts])
        runs.append((objective / len(vectors), kmeans.centroids))
    error, centroids = min(runs, key=lambda run: run[0])
    # FAISS sums rows in float32, in the order of its threads: 2e-7 was seen.
    assert np.allclose(fit.codebook, centroids, atol=1e-5)
    assert fit.mean_squared_error == pytest.approx(error, rel=1e-5)


def test_a_step_gives_the_same_bytes_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    codewords = rng.normal(size=(128, 64)).astype(np.float32)
    # Rows half-way between two codewords: the last bit of a product decides, and FAISS's own steps may differ.
    pairs = rng.integers(128, size=(20_000, 2))
    weights = rng.integers(1, 9, len(pairs)).astype(np.float32)
    stepper, found = _FaissLloyd(codewords[pairs].mean(axis=1), 128, weights), []
    before = faiss.omp_get_max_threads()
    try:
        for asked, of_faiss in (("1", 1), ("1", 2), ("3", 1)):
            monkeypatch.setenv("OMP_NUM_THREADS", asked)
            faiss.omp_set_num_threads(of_faiss)
            moved, error = stepper.step(codewords)
            assert faiss.omp_get_max_threads() == of_faiss
            found.append((moved.tobytes(), error))
    finally:
        faiss.omp_set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20])
def test_rows_that_have_no_finite_length_are_refused(bad: float) -> None:
    rows = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    rows[7, 2] = bad
    with pytest.raises(ShapeError, match="squared lengths are finite, got 1 of 500 that are not"):
        fit_codebook(rows, 8, Lloyd(2, 1), rng=np.random.default_rng(0))


def test_more_restarts_never_fit_worse(vectors: np.ndarray) -> None:
    errors = [fit_codebook(vectors, 32, Lloyd(10, n), rng=np.random.default_rng(3)).mean_squared_error for n in (1, 4)]
    assert errors[1] <= errors[0] + 1e-6


def test_a_sample_is_drawn_by_seed_without_repetition() -> None:
    first, again, other = (sample_rows(10_000, 500, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert len(np.unique(first)) == 500
    assert np.array_equal(sample_rows(7, 100, seed=0), np.arange(7))


@pytest.mark.parametrize("product_bytes", [residual.PRODUCT_BYTES, 0])
@pytest.mark.parametrize("beam", [2, 5, 40])
def test_codes_equal_faiss_at_wider_beams(
    beam: int, product_bytes: int, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residual, "PRODUCT_BYTES", product_bytes)
    greedy = make_codebooks((16, 16, 16), 24)
    books = ResidualCodebooks(greedy.codebooks, greedy.potentials, (), beam)
    quantizer = faiss.ResidualQuantizer(24, 3, 4)
    quantizer.max_beam_size = beam
    faiss.copy_array_to_vector(np.concatenate(books.codebooks).ravel(), quantizer.codebooks)
    quantizer.is_trained = True
    bits = np.unpackbits(quantizer.compute_codes(vectors), axis=1, bitorder="little")[:, :12].reshape(-1, 3, 4)
    codes = books.encode(vectors)
    assert np.array_equal(codes, bits @ np.array([1, 2, 4, 8], dtype=np.uint8))
    errors, before = (some.squared_errors(vectors, some.encode(vectors))[:, -1] for some in (books, greedy))
    assert errors.mean() < 0.98 * before.mean()  # seen: 0.967 at beam 2


def test_a_beam_over_all_paths_finds_the_best_code(vectors: np.ndarray) -> None:
    greedy = make_codebooks((5, 4, 3), 24)
    books = ResidualCodebooks(greedy.codebooks, greedy.potentials, (), 60)
    everything = np.stack(np.unravel_index(np.arange(60), (5, 4, 3)), axis=1).astype(np.uint8)
    distances = ((vectors[:200, None] - books.decode(everything)[None]) ** 2).sum(axis=2)
    assert np.array_equal(books.encode(vectors[:200]), everything[distances.argmin(axis=1)])
