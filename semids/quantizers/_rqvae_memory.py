"""What the training of an RQ-VAE holds in the memory of a CUDA device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from semids.kmeans import training_budget
from semids.work import DEVICE_BYTES, Counts

if TYPE_CHECKING:
    from semids.quantizers.rqvae import RqvaeSettings

KEPT_BY = {"AdamW": 2, "Adam": 2, "SGD": 0, "Adagrad": 1, "RMSprop": 3}
"""Numbers that an optimizer holds a weight: moments and, of the one that is not fused, two of a step on its way."""


def training_device_bytes(sizes: Sequence[int], settings: RqvaeSettings, counts: Counts) -> int:
    """Return the most bytes that a process of the training holds on its device, rows that stay there left out.

    Counted are weights, their gradients, what the optimizer keeps of them, and the best weights so far; two batches
    ahead, as they are stored; what products need; and the largest of what it takes, besides, to

    - measure the rows' mean and scale, in float64;
    - start the codebooks from k-means: a sample of latent vectors, and a part of the rows on their way there;
    - take a step, see `step_numbers`;
    - judge the network by the held-out rows, in float64;
    - find a new place for dead codewords: some rows on their way to latent vectors;
    - replace the best weights by better ones.

    Not counted: what the driver holds for a process, some hundreds of MB, which is not free any more when a device is
    asked; what allocation leaves unused between tensors; and a matrix or two of rows × codewords where balanced
    assignment has to begin anew.
    """
    from semids.quantizers import _rqvae_rows
    from semids.quantizers._rqvae_evaluation import EVALUATION_ROWS
    from semids.quantizers._rqvae_train import REVIVAL_ROWS

    d, rows = counts.dimensions, counts.training
    batch = min(settings.batch_size, rows)
    widest = max((*settings.layers, settings.e_dim))
    weights = weight_numbers((d, *settings.layers, settings.e_dim)) + sum(sizes) * settings.e_dim
    # Gradients are sent from a copy of theirs.
    kept = weights * (2 + KEPT_BY[settings.optimizer] + (settings.processes > 1))

    def passed(some: int) -> int:
        """Rows as they come and standardised, and what two layers, one after the other, make of them."""
        return some * (2 * d + 2 * widest)

    part = min(EVALUATION_ROWS, rows)
    started = 0
    if settings.kmeans_init:
        sample = min(training_budget(max(sizes), d), rows) * settings.e_dim
        # What k-means holds is not counted: it takes the device where there is room, and the CPU where there is none.
        started = sample + max(sample, passed(part), part * (settings.e_dim + max(sizes)))
    held = min(round(_rqvae_rows.HELD_OUT_SHARE * rows), _rqvae_rows.MOST_HELD_OUT) or rows
    judged = min(batch, held)
    judging = judged * d + min(judged, EVALUATION_ROWS) * max(5 * d, 2 * d + 2 * widest, max(sizes))
    step = step_numbers(sizes, settings, d, -(-batch // settings.processes))
    revived = passed(min(max(REVIVAL_ROWS, *sizes), rows))
    numbers = max(weights + 5 * part * d, kept + started, kept + weights + max(step, judging, revived, weights))
    return 4 * numbers + _rqvae_rows.BATCHES_AHEAD * batch * d * counts.itemsize + DEVICE_BYTES


def step_numbers(sizes: Sequence[int], settings: RqvaeSettings, dimensions: int, rows: int) -> int:
    """Return the most numbers of 4 bytes that a training step holds besides weights, gradients and moments.

    They are the rows as they come and standardised; what every layer of the encoder makes of them; what is left over
    before each level, and codes; then either the distances to the codewords of a level, of which balanced assignment
    keeps a second matrix, or what the decoder's layers make of the codewords, and the squared error, of which the
    way back needs three more matrices of the rows' size.
    """
    d, layers, e = dimensions, sum(settings.layers), settings.e_dim
    encoded = 2 * d + layers + (len(sizes) + 5) * e + 2 * len(sizes)
    balanced = 2 if any(settings.sk_epsilons) else 1
    return rows * (encoded + max(balanced * max(sizes), layers + 3 * d))


def decoder_device_bytes(settings: RqvaeSettings, counts: Counts) -> int:
    """Return the most bytes that fitting the decoder to codes holds on a device, rows that stay there left out.

    Counted are its weights, their gradients, and both moments and a third number of AdamW; of a batch the rows, what
    layers make of them, and what the squared error needs on its way back; two batches ahead; and what products need.
    """
    from semids.quantizers._rqvae_rows import BATCHES_AHEAD

    d, batch = counts.dimensions, min(settings.batch_size, counts.training)
    weights = weight_numbers((d, *settings.layers, settings.e_dim)) // 2
    step = batch * (6 * d + sum(settings.layers) + 2 * settings.e_dim)
    return 4 * (5 * weights + step) + BATCHES_AHEAD * batch * d * counts.itemsize + DEVICE_BYTES


def weight_numbers(widths: Sequence[int]) -> int:
    """Return the number of weights and biases of an encoder and a decoder of such widths."""
    products = sum(before * after for before, after in itertools.pairwise(widths))
    return 2 * products + sum(widths[1:]) + sum(widths[:-1])
