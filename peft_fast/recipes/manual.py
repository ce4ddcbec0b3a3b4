"""docs/options.md, made of the table in config.py: `python -m peft_fast.recipes.manual` writes it anew."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from peft_fast.recipes import config as configs
from peft_fast.recipes.config import AUDIO, GENERATES, IMAGES, LABELLED, SEQ2SEQ, TEXT, Config

# how help and docs name a set of tasks
GROUPS = {
    TEXT: "text",
    SEQ2SEQ: "translation, summarization",
    GENERATES: "generation",
    IMAGES: "images",
    AUDIO: "audio",
    LABELLED: "classification",
}
PAGE = Path(__file__).with_name("docs") / "options.md"
HEAD = """\
# Options

Every option of `peft-fast train`, `peft_fast.train(...)` and of a YAML file. In YAML and Python they are written as
here, on the command line with `--` and hyphens: `learning_rate: 1e-3` is `--learning-rate 1e-3`. A list takes its
values one after the other (`--progressive 64 128`), a mapping pairs (`--columns text=review label=stars`), a yes-or-no
is `--fast` or `--no-fast`. What does not apply to the task or method is refused, and all that is wrong is said at once.

<!-- written by `python -m peft_fast.recipes.manual`; a test fails when it is not what config.py says -->
"""


def page() -> str:
    """The page."""
    parts = [HEAD]
    head = "| option | takes | default | what it is |\n| --- | --- | --- | --- |\n"
    for section, what in configs.SECTIONS.items():
        parts.append(f"\n## {what[:1].upper()}{what[1:]}\n\n{head}")
        for name, field in Config.model_fields.items():
            if field.json_schema_extra["section"] == section:
                group = only(field.json_schema_extra)
                what_it_is = f"{field.description}{f' ({group})' if group else ''}"
                cells = (f"`{name}`", _takes(field.annotation), _default(field), what_it_is)
                parts.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n")
    return "".join(parts).rstrip("\n") + "\n"


def _takes(annotation: Any) -> str:
    """A type in words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, type(int | str)):
        return " or ".join(dict.fromkeys(_takes(part) for part in inner if part is not type(None)))
    if origin is list:
        return f"list of {_takes(inner[0])}s"
    if origin is dict:
        return "mapping"
    return {bool: "yes or no", int: "whole number", float: "number", str: "text", Path: "folder"}[annotation]


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "needed"
    value = field.default
    if value is None or value == [] or value == {} or value == "":
        return ""
    return {True: "`true`", False: "`false`"}[value] if isinstance(value, bool) else f"`{value}`"


def only(about: Mapping[str, Any]) -> str:
    """For which tasks or methods an option is there."""
    tasks = about["tasks"] and tuple(about["tasks"])
    named, left = [], set(tasks or ())
    while left:
        best = max(GROUPS, key=lambda group: len(left & set(group)) if set(group) <= set(tasks) else 0)
        if len(covered := left & set(best)) < 2 or not set(best) <= set(tasks):
            named += [task for task in tasks if task in left]
            break
        named.append(GROUPS[best])
        left -= covered
    return ", ".join([*named, *(about["methods"] or ())])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
