"""A trained RQ-VAE: what gives vectors their codes, and codes their vectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from semids.arrays import Codes, Vectors, check_codes, check_vectors, code_dtype
from semids.blocks import Take
from semids.free_ids import find_free_ids
from semids.network import CHUNK_ROWS, Network
from semids.parallel import in_order, slices
from semids.quantizers.base import FrozenQuantizer, Tensors
from semids.residual import ResidualCodebooks
from semids.shards import ShardedArray

PART_ROWS = 8 * CHUNK_ROWS
"""Rows that a thread encodes or decodes in one go."""


class FrozenRqvae(FrozenQuantizer):
    """An encoder, codebooks in its latent space, and a decoder.

    Args:
        encoder: from vectors to latent vectors.
        codebooks: with potentials and prices in squared units of the latent space.
        decoder: from latent vectors to vectors.
    """

    def __init__(self, encoder: Network, codebooks: ResidualCodebooks, decoder: Network) -> None:
        self.encoder, self.codebooks, self.decoder = encoder, codebooks, decoder

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codebook size of each level."""
        return self.codebooks.sizes

    @property
    def dimensions(self) -> int:
        """Width d of the vectors."""
        return self.encoder.dimensions[0]

    def encode(self, vectors: Vectors) -> Codes:
        """Return the (n, L) codes of (n, d) vectors."""
        check_vectors(vectors, dimensions=self.dimensions)
        codes = np.empty((len(vectors), len(self.sizes)), dtype=code_dtype(self.sizes))
        parts = slices(len(vectors), PART_ROWS)

        def encode_part(part: slice) -> Codes:
            return self.codebooks.assign(self.encoder.apply(vectors[part]))

        for part, found in zip(parts, in_order(encode_part, parts), strict=True):
            codes[part] = found
        return codes

    def encode_all(self, vectors: ShardedArray) -> Codes:
        """Return the (D, L) codes of all vectors."""
        codes = np.empty((vectors.layout.rows, len(self.sizes)), dtype=code_dtype(self.sizes))
        for start, chunk in vectors.chunks(vectors.layout.shard_rows):
            codes[start : start + len(chunk)] = self.encode(chunk)
        return codes

    def decode(self, codes: Codes, *, depth: int | None = None) -> NDArray[np.float32]:
        """Return (n, d) float32 reconstructions in input space from the first `depth` levels (default all)."""
        return self.decoder.apply(self.codebooks.decode(codes, depth=depth))

    def squared_errors(self, vectors: Vectors, codes: Codes) -> NDArray[np.float32]:
        """Return the (n, L) squared distances of vectors to their reconstructions, by depth, in input space."""
        check_codes(codes, self.sizes)
        errors = np.empty(codes.shape, dtype=np.float32)
        parts = slices(len(vectors), CHUNK_ROWS)

        def measure(part: slice) -> NDArray[np.float32]:
            here = np.empty((len(vectors[part]), len(self.sizes)), np.float32)
            for depth in range(1, len(self.sizes) + 1):
                apart = self.decode(codes[part], depth=depth)
                apart -= vectors[part]
                here[:, depth - 1] = np.einsum("nd,nd->n", apart, apart)
            return here

        for part, found in zip(parts, in_order(measure, parts), strict=True):
            errors[part] = found
        return errors

    def find_free_ids(self, take: Take, given: Codes, *, rows: int) -> Codes:
        """Return the codes of rows, each its own and none among the given."""
        return find_free_ids(lambda some: self.encoder.apply(take(some)), self.codebooks, given, rows=rows)


def read_network(tensors: Tensors, name: str) -> Network:
    """Return the network among tensors: `NAME_weight_l` (d_in, d_out) and `NAME_bias_l` (d_out,) float32, l from 1."""
    layers = range(1, len([key for key in tensors if key.startswith(f"{name}_weight_")]) + 1)
    return Network(
        tuple(tensors[f"{name}_weight_{layer}"] for layer in layers),
        tuple(tensors[f"{name}_bias_{layer}"] for layer in layers),
    )
