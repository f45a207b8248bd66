"""The stages after the model: vectors to codes, codes to IDs."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from semids.arrays import Codes, code_dtype, format_shape, parse_shape
from semids.config import QUANTIZERS, CommonConfig
from semids.contents import read_digests
from semids.errors import UsageError
from semids.fingerprints import code_digest, method_code
from semids.free_ids import check_room
from semids.known import KnownCodes, known_files, later_file, write_known
from semids.parser import open_npy
from semids.pipeline import contents_digest, make_stage, read_quantizer
from semids.semantic_ids import number_equal_ids, vocabulary, write_ids, write_tokens
from semids.shards import ShardLayout
from semids.stages import Ref, Stage, StageOutput, StageReader


def encode_vectors(items: Ref, vectors: Ref, model: Ref, *, unique: bool = False) -> Stage:
    """Give every distinct content its codes, those it has in the model first, and its squared errors by depth.

    Args:
        unique: contents that the model does not know get IDs that no content has.
    """
    reader = StageReader(model.path)
    quantizer = QUANTIZERS[reader.summary["quantizer"]]
    files = reader.manifest["files"]
    known = [files[name]["sha256"] for name in known_files(files)]
    return make_stage(
        "codes",
        "Encode the vectors",
        partial(_encode, items, vectors, model, unique),
        inputs={
            "vectors": vectors,
            "model": files["tensors.safetensors"]["sha256"],
            **({"known": known, "contents": contents_digest(items)} if known else {}),
        },
        parameters={"unique": True} if unique else {},
        code=code_digest(_encode, *method_code(quantizer, quantizer.freeze)),
        # Free IDs are found for all contents at once.
        shards=1 if unique else StageReader(vectors.path).array("vectors").layout.shards,
    )


def _encode(items: Ref, vectors: Ref, model: Ref, unique: bool, output: StageOutput) -> dict[str, Any]:
    array = StageReader(vectors.path).array("vectors")
    quantizer = read_quantizer(model)
    rows, levels = array.layout.rows, len(quantizer.sizes)
    dtype = str(code_dtype(quantizer.sizes))
    layout = ShardLayout(rows, levels, dtype, array.layout.shard_rows)
    known = read_known(model)
    # What has an ID keeps it, wherever rounding put it; the rest goes by the rule.
    codes, found = np.empty((rows, levels), dtype), np.zeros(rows, dtype=bool)
    if known is not None:
        codes, found = known.find(_digests(items))
    new = np.flatnonzero(~found)
    if unique and known is not None and len(new):
        codes[new] = quantizer.find_free_ids(lambda some: array.take(new[some]), known.codes, rows=len(new))
        found[:] = True

    def shard_codes(start: int, stop: int) -> Codes:
        missing = ~found[start:stop]
        if missing.any():
            codes[start:stop][missing] = quantizer.encode(array.shard(start // layout.shard_rows)[missing])
        return codes[start:stop]

    output.write_shards("codes", layout, shard_codes)

    def shard_errors(start: int, stop: int) -> NDArray[np.float32]:
        shard = start // layout.shard_rows
        codes: Codes = open_npy(output.folder / f"codes-{shard:05d}.npy")
        return quantizer.squared_errors(array.shard(shard), codes)

    errors = ShardLayout(rows, levels, "float32", array.layout.shard_rows)
    output.write_shards("squared_errors", errors, shard_errors)
    return {"rows": rows, "sizes": list(quantizer.sizes)}


def read_known(model: Ref) -> KnownCodes | None:
    """Return the contents that a model has given IDs to, or None: only the mapping capacity keeps them."""
    reader = StageReader(model.path)
    names = known_files(reader.manifest["files"])
    return KnownCodes([reader.path(name) for name in names]) if names else None


def _digests(items: Ref) -> NDArray[np.uint64]:
    return read_digests(StageReader(items.path).path("contents.parquet"))


def check_unique(items: Ref, model: Ref) -> None:
    """Refuse to give IDs of their own to the contents that a model does not know, where that cannot be.

    Raises:
        UsageError: the model does not tell which IDs it gave, or has fewer free ones than there are new contents.
    """
    summary = StageReader(model.path).summary
    known = read_known(model)
    if known is None:
        raise UsageError(
            "expected a model of the mapping capacity, which tells the IDs it gave, for unique IDs; got the mapping "
            f"{summary['mapping']!r}"
        )
    _, found = known.find(_digests(items))
    check_room(parse_shape(summary["shape"]), np.unique(known.codes, axis=0), int((~found).sum()))


def extend_model(items: Ref, model: Ref, codes: Ref) -> Stage:
    """Make the model that also knows the contents that were just given their IDs: the next ones get others."""
    return make_stage(
        "model",
        "Add the new contents to the model",
        partial(_extend, items, model, codes),
        inputs={"model": model, "contents": contents_digest(items), "codes": codes},
        parameters={},
    )


def _extend(items: Ref, model: Ref, codes: Ref, output: StageOutput) -> dict[str, Any]:
    reader = StageReader(model.path)
    for name in reader.manifest["files"]:
        output.commit(name, lambda path, name=name: _copy(reader.path(name), path))
    words = _digests(items)
    known = read_known(model)
    new = ~known.find(words)[1] if known is not None else np.ones(len(words), dtype=bool)
    if new.any():
        lots = len(known_files(reader.manifest["files"]))
        content_codes = read_codes(codes)[0]
        output.commit(later_file(lots), lambda path: write_known(path, words[new], content_codes[new]))
    output.remember(config=reader.manifest["run"]["config"])
    return reader.summary


def _copy(source: Path, path: Path) -> None:
    shutil.copyfile(source, path)


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
    reader = StageReader(items.path)
    item_file, rows = reader.path("items.parquet"), reader.summary["items"]
    content_codes, sizes = read_codes(codes)
    suffixes: NDArray[np.uint32] | None = None
    if suffix:
        frame = pl.read_parquet(item_file, glob=False, columns=["item_id", "content_id"])
        content_ids = frame["content_id"].to_numpy()
        suffixes = number_equal_ids(frame["item_id"], content_ids, content_codes[content_ids], sizes)
    suffix_values = int(suffixes.max()) + 1 if suffixes is not None else 0
    words = vocabulary(sizes, suffix_values)
    for name, write in (("semantic_ids.parquet", write_ids), ("tokens.json", write_tokens)):
        told = partial(_tell, output, f"write {name}", rows)
        output.commit(
            name, lambda path, write=write, told=told: write(path, item_file, content_codes, suffixes, told=told)
        )
    output.commit_bytes("vocabulary.json", (json.dumps(words, indent=0) + "\n").encode())
    return {"shape": format_shape(sizes), "suffix_values": suffix_values, "vocabulary": len(words)}


def _tell(output: StageOutput, step: str, total: int, done: int) -> None:
    output.progress(step, done, total, "items")
