"""Threads give what one thread gives, in order, and hand on the first failure."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_info, threadpool_limits

from semids import residual
from semids.balance import fit_potentials
from semids.capacity import Bounds
from semids.kmeans import Lloyd, fit_codebook
from semids.parallel import in_order, single_threaded_products, thread_count
from semids.pipeline import make_stage
from semids.prefixes import assign_within_bounds
from semids.residual import ResidualCodebooks
from semids.stages import StageOutput, run_stage


def blas_threads() -> set[int]:
    libraries = (library for library in threadpool_info() if library["user_api"] == "blas")
    return {library["num_threads"] for library in libraries if "faiss" not in Path(library["filepath"]).parent.name}


def test_results_come_in_order_whoever_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    turns = [threading.Event() for _ in range(4)]

    def work(item: int) -> int:
        # The first item ends when the last of the first four has.
        if item < 3:
            turns[item + 1].wait(10)
        if item < 4:
            turns[item].set()
        return item * item

    assert list(in_order(work, range(40))) == [item * item for item in range(40)]


def test_the_first_failure_in_order_is_raised_and_work_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item in (3, 4):
            raise ValueError(f"item {item}")
        return item

    with pytest.raises(ValueError, match="item 3"):
        list(in_order(work, range(1000)))
    assert len(begun) < 20


def test_what_runs_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    begun: list[int] = []
    results = in_order(begun.append, range(100))
    next(results)
    time.sleep(0.05)
    assert len(begun) <= 5
    results.close()  # type: ignore[attr-defined]


def test_libraries_keep_to_one_thread_within_and_get_theirs_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = blas_threads()

    def work(item: int) -> tuple[set[int], list[set[int]]]:
        return blas_threads(), list(in_order(lambda _: blas_threads(), range(3)))

    for own, nested in in_order(work, range(6)):
        assert own == {1}
        assert nested == [{1}] * 3
    assert blas_threads() == before


def test_items_are_asked_for_a_few_ahead_of_their_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    asked: list[int] = []

    def items() -> Iterator[int]:
        for item in range(100):
            asked.append(item)
            yield item

    results = in_order(lambda item: -item, items())
    assert next(results) == 0
    assert len(asked) <= 5
    assert list(results) == [-item for item in range(1, 100)]


def test_what_other_threads_do_changes_no_product_of_a_stage(tmp_path: Path) -> None:
    """Guard: `single_threaded_products` around the building of a stage; cells of a sweep are threads of a process."""
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(4096, 1024)).astype(np.float32)
    columns = generator.normal(size=(1024, 34)).astype(np.float32)
    products: list[NDArray[np.float32]] = []
    threads: list[set[int]] = []

    def multiply() -> None:
        products.append(rows @ columns)
        threads.append(blas_threads())

    def build(output: StageOutput) -> dict[str, Any]:
        multiply()
        begun, over = threading.Event(), threading.Event()

        def work(_: int) -> None:
            begun.set()
            over.wait(60)

        other = threading.Thread(target=lambda: list(in_order(work, range(2))))
        other.start()
        assert begun.wait(60)
        multiply()
        over.set()
        other.join()
        multiply()
        return {}

    stage = make_stage("products", "Multiply", partial(build), inputs={}, parameters={}, code={})
    with threadpool_limits(2, user_api="blas"):
        run_stage(tmp_path, stage)
        assert blas_threads() == {2}
    assert threads == [{1}] * 3
    assert len({product.tobytes() for product in products}) == 1


def test_products_keep_to_one_thread_whichever_thread_set_limits_before() -> None:
    """Guard: `_take_control`."""
    found: list[set[int]] = []

    def work() -> None:
        with single_threaded_products():
            found.append(blas_threads())
        found.append(blas_threads())

    with threadpool_limits(2, user_api="blas"):
        other = threading.Thread(target=work)
        other.start()
        other.join()
    assert found == [{1}, {2}]


def test_pytorch_keeps_to_one_thread_in_workers_and_to_its_own_in_threads_that_begin_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    torch.set_num_threads(own := 3)
    found: list[int] = []

    def work(item: int) -> int:
        if item == 0:
            other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
            other.start()
            other.join()
        return torch.get_num_threads()

    try:
        assert list(in_order(work, range(4))) == [1] * 4
        assert found == [own]
        assert torch.get_num_threads() == own
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", ["", "0", "nonsense"])
def test_threads_are_the_processors_where_nothing_usable_is_asked_for(
    threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert thread_count() >= 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert thread_count() == 3


def encoded(vectors: NDArray[np.float32], quantizer: ResidualCodebooks) -> list[NDArray[np.generic]]:
    codes = quantizer.encode(vectors)
    return [codes, quantizer.squared_errors(vectors, codes), quantizer.residuals(vectors)]


def placed(vectors: NDArray[np.float32], quantizer: ResidualCodebooks) -> list[NDArray[np.generic]]:
    found = assign_within_bounds(
        lambda rows: vectors[rows], quantizer.codebooks, Bounds(0, 1), rows=len(vectors), contents=len(vectors)
    )
    return [found.codes, *(table.values for table in found.prices)]


def balanced(vectors: NDArray[np.float32], quantizer: ResidualCodebooks) -> list[NDArray[np.generic]]:
    costs = quantizer.costs(vectors, quantizer.encode(vectors), 0)
    return [fit_potentials(costs, epsilon=0.5, max_iterations=40).values]


def clustered(vectors: NDArray[np.float32], quantizer: ResidualCodebooks) -> list[NDArray[np.generic]]:
    weights = np.random.default_rng(1).integers(1, 9, len(vectors)).astype(np.float32)
    fit = fit_codebook(vectors, 16, Lloyd(5, 2), rng=np.random.default_rng(2), weights=weights)
    return [fit.codebook, np.array(fit.mean_squared_error)]


@pytest.mark.parametrize("work", [encoded, placed, balanced, clustered])
def test_bytes_do_not_depend_on_the_number_of_threads(
    work: Callable[..., list[NDArray[np.generic]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residual, "PART_ROWS", 512)
    monkeypatch.setattr("semids.balance.BLOCK_ENTRIES", 1 << 12)
    monkeypatch.setattr("semids.blocks.READ_ROWS", 300)
    monkeypatch.setattr("semids.capacity.CHUNK_ROWS", 200)
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(3000, 24)).astype(np.float32)
    books = tuple(generator.normal(size=(16, 24)).astype(np.float32) for _ in range(3))
    quantizer = ResidualCodebooks(books, tuple(np.zeros(16, np.float32) for _ in books))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone = work(vectors, quantizer)
    for threads in ("2", "5"):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        for one, other in zip(alone, work(vectors, quantizer), strict=True):
            assert np.array_equal(one, other)
