"""The rows of a run by split, and what is known of them besides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from peft_fast.recipes.tasks import Problem

if TYPE_CHECKING:
    from datasets import Dataset

LISTED = 20
SOME = 20  # classes from which on "as many as rows" is a mistake


def classes_of(cells: Iterable[Any]) -> Counter:
    """Rows of each class; a cell is a class, a list of them, or None."""
    return Counter(name for cell in cells for name in each(cell))


def each(cell: Any) -> Iterable[str]:
    return cell if isinstance(cell, list) else [cell] if cell is not None else []


def listed(problems: Sequence[Problem]) -> str:
    """The first problems, a line each, and how many there are of which kind."""
    problems = sorted(problems, key=lambda problem: (problem.row is not None, problem.file, problem.row or 0))
    unique = list(dict.fromkeys(map(str, problems)))
    if len(unique) == 1:
        return unique[0]
    lines = [f"{len(unique):,} problems:", *unique[:LISTED]]
    if len(unique) > LISTED:
        kinds: dict[str, int] = {}
        for problem in problems[LISTED:]:
            kind = f"{problem.file}: {problem.kind}"
            kinds[kind] = kinds.get(kind, 0) + 1
        lines += [f"and {count:,} more in {kind}" for kind, count in kinds.items()]
    return "\n  ".join(lines)


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

    def no_classes(self, role: str, pending: bool = False) -> Problem | None:
        """What is wrong with a column of one class only, or of as many as rows.

        ``pending``: bad rows are to be mended first, and a few good ones beside them say nothing of the classes.
        """
        cells = self["train"][role][:]
        counts, some = classes_of(cells), len(cells) > SOME
        # after a hold-out or a draw these are not the file's
        rows = f"{len(cells):,} {'training ' * ('train' in self.drawn)}row{'s' * (len(cells) != 1)}"
        if len(counts) < 2 and (some or not pending):
            what = f"one class only, {next(iter(counts), None)!r}, in {rows}"
            fix = "Add rows of another class, or name the column of classes with columns"
        elif len(counts) > max(SOME, len(cells) / 2):
            what = f"{len(counts):,} different classes in {rows} ({', '.join(list(counts)[:3])}, …)"
            fix = f"Name the column of classes with columns: {{{role}: NAME}}, or use the task regression for numbers"
        else:
            return None
        return Problem(self.sources["train"], None, self.names.get(role, role), what, fix, split="train")

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
