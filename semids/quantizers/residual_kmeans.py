"""Residual k-means: one codebook a level, fitted to what the levels before it left over."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field

from semids.arrays import Codes
from semids.blocks import Take
from semids.free_ids import find_free_ids
from semids.kmeans import Lloyd, fit_codebook, training_budget
from semids.progress import Progress
from semids.quantizers._bounded import bounded_codes, bounded_steps, bounded_tensors
from semids.quantizers._codebooks import level_tensors, read_codebooks
from semids.quantizers._uniform import sample_residuals, uniform_steps
from semids.quantizers._work import codebook_bytes, codebook_work, encoding_work
from semids.quantizers.base import (
    FrozenQuantizer,
    MappingName,
    Quantizer,
    QuantizerSettings,
    StepOutcome,
    Tensors,
    TrainingData,
    TrainingStep,
)
from semids.residual import ResidualCodebooks
from semids.work import Counts, Work


class ResidualKMeansSettings(QuantizerSettings):
    """How the codebooks of residual k-means are fitted."""

    model_config = ConfigDict(title="Residual k-means")

    iterations: int = Field(25, ge=1, le=1000)
    """Lloyd steps of a start. More than 50 gain little."""
    restarts: int = Field(1, ge=1, le=100)
    """Independent starts of a level, of which the best is kept; time grows in proportion. Where rows are few, 3 gain
    0.5 to 1.6 % of error."""
    weights: Literal["contents", "items"] = "contents"
    """What codebooks are fitted to: contents counts every distinct content once, items as often as there are items with
    it in the training split, so that popular contents lie closer to their codewords. Bounds count contents always."""
    beam: int = Field(1, ge=1, le=64)
    """Paths kept while codes are searched, under the mapping nearest alone. 1 takes the nearest codeword of each level;
    5 finds codes of a lower error in 1.3 times the time; beyond, little more is found."""


class FrozenResidualKMeans(ResidualCodebooks, FrozenQuantizer):
    """Residual codebooks in the space of the vectors themselves."""

    def find_free_ids(self, take: Take, given: Codes, *, rows: int) -> Codes:
        """Return the codes of rows, each its own and none among the given."""
        return find_free_ids(take, self, given, rows=rows)


class ResidualKMeans(Quantizer):
    """Train level by level: first the codebooks of the nearest mapping, then, if asked, another mapping on them.

    Level l is a step of its own and depends on nothing after it, so shapes with a common beginning share it.
    """

    name: ClassVar[str] = "residual_kmeans"
    settings_type: ClassVar[type[QuantizerSettings]] = ResidualKMeansSettings
    mappings: ClassVar[tuple[MappingName, ...]] = ("nearest", "uniform", "capacity")
    settings: ResidualKMeansSettings

    def training_steps(self) -> list[TrainingStep]:
        """Return one step a level for the codebooks, then those of another mapping: a step a level, or more."""
        steps: list[TrainingStep] = []
        weighted = self.settings.weights == "items"
        lloyd = Lloyd(self.settings.iterations, self.settings.restarts)
        for level, size in enumerate(self.sizes, start=1):
            steps.append(
                TrainingStep(
                    name=f"codebook-{level}",
                    title=f"Fit codebook {level} ({size} codewords)",
                    parameters={"size": size, "seed": self.seed, **self.settings.model_dump(exclude={"beam"})},
                    run=type(self)._fit_codebook,
                    work=partial(codebook_work, level, self.sizes, lloyd=lloyd),
                    needs=tuple(f"codebook-{before}" for before in range(1, level)),
                    weighted=weighted,
                )
            )
        codebooks = [step.name for step in steps]
        if self.mapping == "uniform":
            steps += uniform_steps(self.sizes, seed=self.seed, codebooks=codebooks, weighted=weighted)
        if self.bounds is not None and self.mapping == "capacity":
            steps += bounded_steps(self.sizes, self.bounds, seed=self.seed, codebooks=codebooks, weighted=weighted)
        return steps

    def _fit_codebook(
        self, step: TrainingStep, data: TrainingData, needed: Mapping[str, Tensors], progress: Progress
    ) -> StepOutcome:
        size = step.parameters["size"]
        levels = [needed[name] for name in step.needs]
        rows = training_budget(size, data.vectors.layout.columns)
        sample = sample_residuals(data, levels, rows=rows, seed=self.seed)
        steps = self.settings.iterations * self.settings.restarts
        fit = fit_codebook(
            sample.residuals,
            size,
            Lloyd(self.settings.iterations, self.settings.restarts),
            rng=np.random.default_rng((self.seed, 1 + len(levels))),
            weights=sample.weights,
            done=lambda taken: progress(step.title, taken, steps, "Lloyd steps"),
        )
        evidence = {
            "rows": len(sample.residuals),
            "mean_squared_error": fit.mean_squared_error,
            "distinct_codewords": fit.distinct_codewords,
        }
        return StepOutcome({"codebook": fit.codebook, "potentials": np.zeros(size, np.float32)}, evidence)

    def given_codes(self, outcomes: Mapping[str, Tensors]) -> Codes | None:
        """Return what exact rounding gave under the mapping capacity."""
        return bounded_codes(outcomes) if self.mapping == "capacity" else None

    def assemble(self, outcomes: Mapping[str, Tensors]) -> Tensors:
        """Return `codebook_l` (K_l, d) and `potentials_l` (K_l,) float32 for every level l from 1.

        Under the mapping capacity, `price_prefixes_l` (m,) int64 and `prices_l` (m, K_l) float32, besides; where codes
        are searched, `beam` (1,) int64.
        """
        if self.mapping == "capacity":
            return bounded_tensors(outcomes)
        kind = "codebook" if self.mapping == "nearest" else "uniform"
        tensors = level_tensors(outcomes, kind, len(self.sizes))
        return tensors | {name: np.array([value]) for name, value in self.model_parameters().items()}

    def model_parameters(self) -> dict[str, int]:
        """Return the width of the search, where there is one."""
        return {"beam": self.settings.beam} if self.mapping == "nearest" and self.settings.beam > 1 else {}

    def encoding_work(self, counts: Counts) -> Work:
        """Return the work of one product of the vectors with all codewords, or of a search."""
        work = encoding_work(self.sizes, counts, beam=self.settings.beam, known=self.mapping == "capacity")
        return work + Work(disk=codebook_bytes(self.sizes, counts.dimensions))

    @staticmethod
    def freeze(tensors: Tensors) -> FrozenQuantizer:
        """Return the codebooks and potentials as a quantizer."""
        codebooks = read_codebooks(tensors)
        beam = int(tensors["beam"][0]) if "beam" in tensors else 1
        return FrozenResidualKMeans(codebooks.codebooks, codebooks.potentials, codebooks.prices, beam)
