"""What code a step is made of: a digest of the syntax trees it reaches, blind to comments, docstrings and types."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PACKAGE = "semids"
INFRASTRUCTURE = frozenset(
    f"{PACKAGE}.{name}"
    for name in (
        "embedders.base",
        "errors",
        "families",
        "fingerprints",
        "progress",
        "settings",
        "shards",
        "stages",
        "store",
    )
)
"""Modules that move and guard bytes but do not choose them: a change in them makes no step run again."""


def code_digest(function: Callable[..., Any], modules: Iterable[str] = ()) -> dict[str, str]:
    """Return a digest, 16 hex digits, for the function and for every semids module it depends on, by name.

    Functions of the same module that it names are part of it; any other semids module it names counts whole,
    with the modules that one imports. `modules` adds those that are reached through a family.
    """
    own = function.__module__
    digests: dict[str, str] = {}
    reached = set(modules)
    waiting = [function]
    while waiting:
        current = waiting.pop()
        if current.__qualname__ in digests:
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(current)))
        digests[current.__qualname__] = _tree_digest(tree)
        for node in ast.walk(tree):
            named = current.__globals__.get(node.id) if isinstance(node, ast.Name) else None
            home = getattr(named, "__module__", None) or getattr(named, "__name__", "")
            if inspect.isfunction(named) and home == own:
                waiting.append(named)
            elif isinstance(home, str) and home.startswith(f"{PACKAGE}."):
                reached.add(home)
    for module in sorted(_closure(reached)):
        digests[module] = _module_digest(module)
    return dict(sorted(digests.items()))


def _closure(modules: Iterable[str]) -> set[str]:
    found: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module in found or module in INFRASTRUCTURE:
            continue
        found.add(module)
        waiting.extend(_imports(module))
    return found


def _parse(module: str) -> ast.Module:
    # A tree of its own for every caller: threads digest at the same time, and digesting strips the tree.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise AssertionError(f"module {module} has no source file")
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


@functools.cache
def _imports(module: str) -> frozenset[str]:
    names: set[str] = set()
    for node in ast.walk(_parse(module)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{PACKAGE}."):
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names if alias.name.startswith(f"{PACKAGE}."))
    return frozenset(names)


@functools.cache
def _module_digest(module: str) -> str:
    return _tree_digest(_parse(module))


def _tree_digest(tree: ast.AST) -> str:
    bare = _Bare().visit(tree)
    return hashlib.sha256(ast.dump(bare, include_attributes=False).encode()).hexdigest()[:16]


class _Bare(ast.NodeTransformer):
    """Drops what does not compute: docstrings (of fields too) and annotations."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(value=None)
        return self.generic_visit(node)
