"""What code a step is made of: a digest of the definitions it reaches, blind to comments, docstrings and types."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semids.parser import parsing

PACKAGE = "semids"
INFRASTRUCTURE = frozenset(
    f"{PACKAGE}.{name}"
    for name in (
        "embedders.base",
        "errors",
        "families",
        "fingerprints",
        "memory",
        "parallel",
        "parser",
        "progress",
        "quantizers._rqvae_memory",
        "settings",
        "shards",
        "stages",
        "store",
    )
)
"""Modules that move and guard bytes but do not choose them: a change in them makes no step run again."""

MODULE = "*"
"""Stands for all names of a module."""
UNNAMED = ""
"""Stands for the statements of a module that define no name."""


def code_digest(*functions: Callable[..., Any]) -> dict[str, str]:
    """Return a digest, 16 hex digits, of what the functions reach in each semids module, by module.

    They reach the functions, classes and constants of semids that their code names, and those that these name
    in turn; a class counts whole. What they are handed (a member of a family) is to be given as a function, too.
    A method reaches the methods and values of its class that it names, and the bases of the class.
    """
    reached: dict[str, dict[str, str]] = defaultdict(dict)
    waiting = [(function.__module__, function.__qualname__) for function in functions]
    while waiting:
        module, name = _resolve(*waiting.pop())
        if not module.startswith(f"{PACKAGE}.") or module in INFRASTRUCTURE or name in reached[module]:
            continue
        definition = _definition(module, name)
        reached[module][name] = definition.digest
        waiting += definition.names
    return {module: _sha256(sorted(reached[module].items())) for module in sorted(reached) if reached[module]}


def method_code(member: type, method: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return what `code_digest` is to be given for a method that an object of class `member` runs.

    A method may call others through its object, which then are those of the object's class: besides the method, all
    classes count that `member` inherits from and the class that defines the method does not. A function that is no
    method calls none of them, and stands for itself.
    """
    if "." not in method.__qualname__:
        return [method]
    named = method.__module__, method.__qualname__.rpartition(".")[0]
    defining = next((owner for owner in member.__mro__ if (owner.__module__, owner.__qualname__) == named), object)
    return [method, *(owner for owner in member.__mro__ if owner not in defining.__mro__)]


@dataclass(frozen=True)
class _Definition:
    """A definition's digest and the (module, name) of all that it names."""

    digest: str
    names: frozenset[tuple[str, str]]


@dataclass(frozen=True)
class _Source:
    """A module's statements by the name that each defines, and the (module, name) that imports stand for."""

    statements: Mapping[str, list[ast.stmt]]
    imports: Mapping[str, tuple[str, str]]


def _resolve(module: str, name: str) -> tuple[str, str]:
    """Follow a name to the module that defines it, through those that only import it."""
    while module.startswith(f"{PACKAGE}.") and name != MODULE:
        source = _source(module)
        if name.partition(".")[0] in source.statements or name not in source.imports:
            break
        module, name = source.imports[name]
    return module, name


@functools.cache
def _source(module: str) -> _Source:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise AssertionError(f"module {module} has no source file")
    text = Path(spec.origin).read_text(encoding="utf-8")
    tree = _Bare().visit(parsing(lambda: ast.parse(text)))
    imports: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                imports[alias.asname or alias.name] = _imported(node.module, alias.name)
        elif isinstance(node, ast.Import):
            imports |= {alias.asname: (alias.name, MODULE) for alias in node.names if alias.asname}
    statements: dict[str, list[ast.stmt]] = defaultdict(list)
    for statement in tree.body:
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            for name in _defined(statement):
                statements[name].append(statement)
    return _Source(statements, imports)


def _imported(module: str, name: str) -> tuple[str, str]:
    # `from semids import pipeline` names a module, all of which may then be used.
    is_module = module == PACKAGE and importlib.util.find_spec(f"{module}.{name}") is not None
    return (f"{module}.{name}", MODULE) if is_module else (module, name)


def _defined(statement: ast.stmt) -> Iterable[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    names = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in ast.walk(statement) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    # What defines nothing acts when the module is imported.
    return names or [UNNAMED]


@functools.cache
def _definition(module: str, name: str) -> _Definition:
    source = _source(module)
    # The module itself was named, and any of it may be used.
    names = {(module, defined) for defined in source.statements} if name == MODULE else set[tuple[str, str]]()
    owner, _, method = name.rpartition(".")
    nodes: list[ast.AST] = [*source.statements.get(owner or name, ()), *source.statements.get(UNNAMED, ())]
    if owner:
        classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
        methods = {node.name: node for found in classes for node in found.body if isinstance(node, ast.FunctionDef)}
        used = {node.attr for node in ast.walk(methods[method]) if isinstance(node, ast.Attribute)}
        names |= {(module, f"{owner}.{other}") for other in used & methods.keys()}
        values = [
            node
            for found in classes
            for node in found.body
            if isinstance(node, ast.Assign | ast.AnnAssign) and used.intersection(_defined(node))
        ]
        nodes = [methods[method], *values, *(base for found in classes for base in found.bases)]
    for node in (found for part in nodes for found in ast.walk(part)):
        if isinstance(node, ast.Name) and (node.id in source.statements or node.id in source.imports):
            names.add((module, node.id))
    return _Definition(_sha256([ast.dump(node, include_attributes=False) for node in nodes]), frozenset(names))


def _sha256(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


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
