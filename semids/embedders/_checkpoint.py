"""Where a transformer's checkpoint lies, what decides its vectors, and what it declares; without loading it."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from semids.errors import DataError, UsageError
from semids.store import digest_file

PACKAGE_PREFIX = "package:"
# What is fetched from a hub: no pickle, no code, no copies of the weights for other runtimes in subfolders.
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "1_Pooling/*")
HUB_SKIPS = ("*/*.safetensors", "onnx/*", "openvino/*")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
)
PICKLED_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# The steps of a sentence-transformers checkpoint that a TransformerEmbedder carries out.
KNOWN_STEPS = ("Transformer", "Pooling", "Normalize")
# The older spelling of 1_Pooling/config.json, one flag a mode, against the newer one.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds a model in safetensors; see `open_checkpoint`.

    Args:
        weights: names of the files that hold the weights, and of the index that lists them if there is one.
        config: the content of config.json.
    """

    folder: Path
    weights: tuple[str, ...]
    config: dict[str, Any]

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each file that decides the vectors, by its name within the folder. Read once.

        What a file only declares (pooling, longest input) is left to the settings that are resolved from it.
        """
        tokenizer = [name for name in TOKENIZER_FILES if (self.folder / name).is_file()]
        names = ["config.json", *self.weights, *tokenizer]
        return {name: digest_file(self.folder / name) for name in sorted(names)}

    @property
    def stored_dtype(self) -> str | None:
        """The type of the weights, as config.json names it; None where it names none."""
        config = self.config.get("text_config") or self.config
        return config.get("dtype") or config.get("torch_dtype")

    @property
    def declared_poolings(self) -> tuple[str, ...]:
        """The pooling modes that 1_Pooling/config.json names, in its own words; empty where it is absent."""
        declared = self._read("1_Pooling/config.json")
        mode = declared.get("pooling_mode", [name for flag, name in POOLING_FLAGS.items() if declared.get(flag)])
        return (mode,) if isinstance(mode, str) else tuple(mode)

    @property
    def declared_max_tokens(self) -> int | None:
        """The longest input, in tokens, that sentence_bert_config.json names; None where it names none."""
        return self._read("sentence_bert_config.json").get("max_seq_length")

    @property
    def longest_input(self) -> int | None:
        """The tokens that the positions and the tokenizer have room for; None where neither is bounded."""
        config = self.config.get("text_config") or self.config
        # RoBERTa counts two positions it cannot use; there the tokenizer's own limit is the true one.
        limits = (config.get("max_position_embeddings"), self._read("tokenizer_config.json").get("model_max_length"))
        return min((int(limit) for limit in limits if limit is not None and limit > 0), default=None)

    @property
    def hidden_size(self) -> int | None:
        """Width of the model's vectors, as config.json names it; None where it names none."""
        return self._width("hidden_size", "dim", "d_model", "n_embd")

    @property
    def intermediate_size(self) -> int | None:
        """Width of the states within a layer, as config.json names it; None where it names none."""
        return self._width("intermediate_size", "hidden_dim", "d_ff", "n_inner")

    def _width(self, *names: str) -> int | None:
        config = self.config.get("text_config") or self.config
        return next((config[name] for name in names if config.get(name)), None)

    @property
    def weight_bytes(self) -> int:
        """Size of the files of weights."""
        return sum((self.folder / name).stat().st_size for name in self.weights)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_json(path) if path.is_file() else {}


def open_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in a folder, once it is known that all of it can be used and none of it is pickled.

    Raises:
        DataError: no config.json or no safetensors weights; or it asks for something that would be left out
            in silence (an adapter, a projection after the pooling, lower-casing before the tokenizer).
        StorageError: a file cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise DataError(f"expected a checkpoint in {folder}, got no config.json there; point `model` at its folder")
    config = read_json(folder / "config.json")
    weights = _find_weights(folder)
    missing = [name for name in weights if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}, which its index lists; fetch the checkpoint again")
    # With an adapter beside it, transformers may load another base model than the weights digested here.
    if (folder / "adapter_config.json").is_file():
        raise DataError(f"{folder} holds an adapter; merge it into its base model and save that as safetensors")
    if "transformers_weights" in config:
        raise DataError(f"{folder / 'config.json'} renames the weights (transformers_weights); remove that entry")
    modules = folder / "modules.json"
    for module in read_json(modules) if modules.is_file() else []:
        step = str(module["type"]).rpartition(".")[2]
        if step not in KNOWN_STEPS:
            raise DataError(
                f"{modules}: expected only the steps {', '.join(KNOWN_STEPS)}, got {step}, which is not applied "
                "here, so the vectors would not be this model's; choose another model"
            )
    bert = folder / "sentence_bert_config.json"
    if bert.is_file() and read_json(bert).get("do_lower_case"):
        raise DataError(f"{bert} asks for lower-casing, which is not applied here; put it into the tokenizer instead")
    return Checkpoint(folder, weights, config)


def _find_weights(folder: Path) -> tuple[str, ...]:
    # The order in which transformers looks.
    if (folder / "model.safetensors").is_file():
        return ("model.safetensors",)
    index = "model.safetensors.index.json"
    if (folder / index).is_file():
        return (index, *sorted(set(read_json(folder / index)["weight_map"].values())))
    pickled = sorted(path.name for pattern in PICKLED_WEIGHTS for path in folder.glob(pattern))
    if pickled:
        raise DataError(
            f"expected model.safetensors in {folder}, got only pickled weights ({', '.join(pickled)}): loading them "
            "can run any code, so they are never opened; convert them to safetensors where you trust them"
        )
    raise DataError(f"expected model.safetensors in {folder}, got no weights there; fetch the checkpoint again")


def read_json(path: Path) -> Any:
    """Return the content of a checkpoint's JSON file.

    Raises:
        DataError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected JSON, got {error}; fetch the checkpoint again") from error


def locate_model(model: str, revision: str | None) -> Path:
    """Return the folder that `model` names, fetching it only if it is a hub id that is not cached.

    Args:
        model: a folder, a hub id such as `Qwen/Qwen3-Embedding-0.6B`, or `package:name/folder` for a folder
            inside an installed Python package, none of whose code is run.
        revision: the commit of a hub id, 40 hexadecimal digits; None for the other two.

    Raises:
        UsageError: there is no such folder, package or repository, its revision is not pinned, access was
            not granted, or it is not cached and no connection is allowed.
    """
    is_package, is_folder = model.startswith(PACKAGE_PREFIX), _is_folder(model)
    if revision is not None and (is_package or is_folder):
        raise UsageError(f"expected no revision for {model}, got {revision!r}: only a hub id has one; remove it")
    if is_package:
        return _locate_in_package(model)
    if is_folder:
        return Path(model).expanduser()
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise UsageError(
            f"expected a folder, a hub id such as Qwen/Qwen3-Embedding-0.6B or package:name/folder, got {model!r}: "
            "there is no such folder"
        )
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UsageError(
            f"expected a pinned revision for {model} (a commit, 40 hexadecimal digits: a branch moves, and the "
            f"vectors with it), got {revision!r}; set `revision`, or point `model` at an existing folder"
        )
    return _fetch_snapshot(model, revision)


def _is_folder(name: str) -> bool:
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, RuntimeError):
        # Too long a name, or the home of a user who does not exist.
        return False


def _locate_in_package(model: str) -> Path:
    package, *inside = PurePosixPath(model.removeprefix(PACKAGE_PREFIX)).parts or ("",)
    # A dotted name would import its parents, and importing is running code.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            f"expected an installed package, got {package!r} (from {model!r}); install it, for example with "
            "`pip install 'semids[minilm]'`, or choose another model"
        )
    for location in spec.submodule_search_locations:
        folder = Path(location, *inside)
        if folder.is_dir():
            return folder
    raise UsageError(f"the package {package} holds no folder {'/'.join(inside)!r} (from {model!r})")


def _fetch_snapshot(model: str, revision: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def snapshot(*, local_files_only: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                allow_patterns=list(HUB_FILES),
                ignore_patterns=list(HUB_SKIPS),
                local_files_only=local_files_only,
            )
        )

    # A cached snapshot needs no connection, not even to ask whether it is current: a commit never changes.
    try:
        cached = snapshot(local_files_only=True)
        open_checkpoint(cached)
    except (LocalEntryNotFoundError, DataError):
        pass
    else:
        return cached
    try:
        return snapshot(local_files_only=False)
    except GatedRepoError as error:
        raise UsageError(
            f"{model} is gated: accept its terms at https://huggingface.co/{model} and log in with `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UsageError(f"the hub has no {model} at revision {revision}, or hides it from this account") from error
    except LocalEntryNotFoundError as error:
        raise UsageError(
            f"{model} at revision {revision} is not cached and the hub cannot be reached; fetch it where there is a "
            f"connection (`hf download {model} --revision {revision}`), or point `model` at a folder that holds it"
        ) from error
