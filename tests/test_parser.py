"""Threads that parse at once, which CPython 3.11 to 3.11.7 does not bear, do not fail a run."""

import ast
import gc
import itertools
import weakref
from pathlib import Path

import numpy as np
import pytest
from prefect.states import Failed

from semids.errors import DataError
from semids.parser import TRIES, open_npy, parsing
from tasks.stage import is_worth_retrying


class Cycle:
    """Is found by the garbage collector, in whatever is running then, and has something parsed there."""

    def __init__(self, parsed: list[ast.Module]) -> None:
        self.itself = self
        weakref.finalize(self, lambda: parsed.append(ast.parse("1 + 1")))


def test_what_is_parsed_meanwhile_does_not_fail_a_parse() -> None:
    text = f"numbers = [{', '.join(map(str, range(5000)))}]"
    parsed: list[ast.Module] = []
    gc.collect()
    Cycle(parsed)
    tree = parsing(lambda: ast.parse(text))
    assert len(ast.unparse(tree)) == len(text)
    assert parsed


def test_an_array_is_opened_as_it_was_saved(tmp_path: Path) -> None:
    array = np.arange(12.0).reshape(4, 3)
    np.save(tmp_path / "array.npy", array)
    opened = open_npy(tmp_path / "array.npy")
    assert np.array_equal(opened, array)
    assert not opened.flags.writeable


def test_a_parser_that_fails_is_asked_again() -> None:
    calls = itertools.count(1)

    def fail_twice() -> int:
        if (call := next(calls)) < 3:
            raise SystemError("AST constructor recursion depth mismatch (before=135, after=132)")
        return call

    assert parsing(fail_twice) == 3


def test_a_parser_that_always_fails_fails() -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise SystemError("AST constructor recursion depth mismatch (before=135, after=132)")

    with pytest.raises(SystemError, match="mismatch"):
        parsing(fail)
    assert len(calls) == TRIES


def test_a_task_is_retried_after_the_interpreter_failed_but_not_after_bad_data() -> None:
    assert is_worth_retrying(None, None, Failed(data=SystemError("AST constructor recursion depth mismatch")))
    assert not is_worth_retrying(None, None, Failed(data=DataError("two items have the id 7")))
