"""Rows a task learns from: read, brought into its roles, held out and drawn; nothing here depends on a model.

    splits = read(config, task)     {"train": Dataset, "validation": Dataset, "test"?: Dataset}, columns = roles + `row`
    rows(source, task)              rows to predict or judge: a file, a folder, dicts or plain values

Rows that have no such form never get into a Dataset: they are `splits.problems`, which checks.run says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_fast.errors import DataError, fail
from peft_fast.recipes import columns, examples, forms, media, sources
from peft_fast.recipes.config import Config
from peft_fast.recipes.files import Table, Unreadable
from peft_fast.recipes.media import audio_seconds, load_audio, load_image
from peft_fast.recipes.splits import Splits, listed
from peft_fast.recipes.tasks import Column, Problem, Task

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Splits", "audio_seconds", "load_audio", "load_image", "read", "rows"]

SKIP = "mend them, or leave such rows out with bad_rows: skip (--bad-rows skip)"
SKIP_USED = "mend them, or leave such rows out with --skip-bad-rows (bad_rows='skip' in Python)"  # eval and predict
MEND = "mend the data, then start again"


# the options that rows depend on, but for series: those read by what they are for
READS = {"task", "data", "columns", "subset", "network", "seed", "validation_share"}
READS |= {"train_rows", "validation_rows", "test_rows"}

_kept: dict[str, tuple[Splits, dict[str, Any]]] | None = None


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Inside, rows are read once for the same READS, and one reading is kept: the runs of a search differ in others."""
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def read(config: Config, task: Task, say: Callable[[str], None] = lambda text: None) -> Splits:
    """The splits of ``config.data``; validation is made of train where there is none."""
    if _kept is None or task.modality == "series":  # a series task notes more than rows while it reads
        return _read(config, task, say)
    key = config.model_dump_json(include=READS, exclude_unset=True)  # whether it was given is said in a note
    if key not in _kept:
        _kept.clear()
        _kept[key] = _read(config, task, say), {name: v for name, v in task.facts.items() if name.endswith(" of")}
    splits, facts = _kept[key]
    task.facts |= facts
    return splits.copy()


def _read(config: Config, task: Task, say: Callable[[str], None]) -> Splits:
    sources.check(config)
    tables = sources.tables(config.data, task, say)
    given = given_columns(config)
    splits = Splits()
    if "validation" in tables and "validation_share" in config.model_fields_set:
        splits.notes.append(f"there is a validation split: validation_share {config.validation_share:g} is not used")
    roles = _roles(tables, task.columns, given)
    splits.names = roles["train"][0]
    for split, parts in tables.items():
        _add(splits, split, parts, roles[split], task.columns)
    _hidden(splits, task)
    for split in list(splits):
        if not len(splits[split]):
            _stop(splits.problems or [Problem(splits.sources[split], None, None, "no rows", "Pass a file with rows")])
    if "validation" not in splits:
        _hold_out(splits, task, config)
    for split in list(splits):
        _draw(splits, split, task, config)
    task.facts |= {f"{role} of": splits.names[role] for role, name in given.items() if name == columns.ALL}
    return splits


def rows(source: str | Path | Iterable[Any], task: Task, need_truth: bool = False) -> Dataset:
    """Rows of a file, folder, hub id or example, or dicts or plain values; without truth only what prediction takes."""
    config = task.config
    if isinstance(source, str | Path):
        tables = sources.tables(source, task)
        split = next(name for name in ("test", "validation", "train") if name in tables)
        parts, here = tables[split], given_columns(config.model_copy(update={"data": str(source)}))
        # a file like the example that was trained on is read like it
        have = set(parts[0].names)
        given = {
            role: name for role, name in given_columns(config).items() if set(re.split(r",\s*", name)) <= have
        } | here
    else:
        given_rows = list(source)
        if not given_rows:
            fail(DataError, "no rows", "one row or more", "pass a text, a dict or a file")
        split, parts, given = "rows", [sources.of_rows(given_rows, task)], given_columns(config)
    wanted = [c for c in task.columns if need_truth or not columns.is_truth(c)]
    if not need_truth:  # a person writes sentences, a data set has words
        wanted = [dataclasses.replace(c, holds="words") if c.holds == "tokens" else c for c in wanted]
    # `*` is what it was in training, and not what is to be found as well
    given |= {role: task.facts[f"{role} of"] for role, name in given.items() if name == columns.ALL}
    given = {role: name for role, name in given.items() if any(c.role == role for c in wanted)}
    if not isinstance(source, str | Path):  # a plain value, or a dict by role, need not be called as in training
        have = set(parts[0].names)
        given = {role: name for role, name in given.items() if role not in have or name in have}
    splits = Splits()
    _add(splits, split, parts, _roles({split: parts}, wanted, given)[split], wanted)
    if splits.problems and (config.bad_rows == "stop" or not len(splits[split])):
        _stop(splits.problems, SKIP_USED if len(splits[split]) else MEND)
    return splits[split]


def given_columns(config: Config) -> dict[str, str]:
    """role -> column as the example, then the config says."""
    found: dict[str, str] = {}
    for source in config.data.values() if isinstance(config.data, dict) else [config.data]:
        if examples.named(source):
            found |= examples.get(source).columns
    return found | config.columns


def _roles(
    tables: dict[str, list[Table]], wanted: Sequence[Column], given: dict[str, str]
) -> dict[str, list[dict[str, str]]]:
    """Of each table role -> column. Raises DataError with all that lack one."""
    if strange := sorted(set(given) - {column.role for column in wanted}):
        known = ", ".join(column.role for column in wanted)
        fail(DataError, f"columns: no role {', '.join(strange)}", f"roles of this task: {known}", "correct columns")
    found: dict[str, list[dict[str, str]]] = {}
    wrong = []
    for split, parts in tables.items():
        found[split] = []
        for table in parts:
            if not table.names and table.problems:  # not one row could be read
                wrong += table.problems
                continue
            try:
                found[split].append(columns.assign(table, wanted, given))
            except Unreadable as error:
                wrong.append(error.problem)
    if wrong:
        roles = ", ".join(column.role + ("" if column.required else " (optional)") for column in wanted)
        fail(DataError, listed(wrong), f"columns for {roles}", "name them with columns, or in the file")
    shared = set.intersection(*({*roles} for parts in found.values() for roles in parts))
    return {
        split: [{r: n for r, n in roles.items() if r in shared} for roles in parts] for split, parts in found.items()
    }


def _add(splits: Splits, split: str, parts: list[Table], roles: list[dict[str, str]], wanted: Sequence[Column]) -> None:
    """One split of the rows of all its tables that have the forms the task needs."""
    import datasets

    pieces, places = [], []
    for table, names in zip(parts, roles, strict=True):
        splits.problems += [dataclasses.replace(problem, split=split) for problem in table.problems]
        piece, kept = _converted(splits, split, table, names, wanted)
        pieces.append(piece)
        places += [table.file] * kept
    merged = pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)
    source = parts[0].file if len(parts) == 1 else f"{Path(parts[0].file).parent.name or parts[0].file} and more"
    if len(parts) > 1:
        source = f"{parts[0].file} … {parts[-1].file} ({len(parts)} files)"
    splits.add(split, merged, source, places if len(parts) > 1 else None)


def _converted(
    splits: Splits, split: str, table: Table, names: dict[str, str], wanted: Sequence[Column]
) -> tuple[Dataset, int]:
    import datasets
    import pyarrow

    made: dict[str, list[Any]] = {}
    encoded: list[Dataset] = []
    wrong: set[int] = set()
    for column in wanted:
        name = names.get(column.role)
        if name is None:
            continue
        if column.holds in columns.MEDIA and type(table.features.get(name)).__name__ in ("Image", "Audio"):
            only = table.dataset.select_columns([name])
            encoded.append(only if name == column.role else only.rename_column(name, column.role))
            continue
        made[column.role], bad = columns.convert(table, column, name)
        if column.role == "answers" and "context" in made:
            bad |= _starts(made["answers"], made["context"])
        for place, error in bad.items():
            splits.problems.append(
                Problem(table.file, table.rows[place], name, error.what, error.fix, index=None, split=split)
            )
        wrong |= bad.keys()
    made["row"] = list(table.rows)
    holds = {column.role: column.holds for column in wanted} | {"row": "row"}
    kept = [place for place in range(len(table)) if place not in wrong]
    if wrong:
        made = {role: [cells[place] for place in kept] for role, cells in made.items()}
    features = datasets.Features({role: _feature(holds[role], cells) for role, cells in made.items()})
    # not Dataset.from_dict, which looks at every cell once more
    rows = datasets.Dataset(pyarrow.Table.from_pydict(made, schema=features.arrow_schema))
    if encoded:
        encoded = [part.select(kept) if wrong else part for part in encoded]
        rows = datasets.concatenate_datasets([*encoded, rows], axis=1)
    return rows, len(kept)


def _starts(answers: list[Any], contexts: list[Any]) -> dict[int, forms.Bad]:
    """Look in the context for answers whose place is not given."""
    wrong = {}
    for place, (answer, context) in enumerate(zip(answers, contexts, strict=True)):
        if answer is None or context is None or -1 not in answer["answer_start"]:
            continue
        found = [
            context.find(text) if start == -1 else start
            for text, start in zip(answer["text"], answer["answer_start"], strict=True)
        ]
        if -1 in found:
            text = answer["text"][found.index(-1)]
            wrong[place] = forms.Bad(f"answer {text[:40]!r} is not in the context", "Copy it from the context")
        answers[place] = {"text": answer["text"], "answer_start": found}
    return wrong


def _feature(holds: str, cells: list[Any]) -> Any:
    from datasets import List, Value

    text, whole, number = Value("string"), Value("int64"), Value("float64")
    listed = any(isinstance(cell, list) for cell in cells[:1000])
    packed = any(isinstance(cell, dict) for cell in cells[:1000])
    encoded = {"bytes": Value("binary"), "path": text}
    return {
        "row": whole,
        "label": List(text) if listed else text,
        "number": List(number) if listed else number,
        "tokens": List(text),
        "words": List(text),
        "tags": List(text),
        "answers": {"text": List(text), "answer_start": List(whole)},
        "series": List(number),
        "boxes": {"bbox": List(List(number)), "category": List(text)},
        "image": encoded if packed else text,
        "audio": encoded if packed else text,
    }.get(holds, text)


def _stop(problems: Sequence[Problem], do: str = MEND) -> None:
    fail(DataError, listed(problems), "rows that can all be used", do)


def _hidden(splits: Splits, task: Task) -> None:
    """A public test split often has no labels: it is left out, and said."""
    if "test" in splits and not len(splits["test"]):
        problems = [problem for problem in splits.problems if problem.split == "test"]
        if problems and all("-1 is out of range" in problem.what for problem in problems):
            splits.notes.append(f"{splits.sources['test']} has no public labels (all are -1): not used")
            splits.problems = [problem for problem in splits.problems if problem.split != "test"]
            del splits["test"], splits.sources["test"]


# ---- which rows are alike


def inputs(task: Task, rows: Dataset) -> list[Column]:
    """The columns that prediction reads and these rows have."""
    return [c for c in task.columns if c.role in rows.column_names and not columns.is_truth(c)]


def keys(parts: Sequence[Dataset], wanted: Sequence[Column], whole: bool = False) -> list[list[Any]]:
    """Of each row of each part what makes it the same as another: its text without case and blanks, a file's bytes.

    ``whole``: also what makes it the same as a row that is not there.
    """
    found: list[list[list[Any]]] = [[] for _ in parts]
    for column in wanted:
        if column.holds in columns.MEDIA:
            made = media.digests(parts, column.role, whole)
        elif column.holds in ("text", "messages"):
            made = [[" ".join((cell or "").casefold().split()) for cell in part[column.role][:]] for part in parts]
        else:
            made = [[str(cell) for cell in part[column.role][:]] for part in parts]
        for one, cells in zip(found, made, strict=True):
            one.append(cells)
    return [list(zip(*cells, strict=True)) for cells in found]


def fingerprint(splits: Splits, task: Task) -> dict[str, list[Any]]:
    """Of each split how many rows it has, and a digest of them."""
    wanted = [c for c in task.columns if all(c.role in rows.column_names for rows in splits.values())]
    found: dict[str, list[Any]] = {}
    for name, made in zip(splits, keys(list(splits.values()), wanted, whole=True), strict=True):
        digest = hashlib.sha256()
        for row in made:
            digest.update(repr(row).encode("utf-8", "backslashreplace"))
        found[name] = [len(made), digest.hexdigest()]
    return found


# ---- which rows are used


def _hold_out(splits: Splits, task: Task, config: Config) -> None:
    rows = splits["train"]
    if divided := task.divide(rows, config.validation_share):
        splits["train"], splits["validation"] = divided
        splits.sources["validation"] = splits.sources["train"]
        splits.notes.append(f"no validation split: {len(divided[1]):,} of {len(rows):,} training rows are held out")
        _part(splits, f"the last {config.validation_share:g} of train")
        return
    held = _held(rows, task, config)
    if not held or len(held) == len(rows):
        labels = [c.role for c in task.columns if c.holds == "label" and c.role in rows.column_names]
        problems = splits.problems if config.bad_rows == "stop" else []
        bad = any(problem.split == "train" for problem in problems)
        if wrong := [problem for role in labels if (problem := splits.no_classes(role, pending=bad))]:
            _stop([*wrong, *problems])
        why = "of each label there is one, or several alike" if labels else "they are alike, or belong together"
        what = "one row: none can be held out"
        what = f"none of {len(rows):,} rows can be held out: {why}" if len(rows) > 1 else what
        few = Problem(splits.sources["train"], None, None, what, "Pass more rows")
        need = "rows to learn from, and others to hold out"
        fail(DataError, listed(problems if bad else [few]), need, "mend the data, or pass a validation split")
    splits.select("train", sorted(held), into="validation")
    splits.select("train", [place for place in range(len(rows)) if place not in held])
    splits.notes.append(
        f"no validation split: {len(held):,} of {len(rows):,} training rows are held out (seed {config.seed})"
    )
    _part(splits, f"{config.validation_share:g} of train, drawn by seed {config.seed}")


def _part(splits: Splits, share: str) -> None:
    splits.choose("validation", share)
    splits.choose("train", f"without {share}")


def _held(rows: Dataset, task: Task, config: Config) -> set[int]:
    """Places held out: each class by its share; rows with one key, such as questions on one text, stay together."""
    wanted = inputs(task, rows)
    groups: dict[Any, list[int]] = {}
    for chosen in (wanted[:1], wanted):
        groups = {}
        for place, key in enumerate(keys([rows], chosen)[0]):
            groups.setdefault(key, []).append(place)
        if max(map(len, groups.values())) <= max(2, len(rows) * config.validation_share / 4):
            break
    label = next((c.role for c in task.columns if c.holds == "label" and c.role in rows.column_names), None)
    names = [str(cell) for cell in rows[label][:]] if label else [""] * len(rows)
    strata: dict[str, list[list[int]]] = {}
    for group in groups.values():
        strata.setdefault(names[group[0]], []).append(group)
    draw, held, due = random.Random(config.seed), set(), 0.0
    for name in sorted(strata):
        drawn = strata[name]
        draw.shuffle(drawn)
        due += config.validation_share * sum(map(len, drawn))
        for group in drawn[:-1]:  # the last one stays, so that no class is only held out
            if due < 0.5 or due < len(group) / 2:
                break
            held.update(group)
            due -= len(group)
    if not held:
        held.update(next((drawn[0] for drawn in strata.values() if len(drawn) > 1), ()))
    return held


def _draw(splits: Splits, split: str, task: Task, config: Config) -> None:
    rows, most = splits[split], getattr(config, f"{split}_rows")
    if not most or len(rows) <= most:
        return
    drawn = task.draw(rows, most, split)
    if drawn is not None:
        splits[split] = drawn
        splits.choose(split, f"{most:,} at most")
        return
    splits.select(split, sorted(random.Random(config.seed).sample(range(len(rows)), most)))
    splits.choose(split, f"{most:,} drawn by seed {config.seed}")
