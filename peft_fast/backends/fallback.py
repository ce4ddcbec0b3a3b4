"""Kernels that fail cost speed alone: from then on torch runs their calls, and the reason is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class Fallback:
    """fallback(signature, run, otherwise): run(), or otherwise() from the first time on that the signature's failed.

    ``judge(error)`` says what went wrong and whether it will again; it raises what torch would meet too.
    """

    def __init__(self, name: str, judge: Callable[[Exception], tuple[str, bool]]) -> None:
        self.name, self.judge = name, judge
        self.failed: dict[tuple, str] = {}
        self.calls = 0  # that torch ran so far because a kernel failed: whose time is whose

    def __call__(
        self, signature: tuple, run: Callable[[], Result], otherwise: Callable[[], Result], trusted: bool = True
    ) -> Result:
        """``signature`` starts with what the kernel computes, in words; ``trusted`` is False where none is to run."""
        if trusted and signature not in self.failed:
            try:
                return run()
            except Exception as error:
                what, again = self.judge(error)
                why = f"a {self.name} kernel of {signature[0]} failed and torch runs it instead ({what})"
                if again:
                    self.failed[signature] = why
                warnings.warn(why, RuntimeWarning, stacklevel=2)
        self.calls += 1
        return otherwise()

    def reasons(self) -> list[str]:
        """Why calls ran on the torch backend, a sentence each."""
        return sorted(set(self.failed.values()))
