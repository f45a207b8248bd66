"""RQ-VAE: residual codebooks in the latent space of an encoder network that is trained together with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field, field_validator, model_validator

from semids.arrays import Codes, format_shape
from semids.errors import UsageError
from semids.progress import Progress
from semids.quantizers._bounded import bounded_codes, bounded_steps, bounded_tensors
from semids.quantizers._codebooks import level_tensors, read_codebooks
from semids.quantizers._rqvae_frozen import FrozenRqvae, read_network
from semids.quantizers._rqvae_work import LIBRARY_BYTES, coding_work, decoder_work, latent_work, network_work
from semids.quantizers._uniform import uniform_steps
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
from semids.work import Counts, Work

LEAST_EPSILON = 1e-4
"""Smallest smoothing: below, float32 tells no codewords apart but the nearest."""
NETWORK, LATENT, DECODER = "network", "latent", "decoder"
DECODER_SETTINGS = {"batch_size", "lr", "weight_decay", "epochs"}


class RqvaeSettings(QuantizerSettings):
    """How an RQ-VAE is built and trained, by the names that LC-Rec gave."""

    # The field's own names are what people look for.
    model_config = ConfigDict(title="RQ-VAE", field_title_generator=lambda name, field: name)

    layers: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = (512, 256, 128)
    """Widths of the encoder's hidden layers, from the vectors on; the decoder has them in reverse. The width of the
    vectors is not among them. None makes both linear."""
    e_dim: int = Field(64, ge=1, le=65_536)
    """Width of the latent space, in which the codebooks lie. Small: less to quantize, and less that can be told."""
    batch_size: int = Field(1024, ge=1)
    """Rows of a training step, over all processes. Balanced assignment wants several a codeword."""
    lr: float = Field(1e-3, gt=0)
    """Largest learning rate. Too large ends in an error that names the batch; too small takes more epochs."""
    epochs: int = Field(100, ge=1)
    """Passes over the training rows at most; see patience."""
    warmup_epochs: int = Field(20, ge=0)
    """Epochs in which the learning rate rises. With kmeans_init, the codebooks join after them: k-means on what an
    untrained encoder makes of the rows fits noise, which costs a tenth of the collisions and a sixth of the error."""
    eval_step: int = Field(10, ge=1)
    """Epochs between two evaluations on held-out rows."""
    kmeans_init: bool = True
    """Codebooks start from k-means on a sample of encoded rows. False: from small random codewords, as published."""
    kmeans_iters: int = Field(100, ge=1, le=1000)
    """Lloyd steps of that start."""
    sk_epsilons: tuple[Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)], ...] = ()
    """Smoothing of each level's balanced assignment while training, in halves of the range of distances: 0 takes the
    nearest codeword, 0.003 to 0.05 uses all codewords of a batch about equally; below, 50 iterations do not get there,
    and from 1 on distances hardly count. At least 0.0001 where it is not 0. Empty: 0 on every level."""
    sk_iters: int = Field(50, ge=1)
    """Sinkhorn iterations of that assignment."""
    beta: float = Field(0.25, ge=0)
    """Weight of the commitment loss: how strongly the encoder is drawn to the codewords."""
    quant_loss_weight: float = Field(1.0, gt=0)
    """Weight of the quantization loss; the reconstruction loss has 1, and is of rows scaled to a mean square of 1."""
    optimizer: Literal["AdamW", "Adam", "SGD", "Adagrad", "RMSprop"] = "AdamW"
    """Named as in PyTorch."""
    weight_decay: float = Field(1e-4, ge=0)
    """Pull of all weights to zero."""
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up: it stays, or falls to zero."""
    best_by: Literal["mse", "collisions"] = "mse"
    """What makes an evaluation the best, whose weights are kept: the relative MSE, or first the excess collisions."""
    patience: int = Field(5, ge=0)
    """Evaluations in a row without a better one that end the training; 0 takes all epochs."""
    processes: int = Field(1, ge=1, le=64)
    """Processes on this machine that train together, one a GPU where there are some. Another number rounds sums
    otherwise, which may end in other codes; a network that is there is taken as it is, whatever trained it."""

    @field_validator("sk_epsilons")
    @classmethod
    def _within_float32(cls, sk_epsilons: tuple[float, ...]) -> tuple[float, ...]:
        if any(0 < epsilon < LEAST_EPSILON for epsilon in sk_epsilons):
            raise ValueError(f"expected 0 or at least {LEAST_EPSILON}, got {list(sk_epsilons)}")
        return sk_epsilons

    @model_validator(mode="after")
    def _codebooks_join(self) -> RqvaeSettings:
        if self.kmeans_init and self.epochs <= self.warmup_epochs:
            raise ValueError(
                f"expected more epochs than warmup_epochs, after which the codebooks join, got {self.epochs} and "
                f"{self.warmup_epochs}"
            )
        return self


class Rqvae(Quantizer):
    """Train the network and its codebooks; then, if asked, another mapping on the latent vectors of all contents.

    Codebooks are fitted again under that mapping, as residual k-means fits them, and the decoder after them: without
    it, the error of capacity in input space is a quarter higher.
    """

    name: ClassVar[str] = "rqvae"
    settings_type: ClassVar[type[QuantizerSettings]] = RqvaeSettings
    mappings: ClassVar[tuple[MappingName, ...]] = ("nearest", "uniform", "capacity")
    version: ClassVar[int] = 3
    """Raised when the same configuration trains another network: it takes hours, which no changed line is to cost."""
    decoder_version: ClassVar[int] = 2
    """The same of the decoder that is fitted to another mapping's codes."""
    settings: RqvaeSettings

    @classmethod
    def check_settings(cls, sizes: Sequence[int], settings: Any) -> None:
        """Refuse smoothings that are not one a level."""
        given = len(settings.sk_epsilons)
        if given not in (0, len(sizes)):
            raise UsageError(
                f"rqvae: expected sk_epsilons for each of the {len(sizes)} levels of {format_shape(sizes)}, or none, "
                f"got {given}"
            )

    def training_steps(self) -> list[TrainingStep]:
        """Return the step that trains the network, and those of another mapping in its latent space."""
        parameters = self.settings.model_dump(mode="json", exclude={"processes"})
        network = TrainingStep(
            name=NETWORK,
            title="Train the RQ-VAE",
            parameters={"sizes": list(self.sizes), "seed": self.seed, **parameters},
            run=_train_network,
            work=partial(network_work, self.sizes, self.settings),
            version=self.version,
        )
        if self.mapping == "nearest":
            return [network]
        latent = TrainingStep(
            name=LATENT,
            title="Encode the contents",
            parameters={},
            run=_open_latent_space,
            work=partial(latent_work, self.settings),
            needs=(NETWORK,),
        )
        if self.mapping == "uniform":
            steps = uniform_steps(self.sizes, seed=self.seed, codebooks=[LATENT])
        else:
            assert self.bounds is not None
            steps = bounded_steps(self.sizes, self.bounds, seed=self.seed, codebooks=[LATENT])
        decoder = TrainingStep(
            name=DECODER,
            title="Fit the decoder to the codes",
            parameters={"seed": self.seed, **self.settings.model_dump(include=DECODER_SETTINGS)},
            run=_fit_decoder,
            work=partial(decoder_work, self.sizes, self.settings),
            needs=(NETWORK, LATENT, *(step.name for step in steps)),
            version=self.decoder_version,
        )
        return [network, latent, *(self._in_latent_space(step) for step in steps), decoder]

    def _in_latent_space(self, step: TrainingStep) -> TrainingStep:
        needs = step.needs if LATENT in step.needs else (*step.needs, LATENT)
        return replace(step, needs=needs, space=LATENT, work=partial(_latent_work_of, step, self.settings.e_dim))

    def assemble(self, outcomes: Mapping[str, Tensors]) -> Tensors:
        """Return the network's tensors, and codebooks, potentials and prices as residual k-means has them."""
        networks = outcomes[NETWORK] | outcomes.get(DECODER, {})
        return {name: value for name, value in networks.items() if "coder_" in name} | _mapped_codebooks(
            self.mapping, self.sizes, outcomes
        )

    def given_codes(self, outcomes: Mapping[str, Tensors]) -> Codes | None:
        """Return what exact rounding gave under the mapping capacity."""
        return bounded_codes(outcomes) if self.mapping == "capacity" else None

    def encoding_work(self, counts: Counts) -> Work:
        """Return the work of the encoder, of one product with all codewords, and of the decoder for every depth."""
        return coding_work(self.sizes, self.settings, counts, known=self.mapping == "capacity")

    @staticmethod
    def freeze(tensors: Tensors) -> FrozenQuantizer:
        """Return the networks and codebooks as a quantizer."""
        return FrozenRqvae(read_network(tensors, "encoder"), read_codebooks(tensors), read_network(tensors, "decoder"))


def _latent_work_of(step: TrainingStep, e_dim: int, counts: Counts) -> Work:
    work = step.work(replace(counts, dimensions=e_dim, itemsize=4))
    return replace(work, memory=work.memory + LIBRARY_BYTES)


def _train_network(
    quantizer: Any, step: TrainingStep, data: TrainingData, needed: Mapping[str, Tensors], progress: Progress
) -> StepOutcome:
    """Train in this process, or in several."""
    # Imported here: PyTorch takes seconds, which runs that find everything made save.
    from semids.quantizers._rqvae_outcome import freeze_training
    from semids.quantizers._rqvae_processes import train_together
    from semids.quantizers._rqvae_train import Job, train

    job = Job(
        sizes=quantizer.sizes,
        settings=quantizer.settings,
        seed=quantizer.seed,
        vectors=data.vectors,
        rows=data.rows,
        folder=data.folder,
    )

    def told(what: str, done: int, total: int) -> None:
        progress(f"{step.title}: {what}", done, total, "rows" if what == "train" else "Lloyd steps")

    processes: int = quantizer.settings.processes
    tensors, evidence = train_together(job, told, processes) if processes > 1 else freeze_training(train(job, told))
    return StepOutcome(tensors, evidence)


def _open_latent_space(
    quantizer: Any, step: TrainingStep, data: TrainingData, needed: Mapping[str, Tensors], progress: Progress
) -> StepOutcome:
    network = needed[NETWORK]
    codebooks = {name: value for name, value in network.items() if name.startswith("codebook_")}
    return StepOutcome(codebooks, encoder=read_network(network, "encoder"))


def _fit_decoder(
    quantizer: Any, step: TrainingStep, data: TrainingData, needed: Mapping[str, Tensors], progress: Progress
) -> StepOutcome:
    """Fit the decoder that was trained under the mapping nearest to the codes of another."""
    from semids.quantizers._rqvae_decoder import DecoderJob, fit_decoder

    codebooks = read_codebooks(_mapped_codebooks(quantizer.mapping, quantizer.sizes, needed))
    if quantizer.mapping == "capacity":
        codes = bounded_codes(needed)
    else:
        encoder, decoder = read_network(needed[NETWORK], "encoder"), read_network(needed[NETWORK], "decoder")
        codes = FrozenRqvae(encoder, codebooks, decoder).encode_all(data.vectors)
    job = DecoderJob(needed[NETWORK], codebooks, codes, data, quantizer.settings, quantizer.seed)
    tensors, loss = fit_decoder(job, lambda taken, steps: progress(step.title, taken, steps, "steps"))
    return StepOutcome(tensors, {"rows": len(data.rows), "loss": loss})


def _mapped_codebooks(mapping: MappingName, sizes: Sequence[int], outcomes: Mapping[str, Tensors]) -> Tensors:
    """Return the codebooks, potentials and prices that the steps of a mapping left."""
    if mapping == "capacity":
        return bounded_tensors(outcomes)
    if mapping == "uniform":
        return level_tensors(outcomes, "uniform", len(sizes))
    tensors: Tensors = {}
    for level, size in enumerate(sizes, start=1):
        tensors[f"codebook_{level}"] = outcomes[NETWORK][f"codebook_{level}"]
        tensors[f"potentials_{level}"] = np.zeros(size, np.float32)
    return tensors
