"""What runs tell of where they stand: steps over vectors, by residual k-means, and reading texts, rise to their end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from small_catalogues import compress, many_rows, write_parquet

from semids import readers, runs
from semids.config import BuildConfig

STEPS = {
    "nearest": {
        "read catalogue",
        "find equal vectors",
        "vectors",
        *(f"Fit codebook {level} (8 codewords)" for level in (1, 2)),
        "codes",
        "write semantic_ids.parquet",
        "write tokens.json",
        "measure distortion",
    },
    "uniform": {"Balance level 1 (8 codewords)", "Balance level 2 (8 codewords)"},
    "capacity": {
        "Fit the codebooks within bounds",
        "Fit the last codebook to whole prefixes",
        "Place every content on level 1",
        "Place every content on level 2",
    },
}


@pytest.mark.parametrize("mapping", STEPS)
def test_every_step_of_a_run_rises_to_its_end(catalogue: dict[str, str], tmp_path: Path, mapping: str) -> None:
    heard: dict[str, list[tuple[int, int]]] = {}

    def hear(step: str, done: int, total: int, unit: str) -> None:
        heard.setdefault(step, []).append((done, total))

    values = {"catalogue": catalogue, "shape": "8x8", "mapping": mapping, "out": str(tmp_path / "run")}
    config = BuildConfig.model_validate(values)
    runs.build(config, runs.local_runner(Path(config.out), hear))
    assert STEPS[mapping] <= heard.keys()
    for calls in heard.values():
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)
        assert calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz", ".csv", ".csv.zst"])
def test_reading_texts_rises_to_its_end(
    scan: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Over two files, of which the second is larger than what is read ahead."""
    monkeypatch.setattr(readers, "BATCH_BYTES", 1 << 20)
    rows = [row | {"brand": f"{number * 7919 % 1_000_003} " * 20} for number, row in enumerate(many_rows(60_000))]
    sizes = []
    for name, part in (("a", rows[:300]), ("b", rows[300:])):
        path = tmp_path / "files" / f"{name}{suffix}"
        path.parent.mkdir(exist_ok=True)
        if suffix == ".parquet":
            write_parquet(path, part)
        else:
            plain = pl.DataFrame(part)
            data = plain.write_csv() if ".csv" in suffix else plain.write_ndjson()
            path.write_bytes(compress(data.encode(), path.suffix))
        sizes.append(path.stat().st_size)
    heard: dict[str, list[tuple[int, int, str]]] = {}
    scan(path.parent, progress=lambda step, done, total, unit: heard.setdefault(step, []).append((done, total, unit)))
    assert set(heard) == {"read catalogue", "find equal texts"}
    for calls in heard.values():
        assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert heard["find equal texts"][-1] == (60_000, 60_000, "items")
    read = [done for done, _, _ in heard["read catalogue"]]
    assert heard["read catalogue"][-1] == (sum(sizes), sum(sizes), "bytes")
    assert sum(0.1 < done / sum(sizes) < 0.9 for done in read) >= 5
