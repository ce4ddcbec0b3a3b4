"""`python -m peft_fast build`: peft_fast/build.py with a log."""

from __future__ import annotations

from peft_fast import build


def app(args: list[str], prog_name: str) -> int:
    """Compiles the extension; exit status 1 if there is none afterwards."""
    return build.main(args, prog_name)
