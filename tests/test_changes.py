"""What is made again when something changes: exactly the stages that depend on it."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file
from small_runs import TIMEOUT_S, copy_run, published, tokenize_arguments, write_catalogue

from semids import fingerprints
from semids.cli import main
from semids.embedders.transformer import TransformerEmbedder
from semids.known import write_known

PACKAGE = Path(__file__).parent.parent / "semids"
CODEBOOKS = {"train-codebook-1", "train-codebook-2", "train-codebook-3"}
UNIFORM = {"train-uniform-1", "train-uniform-2", "train-uniform-3"}
BOUNDED = {"train-bounded", "train-placed-1", "train-placed-2", "train-settled", "train-placed-3"}
LAST = {"model", "codes", "ids", "report"}
AFTER_VECTORS = {*CODEBOOKS, *UNIFORM, *LAST}
EVERYTHING = {"items", "vectors", *AFTER_VECTORS}


@dataclass(frozen=True)
class Project:
    """A finished run with all that it was made from, to be changed."""

    folder: Path

    @property
    def catalogue(self) -> Path:
        return self.folder / "catalogue.jsonl"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def arguments(self, **options: Any) -> list[str]:
        return tokenize_arguments(self.catalogue, self.model, self.run, **{"mapping": "uniform"} | options)

    def stages(self) -> dict[str, int]:
        """Return the times of the manifests, by folder."""
        return {path.parent.name: path.stat().st_mtime_ns for path in self.run.glob("stages/*/manifest.json")}

    def made_since(self, before: dict[str, int]) -> set[str]:
        """Return the names of the stages that were made since the times `before`."""
        return {name.rpartition("-")[0] for name, time in self.stages().items() if before.get(name) != time}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("original"))
    write_catalogue(project.catalogue)
    tiny_models.build_bert(project.model)
    assert main(project.arguments()) == 0
    assert project.made_since({}) == EVERYTHING
    return project


@pytest.fixture
def project(original: Project, tmp_path: Path) -> Project:
    """A copy to change."""
    return Project(copy_run(original.folder, tmp_path / "project"))


def change_items(**changes: Any) -> Callable[[Project], None]:
    return lambda project: write_catalogue(project.catalogue, **changes) and None


def reverse_items(project: Project) -> None:
    lines = project.catalogue.read_text().splitlines(keepends=True)
    project.catalogue.write_text("".join(reversed(lines)))


def append_item(**values: Any) -> Callable[[Project], None]:
    def append(project: Project) -> None:
        first = json.loads(project.catalogue.read_text().splitlines()[0])
        with project.catalogue.open("a") as file:
            file.write(json.dumps(first | {"item_id": "appended"} | values) + "\n")

    return append


def change_a_weight(project: Project) -> None:
    tensors = load_file(project.model / "model.safetensors")
    tensors["encoder.layer.0.output.dense.bias"][0] += 0.5
    save_file(tensors, project.model / "model.safetensors", metadata={"format": "pt"})


def respace_the_tokenizer(project: Project) -> None:
    path = project.model / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))


def move_everything(project: Project) -> None:
    # The references below are to where it is now.
    moved = project.folder.rename(project.folder.with_name("moved"))
    project.folder.symlink_to(moved)


def nothing(project: Project) -> None:
    """Change nothing."""


CHANGES: list[tuple[str, Callable[[Project], None], dict[str, Any], list[str], set[str]]] = [
    ("nothing", nothing, {}, [], set()),
    ("seed", nothing, {"seed": 1}, [], AFTER_VECTORS),
    ("size of the last level", nothing, {"shape": "8x6x5"}, [], {"train-codebook-3", "train-uniform-3", *LAST}),
    ("one level more", nothing, {"shape": "8x6x4x3"}, [], {"train-codebook-4", "train-uniform-4", *LAST}),
    ("one level less", nothing, {"shape": "8x6"}, [], LAST),
    ("mapping", nothing, {"mapping": "nearest"}, [], LAST),
    ("mapping capacity", nothing, {"mapping": "capacity"}, [], {*BOUNDED, *LAST}),
    ("bounds of a mapping that has none", nothing, {}, ["max_contents_per_id=9"], set()),
    ("beam of a mapping that searches none", nothing, {}, ["options.residual_kmeans.beam=5"], set()),
    ("beam", nothing, {"mapping": "nearest"}, ["options.residual_kmeans.beam=5"], LAST),
    ("iterations", nothing, {}, ["options.residual_kmeans.iterations=1"], AFTER_VECTORS),
    ("suffix", nothing, {}, ["suffix=true"], {"ids"}),
    ("template", nothing, {"template": "{title} by {brand}"}, [], EVERYTHING),
    ("text column", nothing, {"text_column": "title"}, [], EVERYTHING),
    ("text column, named as found before", nothing, {"text_column": "text"}, [], {"items", "model"}),
    ("training split", nothing, {}, ["catalogue.train_split=test"], {"items", *AFTER_VECTORS}),
    ("one item more", change_items(items=161), {}, [], EVERYTHING),
    ("one item more with a known text", append_item(), {}, [], {"items", "ids", "report"}),
    ("one item more with a text of the other split", append_item(split="test"), {}, [], {"items", "ids", "report"}),
    ("one item more with a test text", append_item(text="new", split="test"), {}, [], EVERYTHING),
    ("a repeated text moved", change_items(changes={7: {"split": "more"}}), {}, [], {"items", "ids", "report"}),
    ("a test text moved", change_items(changes={7: {"split": "train"}}), {}, [], {"items", *AFTER_VECTORS}),
    ("a training text moved", change_items(changes={0: {"split": "test"}}), {}, [], {"items", *AFTER_VECTORS}),
    ("one text", change_items(changes={8: {"text": "another"}}), {}, [], EVERYTHING),
    ("one id", change_items(changes={8: {"item_id": "other"}}), {}, [], {"items", "ids", "report"}),
    ("a column that is not used", change_items(changes={8: {"title": "other"}}), {}, [], {"items"}),
    ("order of items", reverse_items, {}, [], {"items", "ids", "report"}),
    ("quarantine bound", nothing, {}, ["catalogue.max_quarantine_fraction=0.5"], {"items", "model"}),
    ("a weight of the model", change_a_weight, {}, [], {"vectors", *AFTER_VECTORS}),
    ("spacing in the tokenizer", respace_the_tokenizer, {}, [], {"vectors", "model", "report"}),
    ("longest text", nothing, {}, ["embedder.max_tokens=8"], {"vectors", *AFTER_VECTORS}),
    ("pooling", nothing, {}, ["embedder.pooling=last"], {"vectors", *AFTER_VECTORS}),
    ("dimensions", nothing, {}, ["embedder.dimensions=16"], {"vectors", *AFTER_VECTORS}),
    ("pooling, named as declared", nothing, {}, ["embedder.pooling=mean"], set()),
    ("batch size", nothing, {}, ["embedder.batch_tokens=64"], set()),
    ("place", move_everything, {}, [], set()),
]


@pytest.mark.parametrize(
    ("change", "options", "settings", "made"), [row[1:] for row in CHANGES], ids=[row[0] for row in CHANGES]
)
def test_a_change_makes_exactly_what_depends_on_it_again(
    change: Callable[[Project], None],
    options: dict[str, Any],
    settings: list[str],
    made: set[str],
    project: Project,
) -> None:
    """Guard: the fingerprint of `stages.Stage`; a parameter left out of `make_stage` makes a row fail."""
    before = project.stages()
    change(project)
    arguments = project.arguments(**options) + [part for setting in settings for part in ("--set", setting)]
    assert main(arguments) == 0
    assert project.made_since(before) == made
    again = project.stages()
    assert main(arguments) == 0
    assert project.stages() == again


def test_going_back_makes_nothing_again(project: Project) -> None:
    before = project.stages()
    assert main(project.arguments(seed=1)) == 0
    between = project.stages()
    assert main(project.arguments()) == 0
    assert project.stages() == between
    assert before.items() <= between.items()


def test_a_raised_embedder_version_embeds_again(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    before = project.stages()
    monkeypatch.setattr(TransformerEmbedder, "version", TransformerEmbedder.version + 1)
    assert main(project.arguments()) == 0
    # The vectors are the same: what was computed from them stands, but the model says what its vectors are.
    assert project.made_since(before) == {"vectors", "model", "report"}


def add_statement(tree: ast.Module, name: str) -> None:
    """Let the functions of this name begin with a statement that computes something and changes nothing."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    assert found, name
    for function in found:
        function.body.insert(1 if ast.get_docstring(function) else 0, ast.parse("_unused = 1 + 1").body[0])


def set_constant(tree: ast.Module, name: str, value: Any) -> None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            node.value = ast.Constant(value)
            return
    raise AssertionError(name)


def reword(tree: ast.Module) -> None:
    """Change every docstring, comment (none outlives `ast.unparse`), line number and annotation of an argument."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = "Reworded."
        elif isinstance(node, ast.FunctionDef):
            node.returns = ast.Name("object")
        elif isinstance(node, ast.arg) and node.annotation is not None:
            node.annotation = ast.Name("object")


def run_copy(
    project: Project,
    edits: dict[str, Callable[[ast.Module], None]],
    *,
    added: dict[str, str] | None = None,
    **options: Any,
) -> None:
    """Run with a copy of the package whose files were edited, and to which some were added."""
    library = project.folder / "library"
    shutil.rmtree(library, ignore_errors=True)
    shutil.copytree(PACKAGE, library / "semids", ignore=shutil.ignore_patterns("__pycache__"))
    for name, source in (added or {}).items():
        (library / "semids" / name).write_text(source)
    for pattern, edit in edits.items():
        for path in sorted((library / "semids").glob(pattern)):
            tree = ast.parse(path.read_text())
            edit(tree)
            path.write_text(ast.unparse(tree))
    done = subprocess.run(
        [sys.executable, "-m", "semids.cli", *project.arguments(**options)],
        cwd=project.folder,
        env={**os.environ, "PYTHONPATH": str(library)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr


LIBRARY_CHANGES: list[tuple[str, dict[str, Callable[[ast.Module], None]], set[str]]] = [
    ("every docstring, comment and annotation", {"**/*.py": reword}, set()),
    (
        "what no stage depends on",
        {
            "store.py": lambda tree: add_statement(tree, "commit"),
            "stages.py": lambda tree: add_statement(tree, "run_stage"),
            "cli.py": lambda tree: add_statement(tree, "main"),
            "runs.py": lambda tree: add_statement(tree, "build"),
            "embedders/_encoder.py": lambda tree: add_statement(tree, "encode"),
            "reporting.py": lambda tree: add_statement(tree, "report_codes"),
            "semantic_ids.py": lambda tree: add_statement(tree, "read_code_columns"),
        },
        set(),
    ),
    ("metrics", {"metrics.py": lambda tree: add_statement(tree, "uniform_hash_rate")}, {"report"}),
    (
        "a constant of the report",
        {"reporting.py": lambda tree: set_constant(tree, "NEIGHBOUR_QUERIES", 50)},
        {"report"},
    ),
    ("tokens", {"semantic_ids.py": lambda tree: add_statement(tree, "token")}, {"ids"}),
    ("k-means, to the same effect", {"kmeans.py": lambda tree: add_statement(tree, "fit_codebook")}, CODEBOOKS),
    ("balancing, to the same effect", {"balance.py": lambda tree: add_statement(tree, "fit_potentials")}, UNIFORM),
    (
        "balancing, to another effect",
        {"quantizers/_uniform.py": lambda tree: set_constant(tree, "COARSE_ROWS_PER_CODEWORD", (1,))},
        {*UNIFORM, *LAST},
    ),
    (
        "encoding, to the same effect",
        {"residual.py": lambda tree: add_statement(tree, "_encode_chunk")},
        {*CODEBOOKS, *UNIFORM, "codes", "report"},
    ),
    ("reading", {"readers.py": lambda tree: add_statement(tree, "_jsonl_rows")}, {"items"}),
]


@pytest.mark.parametrize(
    ("edits", "made"), [row[1:] for row in LIBRARY_CHANGES], ids=[row[0] for row in LIBRARY_CHANGES]
)
def test_changed_code_makes_exactly_what_runs_it_again(
    edits: dict[str, Callable[[ast.Module], None]], made: set[str], project: Project
) -> None:
    """Guard: `fingerprints.code_digest` among the ingredients of a stage."""
    before = project.stages()
    run_copy(project, edits)
    assert project.made_since(before) == made


CHILD = """
from semids.quantizers.residual_kmeans import ResidualKMeans

class Child(ResidualKMeans):
    name = "child"

    def _fit_codebook(self, *given):
        return super()._fit_codebook(*given)

    @staticmethod
    def unused():
        return 0
"""


def test_a_helper_that_an_inheriting_quantizer_overrides_is_part_of_its_steps(project: Project) -> None:
    """Guard: `fingerprints.method_code`."""
    child = {"quantizers/child.py": CHILD}
    run_copy(project, {}, added=child, quantizer="child")
    before = project.stages()
    run_copy(project, {}, added=child, quantizer="child")
    assert project.stages() == before
    edit = {"quantizers/child.py": lambda tree: add_statement(tree, "_fit_codebook")}
    run_copy(project, edit, added=child, quantizer="child")
    # The report names the class only to decode; what was trained to the same effect leaves the same model behind it.
    assert project.made_since(before) == {*CODEBOOKS, "model", "codes", "report"}


def give_value(value: int) -> Callable[[ast.Module], None]:
    """Let the class have a value that its way of fitting a codebook reads."""

    def edit(tree: ast.Module) -> None:
        (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ResidualKMeans"]
        found.body.insert(0, ast.parse(f"spare = {value}").body[0])
        for function in (node for node in found.body if isinstance(node, ast.FunctionDef)):
            if function.name == "_fit_codebook":
                function.body.insert(0, ast.parse("_unused = self.spare").body[0])

    return edit


def test_a_value_of_a_class_is_part_of_the_steps_that_read_it(project: Project) -> None:
    """Guard: `values` in `fingerprints._definition`."""
    run_copy(project, {"quantizers/residual_kmeans.py": give_value(1)})
    before = project.stages()
    run_copy(project, {"quantizers/residual_kmeans.py": give_value(2)})
    assert project.made_since(before) == CODEBOOKS


def test_new_items_are_encoded_by_a_model_trained_on_adopted_vectors(project: Project) -> None:
    (vectors,) = project.run.glob("stages/vectors-*")
    adopted = [str(project.folder / "adopted") if part == str(project.run) else part for part in project.arguments()]
    common = [part for part in adopted[1:] if part not in ("--shape", "8x6x4", "--mapping", "uniform")]
    assert main(["adopt", str(vectors), *common, "--reason", "test"]) == 0
    assert main(adopted) == 0
    (model,) = (project.folder / "adopted" / "results").glob("*/*/model")
    assert main(["encode", str(model), str(project.catalogue), "--out", str(project.folder / "encoded")]) == 0
    ids = [published(project.folder / name) / "tokens.json" for name in ("adopted", "encoded")]
    assert ids[0].read_bytes() == ids[1].read_bytes()
    assert np.array_equal(
        *(
            np.load(next(folder.glob("*-00000.npy")))
            for folder in (vectors, next((project.folder / "adopted").glob("stages/vectors-*")))
        )
    )


def test_a_parser_that_another_thread_disturbed_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guard: the tries of `fingerprints._parse`. CPython 3.11 spoils three of a thousand parses beside others."""
    parse, failures = ast.parse, iter(range(3))

    def parse_sometimes(text: str) -> ast.Module:
        if next(failures, None) is not None:
            raise SystemError("AST constructor recursion depth mismatch (before=54, after=71)")
        return parse(text)

    expected = fingerprints.code_digest(write_known)
    monkeypatch.setattr(fingerprints.ast, "parse", parse_sometimes)
    fingerprints._source.cache_clear()
    assert fingerprints.code_digest(write_known) == expected
