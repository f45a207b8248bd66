"""The stages after the model: vectors to codes, codes to IDs."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from semids.arrays import Codes, code_dtype, format_shape
from semids.config import QUANTIZERS, CommonConfig
from semids.contents import read_digests
from semids.fingerprints import code_digest, method_code
from semids.known import KNOWN, KnownCodes
from semids.pipeline import contents_digest, make_stage, read_quantizer
from semids.semantic_ids import number_equal_ids, vocabulary, write_ids, write_tokens
from semids.shards import ShardLayout
from semids.stages import Ref, Stage, StageOutput, StageReader


def encode_vectors(items: Ref, vectors: Ref, model: Ref) -> Stage:
    """Give every distinct content its codes, those it has in the model first, and its squared errors by depth."""
    reader = StageReader(model.path)
    quantizer = QUANTIZERS[reader.summary["quantizer"]]
    known = reader.manifest["files"].get(KNOWN)
    return make_stage(
        "codes",
        "Encode the vectors",
        partial(_encode, items, vectors, model),
        inputs={
            "vectors": vectors,
            "model": reader.manifest["files"]["tensors.safetensors"]["sha256"],
            **({"known": known["sha256"], "contents": contents_digest(items)} if known else {}),
        },
        parameters={},
        code=code_digest(_encode, *method_code(quantizer, quantizer.freeze)),
    )


def _encode(items: Ref, vectors: Ref, model: Ref, output: StageOutput) -> dict[str, Any]:
    array = StageReader(vectors.path).array("vectors")
    quantizer = read_quantizer(model)
    rows, levels = array.layout.rows, len(quantizer.sizes)
    dtype = str(code_dtype(quantizer.sizes))
    layout = ShardLayout(rows, levels, dtype, array.layout.shard_rows)

    reader = StageReader(model.path)
    known = KnownCodes(reader.path(KNOWN)) if KNOWN in reader.manifest["files"] else None
    digests = read_digests(StageReader(items.path).path("contents.parquet")) if known else None

    def shard_codes(start: int, stop: int) -> Codes:
        shard = array.shard(start // layout.shard_rows)
        if known is None or digests is None:
            return quantizer.encode(shard)
        # What has an ID keeps it, wherever rounding put it; the rest goes by the rule.
        codes, found = known.find(digests[start:stop])
        if not found.all():
            codes[~found] = quantizer.encode(shard[~found])
        return codes

    output.write_shards("codes", layout, shard_codes)

    def shard_errors(start: int, stop: int) -> NDArray[np.float32]:
        shard = start // layout.shard_rows
        codes: Codes = np.load(output.folder / f"codes-{shard:05d}.npy", allow_pickle=False)
        return quantizer.squared_errors(array.shard(shard), codes)

    errors = ShardLayout(rows, levels, "float32", array.layout.shard_rows)
    output.write_shards("squared_errors", errors, shard_errors)
    return {"rows": rows, "sizes": list(quantizer.sizes)}


def read_codes(codes: Ref) -> tuple[Codes, tuple[int, ...]]:
    """Return all codes by content id, (D, L), and the codebook sizes."""
    reader = StageReader(codes.path)
    array = reader.array("codes")
    whole = np.empty(array.shape, dtype=array.layout.dtype)
    for start, chunk in array.chunks(array.layout.shard_rows):
        whole[start : start + len(chunk)] = chunk
    return whole, tuple(reader.summary["sizes"])


def assign_ids(config: CommonConfig, items: Ref, codes: Ref) -> Stage:
    """Write every item's semantic ID as Parquet and as tokens, and the vocabulary."""
    return make_stage(
        "ids",
        "Write the semantic IDs",
        partial(_assign_ids, config.suffix, items, codes),
        inputs={"items": items, "codes": codes},
        parameters={"suffix": config.suffix},
    )


def _assign_ids(suffix: bool, items: Ref, codes: Ref, output: StageOutput) -> dict[str, Any]:
    item_file = StageReader(items.path).path("items.parquet")
    content_codes, sizes = read_codes(codes)
    suffixes: NDArray[np.uint32] | None = None
    if suffix:
        frame = pl.read_parquet(item_file, glob=False, columns=["item_id", "content_id"])
        content_ids = frame["content_id"].to_numpy()
        suffixes = number_equal_ids(frame["item_id"], content_ids, content_codes[content_ids], sizes)
    suffix_values = int(suffixes.max()) + 1 if suffixes is not None else 0
    words = vocabulary(sizes, suffix_values)
    output.commit("semantic_ids.parquet", lambda path: write_ids(path, item_file, content_codes, suffixes))
    output.commit("tokens.json", lambda path: write_tokens(path, item_file, content_codes, suffixes))
    output.commit_bytes("vocabulary.json", (json.dumps(words, indent=0) + "\n").encode())
    return {"shape": format_shape(sizes), "suffix_values": suffix_values, "vocabulary": len(words)}
