"""Everything wrong with the rows, said at once and before a model is loaded: file, row, column, what and the fix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from peft_fast.errors import DataError, fail
from peft_fast.recipes import columns, media
from peft_fast.recipes.config import Config
from peft_fast.recipes.data import MEND, SKIP, inputs, keys
from peft_fast.recipes.splits import SOME, Splits, classes_of, each, listed
from peft_fast.recipes.tasks import Problem, Task

REMOVE = "Remove it from one of them"


def run(splits: Splits, task: Task, config: Config) -> tuple[Splits, list[str]]:
    """The splits without the rows that are to be skipped, and notes. Raises DataError with every problem."""
    notes = list(getattr(splits, "notes", ()))
    left_out = [problem for problem in splits.problems if problem.row is not None]
    long: dict[str, set[int]] = {}
    problems = [*_long(splits, task, config, notes, long), *splits.problems, *_unusable(splits), *task.check(splits)]
    # a row that is left out for its length has no other problem
    problems = [problem for problem in problems if problem.index not in long.get(problem.split, ())]
    skips = config.bad_rows == "skip"
    pending = not skips and any(problem.split == "train" for problem in left_out)
    problems += _classes(splits, task, pending)
    if task.modality != "series":
        fix = REMOVE if skips else f"{REMOVE}, or leave it out of training with bad_rows: skip"
        problems += _duplicates(splits, task, notes, fix)
    stops = [problem for problem in problems if problem.stops]
    fatal = [p for p in stops if not (skips and (p.index is not None or p in left_out))]
    if fatal:
        do = SKIP if any(p.index is not None or p in left_out for p in fatal) else MEND
        fail(DataError, listed(fatal), "rows that can all be used", do)
    notes += _warnings([problem for problem in problems if not problem.stops])
    if _drop(splits, stops, left_out, notes, long):
        task.learn(splits)  # classes and counts of what is left
        again = [problem for problem in _classes(splits, task) if problem.stops]
        if again:
            fail(DataError, listed(again), "rows enough after bad ones were left out", "mend the data")
    return splits, notes


def _drop(
    splits: Splits, stops: list[Problem], left_out: list[Problem], notes: list[str], long: dict[str, set[int]]
) -> bool:
    """Leave out the rows of problems, and say how many; those too long are said already."""
    gone: dict[str, set[int]] = {}
    for problem in stops:
        if problem.index is not None:
            gone.setdefault(problem.split, set()).add(problem.index)
    before = {split: len({(p.file, p.row) for p in left_out if p.split == split}) for split in splits}
    for split, rows in list(splits.items()):
        places = gone.get(split, set())
        if count := before[split] + len(places):
            kinds = Counter(p.kind for p in dict.fromkeys(stops) if p.split == split)
            why = "; ".join(f"{kind}: {number:,}" for kind, number in kinds.most_common(5))
            notes.append(f"{splits.sources[split]}: {_rows(count)} of {split} left out ({why})")
        if places := places | long.get(split, set()):
            splits.select(split, [place for place in range(len(rows)) if place not in places])
            if not len(splits[split]):
                nothing = Problem(splits.sources[split], None, None, "no row is left", "Mend the rows")
                own = [problem for problem in stops if problem.split == split]
                fail(DataError, listed([nothing, *own]), "rows that can be used", "mend the data")
    return bool(gone or long)


def _warnings(problems: list[Problem]) -> list[str]:
    """A note for each kind: the first of them, and how many there are."""
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        kinds.setdefault((problem.file, problem.kind), []).append(problem)
    more = {key: f" (and {len(found) - 1:,} more)" if len(found) > 1 else "" for key, found in kinds.items()}
    return [f"{found[0]}{more[key]}" for key, found in kinds.items()]


def _problem(splits: Splits, split: str, place: int, role: str | None, what: str, fix: str, **more: Any) -> Problem:
    row = splits[split][place].get("row") if role not in columns.MEDIA else splits[split]["row"][place]
    name = splits.names.get(role, role) if role else None
    return Problem(splits.file(split, place), row, name, what, fix, index=place, split=split, **more)


def _unusable(splits: Splits) -> Iterator[Problem]:
    """Pictures and recordings that cannot be read."""
    for split, rows in splits.items():
        for role in columns.MEDIA:
            if role in rows.column_names:
                for place, (file, reason) in media.wrong(rows, role, role).items():
                    fix = "Replace or remove the file"
                    yield _problem(splits, split, place, role, f"{file} cannot be read: {reason}", fix)


# ---- classes and values


def _classes(splits: Splits, task: Task, pending: bool = False) -> Iterator[Problem]:
    for column in task.columns:
        if column.role in splits["train"].column_names and column.required:
            if column.holds == "label":
                yield from _labels(splits, column.role, pending)
            elif column.holds == "number" and task.modality != "series":
                yield from _constant(splits, column.role)


def _labels(splits: Splits, role: str, pending: bool) -> Iterator[Problem]:
    """One class only, as many classes as rows, names that differ in case, and classes that training never sees."""
    cells = {split: rows[role][:] for split, rows in splits.items()}
    counts = classes_of(cells["train"])
    wrong = splits.no_classes(role, pending)
    if wrong or len(counts) < 2:
        yield from [wrong] if wrong else ()
        return
    yield from _spellings(counts, splits.sources["train"], splits.names.get(role, role))
    for split, found in cells.items():
        if split == "train":
            continue
        for place, cell in enumerate(found):
            for label in each(cell):
                if label not in counts:
                    yield _problem(splits, split, place, role, *_unseen(label, counts))


def _unseen(label: str, counts: Counter) -> tuple[str, str]:
    known = sorted(counts)
    shown = ", ".join(known[:10]) + (", …" if len(known) > 10 else "")
    what = f"label {label!r} is in no training row (those have {shown})"
    near = next((name for name in known if name.casefold() == label.casefold()), None)
    numbers = [name for name in known if name.lstrip("-").isdigit()]
    if near:
        return what, f"Write {near!r}"
    if label.lstrip("-").isdigit() and not numbers:
        return what, "Write the class's name instead of its number"
    if numbers and len(numbers) == len(known) and not label.lstrip("-").isdigit():
        return what, "Write the class's number instead of its name"
    return what, "Correct it, or train on rows of that class"


def _spellings(counts: Counter, file: str, column: str) -> Iterator[Problem]:
    folded: dict[str, str] = {}
    for label in counts:
        other = folded.setdefault(label.casefold(), label)
        if other != label:
            what = f"classes {other!r} and {label!r} differ in case alone"
            yield Problem(file, None, column, what, "Write them alike if they are one", stops=False)
    numbers = [label for label in counts if label.lstrip("-").isdigit()]
    if numbers and len(numbers) < len(counts) and len(counts) <= SOME:
        names = [label for label in counts if label not in numbers]
        what = f"numbers ({', '.join(numbers[:3])}) and names ({', '.join(names[:3])}) are both classes"
        yield Problem(file, None, column, what, "Write them alike if a number stands for a name", stops=False)


def _constant(splits: Splits, role: str) -> Iterator[Problem]:
    cells = splits["train"][role][:]
    if len(cells) > 1 and all(cell == cells[0] for cell in cells):
        what, name = f"every value is {cells[0]}", splits.names.get(role, role)
        yield Problem(splits.sources["train"], None, name, what, "Name the column that is to be predicted with columns")


# ---- rows that are alike


def _duplicates(splits: Splits, task: Task, notes: list[str], fix: str) -> Iterator[Problem]:
    """Training rows that validation or test have too; those that one split has twice are only said."""
    wanted = inputs(task, splits["train"])
    # where a text is learnt, the same question with another answer is another row
    compared = wanted + [
        c for c in task.columns if c.holds == "text" and c not in wanted and c.role in splits["train"].column_names
    ]
    compared = [c for c in compared if all(c.role in rows.column_names for rows in splits.values())]
    if not compared:
        return
    by_split = dict(zip(splits, keys(list(splits.values()), compared), strict=True))
    role = compared[0].role
    first: dict[Any, tuple[str, int]] = {}
    for split in ("test", "validation"):
        alike = 0
        for place, key in enumerate(by_split.get(split, ())):
            alike += key in first
            first.setdefault(key, (split, place))
        if alike:
            notes.append(f"{splits.sources[split]}: {_rows(alike)} of {split} twice, or in test too")
    for place, key in enumerate(by_split["train"]):
        if key in first:
            split, other = first[key]
            what = f"the same row is in {split}: {splits.file(split, other)}, row {splits[split]['row'][other]}"
            yield _problem(splits, "train", place, role, what, fix)
    _twice(splits, task, by_split["train"], notes)


def _twice(splits: Splits, task: Task, found: list[Any], notes: list[str]) -> None:
    """Rows that train has more than once, and those of them with another truth."""
    if len(set(found)) == len(found):
        return
    rows = splits["train"]
    truths = [c.role for c in task.columns if c.role in rows.column_names and columns.is_truth(c)]
    answers = list(zip(*(map(str, rows[role][:]) for role in truths), strict=True)) if truths else [()] * len(found)
    seen: dict[Any, int] = {}
    again, other = [], []
    for place, key in enumerate(found):
        before = seen.setdefault(key, place)
        if before != place:
            (again if answers[before] == answers[place] else other).append((before, place))
    for pairs, how in ((again, ""), (other, " with another answer")):
        if pairs:
            a, b = (rows["row"][place] for place in pairs[0])
            said = f"{_rows(len(pairs))} more than once{how}; the first is row {b}, as row {a}"
            notes.append(f"{splits.sources['train']}: {said}")


# ---- rows that are too long


def _long(splits: Splits, task: Task, config: Config, notes: list[str], long: dict[str, set[int]]) -> Iterator[Problem]:
    """Of rows that are too long: a note if they are cut, their places in ``long`` if skipped, else a problem each."""
    for split, rows in splits.items():
        found = task.too_long(rows)
        for role, (sizes, most) in (found if isinstance(found, dict) else {None: found} if found else {}).items():
            places = [place for place, size in enumerate(sizes) if size > most]
            if not places:
                continue
            who = f"{len(places):,} of {len(rows):,} rows of {split}"
            are = f"are longer than {_size(most)} {task.unit}" + (f" in {splits.names.get(role, role)}" if role else "")
            if config.long_rows == "truncate":
                top = max(places, key=lambda place: sizes[place])
                where = f"row {rows['row'][top]} has {_size(sizes[top])}"
                notes.append(f"{splits.sources[split]}: {who} {are} and {task.truncates(split, role)} ({where})")
            elif config.long_rows == "skip":
                notes.append(f"{splits.sources[split]}: {who} {are} and are left out")
                long.setdefault(split, set()).update(places)
            else:
                for place in places:
                    what = f"{_size(sizes[place])} {task.unit}, {_size(most)} at most"
                    yield _problem(splits, split, place, role, what, "Shorten it, or cut it with long_rows: truncate")


def _rows(count: int) -> str:
    return f"{count:,} row{'s' * (count > 1)}"


def _size(value: float) -> str:
    return f"{value:,.1f}" if value != int(value) else f"{int(value):,}"
