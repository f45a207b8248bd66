"""Where k-means starts: spread over the rows, none of them twice, and the same on a device."""

import numpy as np
import pytest
import torch
from conftest import clustered_vectors
from numpy.typing import NDArray

from semids import starts
from semids.device import DeviceLloyd
from semids.kmeans import draw_starts, lloyd_stepper
from semids.starts import HostRows, choose_starts


def start_among(rows: NDArray[np.float32], size: int, *, seed: int = 0) -> NDArray[np.int64]:
    return choose_starts(HostRows(rows, np.ones(len(rows), np.float32)), size, rng=np.random.default_rng(seed))


@pytest.mark.parametrize("seed", range(5))
def test_every_far_away_group_of_rows_gets_a_start(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # One group has two thirds of the rows: of 24 starts drawn evenly, most would be in it.
    groups = np.concatenate([np.zeros(1000, int), np.repeat(np.arange(1, 24), 20)])
    centres = 100 * rng.standard_normal((24, 16), dtype=np.float32)
    rows = centres[groups] + rng.standard_normal((len(groups), 16), dtype=np.float32)
    assert set(groups[start_among(rows, 24, seed=seed)]) == set(range(24))


def test_starts_are_different_rows_and_closer_to_all_than_drawn_ones() -> None:
    rows = clustered_vectors(4000, 24)
    chosen = start_among(rows, 64)
    assert len(set(chosen)) == 64
    drawn = np.random.default_rng(0).choice(len(rows), 64, replace=False)
    errors = [np.square(rows[:, None] - rows[numbers]).sum(axis=2).min(axis=1).mean() for numbers in (chosen, drawn)]
    assert errors[0] < 0.9 * errors[1]  # seen: 0.77 to 0.83


def test_fewer_distinct_rows_than_starts_are_all_chosen() -> None:
    distinct = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    # Small whole numbers, so that equal rows are at a distance of exactly 0.
    rows = np.round(4 * distinct)[np.arange(100) % 5]
    chosen = start_among(rows, 12)
    assert len(chosen) == 12
    assert len(np.unique(rows[chosen], axis=0)) == 5


def test_rows_of_no_weight_are_no_starts() -> None:
    rows = clustered_vectors(500, 8)
    weights = (np.arange(500) % 5 == 0).astype(np.float32)
    chosen = choose_starts(HostRows(rows, weights), 40, rng=np.random.default_rng(0))
    assert not (chosen % 5).any()


def test_a_device_chooses_the_same_starts() -> None:
    rows = clustered_vectors(3000, 24)
    weights = np.random.default_rng(1).integers(1, 4, 3000).astype(np.float32)
    for given in (None, weights):
        device = DeviceLloyd(rows, 48, given, torch.device("cpu"))
        on_device = draw_starts(device, rows, 48, rng=np.random.default_rng(2))
        on_host = draw_starts(lloyd_stepper(rows, 48, given), rows, 48, rng=np.random.default_rng(2))
        assert np.array_equal(on_device, on_host)


def test_long_rows_are_chosen_once() -> None:
    rows = clustered_vectors(4000, 32)
    # Of these, rounding makes the distance to themselves 1e10 and more, if it is not known to be 0.
    rows[::200] *= np.float32(1e9)
    assert len(set(start_among(rows, 128))) == 128


@pytest.mark.parametrize("size", [4, 16, 64])
def test_copies_of_starts_are_no_starts(size: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1040, 16), dtype=np.float32)
    # Two groups of equal rows so far away that nearly all candidates are of them.
    rows[1000:1020], rows[1020:] = np.float32(1000), np.float32(-1000)
    assert len(np.unique(rows[start_among(rows, size)], axis=0)) == size


def test_distances_are_those_of_the_rows_in_any_number_of_parts_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = clustered_vectors(3000, 24)
    host = HostRows(rows, np.ones(3000, np.float32))
    numbers = np.arange(0, 3000, 100)
    monkeypatch.setattr(starts, "SLICE_ROWS", 700)
    found: list[NDArray[np.float32]] = []
    for threads in ("1", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        found.append(host.distances(numbers))
    assert found[0].shape == (30, 3000)
    assert found[0].dtype == np.float32
    assert found[0].tobytes() == found[1].tobytes()
    assert np.allclose(found[0], np.square(rows[numbers, None] - rows).sum(axis=2), atol=1e-4)
    assert (found[0][np.arange(30), numbers] == 0).all()


def test_starts_are_chosen_among_a_bounded_part_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, seen = clustered_vectors(3000, 16), []
    stepper = lloyd_stepper(rows, 8)
    select = stepper.select

    def watched(numbers: NDArray[np.int64]) -> starts.StartRows:
        seen.append(numbers)
        return select(numbers)

    monkeypatch.setattr(stepper, "select", watched)
    chosen = draw_starts(stepper, rows, 8, rng=np.random.default_rng(0))
    assert len(np.unique(seen[0])) == len(seen[0]) == 32 * 8
    assert set(chosen) <= set(seen[0])
    monkeypatch.setattr(starts, "START_BYTES", 100 * 16 * 4)
    for size, among in ((8, 100), (200, 200)):
        draw_starts(stepper, rows, size, rng=np.random.default_rng(0))
        assert len(seen[-1]) == among
