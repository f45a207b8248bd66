"""A loaded transformer: texts to tokens, tokens to unit vectors, and the probe that it does what it promises."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from semids.embedders._checkpoint import Checkpoint
from semids.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch

Pooling = Literal["mean", "last"]
TokenIds = NDArray[np.int32]
"""(tokens,) int32 vocabulary indices of one text, with what the tokenizer adds before and after."""

TEXTS_AT_ONCE = 4096
"""Texts handed to the tokenizer together: bounds its lists of Python integers, which take 36 bytes a token."""
PROBES = (
    "Red leather shoes",
    "A stainless steel water bottle that keeps drinks cold for a day, with two lids, in seven colours",
    "42",
)
# Largest difference of a component between a text embedded alone and in a batch; bfloat16 keeps 8 bits.
AGREEMENT = {"float32": 1e-5, "bfloat16": 2e-2}
NORM_TOLERANCE = 1e-3
# These decoders were never shown a terminal token after a text: only `<bos>` stands before it.
WITHOUT_TERMINAL_TOKEN = ("gemma3", "gemma3_text")
# No pooling here reads these layers, so a checkpoint may leave them out.
UNREAD_LAYERS = "pooler."


@dataclass(frozen=True)
class Encoder:
    """A tokenizer and a model in memory, in evaluation mode.

    Args:
        width: d, the components of a vector that are kept.
        pooling: `mean` over all of a text's tokens, the added ones included, or its `last` token.
    """

    tokenizer: Any
    model: Any
    device: torch.device
    width: int
    pooling: Pooling
    max_tokens: int

    def tokenize(self, texts: Sequence[str]) -> list[TokenIds]:
        """Return the token ids of each text, cut to max_tokens before the tokenizer adds its special tokens."""
        tokens: list[TokenIds] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            encoded = self.tokenizer(
                list(texts[start : start + TEXTS_AT_ONCE]),
                truncation=True,
                max_length=self.max_tokens,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )
            tokens += [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]
        return tokens

    def encode(self, tokens: Sequence[TokenIds]) -> NDArray[np.float32]:
        """Return (n, d) float32 unit vectors of n texts in one pass of the model.

        A row is not of unit norm where the model gave zeros or numbers that are not finite; see `unusable_rows`.

        Raises:
            UsageError: the batch does not fit the device's memory.
        """
        import torch

        lengths = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))
        mask = np.arange(lengths.max()) < lengths[:, None]
        # On the right: a causal model never sees it, and positions count from the first token everywhere.
        ids = np.full(mask.shape, self.tokenizer.pad_token_id or 0, dtype=np.int64)
        ids[mask] = np.concatenate(tokens)
        try:
            with torch.inference_mode():
                attended = torch.from_numpy(mask).to(self.device)
                output = self.model(input_ids=torch.from_numpy(ids).to(self.device), attention_mask=attended.long())
                pooled = self._pool(output.last_hidden_state, attended)[:, : self.width]
                vectors = pooled / torch.linalg.vector_norm(pooled, dim=1, keepdim=True)
                return vectors.cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"a batch of {mask.shape[0]} texts of up to {mask.shape[1]} tokens does not fit the memory of "
                f"{self.device}; halve batch_tokens: the vectors stay the same"
            ) from error

    def _pool(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Reduce (n, tokens, width) states to (n, width) float32 by an (n, tokens) mask padded on the right."""
        if self.pooling == "last":
            last = attended.sum(dim=1) - 1
            return hidden.take_along_dim(last[:, None, None], dim=1).squeeze(1).float()
        weights = attended.unsqueeze(2).float()
        return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)


def load_encoder(
    checkpoint: Checkpoint, *, pooling: Pooling, max_tokens: int, dtype: str, dimensions: int | None
) -> Encoder:
    """Return the checkpoint's tokenizer and model, on a CUDA device if there is one, probed.

    Args:
        max_tokens: longer texts are cut to it.
        dtype: `float32` or `bfloat16`.
        dimensions: components to keep; None keeps all.

    Raises:
        UsageError: the model has fewer than `dimensions` components.
        DataError: see `check_encoder`; or transformers cannot load the files, or finds weights missing.
    """
    # Said aloud, because the tokenizer otherwise turns itself off, with a warning, in every forked child.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import torch
    import transformers
    from safetensors import SafetensorError

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet_transformers():
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(checkpoint.folder, **options)
            model, loading = transformers.AutoModel.from_pretrained(
                checkpoint.folder,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(f"transformers cannot load {checkpoint.folder}: {error}") from error
    # transformers fills what is missing with random numbers, and only warns.
    missing = sorted(name for name in loading["missing_keys"] if not name.startswith(UNREAD_LAYERS))
    if missing or loading["mismatched_keys"]:
        raise DataError(
            f"{checkpoint.folder} lacks {len(missing)} weights of its architecture and has "
            f"{len(loading['mismatched_keys'])} of another shape, first {missing[:3]}; fetch the checkpoint again"
        )
    width = int(model.config.get_text_config().hidden_size)
    if dimensions is not None and dimensions > width:
        raise UsageError(f"expected dimensions of at most {width} for {checkpoint.folder}, got {dimensions}")
    model.config.use_cache = False
    encoder = Encoder(tokenizer, model.eval().to(device), device, dimensions or width, pooling, max_tokens)
    check_encoder(encoder, checkpoint.folder, tolerance=AGREEMENT[dtype])
    return encoder


def check_encoder(encoder: Encoder, folder: Any, *, tolerance: float) -> None:
    """Embed a few short texts, alone and together, and compare with what the pooling promises.

    Args:
        tolerance: largest difference of a component that the rounding of another batch may cause.

    Raises:
        DataError: a vector is zero or not finite; it depends on its batch; or, with last-token pooling, the
            tokenizer does not end each text, cut ones too, with a terminal token.
    """
    if encoder.pooling == "last":
        _check_terminal_token(encoder, folder)
    tokens = encoder.tokenize(PROBES)
    together = encoder.encode(tokens)
    if unusable_rows(together).size:
        raise DataError(
            f"{folder}: expected finite vectors of the probe texts, got zeros, NaN or infinities: its weights are "
            "damaged or overflow this dtype; fetch it again, or set dtype to float32"
        )
    alone = np.concatenate([encoder.encode([ids]) for ids in tokens])
    difference = float(np.abs(together - alone).max())
    if not difference <= tolerance:
        raise DataError(
            f"{folder}: expected a text's vector not to depend on its batch (within {tolerance:g}), got a "
            f"difference of {difference:.2g}: the model attends to padding; it cannot be used here"
        )


def _check_terminal_token(encoder: Encoder, folder: Any) -> None:
    tokenizer, config = encoder.tokenizer, encoder.model.config.get_text_config()
    ends: Any = config.eos_token_id
    ids = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.sep_token_id]
    ids += ends if isinstance(ends, list) else [ends]
    terminal = sorted({int(token) for token in ids if token is not None})
    short, long = (int(ids[-1]) for ids in encoder.tokenize([PROBES[0], f"{PROBES[0]} " * encoder.max_tokens]))
    if short not in terminal and config.model_type in WITHOUT_TERMINAL_TOKEN:
        return
    arrived = short if short not in terminal else long
    if arrived not in terminal:
        expected = " or ".join(map(str, tokenizer.convert_ids_to_tokens(terminal))) or "a terminal token"
        raise DataError(
            f"{folder}: expected its tokenizer to end {'a text' if arrived == short else 'a text cut to max_tokens'} "
            f"with {expected}, where last-token pooling reads, got {tokenizer.convert_ids_to_tokens(arrived)!r}; "
            "restore the template (post_processor) in tokenizer.json, or set pooling to mean"
        )


def unusable_rows(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the indices of rows that are not of unit norm: the model gave zeros, NaN or infinities."""
    norms = np.linalg.norm(vectors, axis=1)
    return np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))


@contextlib.contextmanager
def _quiet_transformers() -> Generator[None]:
    """Silence the bars and the table of unread weights that loading draws; errors still raise."""
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
