"""Fixtures that every test may use."""

from __future__ import annotations

import os
import shutil

# One thread a worker: two cores are shared by the test workers, and results must not depend on their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray
from servers import make_database, make_server
from small_catalogues import scanner
from small_runs import WarmParent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with what runs in one worker, one after the other, and mostly waits: the rest fills the gaps."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real catalogues and published IDs."""
    folder = os.environ.get("SEMIDS_REAL_DATA")
    if not folder:
        pytest.skip("SEMIDS_REAL_DATA does not name the folder of real catalogues")
    return Path(folder)


def clustered_vectors(rows: int, dimensions: int, *, seed: int = 0, clusters: int = 24) -> NDArray[np.float32]:
    """Return unit vectors around centres of Zipf-distributed popularity, as embeddings of products lie."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, clusters + 1)
    centres = rng.normal(size=(clusters, dimensions))
    vectors = centres[rng.choice(clusters, rows, p=weights / weights.sum())] + 0.6 * rng.normal(size=(rows, dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="session")
def vectors() -> NDArray[np.float32]:
    """(2000, 24) unit vectors in clusters of unequal size."""
    return clustered_vectors(2000, 24)


@pytest.fixture(scope="session")
def warm_parent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmParent]:
    """A process whose children start in no time; its tests share a test worker, since it takes seconds to start."""
    parent = WarmParent(tmp_path_factory.mktemp("warm"))
    yield parent
    parent.close()


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where there is room: a killed process loses nothing that was written, flushed or not."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 1 << 30:
        yield tmp_path
        return
    with TemporaryDirectory(dir=memory, prefix="semids-") as folder:
        yield Path(folder)


@pytest.fixture
def scan(tmp_path: Path) -> Callable[..., Any]:
    """Scan a catalogue in a fresh stage folder; see `small_catalogues.scanner`."""
    return scanner(tmp_path)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every tiny checkpoint by name; read only: a test that changes one copies it with `changed`."""
    import tiny_models  # PyTorch, which takes seconds and most tests do not need.

    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "qwen3": str(tiny_models.build_qwen3(folder / "qwen3")),
        "gemma3": str(tiny_models.build_gemma3(folder / "gemma3")),
        "gemma3-mean": str(tiny_models.build_gemma3(folder / "gemma3-mean", pooling="mean")),
        "gemma3-last": str(tiny_models.build_gemma3(folder / "gemma3-last", pooling="lasttoken")),
        "bert": str(tiny_models.build_bert(folder / "bert")),
        "minilm": tiny_models.MINILM,
    }


@pytest.fixture
def changed(checkpoints: dict[str, str], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies a checkpoint, for a test to spoil."""
    return lambda name: Path(shutil.copytree(checkpoints[name], tmp_path / name))


@pytest.fixture(scope="session")
def prefect_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of a Prefect server that did nothing, for others to begin with; test workers share it."""
    own = tmp_path_factory.getbasetemp()
    path = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "prepared.db"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make_database(path, tmp_path_factory.mktemp("prepared"))
    return path


@pytest.fixture(scope="module")
def prefect_storage(tmp_path_factory: pytest.TempPathFactory, prefect_database: Path) -> Iterator[Path]:
    """A Prefect server for the module, and the folder in which flows keep Prefect's results."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, PREFECT_LOCAL_STORAGE_PATH, temporary_settings

    server = make_server(tmp_path_factory.mktemp("server"), database=prefect_database)
    folder = tmp_path_factory.mktemp("results")
    api = server.environment["PREFECT_API_URL"]
    with server.running(), temporary_settings({PREFECT_API_URL: api, PREFECT_LOCAL_STORAGE_PATH: folder}):
        yield folder
        APILogWorker.drain_all()
        EventsWorker.drain_all()


@pytest.fixture
def catalogue(tmp_path: Path) -> dict[str, str]:
    """The catalogue of a configuration: 400 vectors in a file."""
    np.save(tmp_path / "vectors.npy", clustered_vectors(400, 16))
    return {"path": str(tmp_path / "vectors.npy")}
