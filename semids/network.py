"""A trained multilayer perceptron as arrays: what maps vectors into the space of a quantizer's codebooks, and back."""

from __future__ import annotations

import functools
import itertools
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from semids.arrays import Vectors, widen
from semids.device import DeviceNetwork, accelerator
from semids.errors import ShapeError
from semids.parallel import in_order, slices

CHUNK_ROWS = 2048
"""Rows that pass through all layers at a time: what they become in between stays small."""

_copying = threading.Lock()


@dataclass(frozen=True)
class Network:
    """Linear layers with the positive part of each but the last (ReLU) handed on to the next.

    Args:
        weights: one (d_in, d_out) float32 matrix a layer.
        biases: one (d_out,) float32 array a layer.

    Raises:
        ShapeError: no layer, or layers that do not fit together.
    """

    weights: tuple[NDArray[np.float32], ...]
    biases: tuple[NDArray[np.float32], ...]

    def __post_init__(self) -> None:
        shapes = [weight.shape for weight in self.weights]
        fitting = all(before[1] == after[0] for before, after in itertools.pairwise(shapes))
        if not shapes or not fitting or [bias.shape for bias in self.biases] != [shape[1:] for shape in shapes]:
            raise ShapeError(f"expected layers that fit together, got weights of shapes {shapes}")

    @property
    def _on_device(self) -> DeviceNetwork | None:
        """What does the arithmetic instead, where there is a device for it: one copy, whichever thread comes first."""
        with _copying:
            return self._device_copy

    @functools.cached_property
    def _device_copy(self) -> DeviceNetwork | None:
        device = accelerator()
        return DeviceNetwork(self.weights, self.biases, device) if device is not None else None

    @property
    def dimensions(self) -> tuple[int, int]:
        """Widths of what goes in and of what comes out."""
        return self.weights[0].shape[0], self.weights[-1].shape[1]

    def apply(self, rows: Vectors) -> NDArray[np.float32]:
        """Return what (n, d_in) rows become, (n, d_out) float32.

        A row is computed along with the others of its chunk, so that the bytes do not depend on the number of threads.
        """
        if self._on_device is not None:
            return self._on_device.apply(rows)
        out = np.empty((len(rows), self.dimensions[1]), np.float32)
        parts = slices(len(rows), CHUNK_ROWS)
        for part, found in zip(parts, in_order(lambda part: self._apply_chunk(rows[part]), parts), strict=True):
            out[part] = found
        return out

    def _apply_chunk(self, rows: Vectors) -> NDArray[np.float32]:
        values = rows if rows.dtype == np.float32 else widen(rows, out=np.empty(rows.shape, np.float32))
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            values = values @ weight
            values += bias
            if layer < len(self.weights) - 1:
                np.maximum(values, 0, out=values)
        return values
