"""The embedder family: what a member must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from semids.families import discover_members
from semids.progress import Progress, silent
from semids.settings import Settings


class EmbedderSettings(Settings):
    """Base of a member's settings; every member adds `kind`, a literal equal to its name."""


class Embedder(ABC):
    """Turns texts into unit vectors. Constructing one is cheap; `load` brings the model into memory."""

    name: ClassVar[str]
    """How configurations name the member."""
    version: ClassVar[int]
    """Raised by hand whenever the vectors of an unchanged checkpoint change: embedding costs hours, so its
    fingerprint holds this number and not the code (a test compares vectors of a fixture with stored ones)."""
    settings_type: ClassVar[type[EmbedderSettings]]

    def __init__(self, settings: Any) -> None:
        """Keep settings of the member's own `settings_type`."""
        self.settings = settings

    @property
    @abstractmethod
    def short_name(self) -> str:
        """The model in a word, for the names of folders."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return everything that decides the vectors, as JSON: digests of weights and tokenizer, and parameters.

        Must not import a deep-learning library: a run that reuses its embeddings ends in seconds.

        Raises:
            UsageError: the checkpoint is not to be found, or its revision is not pinned.
        """

    @abstractmethod
    def load(self) -> None:
        """Bring the model into memory and probe it.

        Raises:
            DataError: the checkpoint does not do what its settings promise; says what and how to mend it.
        """

    @property
    @abstractmethod
    def dimensions(self) -> int:
        """Width d of a vector. Only after `load`."""

    @property
    def declared_dimensions(self) -> int | None:
        """The width that the model's files declare, without loading it; None where they do not."""
        return None

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """The most memory that embedding takes, its libraries included and its vectors not, without loading it."""

    @property
    def device_bytes(self) -> int:
        """The most memory of a CUDA device that embedding takes where there is one; 0 for a member that uses none."""
        return 0

    @abstractmethod
    def embed(self, texts: Sequence[str], progress: Progress = silent) -> NDArray[np.float32]:
        """Return (len(texts), d) float32 rows of unit norm, in the order of the texts. Only after `load`."""


def embedder_types() -> dict[str, type[Embedder]]:
    """Return the members of the family by name."""
    return discover_members("semids.embedders", Embedder)
