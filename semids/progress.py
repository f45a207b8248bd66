"""How long work tells a person where it stands: one callable, whoever listens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

Progress = Callable[[str, int, int, str], None]
"""Called as progress(step, done, total, unit), for example ("embed texts", 65536, 1403098, "texts").

`done` never falls within a step; done == total ends it.
"""


def silent(step: str, done: int, total: int, unit: str) -> None:
    """Listen to nothing."""


class TerminalProgress:
    """Draw a bar with rate and time left for each step on standard error; nothing where that is no terminal."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm[Any]] = {}

    def __call__(self, step: str, done: int, total: int, unit: str) -> None:
        if not sys.stderr.isatty():
            return
        bar = self._bars.get(step)
        if bar is None:
            bar = self._bars[step] = tqdm(desc=step, total=total, unit=f" {unit}", unit_scale=True)
        bar.update(done - bar.n)
        if done >= total:
            bar.close()
            del self._bars[step]
