"""What a run is asked to do: the same models for the library, the command line, YAML files and the flows."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    create_model,
    field_validator,
    model_validator,
)

from semids.arrays import capacity_of, format_shape, parse_shape
from semids.capacity import Bounds, resolve_bounds
from semids.catalogue import CatalogueSettings
from semids.embedders.base import Embedder, EmbedderSettings, embedder_types
from semids.errors import UsageError
from semids.quantizers.base import MAPPINGS, MappingName, Quantizer, QuantizerSettings, quantizer_types
from semids.remote import is_remote
from semids.semantic_ids import LETTERS
from semids.settings import Settings
from semids.text import printable

QUANTIZERS = quantizer_types()
EMBEDDERS = embedder_types()

MOST_IDS = 1 << 63
MOST_LEVELS = len(LETTERS) - 1
SIX_SHAPES = tuple(format_shape([size] * levels) for levels in (3, 4) for size in (128, 256, 512))


def _known_quantizer(name: str) -> str:
    if name not in QUANTIZERS:
        raise ValueError(f"expected one of {', '.join(QUANTIZERS)}, got {name!r}")
    return name


def _shape_of_one_level(shape: Any) -> Any:
    # YAML reads `shape: 256` as a number.
    return str(shape) if isinstance(shape, int) and not isinstance(shape, bool) else shape


def _usable_shape(shape: str) -> str:
    try:
        sizes = parse_shape(shape)
    except UsageError as error:
        # pydantic collects ValueErrors and names the field.
        raise ValueError(str(error)) from None
    if len(sizes) > MOST_LEVELS:
        raise ValueError(
            f"expected at most {MOST_LEVELS} levels (a letter each, one kept for a suffix), got {len(sizes)}"
        )
    return format_shape(sizes)


def _bound(value: Any) -> Any:
    # A form has a box of text for it.
    if not isinstance(value, str) or value == "auto":
        return value
    return None if value.strip().lower() in ("", "none") else value.strip()


def _one_or_more(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


QuantizerName = Annotated[
    str, AfterValidator(_known_quantizer), WithJsonSchema({"type": "string", "enum": list(QUANTIZERS)})
]
Shape = Annotated[
    str,
    BeforeValidator(_shape_of_one_level),
    AfterValidator(_usable_shape),
    WithJsonSchema({"type": "string", "pattern": r"^\s*[0-9]+(\s*[xX]\s*[0-9]+)*\s*$"}),
]
AS_TEXT = (BeforeValidator(_bound), WithJsonSchema({"type": "string"}))
Limit = Annotated[Literal["auto"] | Annotated[int, Field(ge=1)] | None, *AS_TEXT]

if TYPE_CHECKING:
    AnyEmbedderSettings = EmbedderSettings
    QuantizerOptions = Settings
else:
    # The families decide: a new member appears here, in the run form and in YAML because its file exists.
    AnyEmbedderSettings = functools.reduce(operator.or_, (member.settings_type for member in EMBEDDERS.values()))
    if len(get_args(AnyEmbedderSettings)) > 1:
        AnyEmbedderSettings = Annotated[AnyEmbedderSettings, Field(discriminator="kind")]
    QuantizerOptions = create_model(
        "QuantizerOptions",
        __base__=Settings,
        __doc__="How each quantizer trains.",
        **{
            name: (
                member.settings_type,
                Field(member.settings_type(), title=member.settings_type.model_config.get("title")),
            )
            for name, member in QUANTIZERS.items()
        },
    )


class CommonConfig(Settings):
    """What one configuration and a sweep of them have in common."""

    form_order = ("catalogue", "embedder", "out", "seed")

    catalogue: CatalogueSettings
    """The items, and where their texts or vectors are."""
    embedder: AnyEmbedderSettings = Field(
        default_factory=lambda: EMBEDDERS["transformer"].settings_type(), title="Embedding model"
    )
    """The model that turns texts into vectors; unused where the catalogue holds vectors."""
    options: QuantizerOptions = Field(default_factory=QuantizerOptions, title="Training")
    """How each quantizer trains."""
    suffix: bool = False
    """Add a last token that makes every item's ID unique (TIGER's way of resolving collisions)."""
    min_contents_per_id: Annotated[Literal["auto"] | Annotated[int, Field(ge=0)], *AS_TEXT] = "auto"
    """Distinct contents that every ID must have under the mapping capacity: auto takes 1 where there are enough of
    them, else 0."""
    seed: int = Field(0, ge=0, lt=1 << 31, title="Random seed")
    """Decides samples and starts: the same seed gives the same IDs."""
    alarm_collision_rate: float = Field(1.0, ge=0, le=1, title="Alarm above this collision rate")
    """A configuration that ends above it raises an event, of which an automation may make a message: from 0 to 1, which
    never does. Under the mapping capacity, contents that collide where IDs suffice raise one in any case."""
    out: str = Field("runs", title="Run folder")
    """What it already holds is reused; another process may not write to it at the same time."""
    copy_to: str = Field("", title="Copy results to")
    """URL of a folder, such as s3://bucket/semantic-ids, that gets copies of the results too. Empty: none."""
    ray: str = Field("", title="Ray cluster")
    """Spreads the shards of vectors and codes, the placing of contents under capacity, and the cells of a sweep over
    the machines of a Ray cluster where the run folder has the same path: its address, such as ray://10.0.0.1:10001, or
    auto for the one that this machine belongs to. Empty: this machine alone."""

    @field_validator("out")
    @classmethod
    def _plain_folder(cls, out: str) -> str:
        if not out.strip() or "\0" in out:
            raise ValueError("expected a folder, got an empty name or one with a NUL character")
        return out

    @field_validator("copy_to")
    @classmethod
    def _openable(cls, place: str) -> str:
        if place and not is_remote(place):
            raise ValueError(f"expected a URL such as s3://bucket/folder, got {place!r}")
        return place

    def make_embedder(self) -> Embedder:
        """Return the embedder, not loaded yet."""
        return EMBEDDERS[getattr(self.embedder, "kind")](self.embedder)  # noqa: B009


def _check_settings(config: CommonConfig, quantizer: str, shape: str) -> None:
    try:
        QUANTIZERS[quantizer].check_settings(parse_shape(shape), getattr(config.options, quantizer))
    except UsageError as error:
        raise ValueError(str(error)) from None


def _check_limits(config: CommonConfig, shapes: Sequence[str], limits: Sequence[Limit]) -> None:
    """Refuse what the mapping capacity can do with no catalogue."""
    for shape in shapes:
        if capacity_of(parse_shape(shape)) >= MOST_IDS:
            raise ValueError(f"the mapping capacity numbers IDs with 63 bits: {shape} has too many")
    least = config.min_contents_per_id
    for most in limits:
        if least != "auto" and most != "auto" and most is not None and least > most:
            raise ValueError(f"expected min_contents_per_id of at most max_contents_per_id, {most}, got {least}")


class BuildConfig(CommonConfig):
    """One configuration: a catalogue, a model, a shape, a mapping, a quantizer."""

    form_order = ("shape", "mapping", "quantizer", *CommonConfig.form_order)

    shape: Shape = "256x256x256"
    """Codebook sizes (codewords), first level first, joined by x: 128x128x128 has three levels of 128 codewords."""
    mapping: MappingName = "nearest"
    """nearest: least error. uniform: every codeword of a level equally used. capacity: no ID has more contents than the
    bounds allow, so that collisions are as few as can be."""
    quantizer: QuantizerName = "residual_kmeans"
    """How codebooks are made."""
    max_contents_per_id: Limit = "auto"
    """Distinct contents that may share an ID under the mapping capacity: 1 allows no collision, none sets no limit,
    and auto takes the least that the numbers of contents and of IDs allow."""

    @model_validator(mode="after")
    def _mapping_exists(self) -> BuildConfig:
        mappings = QUANTIZERS[self.quantizer].mappings
        if self.mapping not in mappings:
            raise ValueError(f"{self.quantizer} offers the mappings {', '.join(mappings)}, got {self.mapping!r}")
        if self.mapping == "capacity":
            _check_limits(self, [self.shape], [self.max_contents_per_id])
        _check_settings(self, self.quantizer, self.shape)
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codebook size of each level."""
        return parse_shape(self.shape)

    @property
    def label(self) -> str:
        """The configuration in a name of letters, digits and dashes."""
        bounds = ""
        if self.mapping == "capacity" and self.max_contents_per_id != "auto":
            bounds += f"-max{self.max_contents_per_id or 'none'}"
        if self.mapping == "capacity" and self.min_contents_per_id != "auto":
            bounds += f"-min{self.min_contents_per_id}"
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"{self.shape}-{self.mapping}{bounds}-{self.quantizer.replace('_', '-')}{seed}"

    def quantizer_settings(self) -> QuantizerSettings:
        """Return the settings of the chosen quantizer."""
        return getattr(self.options, self.quantizer)

    def make_quantizer(self, contents: int) -> Quantizer:
        """Return the quantizer, not trained yet, for a catalogue of D distinct contents."""
        bounds = self.bounds(contents) if self.mapping == "capacity" else None
        return QUANTIZERS[self.quantizer](
            self.sizes, self.mapping, self.quantizer_settings(), seed=self.seed, bounds=bounds
        )

    def bounds(self, contents: int) -> Bounds:
        """Return how many of D distinct contents an ID may have under the mapping capacity.

        Raises:
            UsageError: they do not fit, or do not suffice.
        """
        return resolve_bounds(
            contents, capacity_of(self.sizes), least=self.min_contents_per_id, most=self.max_contents_per_id
        )


class SweepConfig(CommonConfig):
    """Every combination of shapes, mappings and quantizers over one catalogue and one model."""

    form_order = ("shapes", "mappings", "quantizers", *CommonConfig.form_order)

    shapes: list[Shape] = Field(default=list(SIX_SHAPES), min_length=1)
    """Codebook sizes (codewords), first level first, joined by x: 128x128x128 has three levels of 128 codewords."""
    mappings: list[MappingName] = Field(default=list(MAPPINGS), min_length=1)
    """nearest: least error. uniform: every codeword of a level equally used. capacity: no ID has more contents than the
    bounds allow."""
    quantizers: list[QuantizerName] = Field(default=["residual_kmeans"], min_length=1)
    """How codebooks are made."""
    max_contents_per_id: Annotated[list[Limit], BeforeValidator(_one_or_more)] = Field(["auto"], min_length=1)
    """Distinct contents that may share an ID under the mapping capacity, a cell for each: 1 allows no collision, none
    sets no limit, and auto takes the least that the numbers of contents and of IDs allow. Several show what fewer
    collisions cost."""

    @model_validator(mode="after")
    def _settings_fit(self) -> SweepConfig:
        for quantizer in self.quantizers:
            for shape in self.shapes:
                _check_settings(self, quantizer, shape)
        if "capacity" in self.mappings:
            _check_limits(self, self.shapes, self.max_contents_per_id)
        return self

    @property
    def label(self) -> str:
        """The sweep in a few words."""
        lists = {
            "shape": self.shapes,
            "mapping": self.mappings,
            "quantizer": self.quantizers,
            "limit": self.max_contents_per_id if "capacity" in self.mappings else [],
        }
        counts = [
            f"{len(values)} {name}{'s' * (len(values) > 1)}"
            for name, values in lists.items()
            if len(values) > 1 or name in ("shape", "mapping")
        ]
        return f"{printable(Path(self.catalogue.path).stem)} · {' × '.join(counts)}"

    def cells(self) -> list[BuildConfig]:
        """Return one configuration a combination that exists, without repetition, in the order given."""
        # On a cluster a cell runs whole on one machine.
        common: dict[str, Any] = {name: getattr(self, name) for name in CommonConfig.model_fields} | {"ray": ""}
        no_limits: list[Limit] = ["auto"]
        return [
            BuildConfig(**common, shape=shape, mapping=mapping, quantizer=quantizer, max_contents_per_id=limit)
            for shape in dict.fromkeys(self.shapes)
            for quantizer in dict.fromkeys(self.quantizers)
            for mapping in dict.fromkeys(self.mappings)
            if mapping in QUANTIZERS[quantizer].mappings
            for limit in dict.fromkeys(self.max_contents_per_id if mapping == "capacity" else no_limits)
        ]


class EncodeConfig(Settings):
    """New items that are to get their IDs from a model that is there."""

    model_config = ConfigDict(title="New items")

    new_items: str = Field(title="Files")
    """File, folder or glob with the new items, in columns named as those of the catalogue the model was trained on."""
    model: str = Field(title="Model folder")
    """The folder `model` among the results of a build or of a cell of a sweep."""
    unique: bool = Field(default=False, title="Unique IDs")
    """Every content that the model does not know gets an ID that no content has yet, and the model shown with the
    results knows them. Otherwise it gets the ID that the frozen codebooks give, which may be taken."""
    out: str = Field(default="runs/encoded", title="Run folder")
    """What it already holds is reused; another process may not write to it at the same time."""
    copy_to: str = Field("", title="Copy results to")
    """URL of a folder, such as s3://bucket/semantic-ids, that gets copies of the results too. Empty: none."""
    ray: str = Field("", title="Ray cluster")
    """Spreads the shards of vectors and codes over the machines of a Ray cluster; see the other deployments' forms."""

    @property
    def label(self) -> str:
        """The new items in a name that moves no cursor."""
        return printable(self.new_items)


def read_config(path: Path | str, kind: type[Settings]) -> Any:
    """Return the configuration in a YAML file.

    Raises:
        UsageError: no such file, not YAML, or a key or value that the model refuses; names the field.
    """
    return make_config(kind, read_values(path), source=str(path))


def read_values(path: Path | str) -> dict[str, Any]:
    """Return the keys and values in a YAML file, which need not be a whole configuration.

    Raises:
        UsageError: no such file, not YAML, or something other than keys and values.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected keys and values, got {type(content).__name__}")
    return content


def make_config(kind: type[Settings], values: dict[str, Any], *, source: str) -> Any:
    """Return the configuration of the given values.

    Raises:
        UsageError: a key or value that the model refuses; names the field and the source.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        places = [".".join(str(part) for part in fault["loc"]) or "configuration" for fault in found]
        messages = [fault["msg"].removeprefix("Value error, ") for fault in found]
        faults = "; ".join(f"{place}: {message}" for place, message in zip(places, messages, strict=True))
        raise UsageError(f"{source}: {faults}") from error


def write_config(config: CommonConfig) -> str:
    """Return the configuration as YAML that `read_config` reads back as an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
