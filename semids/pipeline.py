"""The stages, each a function from a configuration and references to a stage, and their order.

A stage function decides nothing but what its stage depends on and which function makes it; `run_stage` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from semids.config import QUANTIZERS, BuildConfig, CommonConfig
from semids.contents import read_digests
from semids.errors import CorruptionError, DataError, UsageError
from semids.fingerprints import code_digest, method_code
from semids.items import VectorSource, catalogue_digest, is_vectors, scan_texts, scan_vectors
from semids.known import KNOWN, write_known
from semids.quantizers.base import FrozenQuantizer, Tensors, TrainingData, TrainingStep
from semids.shards import EVERY, ShardLayout, count_shards
from semids.stages import Ref, Stage, StageOutput, StageReader

Runner = Callable[[Stage], Ref]
"""Runs a stage, or finds its outputs, and returns the reference to them."""


def make_stage(
    name: str,
    title: str,
    make: partial[dict[str, Any]],
    *,
    inputs: Mapping[str, Any],
    parameters: Mapping[str, Any],
    code: Mapping[str, Any] | None = None,
    shards: int = 1,
) -> Stage:
    """Return the stage that calls `make(output)`.

    Args:
        inputs: references, of which the digest counts, or digests.
        code: what stands for the code; its digest by default. Given where `make` reaches code through a family, and
            where a changed line must not cost hours (a version).
        shards: see `Stage`.
    """
    ingredients = {
        "inputs": {key: value.digest if isinstance(value, Ref) else value for key, value in inputs.items()},
        "parameters": dict(parameters),
        "code": dict(code) if code is not None else code_digest(make.func),
    }
    return Stage(name=name, title=title, ingredients=ingredients, build=make, shards=shards)


# Catalogue to items


def scan_catalogue(config: CommonConfig) -> Stage:
    """Read the catalogue: items with their split and content, distinct contents, quarantine."""
    catalogue = config.catalogue
    return make_stage(
        "items",
        "Read the catalogue",
        partial(scan_vectors if is_vectors(catalogue) else scan_texts, catalogue),
        inputs={"catalogue": catalogue_digest(catalogue)},
        parameters=catalogue.model_dump(exclude={"path"}),
    )


def check_sizes(config: BuildConfig, items: Ref) -> None:
    """Refuse a shape that the training split cannot fill, or bounds that the contents cannot keep.

    Raises:
        UsageError: a codebook size exceeds the number of training items, or as `BuildConfig.bounds` does.
    """
    training = StageReader(items.path).summary["splits"][config.catalogue.train_split]["items"]
    check_counts(config, count_contents(items), training)


def check_counts(config: BuildConfig, contents: int, training: int) -> None:
    """As `check_sizes`, given how many distinct contents and how many training items there are."""
    if config.mapping == "capacity":
        config.bounds(contents)
    if max(config.sizes) > training:
        raise UsageError(
            f"shape {config.shape}: expected at least as many training items as the largest codebook has codewords, "
            f"got {training} items for {max(config.sizes)} codewords; choose a smaller shape"
        )


def count_contents(items: Ref) -> int:
    """Return D, the number of distinct contents."""
    return StageReader(items.path).summary["distinct_contents"]


def contents_digest(items: Ref) -> str:
    """Return the SHA-256 of the contents in their order: all that vectors depend on, whatever else items have."""
    return StageReader(items.path).summary["contents_digest"]


def training_digest(config: BuildConfig, items: Ref) -> str:
    """Return the SHA-256 of the contents of the training split: which vectors codebooks are fitted to."""
    return StageReader(items.path).summary["splits"][config.catalogue.train_split]["contents_digest"]


# Contents to vectors


def make_vectors(config: CommonConfig, items: Ref) -> Stage:
    """Turn every distinct content into a vector: embed its text, or copy the vector that was given."""
    if is_vectors(config.catalogue):
        return make_stage(
            "vectors",
            "Import the vectors",
            partial(_import_vectors, config.catalogue, items),
            inputs={"contents": contents_digest(items), "catalogue": catalogue_digest(config.catalogue)},
            parameters=config.catalogue.model_dump(include={"vector_column"}),
            shards=count_shards(count_contents(items)),
        )
    identity = config.make_embedder().identity()
    return make_stage(
        "vectors",
        "Embed the texts",
        partial(_embed, config, items),
        inputs={"contents": contents_digest(items)},
        parameters=identity,
        code={"embedder version": identity["version"]},
        shards=count_shards(count_contents(items)),
    )


def _embed(config: CommonConfig, items: Ref, output: StageOutput) -> dict[str, Any]:
    contents = StageReader(items.path).path("contents.parquet")
    rows: int = pl.scan_parquet(contents, glob=False).select(pl.len()).collect().item()
    embedder = config.make_embedder()
    embedder.load()

    def embed_rows(start: int, stop: int) -> NDArray[np.float32]:
        part = pl.scan_parquet(contents, glob=False).select("text").slice(start, stop - start).collect()
        texts: list[str] = part["text"].to_list()
        # Where duplicates are contents of their own, equal texts are neighbours.
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        try:
            found = embedder.embed(
                list(places),
                lambda step, done, total, unit: output.progress("embed texts", start + done, rows, "texts"),
            )
            return found if len(found) == len(texts) else found[[places[text] for text in texts]]
        except DataError as error:
            raise DataError(f"texts {start} to {stop - 1} of {contents}: {error}") from error

    # float16 halves the disk and is safe for unit vectors, which embedders return.
    output.write_shards("vectors", ShardLayout(rows, embedder.dimensions, "float16"), embed_rows)
    return {"rows": rows, "dimensions": embedder.dimensions}


def _import_vectors(catalogue: Any, items: Ref, output: StageOutput) -> dict[str, Any]:
    sources: NDArray[np.int64] = (
        pl.read_parquet(StageReader(items.path).path("contents.parquet"), glob=False, columns=["row"])["row"]
        .to_numpy()
        .astype(np.int64)
    )
    source = VectorSource(catalogue)
    layout = ShardLayout(len(sources), source.dimensions, str(source.dtype))
    output.write_shards("vectors", layout, lambda start, stop: source.rows_at(sources[start:stop]))
    return {"rows": len(sources), "dimensions": source.dimensions}


# Vectors to a frozen quantizer


def train_step(config: BuildConfig, items: Ref, vectors: Ref, step: TrainingStep, needed: Mapping[str, Ref]) -> Stage:
    """Run one step of the quantizer's training."""
    return make_stage(
        f"train-{step.name}",
        step.title,
        partial(_train, config, items, vectors, step, dict(needed)),
        inputs={
            "contents": contents_digest(items),
            "training": training_digest(config, items),
            "vectors": vectors,
            **({"items": items} if step.weighted else {}),
            **needed,
        },
        parameters={"quantizer": config.quantizer, "step": step.name, **step.parameters},
        code={"version": step.version}
        if step.version
        else code_digest(_train, *method_code(QUANTIZERS[config.quantizer], step.run)),
        shards=step.lots(count_contents(items)) if step.lots else 1,
    )


def _train(
    config: BuildConfig, items: Ref, vectors: Ref, step: TrainingStep, needed: dict[str, Ref], output: StageOutput
) -> dict[str, Any]:
    training = multiplicities(items)[config.catalogue.train_split]
    space = StageReader(needed[step.space].path if step.space else vectors.path).array("vectors")
    rows = np.flatnonzero(training)
    weights = training[rows].astype(np.float32) if step.weighted else None
    data = TrainingData(space, rows, output.kept("training"), weights, output.lot)
    tensors = {name: read_tensors(ref) for name, ref in needed.items()}
    outcome = config.make_quantizer(count_contents(items)).run_step(step, data, tensors, output.progress)
    if output.lot != EVERY:
        return {}
    output.commit("tensors.safetensors", lambda path: save_file(outcome.tensors, path))
    if outcome.encoder is not None:
        encoder, each = outcome.encoder, space.layout.shard_rows
        layout = ShardLayout(space.layout.rows, encoder.dimensions[1], "float32", each)
        output.write_shards("vectors", layout, lambda start, stop: encoder.apply(space.shard(start // each)))
    return outcome.evidence


def train_quantizer(config: BuildConfig, items: Ref, vectors: Ref, run: Runner) -> Ref:
    """Run every step of the training in order, and freeze what they leave into a model."""
    steps: dict[str, Ref] = {}
    for step in config.make_quantizer(count_contents(items)).training_steps():
        steps[step.name] = run(train_step(config, items, vectors, step, {name: steps[name] for name in step.needs}))
    return run(freeze_model(config, items, vectors, steps))


def freeze_model(config: BuildConfig, items: Ref, vectors: Ref, steps: Mapping[str, Ref]) -> Stage:
    """Gather what the training steps left into one folder that encodes new items without the rest of the run."""
    quantizer = QUANTIZERS[config.quantizer]
    return make_stage(
        "model",
        "Freeze the model",
        partial(_freeze, config, items, vectors, dict(steps)),
        inputs={"contents": contents_digest(items), "vectors": vectors, **steps},
        parameters={
            **config.model_dump(include={"shape", "mapping", "quantizer"}),
            **config.make_quantizer(count_contents(items)).model_parameters(),
            "catalogue": config.catalogue.model_dump(exclude={"path"}),
            "vectors": vector_model(StageReader(vectors.path).manifest["ingredients"]),
        },
        code=code_digest(
            _freeze,
            *method_code(quantizer, quantizer.assemble),
            *method_code(quantizer, quantizer.given_codes),
        ),
    )


def _freeze(
    config: BuildConfig, items: Ref, vectors: Ref, steps: dict[str, Ref], output: StageOutput
) -> dict[str, Any]:
    quantizer = config.make_quantizer(count_contents(items))
    outcomes = {name: read_tensors(ref) for name, ref in steps.items()}
    tensors = quantizer.assemble(outcomes)
    given = quantizer.given_codes(outcomes)
    if given is not None:
        contents = StageReader(items.path).path("contents.parquet")
        output.commit(KNOWN, lambda path: write_known(path, read_digests(contents), given))
    output.commit("tensors.safetensors", lambda path: save_file(tensors, path))
    # Where the catalogue and the embedder lay decides nothing, and must not be in a digest.
    output.remember(config=config.model_dump(mode="json"))
    return {
        "shape": config.shape,
        "mapping": config.mapping,
        "quantizer": config.quantizer,
        "dimensions": StageReader(vectors.path).summary["dimensions"],
        "vectors": vector_model(StageReader(vectors.path).manifest["ingredients"]),
        "training": [
            {"step": name, "fingerprint": ref.fingerprint, **StageReader(ref.path).summary}
            for name, ref in steps.items()
        ],
    }


def vector_model(ingredients: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of the model that vectors are, or were adopted as, those of; empty if they were given.

    Vectors are comparable only if theirs are equal.

    Args:
        ingredients: of the vectors stage.
    """
    return {name: value for name, value in ingredients["parameters"].items() if name != "vector_column"}


def read_tensors(ref: Ref) -> Tensors:
    """Return the tensors of a training step or a model."""
    path = StageReader(ref.path).path("tensors.safetensors")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CorruptionError(f"{path}: expected tensors: {error}") from error


def read_quantizer(model: Ref) -> FrozenQuantizer:
    """Return the frozen quantizer of a model."""
    quantizer = QUANTIZERS[StageReader(model.path).summary["quantizer"]]
    return quantizer.freeze(read_tensors(model))


def multiplicities(items: Ref) -> dict[str, NDArray[np.uint32]]:
    """Return how many items of each split have each content: (D,) counts by split name."""
    reader = StageReader(items.path)
    frame = pl.read_parquet(
        reader.path("contents.parquet"), glob=False, columns=[f"items:{name}" for name in reader.summary["splits"]]
    )
    return {name: frame[f"items:{name}"].to_numpy() for name in reader.summary["splits"]}
