"""YAML as people write it: 1e-5 is a number, and a key that stands twice is a mistake."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from peft_fast.errors import SettingsError, fail


class _Loader(yaml.SafeLoader):
    """YAML 1.1, with 1e-5 as the number that everybody means, and not a text; ``twice`` are the keys that repeat."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.twice: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Composer's: here keys are as they were written, before `<<` has brought others in."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, list[int]] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                lines.setdefault(key.value, []).append(key.start_mark.line + 1)
        self.twice += [
            f"{key}: given {len(at)} times, in line{'s' * (len({*at}) > 1)} {', '.join(map(str, dict.fromkeys(at)))}"
            for key, at in lines.items()
            if len(at) > 1
        ]
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse(text: str) -> Any:
    """A YAML text, of a file or of a flag."""
    return load(text)[0]


def load(text: str) -> tuple[Any, list[str]]:
    """What a YAML text says, and a line for each key that stands more than once in its mapping."""
    loader = _Loader(text)
    try:
        return loader.get_single_data(), loader.twice
    finally:
        loader.dispose()


def mapping(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options of a file or mapping, and a line for each that a file has more than once."""
    if isinstance(source, Mapping):
        return dict(source), []
    try:
        found, twice = load(Path(source).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        fail(SettingsError, f"{source}: {error}", "a YAML file of options", "check the path and the file", error)
    if not isinstance(found, dict):
        what = "empty, there is no option in it" if found is None else type(found).__name__
        fail(SettingsError, f"{source}: {what}", "a YAML mapping option: value", "see --help")
    return {str(key): value for key, value in found.items()}, twice
