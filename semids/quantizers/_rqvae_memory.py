"""What the training of an RQ-VAE holds in the memory of a CUDA device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from semids.kmeans import training_budget
from semids.shards import ShardLayout
from semids.work import DEVICE_BYTES

if TYPE_CHECKING:
    from semids.quantizers.rqvae import RqvaeSettings

KEPT_BY = {"AdamW": 2, "Adam": 2, "SGD": 0, "Adagrad": 1, "RMSprop": 3}
"""Numbers that an optimizer holds a weight: moments and, of the one that is not fused, two of a step on its way."""


def training_device_bytes(sizes: Sequence[int], settings: RqvaeSettings, vectors: ShardLayout) -> int:
    """Return the most bytes that a process of the training holds on its device, rows that stay there left out.

    Counted are weights, their gradients, what the optimizer keeps of them, and the best weights so far; two batches
    ahead, as they are stored; what products need; and the largest of what it takes, besides, to

    - measure the rows' mean and scale, in float64;
    - start the codebooks from k-means: a sample of latent vectors, and a part of the rows on their way there;
    - take a step, see `step_bytes`;
    - judge the network by the held-out rows, in float64;
    - find a new place for dead codewords: some rows on their way to latent vectors;
    - replace the best weights by better ones.

    Not counted: what the driver holds for a process, some hundreds of MB, which is not free any more when a device is
    asked; what allocation leaves unused between tensors; and a matrix or two of rows × codewords where balanced
    assignment has to begin anew.

    Args:
        vectors: those of the training split.
    """
    from semids.quantizers import _rqvae_rows
    from semids.quantizers._rqvae_evaluation import EVALUATION_ROWS
    from semids.quantizers._rqvae_train import REVIVAL_ROWS

    d, rows, stored = vectors.columns, vectors.rows, vectors.row_bytes
    batch = min(settings.batch_size, rows)
    widest = max(map(sum, itertools.pairwise((0, *settings.layers, settings.e_dim))))
    weights = 4 * (weight_numbers((d, *settings.layers, settings.e_dim)) + sum(sizes) * settings.e_dim)
    # Gradients are sent from a copy of theirs.
    kept = weights * (2 + KEPT_BY[settings.optimizer] + (settings.processes > 1))

    def passed(some: int) -> int:
        """Rows as they come and standardised, and what two layers, one after the other, make of them."""
        return some * (stored + 4 * d + 4 * widest)

    part = min(EVALUATION_ROWS, rows)
    started = 0
    if settings.kmeans_init:
        sample = 4 * min(training_budget(max(sizes), d), rows) * settings.e_dim
        # What k-means holds is not counted: it takes the device where there is room, and the CPU where there is none.
        started = sample + max(sample, passed(part), 4 * part * max(settings.e_dim, *sizes))
    held = min(round(_rqvae_rows.HELD_OUT_SHARE * rows), _rqvae_rows.MOST_HELD_OUT) or rows
    judged = min(batch, held)
    judging = judged * stored + 4 * min(judged, EVALUATION_ROWS) * max(5 * d, d + widest, *sizes)
    if any(settings.sk_epsilons):
        # How training would assign them, which is asked of a whole batch.
        judging = max(judging, judged * (stored + 4 * d + 4 * max(widest, 4 * settings.e_dim + 2 * max(sizes))))
    step = step_bytes(sizes, settings, vectors, -(-batch // settings.processes))
    revived = passed(min(max(REVIVAL_ROWS, *sizes), rows))
    most = max(
        weights + part * (stored + 16 * d), kept + started, kept + weights + max(step, judging, revived, weights)
    )
    return most + _rqvae_rows.BATCHES_AHEAD * batch * stored + DEVICE_BYTES


def step_bytes(sizes: Sequence[int], settings: RqvaeSettings, vectors: ShardLayout, rows: int) -> int:
    """Return the most bytes that a training step holds besides weights, gradients and moments.

    They are the rows as they come, standardised, and as products take them, in 2 bytes; what every layer of the encoder
    makes of them; what is left over before each level, and codes; then either the distances to the codewords of a
    level, of which balanced assignment keeps a second matrix, or what the decoder's layers make of the codewords, how
    far that is from the rows, and its gradient.
    """
    d, layers, e = vectors.columns, 2 * sum(settings.layers), settings.e_dim
    encoded = vectors.row_bytes + 6 * d + layers + 4 * (len(sizes) + 5) * e + 8 * len(sizes)
    balanced = 8 if any(settings.sk_epsilons) else 4
    return rows * (encoded + max(balanced * max(sizes), layers + 6 * d))


def decoder_device_bytes(settings: RqvaeSettings, vectors: ShardLayout) -> int:
    """Return the most bytes that fitting the decoder to codes holds on a device, rows that stay there left out.

    Counted are its weights, their gradients, and both moments and a third number of AdamW; of a batch the rows, what
    layers make of them, and what the squared error needs on its way back; two batches ahead; and what products need.
    """
    from semids.quantizers._rqvae_rows import BATCHES_AHEAD

    d, batch = vectors.columns, min(settings.batch_size, vectors.rows)
    weights = weight_numbers((d, *settings.layers, settings.e_dim)) // 2
    step = batch * (vectors.row_bytes + 12 * d + 2 * sum(settings.layers) + 8 * settings.e_dim)
    return 20 * weights + step + BATCHES_AHEAD * batch * vectors.row_bytes + DEVICE_BYTES


def weight_numbers(widths: Sequence[int]) -> int:
    """Return the number of weights and biases of an encoder and a decoder of such widths."""
    products = sum(before * after for before, after in itertools.pairwise(widths))
    return 2 * products + sum(widths[1:]) + sum(widths[:-1])
