"""What the stages that every run has ask of a machine; those of training are the quantizers' to tell."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from semids.arrays import Codes, code_dtype
from semids.calibration import PROBE_BYTES, PROBE_ROWS, Prepared, draw_rows, reading, taking, writing
from semids.catalogue import CatalogueSettings
from semids.config import BuildConfig, CommonConfig
from semids.distortion import Distortion, neighbour_figures
from semids.items import scan_vectors
from semids.metrics import measure_ids
from semids.parallel import in_order, slices, thread_count
from semids.plots import plot_report
from semids.progress import silent
from semids.readers import BATCH_BYTES
from semids.reporting import NEIGHBOUR_QUERIES, NEIGHBOUR_SAMPLE
from semids.semantic_ids import write_ids, write_tokens
from semids.shards import SHARD_ROWS
from semids.stages import StageOutput
from semids.work import Counts, Probe, Work

CONTENT_BYTES, ITEM_BYTES = 17.2, 3.7
"""Of a content's digest and row, and of an item's place, in a compressed file: measured on 200,000 vectors."""
KNOWN_BYTES = 16.6
"""Of a content in a model that knows it, besides its codes."""
ID_BYTES = 2.9
"""Of an item's id beside its codes in `semantic_ids.parquet`, where ids are numbers in order."""
REPORT_BYTES = 130_000
WRITING_BYTES = 50 << 20
"""Of batches of items while their IDs are written."""
MEASURING_BYTES = 32 << 20
"""Of a thread that measures distortion or compares neighbours."""
SAMPLE_TEXTS = 256
"""Texts that are embedded to time a model: a batch or two of the default size."""


def scan_work(counts: Counts) -> Work:
    """Return the work of reading a catalogue."""
    d, itemsize = counts.dimensions, counts.itemsize
    disk = CONTENT_BYTES * counts.contents + ITEM_BYTES * counts.items
    if counts.texts is not None:
        # Texts count as vectors in time, which is little beside that of embedding them.
        disk += counts.texts.stat().st_size * counts.contents / pq.read_metadata(counts.texts).num_rows
    units = {scanning(d, itemsize): counts.items, reading(counts): counts.items * d * itemsize}
    return Work(units, memory=BATCH_BYTES, disk=round(disk))


def import_work(counts: Counts) -> Work:
    """Return the work of copying given vectors to shards."""
    shard = min(counts.contents, SHARD_ROWS) * counts.dimensions * counts.itemsize
    units = {
        taking(counts.dimensions, counts.itemsize): 3 * counts.contents,
        reading(counts): counts.vector_bytes,
        writing(): counts.vector_bytes,
    }
    # A shard and its copy, and the shard before it.
    return Work(
        units,
        memory=(3 if counts.contents > SHARD_ROWS else 2) * shard,
        disk=_array_bytes(counts, counts.vector_bytes),
    )


def embed_work(config: CommonConfig, contents: Path, counts: Counts) -> Work:
    """Return the work of embedding texts, of which some are in the file `contents`."""
    shard = min(counts.contents, SHARD_ROWS) * counts.dimensions
    embedder = config.make_embedder()
    # float32 vectors of a shard, and as they are stored.
    return Work(
        {loading(config): 1, embedding(config, contents): counts.contents, writing(): counts.vector_bytes},
        memory=embedder.memory_bytes + 6 * shard,
        disk=_array_bytes(counts, counts.vector_bytes),
        device_memory=embedder.device_bytes,
    )


def freeze_work(config: BuildConfig, counts: Counts, tensor_bytes: int) -> Work:
    """Return the work of gathering a model whose tensors have so many bytes."""
    known = counts.contents if config.mapping == "capacity" else 0
    row = KNOWN_BYTES + len(config.sizes) * code_dtype(config.sizes).itemsize
    disk = tensor_bytes + round(known * row)
    return Work({writing(): disk}, memory=tensor_bytes + 100 * known, disk=disk)


def encode_work(config: BuildConfig, counts: Counts, encoding: Work) -> Work:
    """Return the work of writing the codes and squared errors that the work `encoding` makes."""
    levels, itemsize = len(config.sizes), code_dtype(config.sizes).itemsize
    disk = sum(_array_bytes(counts, counts.contents * levels * width) for width in (itemsize, 4))
    units = {**encoding.units, reading(counts): counts.vector_bytes, writing(): disk}
    return Work(units, encoding.memory + counts.contents * (levels * itemsize + 1), disk)


def assign_work(config: BuildConfig, counts: Counts) -> Work:
    """Return the work of writing semantic IDs, tokens and the vocabulary."""
    sizes = config.sizes
    tokens = sum(_mean_digits(size) + len('"<a_>"') for size in sizes) + 2 * (len(sizes) - 1)
    columns = sum(math.log2(size) for size in sizes) / 8
    if config.suffix:
        tokens, columns = tokens + len(', "<a_0>"'), columns + 0.1
    line = len(',\n"": []') + counts.id_bytes + tokens
    words = sum(size * (_mean_digits(size) + len('"<a_>",\n')) for size in sizes)
    held = counts.contents * len(sizes) * code_dtype(sizes).itemsize
    # A suffix is counted over a table of all items.
    held += round(counts.items * (64 + 2 * counts.id_bytes)) if config.suffix else 0
    disk = round(counts.items * (line + columns + ID_BYTES) + words)
    return Work({writing_ids(sizes): counts.items}, memory=WRITING_BYTES + held, disk=disk)


def report_work(config: BuildConfig, counts: Counts) -> Work:
    """Return the work of measuring and drawing what a report shows."""
    d, levels = counts.dimensions, len(config.sizes)
    sample = min(counts.contents, NEIGHBOUR_SAMPLE)
    units = {
        # Once for the distortion, and again for the neighbours.
        reading(counts): 2 * counts.vector_bytes,
        measuring_ids(config.sizes): (counts.splits + 1) * counts.contents,
        measuring_distortion(d, counts.itemsize, levels): counts.contents,
        taking(d, counts.itemsize): sample,
        finding_neighbours(d, counts.itemsize): sample * min(sample, NEIGHBOUR_QUERIES),
        plotting(): 1,
    }
    # Vectors and reconstructions as they are, of unit length, and on the way there.
    held = (
        4 * 7 * sample * d
        + thread_count() * MEASURING_BYTES
        + counts.contents * (16 + 4 * counts.splits + levels * code_dtype(config.sizes).itemsize)
    )
    return Work(units, memory=held, disk=REPORT_BYTES)


def _array_bytes(counts: Counts, size: int) -> int:
    return size + 128 * -(-counts.contents // SHARD_ROWS)


def _mean_digits(size: int) -> float:
    """Return the mean number of digits of the numbers below `size`."""
    return sum(max(0, size - 10**digits) for digits in range(1, len(str(size)))) / size + 1


def loading(config: CommonConfig) -> Probe:
    """Embedding models brought into memory."""

    def prepare(folder: Path) -> Prepared:
        return lambda: config.make_embedder().load(), 1

    return Probe("load the embedding model", prepare, once=True)


def embedding(config: CommonConfig, contents: Path) -> Probe:
    """Texts embedded, an evenly spaced part of those in a file of contents."""

    def prepare(folder: Path) -> Prepared:
        rows: int = pl.scan_parquet(contents, glob=False).select(pl.len()).collect().item()
        step = max(1, -(-rows // SAMPLE_TEXTS))
        texts = pl.scan_parquet(contents, glob=False).select("text").gather_every(step).collect()["text"].to_list()
        embedder = config.make_embedder()
        embedder.load()
        return lambda: embedder.embed(texts[:SAMPLE_TEXTS]), len(texts[:SAMPLE_TEXTS])

    return Probe("embed texts", prepare, once=True)


def scanning(dimensions: int, itemsize: int) -> Probe:
    """Rows of a catalogue of vectors read, checked, digested and committed as items and contents."""

    def prepare(folder: Path) -> Prepared:
        rows = max(1, min(PROBE_ROWS, PROBE_BYTES // (dimensions * itemsize)))
        np.save(folder / "vectors.npy", draw_rows(rows, dimensions, itemsize))
        settings = CatalogueSettings(path=str(folder / "vectors.npy"))
        return lambda: scan_vectors(settings, StageOutput(folder / "items", "", silent)), rows

    return Probe(f"scan rows of {dimensions} × {itemsize} bytes", prepare)


def writing_ids(sizes: tuple[int, ...]) -> Probe:
    """Items whose IDs are written as Parquet and as tokens."""

    def prepare(folder: Path) -> Prepared:
        rows = 8 * PROBE_ROWS
        items, columns = folder / "items.parquet", np.arange(rows)
        pq.write_table(pa.table({"item_id": columns, "content_id": columns.astype(np.uint32)}), items)
        codes = _draw_codes(rows, sizes)

        def run() -> None:
            write_ids(folder / "ids.parquet", items, codes, None)
            write_tokens(folder / "tokens.json", items, codes, None)

        return run, rows

    return Probe(f"write IDs of {len(sizes)} levels", prepare)


def measuring_ids(sizes: tuple[int, ...]) -> Probe:
    """Contents whose IDs are counted in a report."""

    def prepare(folder: Path) -> Prepared:
        codes = _draw_codes(8 * PROBE_ROWS, sizes)
        return lambda: measure_ids([codes], None, sizes=sizes), len(codes)

    return Probe(f"measure IDs of {len(sizes)} levels", prepare)


def measuring_distortion(dimensions: int, itemsize: int, levels: int) -> Probe:
    """Rows whose distortion is measured in a report."""

    def prepare(folder: Path) -> Prepared:
        rows = draw_rows(PROBE_ROWS // 2, dimensions, itemsize)
        errors, weights = np.ones((len(rows), levels), np.float32), np.ones(len(rows), np.uint32)

        def measure(part: slice) -> None:
            Distortion(dimensions, levels).add(rows[part], errors[part], weights[part])

        return lambda: list(in_order(measure, slices(len(rows), len(rows) // 8))), len(rows)

    return Probe(f"measure distortion of {dimensions} × {itemsize} bytes", prepare)


def finding_neighbours(dimensions: int, itemsize: int) -> Probe:
    """Pairs of a query and a row of a sample."""

    def prepare(folder: Path) -> Prepared:
        # As many rows a query as in a report.
        rows, queries = draw_rows(PROBE_ROWS // 2, dimensions, itemsize), PROBE_ROWS // 40
        codes = _draw_codes(len(rows), (64, 64))

        def run() -> None:
            sample = rows.astype(np.float32)
            neighbour_figures(sample, sample, codes, queries=queries)

        return run, len(rows) * queries

    return Probe(f"find neighbours in {dimensions} × {itemsize} bytes", prepare)


def plotting() -> Probe:
    """Reports whose plots are drawn."""

    def prepare(folder: Path) -> Prepared:
        figures = measure_ids([_draw_codes(PROBE_ROWS, (64, 64, 64))], None, sizes=(64, 64, 64))
        return lambda: plot_report(figures), 1

    return Probe("draw plots", prepare, once=True)


def _draw_codes(rows: int, sizes: tuple[int, ...]) -> Codes:
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(0, size, rows) for size in sizes], axis=1).astype(code_dtype(sizes))
