"""The options of a fine-tuning as flags, made from the table in recipes/config.py: nothing is said twice."""

from __future__ import annotations

import argparse
import textwrap
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic_core import PydanticUndefined

from peft_fast.recipes import config as configs
from peft_fast.recipes import manual, yamls
from peft_fast.recipes.config import Config

INLINE = 26  # characters of choices that stand beside the flag; more go to the text
SPLITS = ("train", "validation", "test")


class Formatter(argparse.HelpFormatter):
    """argparse's, with one word for a switch and its opposite."""

    def __init__(self, prog: str, width: int | None = None) -> None:
        import shutil

        width = width or min(shutil.get_terminal_size().columns, 120)
        super().__init__(prog, max_help_position=28 if width < 100 else 40, width=width - 1)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0][2:]}"
        text = super()._format_action_invocation(action)
        # one value is the common case, and "X [X ...]" says it twice
        return text.replace(f"{action.metavar} [{action.metavar} ...]", f"{action.metavar} …")


def add(parser: argparse.ArgumentParser, task: str | None = None, method: str | None = None) -> None:
    """A flag for every option, by section; with ``task`` and ``method`` only those that mean something for them."""
    for section, what in configs.SECTIONS.items():
        group = parser.add_argument_group(section, what)
        for name, field in Config.model_fields.items():
            about = field.json_schema_extra
            fits = all(
                not about[key] or one in about[key] for key, one in (("tasks", task), ("methods", method)) if one
            )
            if about["section"] == section and fits:
                _add_one(group, name, field)


def _add_one(group: Any, name: str, field: Any) -> None:
    flag, kinds = "--" + name.replace("_", "-"), _kinds(field.annotation)
    choices = [
        str(value) for kind in kinds if typing.get_origin(kind) is typing.Literal for value in typing.get_args(kind)
    ]
    inline = len(",".join(choices)) <= INLINE and not _many(kinds)
    words = [field.description]
    if choices and not inline:
        words.append(f"one of {', '.join(choices)}")
    if default := _default(field):
        words.append(f"default {default}")
    if only := manual.only(field.json_schema_extra):
        words.append(f"[{only}]")
    text = _joined(words).replace("%", "%%")
    if kinds == [bool]:
        group.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        return
    metavar = (
        "{" + ",".join(choices) + "}" if choices and inline and len(kinds) == 1 else _metavar(name, kinds, choices)
    )
    more = {"nargs": "+", "action": "extend"} if _many(kinds) else {}
    group.add_argument(flag, dest=name, default=argparse.SUPPRESS, metavar=metavar, help=text, **more)


def _joined(words: Sequence[str]) -> str:
    """Parts of a help text; what is said in the description is not said again."""
    text = words[0]
    for part in words[1:]:
        text += f" {part}" if part.startswith("[") else f"; {part}"
    return text


def _kinds(annotation: Any) -> list[Any]:
    """The branches of a type, None left out."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    branches = typing.get_args(annotation) if union else (annotation,)
    return [kind for kind in branches if kind is not type(None)]


def _many(kinds: Iterable[Any]) -> bool:
    return any(typing.get_origin(kind) in (dict, list) for kind in kinds)


def _metavar(name: str, kinds: Sequence[Any], choices: Sequence[str]) -> str:
    if any(typing.get_origin(kind) is dict for kind in kinds):
        return {"data": "DATA", "class_weights": "WEIGHT"}.get(name, "NAME=VALUE")
    if name == "out":
        return "DIR"
    if choices and len(kinds) > 1:
        return f"{'|'.join(choices)}|N"
    kind = kinds[-1]
    if typing.get_origin(kind) is list:
        kind = typing.get_args(kind)[0]
    return {int: "N", float: "X"}.get(kind, {"task": "TASK", "model": "MODEL", "adapter": "DIR"}.get(name, "NAME"))


def _default(field: Any) -> str:
    value = field.default
    if value is PydanticUndefined or value is None or value in ("", [], {}):
        return ""
    if isinstance(value, bool):
        return ("yes" if value else "no") if field.annotation is bool else str(value).lower()
    # texts that say themselves what 0 means
    return "" if value == 0 and "; 0" in field.description else f"{value}"


def given(namespace: argparse.Namespace) -> dict[str, Any]:
    """What was given as flags, as `config.read` takes it: it is there that values are judged, all at once."""
    found = {name: value for name, value in vars(namespace).items() if name in Config.model_fields}
    return {name: _value(name, value) for name, value in found.items()}


def _value(name: str, value: Any) -> Any:
    kinds = _kinds(Config.model_fields[name].annotation)
    if isinstance(value, list):
        table = next((kind for kind in kinds if typing.get_origin(kind) is dict), None)
        if table is not None and all("=" in word for word in value) and (name != "data" or _splits(value)):
            read = yamls.parse if typing.get_args(table)[1] is Any else str
            return {key: read(text) for key, _, text in (word.partition("=") for word in value)}
        listed = any(typing.get_origin(kind) is list for kind in kinds)
        single = len(value) == 1 and (not listed or str in kinds)
        return value[0] if single else value
    if bool in kinds and len(kinds) > 1 and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value


def _splits(words: Iterable[str]) -> bool:
    return all(word.partition("=")[0] in SPLITS for word in words)


def unknown(rest: Sequence[str]) -> dict[str, Any]:
    """Flags that nobody knows -> options of these names, for `config.read` to say so beside all else."""
    return {word[2:].partition("=")[0].replace("-", "_"): None for word in rest if word.startswith("--")}
