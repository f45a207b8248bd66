"""The base of every configuration model: what a YAML file may hold, and how a form shows it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema


def _arrange_form(schema: dict[str, Any], model: type[Settings]) -> None:
    properties: dict[str, Any] = schema.get("properties", {})
    for place, name in enumerate(dict.fromkeys([*model.form_order, *properties])):
        # A server may keep the schema in a form that has no order; forms sort by this.
        properties[name]["position"] = place
        if properties[name].get("type") == "string" and properties[name].get("default", "") is None:
            properties[name]["default"] = ""
    schema["properties"] = dict(sorted(properties.items(), key=lambda item: item[1]["position"]))


def _title(name: str, field: Any) -> str:
    return name.replace("_", " ").capitalize().replace(" id", " ID")


class Settings(BaseModel):
    """An immutable group of parameters; an unknown key is refused; a field's docstring is its description."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        field_title_generator=_title,
        json_schema_extra=_arrange_form,
    )

    form_order: ClassVar[tuple[str, ...]] = ()
    """Fields that a form shows first, in this order."""


def _none_if_empty(value: Any) -> Any:
    return None if value == "" else value


OptionalText = Annotated[str | None, BeforeValidator(_none_if_empty), WithJsonSchema({"type": "string"})]
"""A text that may be left out: None and an empty box of a form are the same."""
