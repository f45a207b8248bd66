"""The walls: who may import whom, what an import costs, and that a new family member is one file."""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from semids import fingerprints, reporting

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "semids": {"semids"},
    "tasks": {"semids", "tasks", "prefect"},
    "flows": {"tasks", "flows", "prefect"},
    "deployments": {"tasks", "flows", "deployments", "prefect"},
}
OURS = {*MAY_IMPORT, "prefect"}


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names & OURS


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_downwards(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        beyond = imported_packages(path) - MAY_IMPORT[package]
        assert not beyond, f"{path.relative_to(ROOT)} imports {beyond}"


def test_a_flow_body_fits_on_a_screen() -> None:
    for path in (ROOT / "flows").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, node.name


def run_python(code: str, root: Path = ROOT) -> str:
    # Python looks into its working folder first, so the packages there are the ones that are imported.
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_semids_imports_without_prefect_faiss_or_torch() -> None:
    """The machine with the accelerator has neither Prefect nor FAISS; torch costs seconds that a cached run saves."""
    code = """
import sys
for name in ("prefect", "faiss", "torch", "transformers", "sentence_transformers"):
    sys.modules[name] = None
import semids.cli, semids.runs, semids.embedders.transformer, semids.quantizers.residual_kmeans
print("fine")
"""
    assert run_python(code) == "fine\n"


def test_missing_faiss_is_named_when_it_is_needed() -> None:
    code = """
import sys; sys.modules["faiss"] = None
import numpy as np
from semids.errors import UsageError
from semids.kmeans import Lloyd, fit_codebook
try: fit_codebook(np.random.default_rng(0).normal(size=(99, 4)), 4, Lloyd(2, 1), rng=np.random.default_rng(0))
except UsageError as error: print(error)
"""
    assert "install semids[cpu] or semids[gpu], never both" in run_python(code)


THROWAWAY = '''
"""A quantizer that someone added as one file."""
from typing import ClassVar
from semids.quantizers.residual_kmeans import ResidualKMeans, ResidualKMeansSettings

class HastySettings(ResidualKMeansSettings):
    """Settings of the throwaway member."""
    patience: int = 3

class Hasty(ResidualKMeans):
    """Residual k-means under another name."""
    name: ClassVar[str] = "hasty"
    settings_type: ClassVar = HastySettings
'''


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with one file more."""
    root = tmp_path_factory.mktemp("extended")
    ignored = shutil.ignore_patterns("__pycache__")
    for package in (*MAY_IMPORT, "tests"):
        shutil.copytree(ROOT / package, root / package, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "semids" / "quantizers" / "hasty.py").write_text(THROWAWAY)
    return root


@pytest.mark.slow
def test_a_new_quantizer_file_appears_in_the_run_form(extended: Path) -> None:
    code = """
import json
from flows.sweep import sweep
print(json.dumps(sweep.parameters.model_dump()))
"""
    schema = json.loads(run_python(code, extended).splitlines()[-1])
    definitions = schema["definitions"]
    offered = definitions["SweepConfig"]["properties"]["quantizers"]["items"]["enum"]
    assert offered == ["hasty", "residual_kmeans", "rqvae"]
    assert "patience" in definitions["HastySettings"]["properties"]
    assert "hasty" in definitions["QuantizerOptions"]["properties"]


@pytest.mark.slow
def test_a_new_quantizer_file_comes_under_the_contract_tests(extended: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_quantizers.py", "-k", "hasty", "-vv", "-p", "no:cacheprovider"],
        cwd=extended,
        env={**os.environ, "PYTHONPATH": str(extended)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    for mapping in ("nearest", "uniform"):
        assert f"test_equal_vectors_get_equal_codes_wherever_they_stand[hasty-{mapping}] PASSED" in done.stdout


def test_no_two_threads_parse_code_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guard: the lock in `code_digest`; without it a cell of a sweep once ended in SystemError (see the lock)."""
    parsing, most = 0, 0
    parse = ast.parse

    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal parsing, most
        parsing += 1
        most = max(most, parsing)
        time.sleep(0.002)  # lets the other threads in, if nothing keeps them out
        parsing -= 1
        return parse(*arguments, **options)

    fingerprints._source.cache_clear()
    fingerprints._definition.cache_clear()
    monkeypatch.setattr(fingerprints.ast, "parse", watched)
    with ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(lambda _: str(fingerprints.code_digest(reporting._write_report)), range(8)))
    assert most == 1
    assert len(set(digests)) == 1
