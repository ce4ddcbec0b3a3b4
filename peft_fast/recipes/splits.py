"""The rows of a run by split, and what is known of them besides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy

from peft_fast.recipes.tasks import Problem

if TYPE_CHECKING:
    from datasets import Dataset


class Splits(dict):
    """The rows by split; where they are from, what is to be said of them, and which could not be used."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: dict[str, str] = {}
        self.notes: list[str] = []
        self.problems: list[Problem] = []
        self.names: dict[str, str] = {}  # role -> column, as the user knows it
        self.drawn: dict[str, str] = {}  # how its rows were chosen, of a split that has not all of a source's
        self._files: dict[str, list[str]] = {}  # of each row, where a split has several

    def add(self, split: str, rows: Dataset, source: str, files: list[str] | None = None) -> None:
        self[split], self.sources[split] = rows, source
        if files:
            self._files[split] = files

    def file(self, split: str, place: int) -> str:
        """The name of the file that row ``place`` of the split is from."""
        return self._files[split][place] if split in self._files else self.sources[split]

    def choose(self, split: str, how: str) -> None:
        """Remember how the split's rows were chosen, besides what was done to it before."""
        self.drawn[split] = "; ".join(filter(None, [self.drawn.get(split), how]))

    def select(self, split: str, places: Sequence[int], into: str | None = None) -> None:
        """Keep only these rows of the split, in this order; with ``into`` as another split."""
        into = into or split
        if split in self._files:
            self._files[into] = [self._files[split][place] for place in places]
        self.sources[into] = self.sources[split]
        self[into] = self[split].select(numpy.asarray(places, dtype=int))  # a list's fingerprint takes seconds

    def copy(self) -> Splits:
        """Another with the same rows, to leave some out of."""
        made = Splits()
        made.update(self)
        for name, value in vars(self).items():
            setattr(made, name, value.copy())
        return made
