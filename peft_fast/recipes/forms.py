"""The one form that tasks take of each kind of cell, made of the forms it has in files and datasets.

text      str                        tokens, tags  list[str]
label     str, or list[str]          messages      JSON text of a list of messages
number    float, or list[float]      answers       {"text": [str], "answer_start": [int]}
series    list[float]                boxes         {"bbox": [[4 numbers]], "category": [str]}
image, audio   path, or {"bytes", "path"}
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_fast.recipes.media import encoded

SHOWN = 40
FILL = "Fill the cell, or remove the row"


class Bad(ValueError):
    """A cell that has no such form: what it is, and the fix."""

    def __init__(self, what: str, fix: str = FILL) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


class Out:
    """A class number outside the names of its dataset."""

    def __init__(self, number: int, names: list[str]) -> None:
        hidden = " (how public data marks a label that is kept secret)" if number == -1 else ""
        self.bad = Bad(f"label {number} is out of range 0 … {len(names) - 1}{hidden}", "Correct it, or remove the row")


def number_of(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _text(cell: Any) -> str:
    if isinstance(cell, str):
        return cell
    raise Bad(f"{_kind(cell)} instead of a text: {short(cell)}", "Write it as text, in quotes")


def _label(cell: Any) -> str | list[str]:
    if isinstance(cell, list | tuple):
        return [_label(one) for one in cell]
    if isinstance(cell, Out):
        raise cell.bad
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, float) and not math.isfinite(cell):
        raise Bad(f"{cell} instead of a class")
    if isinstance(cell, float) and cell == int(cell):
        return str(int(cell))
    if isinstance(cell, dict) or not str(cell).strip():
        raise Bad(f"{_kind(cell)} instead of a class: {short(cell)}", "Write one class name or number")
    return str(cell).strip()


def _float(cell: Any) -> float | list[float]:
    if isinstance(cell, list | tuple):
        return [_float(one) for one in cell]
    if isinstance(cell, bool) or (number := number_of(cell)) is None:
        comma = isinstance(cell, str) and number_of(cell.replace(",", ".")) is not None
        fix = "Write it with a decimal point" if comma else FILL
        raise Bad(f"no number: {short(cell)}", fix)
    if not math.isfinite(number):
        raise Bad(f"{number} is no finite number", "Correct it, or remove the row")
    return number


def _divided(cell: Any) -> list[str]:
    """Words of a text that nobody has divided yet, or those of a list."""
    from peft_fast.recipes.tasks import token_classification

    plain = isinstance(cell, str) and not cell.lstrip().startswith("[")
    return token_classification.divide(cell) if plain else _words(cell)


def _list(cell: Any) -> list[Any]:
    """A list as it is, as JSON or Python text, or words between blanks."""
    if isinstance(cell, str):
        cell = _parsed(cell) if cell.lstrip().startswith("[") else cell.split()
    if not isinstance(cell, list | tuple) or not len(cell):
        raise Bad(f"no list: {short(cell)}" if cell else "an empty list", "Write a list, or words between blanks")
    return list(cell)


def _parsed(cell: str) -> Any:
    for reader in (json.loads, ast.literal_eval):
        try:
            return reader(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    raise Bad(f"no JSON: {short(cell)}", "Write it as JSON")


def _words(cell: Any) -> list[str]:
    found = _list(cell)
    for one in found:
        if isinstance(one, Out):
            raise one.bad
        if one is None or isinstance(one, dict | list) or (isinstance(one, float) and one != one):
            raise Bad(f"{short(one)} in a list of words", "Write a list of words")
    return [str(one) for one in found]


def _numbers(cell: Any) -> list[float]:
    return [_float(one) for one in _list(cell)]


def _messages(cell: Any) -> str:
    found = _parsed(cell) if isinstance(cell, str) else cell
    if not isinstance(found, list) or not found:
        raise Bad(f"no list of messages: {short(cell)}", 'Write [{"role": …, "content": …}, …]')
    return json.dumps(found, ensure_ascii=False)


def _answers(cell: Any) -> dict[str, list[Any]]:
    """SQuAD's lists, one answer, a list of answers, or the text of one. A start of -1 has yet to be looked for."""
    form = 'Write {"text": [answer], "answer_start": [where it begins in the context]}'
    if isinstance(cell, str):
        cell = _parsed(cell) if cell.lstrip().startswith(("{", "[")) else {"text": [cell]}
    if isinstance(cell, list):
        cell = [{"text": one} if isinstance(one, str) else one for one in cell]
        if not all(isinstance(one, dict) for one in cell):
            raise Bad(f"no answers: {short(cell)}", form)
        cell = {key: [one.get(key, -1) for one in cell] for key in ("text", "answer_start")}
    if not isinstance(cell, dict) or "text" not in cell:
        raise Bad(f"no answers: {short(cell)}", form)
    texts = cell["text"] if isinstance(cell["text"], list) else [cell["text"]]
    starts = cell.get("answer_start", [-1] * len(texts))
    starts = starts if isinstance(starts, list) else [starts]
    whole = all(isinstance(start, int) and not isinstance(start, bool) for start in starts)
    if not all(isinstance(text, str) for text in texts) or not whole or len(texts) != len(starts):
        raise Bad(f"no texts with as many starts: {short(cell)}", form)
    return {"text": texts, "answer_start": starts}


def _boxes(cell: Any) -> dict[str, list[Any]]:
    """COCO's lists, or a list of objects each with bbox and category."""
    cell = _parsed(cell) if isinstance(cell, str) else cell
    names = ("category", "label", "name", "category_id", "categories", "labels")
    if isinstance(cell, list):
        keys = {key for one in cell if isinstance(one, dict) for key in one}
        cell = {key: [one.get(key) if isinstance(one, dict) else None for one in cell] for key in keys} or {"bbox": []}
    box = (
        next((cell[key] for key in ("bbox", "boxes", "bboxes") if key in cell), None)
        if isinstance(cell, dict)
        else None
    )
    kinds = next((cell[key] for key in names if key in cell), []) if box is not None else []
    if box is None or not isinstance(box, list) or len(kinds) != len(box):
        form = 'Write {"bbox": [[x, y, width, height], …], "category": [name, …]}'
        raise Bad(f"no boxes with as many categories: {short(cell)}", form)
    for one in box:
        if not isinstance(one, list) or len(one) != 4:
            raise Bad(f"box {short(one)} has not 4 numbers", "Write 4 numbers a box")
    return {"bbox": [[_float(number) for number in one] for one in box], "category": [_label(kind) for kind in kinds]}


def _from(base: Path) -> str:
    return f"Write paths from {base.name}/ on" if base.name else "Correct the path"


def media(cell: Any, base: Path) -> Any:
    if isinstance(cell, dict) and {"bytes", "path"} & set(cell):
        if cell.get("bytes") is None and cell.get("path"):
            return media(cell["path"], base)
        return {"bytes": cell.get("bytes"), "path": cell.get("path")}
    if isinstance(cell, dict) and cell.get("array") is not None or hasattr(cell, "getbands"):
        cell = encoded(cell)
    if isinstance(cell, bytes):
        return {"bytes": cell, "path": None}
    if not isinstance(cell, str | Path):
        raise Bad(f"{_kind(cell)} instead of a file: {short(cell)}", "Write the path of a file")
    if "://" in str(cell):
        raise Bad(f"an address, {short(str(cell))}", "Fetch the file and write its path")
    path = base / Path(cell).expanduser()
    if not path.is_file():
        raise Bad(f"no such file: {short(str(cell))}", _from(base))
    return str(path)


def _kind(cell: Any) -> str:
    names = {"int": "a number", "float": "a number", "bool": "true or false", "list": "a list", "dict": "an object"}
    return names.get(type(cell).__name__, f"a {type(cell).__name__}")


def short(cell: Any) -> str:
    text = repr(cell)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


FORMS: dict[str, Callable[[Any], Any]] = {
    "text": _text,
    "label": _label,
    "number": _float,
    "tokens": _words,
    "words": _divided,
    "tags": _words,
    "messages": _messages,
    "answers": _answers,
    "series": _numbers,
    "boxes": _boxes,
    "image": str,
    "audio": str,
}
