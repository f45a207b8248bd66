"""What a run over vectors, by residual k-means, tells of where it stands: every step rises to its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from semids import runs
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
