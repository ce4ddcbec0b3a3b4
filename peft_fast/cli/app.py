"""`python -m peft_fast <command> …`: finds the command's module and hands it the rest of the line.

A command is a module `peft_fast.cli.<name>` with `app(args=[…], prog_name="…") -> exit status`, imported when
it is asked for. `build` and `doctor` run with torch alone: a user reaches for them when something is missing.
"""

from __future__ import annotations

import difflib
import importlib
import os
import shutil
import sys
import textwrap

from peft_fast.errors import PeftFastError, UnsupportedError, fail, program

PROG = program()
COMMANDS = {
    "train": "fine-tune a model: any of thirteen tasks, from a YAML file or flags",
    "search": "try options of a fine-tuning, and keep the best",
    "eval": "judge a finished run on other data",
    "predict": "answer a text or a file of rows with a finished run",
    "merge": "write a finished run's adapter into its model",
    "compare": "set finished runs side by side, as a table and a plot",
    "doctor": "what is installed, which backends are live, and what to do about the others",
    "build": "compile the C++ kernels, with a log",
    "tune": "time the GPU kernels' tiles and plans on this GPU, and keep the fastest",
    "run": "run an unmodified training script with every PEFT model accelerated",
    "demo": "fine-tune a real model twice, stock PEFT and peft_fast, and write a report",
    "bench": "time peft_fast against stock PEFT, the frozen model and full fine-tuning",
}
# command -> the extra that its packages come with
EXTRAS = dict.fromkeys(("train", "search", "eval", "predict", "merge", "compare"), "train")
EXTRAS |= {"bench": "bench", "demo": "demo"}
EXAMPLES = (
    ("doctor", ""),
    ("train", " sentiment.yaml"),
    ("run", " train.py --lr 1e-4"),
    ("bench", " train_step --quick"),
)


def help_text(width: int | None = None) -> str:
    """The screen of `--help`, wrapped to the terminal."""
    width = min(width or shutil.get_terminal_size().columns, 120)
    lines = [f"usage: {PROG} <command> [options]", "", "commands:"]
    for name, what in COMMANDS.items():
        lines += textwrap.wrap(what, width, initial_indent=f"  {name:<8}", subsequent_indent=" " * 10)
    lines += ["", "examples:", *(f"  {PROG} {name}{rest}" for name, rest in EXAMPLES)]
    lines += ["", *textwrap.wrap(f"`{PROG} <command> --help` lists the options of a command.", width)]
    return "\n".join(lines)


def _command(name: str):
    """The callable of a command; an error that names what to install or what was meant."""
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        do = f"did you mean `{PROG} {near[0]}`?" if near else f"run `{PROG} --help`"
        fail(UnsupportedError, f"command {name!r}", "one of " + ", ".join(COMMANDS), do)
    try:
        return importlib.import_module(f"peft_fast.cli.{name}").app
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "peft_fast":
            raise
        what = {"torch": "torch>=2.11"}.get(error.name, f"peft_fast[{EXTRAS.get(name, 'cli')}]")
        do = f"run `pip install '{what}'`"
        fail(
            UnsupportedError,
            f"`{name}` without {error.name}",
            f"the Python package {error.name}",
            do,
            cause=error,
        )


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from peft_fast import __version__

        print(f"peft_fast {__version__}")
        return 0
    try:
        return _command(argv[0])(args=argv[1:], prog_name=f"{PROG} {argv[0]}") or 0
    except PeftFastError as error:
        print(error, file=sys.stderr)
        return 2 if argv[0] not in COMMANDS else 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `… | head`: nobody is left to read
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
