"""`peft-fast train`: fine-tune a model as a YAML file or flags say."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from typing import Any

from peft_fast.cli import options as flags
from peft_fast.errors import SettingsError, fail
from peft_fast.recipes import config as configs

NAME = "peft-fast train"
YAML = (".yaml", ".yml")
EXAMPLES = """\
examples:
  peft-fast train sentiment.yaml
  peft-fast train sentiment.yaml --epochs 5 --r 8 --out runs/r8
  peft-fast train --task sequence-classification --model example:minilm --data example:movie-reviews
  peft-fast train --task translation --model Helsinki-NLP/opus-mt-en-fr --data pairs.csv --dry-run
  peft-fast train news.yaml --data train=news.csv test=held-out.csv --columns text=headline label=topic
  peft-fast train --resume --out runs/r8
"""


def app(args: list[str], prog_name: str = NAME) -> int:
    """Runs one fine-tuning; exit status 0 when it is done, 130 or 143 when a signal stopped it with a checkpoint."""
    if {"-h", "--help"} & set(args):
        parser(prog_name, **_applies(args)).print_help()
        return 0
    given, rest = parser(prog_name).parse_known_args(args)
    if given.schema:
        print(json.dumps(configs.Config.model_json_schema(), indent=2))
        return 0
    if given.examples:
        _examples()
        return 0
    if not args:
        parser(prog_name).print_usage(sys.stderr)
        print(f"`{prog_name} --help` lists the options", file=sys.stderr)
        return 2
    from peft_fast.recipes import run

    run.need_packages()
    try:
        chosen = flags.given(given) | flags.unknown(rest)
        config = run.resolve(_config(given, rest, args, prog_name), chosen)
    except SettingsError as error:  # how the command was called; what a run finds wrong ends with 1
        print(error, file=sys.stderr)
        return 2
    if given.dry_run:
        from peft_fast.cli import plan

        plan.show(run.plan(config))
        return 0
    done = run.train(config)
    if done.signum:
        return 128 + done.signum
    from peft_fast.cli import plan

    plan.summary(done.result, done.folder)
    return 0


def parser(prog_name: str, task: str | None = None, method: str | None = None) -> argparse.ArgumentParser:
    """The command's flags."""
    made = argparse.ArgumentParser(
        prog=prog_name,
        usage=f"{prog_name} [CONFIG.yaml] [--option value …]",
        description="Fine-tune a pretrained model.\nOptions come from a YAML file, from flags, or both: flags win.",
        epilog=EXAMPLES.replace("peft-fast", prog_name.rpartition(" ")[0]),
        formatter_class=_formatter,
        add_help=False,
        allow_abbrev=False,
    )
    group = made.add_argument_group("general")
    group.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="options as `name: value`, - or _ as below")
    group.add_argument(
        "--dry-run", action="store_true", help="print the plan: parameters, memory, steps; train nothing"
    )
    group.add_argument("--schema", action="store_true", help="print the JSON schema of CONFIG.yaml")
    group.add_argument("--examples", action="store_true", help="list the example:NAME models and data")
    group.add_argument("-h", "--help", action="store_true", help="this text; with --task and --method what applies")
    flags.add(made, task, method)
    return made


def _formatter(prog: str) -> argparse.HelpFormatter:
    class Formatter(flags.Formatter, argparse.RawDescriptionHelpFormatter):
        pass

    return Formatter(prog)


def _applies(args: list[str]) -> dict[str, str | None]:
    """The task and method that --help is asked about."""
    known, _ = parser(NAME).parse_known_args(args)
    task, method = getattr(known, "task", None), getattr(known, "method", None)
    return {
        "task": task if task in configs.TASKS else None,
        "method": method if method in configs.METHODS else None,
    }


def _config(given: argparse.Namespace, rest: list[str], args: list[str], prog_name: str) -> str | None:
    """The word that is the config's path; words that belong to nothing are said."""
    # behind an unknown flag stand its values, which argparse takes for positional
    known = given.config
    if known is not None and args.index(known) and args[args.index(known) - 1] in rest:
        known = None
    strays = list(itertools.takewhile(lambda word: not word.startswith("--"), rest))
    # a list of values has no end but the next flag
    strays += [v[-1] for n, v in vars(given).items() if n != "data" and isinstance(v, list) and v[-1].endswith(YAML)]
    if strays:
        do = f"put CONFIG.yaml first; see `{prog_name} --help`"
        fail(SettingsError, f"{' '.join(strays)!r} beside the config", "one CONFIG.yaml, then flags", do)
    return known


def _examples() -> None:
    from rich.console import Console
    from rich.table import Table

    from peft_fast.recipes import examples

    table = Table(box=None, pad_edge=False)
    for head in ("name", "what", "for"):
        table.add_column(head, no_wrap=head != "what", overflow="fold")  # names are there to be copied
    found: dict[str, Any] = examples.entries()
    for kind, has in (("data", True), ("models", False)):
        table.add_row(f"[bold]{kind}[/bold]", "", "")
        for name, entry in found.items():
            if (entry.splits is not None) == has:
                table.add_row(f"example:{name}", entry.what, "\n".join(entry.tasks))
    console = Console(highlight=False)
    console.width = max(80, console.width)  # below it the names themselves would be cut
    console.print(table)
