"""From a file's columns to a task's roles: which column is which, and its cells in the form of what it holds."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peft_fast.recipes import forms
from peft_fast.recipes.files import Table, Unreadable
from peft_fast.recipes.forms import SHOWN, Bad, Out, number_of, short
from peft_fast.recipes.tasks import Column, Problem

MEDIA = ("image", "audio")
TRUTHS = ("label", "number", "tags", "answers", "boxes", "series")
MEDIA_NAMES = ("file_name", "filename", "file", "path", "filepath")
ALL = "*"  # every column that no other role has
# what a column of yes and no holds
FLAGS = {True: True, False: False, "1": True, "0": False, "1.0": True, "0.0": False}
FLAGS |= {"true": True, "false": False, "True": True, "False": False}


def is_truth(column: Column) -> bool:
    """Whether the column holds what is to be learnt, so that prediction does without."""
    if column.truth is not None:
        return column.truth
    return column.holds in TRUTHS


def assign(table: Table, columns: Sequence[Column], given: Mapping[str, str]) -> dict[str, str]:
    """role -> name of its column: as the config says, else the role itself, else an alias. Raises Unreadable."""
    lower: dict[str, str] = {}
    for name in table.names:
        lower.setdefault(name.strip().lower(), name)
    # rows that are given by role need no columns to make it of
    given = {r: n for r, n in given.items() if not (r in table.names and (n == ALL or _several(n)))}
    found: dict[str, str] = {}
    lacking = [column for column in columns if column.role in given and not _has(table, given[column.role])]
    for column in columns:
        if column.role in given and column not in lacking:
            found[column.role] = given[column.role]
    for column in columns:
        names = (column.role, *column.aliases, *(MEDIA_NAMES if column.holds in MEDIA else ()))
        free = (lower[name] for name in names if name in lower and lower[name] not in found.values())
        if column.role not in given and (name := next(free, None)) is not None:
            found[column.role] = name
    lacking += [c for c in columns if c.required and c.role not in found and c not in lacking]
    if lacking or not found:
        _lacking(table, lacking or list(columns), found, given)
    taken = {part for name in found.values() for part in (name, *_several(name))}
    rest = ", ".join(name for name in table.names if name and name not in taken)
    return {role: rest if name == ALL and ALL not in table.names else name for role, name in found.items()}


def _has(table: Table, name: str) -> bool:
    if name in table.names or name.partition(".")[0] in table.names or name == ALL:
        return True
    return bool(_several(name)) and all(part in table.names for part in _several(name))


def _several(name: str) -> list[str]:
    """The columns of `a, b`; [] of one."""
    return [part.strip() for part in name.split(",")] if "," in name else []


def _lacking(table: Table, lacking: list[Column], found: dict[str, str], given: Mapping[str, str]) -> None:
    have = ", ".join(name for name in table.names if name) or "none"
    free = {name.lower(): name for name in table.names if name and name not in found.values()}
    wanted, fixes = [], []
    for column in lacking:
        name = given.get(column.role)
        usual = [name] if name else [column.role, *column.aliases]
        wanted.append(f"no column {name or column.role}" + ("" if name else f" (nor {_few(column.aliases)})"))
        near = next((m[0] for n in usual if (m := difflib.get_close_matches(n.lower(), free, 1, 0.6))), None)
        fixes.append(f"{column.role}={free.pop(near) if near else 'NAME'}")
    what = f"{', '.join(wanted)}; it has {have}"
    fix = f"Say which it is with --columns {' '.join(fixes)} (columns in a config)"
    if any(len(name) > SHOWN or number_of(name) is not None for name in table.names):
        fix += ", and give the file a first line of column names"
    raise Unreadable(Problem(table.file, None, None, what, fix))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "") if names else "any other"


def values(table: Table, name: str) -> list[Any]:
    """The cells of a column; `a.b` reaches into dicts, `a, b` makes {a: …, b: …} of two columns."""
    if name in table.names:
        return table.column(name)
    outer, _, inner = name.partition(".")
    if outer in table.names:
        return [cell.get(inner) if isinstance(cell, dict) else None for cell in table.column(outer)]
    parts = {part: _named(table.column(part), _feature(table, part)) for part in _several(name)}
    return [dict(zip(parts, cells, strict=True)) for cells in zip(*parts.values(), strict=True)]


def _together(cells: list[dict[str, Any]], column: Column) -> list[Any]:
    """One cell of those of several columns: a text that names them, the names of those that are 1, or a list."""
    if column.holds == "text":
        return ["; ".join(f"{name}: {one}" for name, one in cell.items() if one not in (None, "")) for cell in cells]
    if column.holds == "label" and all(
        isinstance(one, str | int | float) and one in FLAGS for cell in cells for one in cell.values()
    ):
        return [[name for name, one in cell.items() if FLAGS[one]] for cell in cells]
    return [list(cell.values()) for cell in cells]


def convert(table: Table, column: Column, name: str) -> tuple[list[Any], dict[int, Bad]]:
    """The cells in the form of ``column.holds``, and what is wrong with those that have none (they are None)."""
    cells = _named(values(table, name), _feature(table, name))
    if name not in table.names and _several(name):
        cells = _together(cells, column)
    if column.holds == "label":
        cells = _labels(cells)
    form = forms.FORMS[column.holds]
    if column.holds in MEDIA:
        base = table.base
        form = lambda cell: forms.media(cell, base)  # noqa: E731
    made: list[Any] = []
    wrong: dict[int, Bad] = {}
    for place, cell in enumerate(cells):
        try:
            made.append(_one(cell, column, form))
        except Bad as bad:
            wrong[place] = bad
            made.append(None)
    if column.holds in ("label", "number"):
        _alike(made, wrong)
    return made, wrong


def _one(cell: Any, column: Column, form: Callable[[Any], Any]) -> Any:
    if cell is None or cell == "" or (isinstance(cell, float) and cell != cell and column.holds != "number"):
        if column.required:
            raise Bad("empty")
        return "" if column.holds == "text" else None
    found = form(cell)
    if column.required and column.holds == "text" and not found.strip():
        raise Bad("empty, only blanks")
    return found


def _alike(made: list[Any], wrong: dict[int, Bad]) -> None:
    """Lists in a column of single values, or the other way round, are wrong: the rarer of the two."""
    lists = [place for place, cell in enumerate(made) if isinstance(cell, list)]
    if not lists:
        return
    single = [place for place, cell in enumerate(made) if cell is not None and not isinstance(cell, list)]
    rare, what, others = (lists, "a list", "one value") if len(lists) < len(single) else (single, "one value", "a list")
    for place in rare:
        wrong[place] = Bad(f"{what}: {short(made[place])}; other rows have {others}", "Write all rows alike")
        made[place] = None


def _feature(table: Table, name: str) -> Any:
    feature = table.features.get(name.partition(".")[0])
    inner = name.partition(".")[2]
    return feature.get(inner) if inner and isinstance(feature, dict) else feature


def _named(cells: list[Any], feature: Any) -> list[Any]:
    """Class numbers of a dataset as the names it knows, at any depth."""
    if not _knows(feature):
        return cells
    return [_deep(cell, feature) for cell in cells]


def _deep(cell: Any, feature: Any) -> Any:
    if type(feature).__name__ == "ClassLabel":
        return _class(cell, feature.names)
    if isinstance(feature, dict) and isinstance(cell, dict):
        return {key: _deep(value, feature.get(key)) for key, value in cell.items()}
    if isinstance(cell, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_deep(one, inner) for one in cell]
    if isinstance(cell, dict) and hasattr(feature, "feature"):  # a list of objects, kept as an object of lists
        return {key: _deep(value, [feature.feature.get(key)]) for key, value in cell.items()}
    return cell


def _knows(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_knows, feature.values()))
    if isinstance(feature, list):
        return any(map(_knows, feature))
    return type(feature).__name__ == "ClassLabel" or (hasattr(feature, "feature") and _knows(feature.feature))


def _class(cell: Any, names: list[str]) -> Any:
    if not isinstance(cell, int):
        return cell
    if 0 <= cell < len(names):
        return names[cell]
    return Out(cell, names)


def _labels(cells: list[Any]) -> list[Any]:
    """Where every label is a whole number, 1.0 is 1."""
    numbers = [number_of(cell) for cell in set(cell for cell in cells if isinstance(cell, str) and cell.strip())]
    if numbers and all(n is not None and math.isfinite(n) and n == int(n) for n in numbers):
        return [str(int(float(cell))) if isinstance(cell, str) and "." in cell else cell for cell in cells]
    return cells
