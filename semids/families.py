"""Families: packages whose modules each hold one member, found by looking."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Protocol, TypeVar, cast


class Member(Protocol):
    """What a family needs of a member class: the name it goes by in configurations."""

    name: str


M = TypeVar("M")


def discover_members(package: str, base: type[M]) -> dict[str, type[M]]:
    """Return the concrete subclasses of `base` defined in the modules of `package`, by their `name`, sorted.

    Modules whose name starts with an underscore, and `base` itself, are passed over. A member module must
    be cheap to import: what is heavy (torch, faiss) is imported where it is used.
    """
    members: dict[str, type[M]] = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if info.name.startswith("_") or info.name == "base":
            continue
        module = importlib.import_module(f"{package}.{info.name}")
        for _, found in inspect.getmembers(module, inspect.isclass):
            if issubclass(found, base) and not inspect.isabstract(found) and found.__module__ == module.__name__:
                members[cast("type[Member]", found).name] = found
    return dict(sorted(members.items()))
