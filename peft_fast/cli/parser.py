"""The parser of the commands that take a finished run: whole flags only, and errors like all others."""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, without abbreviations: `--out` is not `--output`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Three lines and exit status 2."""
        do = f"`{self.prog} --help` lists them"
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for word in message.split():
            if word.startswith("--") and word not in flags:
                near = difflib.get_close_matches(word.partition("=")[0], flags, n=1)
                near = near or [flag for flag in flags if flag.startswith(word)]
                do = f"did you mean {near[0]}? {do}" if near else do
        needed = " ".join(self.format_usage().removeprefix("usage: ").split())
        print(f"given: {message}\nneeded: {needed}\ndo: {do}", file=sys.stderr)
        sys.exit(2)
