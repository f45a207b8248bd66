"""The quantizer family: a space, residual codebooks in it, and a mapping, trained in steps that runs can share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from semids.arrays import Codes, Vectors
from semids.blocks import Take
from semids.capacity import Bounds
from semids.families import discover_members
from semids.network import Network
from semids.progress import Progress
from semids.settings import Settings
from semids.shards import EVERY, ShardedArray
from semids.work import Counts, Work

MappingName = Literal["nearest", "uniform", "capacity"]
MAPPINGS: tuple[MappingName, ...] = get_args(MappingName)

Tensors = dict[str, NDArray[Any]]
"""Named arrays, as a safetensors file holds them."""


class QuantizerSettings(Settings):
    """Base of a member's own settings: what shape, mapping and seed leave open. Every field has a default."""


@dataclass(frozen=True)
class TrainingStep:
    """A part of the training whose outcome is a file of its own; equal steps of two configurations run once.

    Args:
        title: what a person reads in the dashboard.
        parameters: everything besides the vectors and the needed steps that decides the outcome, as JSON.
        run: carries the step out, as `run(quantizer, step, data, needed, progress)`; see `Quantizer.run_step`. Its
            code is part of the step's fingerprint, so it should reach no other step's code.
        work: what it asks of a machine: time, memory, and disk for its tensors. Steps that differ in it alone are
            equal.
        needs: names of earlier steps whose tensors this one starts from.
        space: the one of them whose space this step works in: it gets the vectors there. Empty is that of the contents.
        version: stands for the code, where a changed line must not cost hours: to be raised when the outcome changes.
            0 takes the code itself.
        weighted: the outcome depends on how many items have each content, not only on which contents there are.
        lots: returns, of so many contents, about how many parts the step has that can be made apart, by processes that
            share `TrainingData.folder`, before it is run as a whole; see `TrainingData.lot`. None: it has no parts.
    """

    name: str
    title: str
    parameters: Mapping[str, Any]
    run: Callable[[Any, TrainingStep, TrainingData, Mapping[str, Tensors], Progress], StepOutcome]
    work: Callable[[Counts], Work] = field(compare=False)
    needs: tuple[str, ...] = ()
    space: str = ""
    version: int = 0
    weighted: bool = False
    lots: Callable[[int], int] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class StepOutcome:
    """What a training step leaves.

    Args:
        tensors: named arrays.
        evidence: how it went (convergence, dead codes, error), as JSON.
        encoder: maps the contents' vectors into a space that later steps work in; all of them are written there.
    """

    tensors: Tensors
    evidence: dict[str, Any] = field(default_factory=dict[str, Any])
    encoder: Network | None = None


@dataclass(frozen=True)
class TrainingData:
    """The vectors to train on.

    Args:
        vectors: all distinct contents, (D, d).
        rows: (n,) int64, sorted: the contents of the training split.
        weights: (n,) float32, how many items of the split have each; None: one each.
        folder: where a step may keep what a killed run goes on from; removed once the step is done. None: nowhere.
        lot: which parts of a step that has several are made and kept, of the list of them; the outcome is then nothing.
    """

    vectors: ShardedArray
    rows: NDArray[np.int64]
    folder: Path | None = None
    weights: NDArray[np.float32] | None = None
    lot: slice = field(default_factory=lambda: EVERY)


class FrozenQuantizer(ABC):
    """A trained quantizer: a pure function from vectors to codes, and back to approximate vectors."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """Codebook size of each level."""

    @property
    @abstractmethod
    def dimensions(self) -> int:
        """Width d of the vectors."""

    @abstractmethod
    def encode(self, vectors: Vectors) -> Codes:
        """Return the (n, L) codes of (n, d) vectors."""

    @abstractmethod
    def decode(self, codes: Codes, *, depth: int | None = None) -> NDArray[np.float32]:
        """Return (n, d) float32 reconstructions in input space from the first `depth` levels (default all)."""

    @abstractmethod
    def squared_errors(self, vectors: Vectors, codes: Codes) -> NDArray[np.float32]:
        """Return the (n, L) squared distances of vectors to their reconstructions, by depth, in input space."""

    @abstractmethod
    def find_free_ids(self, take: Take, given: Codes, *, rows: int) -> Codes:
        """Return the (n, L) codes of rows, each its own and none among the (m, L) given; see `free_ids.find_free_ids`.

        Raises:
            UsageError: there are fewer free IDs than rows.
        """


class Quantizer(ABC):
    """A way to train codebooks of a shape under a mapping."""

    name: ClassVar[str]
    """How configurations name the member."""
    settings_type: ClassVar[type[QuantizerSettings]]
    mappings: ClassVar[tuple[MappingName, ...]]
    """The mappings it can train under."""

    def __init__(
        self, sizes: Sequence[int], mapping: MappingName, settings: Any, *, seed: int, bounds: Bounds | None = None
    ) -> None:
        """Keep the parameters; `settings` is of the member's `settings_type`, `bounds` of the mapping capacity.

        Raises:
            UsageError: as `check_settings` does.
        """
        self.check_settings(sizes, settings)
        self.sizes = tuple(sizes)
        self.mapping: MappingName = mapping
        self.settings = settings
        self.seed = seed
        self.bounds = bounds

    @classmethod
    def check_settings(cls, sizes: Sequence[int], settings: Any) -> None:
        """Refuse settings that do not fit a shape, which here is none.

        Raises:
            UsageError: names the setting.
        """
        return

    @abstractmethod
    def training_steps(self) -> list[TrainingStep]:
        """Return the steps of the training, each after those it needs."""

    def run_step(
        self, step: TrainingStep, data: TrainingData, needed: Mapping[str, Tensors], progress: Progress
    ) -> StepOutcome:
        """Return a step's outcome, a function of its arguments alone; `needed` holds the tensors by step name."""
        return step.run(self, step, data, needed, progress)

    @abstractmethod
    def assemble(self, outcomes: Mapping[str, Tensors]) -> Tensors:
        """Return the tensors of the frozen quantizer from those of every step."""

    def model_parameters(self) -> dict[str, Any]:
        """Return what decides the frozen quantizer besides shape, mapping and the training steps, as JSON."""
        return {}

    def given_codes(self, outcomes: Mapping[str, Tensors]) -> Codes | None:
        """Return the (D, L) codes that training gave to the contents, where they are more than what encoding gives."""
        return None

    @abstractmethod
    def encoding_work(self, counts: Counts) -> Work:
        """Return what giving every content its codes and squared errors asks of a machine; its disk is the model's."""

    @staticmethod
    @abstractmethod
    def freeze(tensors: Tensors) -> FrozenQuantizer:
        """Return the quantizer that `assemble`d tensors describe."""


def quantizer_types() -> dict[str, type[Quantizer]]:
    """Return the members of the family by name."""
    return discover_members("semids.quantizers", Quantizer)
