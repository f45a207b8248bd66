"""What the training and the use of an RQ-VAE ask of a machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semids.calibration import draw_rows, reading, taking, writing
from semids.kmeans import Lloyd, training_budget
from semids.network import CHUNK_ROWS, Network
from semids.parallel import thread_count
from semids.quantizers._lloyd_work import lloyd_work
from semids.quantizers._rqvae_memory import decoder_device_bytes, training_device_bytes
from semids.quantizers._work import HEADER_BYTES, codebook_bytes, encoding_work
from semids.shards import SHARD_ROWS, ShardLayout
from semids.work import Counts, Probe, Work

if TYPE_CHECKING:
    from semids.quantizers.rqvae import RqvaeSettings

STEP_FLOPS = 1 << 36
"""Multiplications and additions of a training step that is timed at most: a second or two of one core."""
COPIES = 6
"""Of all weights: themselves, gradients, two moments, the best so far, and what is being written of them."""
LIBRARY_BYTES = 125_000_000
"""Memory of the libraries that training needs, beyond what numbers need; a process that has trained keeps it."""


def widths_of(settings: RqvaeSettings, dimensions: int) -> list[int]:
    """Return the widths of the encoder's layers, from the vectors' to the latent space's."""
    return [dimensions, *settings.layers, settings.e_dim]


def weight_count(widths: Sequence[int]) -> int:
    """Return the number of multiplications of a row with a network's weights."""
    return sum(before * after for before, after in itertools.pairwise(widths))


def stepping(
    sizes: Sequence[int], settings: RqvaeSettings, dimensions: int, rows: int, *, quantized: bool = True
) -> Probe:
    """Rows of training steps of so many rows each, with codes or without."""
    widths = widths_of(settings, dimensions)
    flops = 12 * weight_count(widths) + 2 * sum(sizes) * settings.e_dim
    timed = max(1, min(rows, STEP_FLOPS // flops))

    def prepare(folder: Path) -> tuple[Callable[[], Any], float]:
        import torch

        from semids.quantizers._rqvae_steps import find_gradients, make_model, make_optimizer

        model = make_model(sizes, settings, dimensions, seed=0)
        optimizer = make_optimizer(settings, model)
        batch = torch.from_numpy(draw_rows(timed, dimensions))
        model.scale.fill_(float(batch.std()) ** -1)

        def step() -> None:
            find_gradients(model, optimizer, model(batch, timed, quantized=quantized))
            optimizer.step()

        return step, timed

    codes = f"coded with {list(sizes)}" if quantized else "not coded"
    return Probe(f"train {'-'.join(map(str, widths))} on {timed} rows, {codes}", prepare)


def applying(widths: Sequence[int]) -> Probe:
    """Rows that pass through a network."""

    def prepare(folder: Path) -> tuple[Callable[[], Any], float]:
        shapes = list(itertools.pairwise(widths))
        network = Network(
            tuple(draw_rows(before, after) for before, after in shapes),
            tuple(draw_rows(1, after)[0] for _, after in shapes),
        )
        rows = draw_rows(CHUNK_ROWS, widths[0])
        return lambda: network.apply(rows), len(rows)

    return Probe(f"network {'-'.join(map(str, widths))}", prepare)


def network_work(sizes: Sequence[int], settings: RqvaeSettings, counts: Counts) -> Work:
    """Return the work of training a network for all its epochs; patience may end it earlier."""
    d, widths = counts.dimensions, widths_of(settings, counts.dimensions)
    batch = min(settings.batch_size, counts.training)
    trained = settings.epochs * counts.training
    units = {
        reading(counts): counts.vector_bytes,
        taking(d, counts.itemsize): trained,
        stepping(sizes, settings, d, batch): trained,
    }
    work = Work(units)
    for size in set(sizes) if settings.kmeans_init else ():
        rows = min(training_budget(size, settings.e_dim), counts.training)
        fit = lloyd_work(size, settings.e_dim, rows, Lloyd(settings.kmeans_iters, restarts=sizes.count(size)))
        work += replace(fit, memory=8 * rows * settings.e_dim + fit.memory)
    # Contents of the training split, those of them that are trained on, and two orders of them, in every process.
    orders = settings.processes * 24 * counts.training
    # Rows on their way, as they are and standardised; what layers make of them, and its gradients; scores.
    held = batch * (4 * counts.itemsize * d + 12 * d + 12 * 3 * sum(widths) + 12 * max(sizes))
    weights = COPIES * 4 * (2 * weight_count(widths) + sum(sizes) * settings.e_dim)
    return work + Work(
        memory=LIBRARY_BYTES + max(work.memory, held) + weights + orders,
        disk=network_bytes(settings, d) + codebook_bytes(sizes, settings.e_dim),
        device_memory=training_device_bytes(sizes, settings, _trained(counts)),
        device_rows=counts.training * d * counts.itemsize,
    )


def latent_work(settings: RqvaeSettings, counts: Counts) -> Work:
    """Return the work of writing the latent vectors of all contents."""
    size = counts.contents * settings.e_dim * 4
    units = {reading(counts): counts.vector_bytes, writing(): size}
    units[applying(widths_of(settings, counts.dimensions))] = counts.contents
    held = min(counts.contents, SHARD_ROWS) * settings.e_dim * 4
    held += thread_count() * CHUNK_ROWS * 4 * 2 * max(widths_of(settings, counts.dimensions))
    return Work(units, memory=LIBRARY_BYTES + 2 * held, disk=size)


def decoder_work(sizes: Sequence[int], settings: RqvaeSettings, counts: Counts) -> Work:
    """Return the work of fitting the decoder to codes."""
    from semids.quantizers._rqvae_decoder import EPOCHS, STEPS

    d, widths = counts.dimensions, widths_of(settings, counts.dimensions)
    batch = min(settings.batch_size, counts.training)
    rows = min(min(EPOCHS, settings.epochs) * counts.training, STEPS * batch)
    units = {
        reading(counts): 2 * counts.vector_bytes,
        applying(widths): counts.contents,
        taking(d, counts.itemsize): rows,
        # The decoder is half of the network, and the codes are known.
        stepping(sizes, settings, d, batch, quantized=False): rows / 2,
    }
    held = batch * (4 * counts.itemsize * d + 12 * d + 18 * sum(widths)) + COPIES * 4 * weight_count(widths)
    codes = counts.contents * len(sizes) * 2
    return Work(
        units,
        memory=LIBRARY_BYTES + held + codes + 16 * counts.training,
        disk=network_bytes(settings, d) // 2,
        device_memory=decoder_device_bytes(settings, _trained(counts)),
        device_rows=counts.training * d * counts.itemsize,
    )


def coding_work(sizes: Sequence[int], settings: RqvaeSettings, counts: Counts, *, known: bool) -> Work:
    """Return the work of giving every content its codes and errors: an encoder, codebooks, and a decoder a depth."""
    widths = widths_of(settings, counts.dimensions)
    latent = replace(counts, dimensions=settings.e_dim, itemsize=4)
    work = encoding_work(sizes, latent, beam=1, known=known)
    units = {applying(widths[::-1]): len(sizes) * counts.contents} | (
        {} if known else {applying(widths): counts.contents}
    )
    held = thread_count() * CHUNK_ROWS * 4 * (2 * max(widths) + counts.dimensions)
    return work + Work(
        units,
        memory=LIBRARY_BYTES + work.memory + held,
        disk=network_bytes(settings, counts.dimensions) + codebook_bytes(sizes, settings.e_dim),
    )


def _trained(counts: Counts) -> ShardLayout:
    return ShardLayout(counts.training, counts.dimensions, f"float{8 * counts.itemsize}")


def network_bytes(settings: RqvaeSettings, dimensions: int) -> int:
    """Return the size of an encoder and a decoder in a file."""
    widths = widths_of(settings, dimensions)
    layers = 2 * (len(widths) - 1)
    biases = sum(widths[1:]) + sum(widths[:-1])
    return 4 * (2 * weight_count(widths) + biases) + 2 * layers * HEADER_BYTES
