"""Checkpoints: which are refused, and where they are looked for."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub.constants
import pytest
import tiny_models
import torch
from embedding import TEXTS, identity, loaded, rewrite_weights
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError

from semids.embedders._encoder import check_encoder
from semids.embedders.transformer import (
    PRESETS,
    TransformerEmbedder,
    TransformerSettings,
)
from semids.errors import DataError, UsageError

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
