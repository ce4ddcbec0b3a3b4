"""`peft-fast eval RUN`: a finished run's metrics on other rows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft_fast.cli.parser import Parser
from peft_fast.errors import SettingsError, fail


def machine_flags(parser: argparse.ArgumentParser) -> None:
    """What depends on this machine and not on the run."""
    group = parser.add_argument_group("this machine")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: auto")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads; default: torch's choice")
    group.add_argument("--batch-size", type=int, metavar="N", help="rows at once; default: the run's")
    group.add_argument("--no-network", action="store_true", help="only what is on this machine already")
    group.add_argument("--model", metavar="WHERE", help="the base model, where it is not where the run had it")


def machine_options(given: argparse.Namespace) -> dict[str, Any]:
    """The same as options of `use.load`; those that were given."""
    wrong = [
        f"--{name} {value}"
        for name in ("threads", "batch-size")
        if (value := _of(given, name)) is not None and value < 1
    ]
    if wrong:
        fail(SettingsError, ", ".join(wrong), "1 or more", "leave it out for the default")
    options = {"device": given.device, "threads": given.threads, "eval_batch_size": given.batch_size}
    options |= {"network": False if given.no_network else None, "model": given.model}
    return {name: value for name, value in options.items() if value is not None}


def _of(given: argparse.Namespace, name: str) -> Any:
    return getattr(given, name.replace("-", "_"))


def column_flags(parser: argparse.ArgumentParser) -> None:
    """Which column is which, and what to do with rows that have no use."""
    parser.add_argument(
        "--columns", nargs="+", metavar="ROLE=COLUMN", help="where a column's name does not tell its role"
    )
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out rows that cannot be used")


def column_options(given: argparse.Namespace) -> dict[str, Any]:
    """The same as options of `use.load`."""
    found: dict[str, Any] = {"bad_rows": "skip" if given.skip_bad_rows else "stop"}
    if given.columns:
        pairs = [word.partition("=") for word in given.columns]
        if any(not (role and mark and name) for role, mark, name in pairs):
            do = "write --columns text=review label=stars"
            fail(SettingsError, f"--columns {' '.join(given.columns)}", "ROLE=COLUMN pairs", do)
        found["columns"] = {role: name for role, _, name in pairs}
    return found


def app(args: list[str], prog_name: str = "peft-fast eval") -> int:
    """Prints a table and writes JSON; exit status 0."""
    parser = Parser(prog=prog_name, description="Judge a finished run on its own or on other rows.")
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder that `train` wrote")
    add("--data", metavar="WHERE", help="file, folder, hub id or example:NAME (default: the run's own)")
    add("--split", choices=("train", "validation", "test"), help="default: test if there is one, else validation")
    add("--output", type=Path, metavar="FILE", help="JSON of metrics and samples (default RUN/eval.json)")
    add("--report", type=Path, metavar="FILE", help="the same as a page, with confusion matrix or samples")
    column_flags(parser)
    machine_flags(parser)
    given = parser.parse_args(args)
    options = machine_options(given) | column_options(given)
    from peft_fast.recipes import record, use

    run = use.load(given.run, **options)
    found = use.evaluate(run, given.data, given.split)
    output = given.output or run.folder / "eval.json"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        record.write_json(output, found)
        if given.report:
            given.report.write_text(_page(found), encoding="utf-8")
    except OSError as error:
        fail(SettingsError, f"{error.filename}: {error.strerror}", "a file that can be written", "pass another", error)
    show(found, run.result)
    print(f"written: {output}" + (f", {given.report}" if given.report else ""))
    return 0


def show(found: dict[str, Any], result: dict[str, Any]) -> None:
    """The metrics beside those that the run ended with, on the same split where it has them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from peft_fast.pages import words

    console = Console(highlight=False)
    final = result.get("final") or {}
    split = found["split"] if final.get(found["split"]) else words.final(result)[0]
    before = final.get(split) or {}
    table = Table(title=Text(f"{found['run']} on {found['data']}, {found['rows']:,} rows"), title_justify="left")
    for column in ("metric", "here", f"after training, {split} rows"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value in found["metrics"].items():
        star = " *" if name == found["metric"] else ""
        table.add_row(name + star, words.metric(name, value), words.metric(name, before.get(name)))
    console.print(table)


def _page(found: dict[str, Any]) -> str:
    from peft_fast.pages import html, shown, words

    name = found["metric"]
    title = f"{found['run']} on {found['data']}: {name} {words.metric(name, found['metrics'].get(name))}"
    rows = [(key, words.metric(key, value)) for key, value in found["metrics"].items()]
    body = [f"<h1>{html.escape(title)}</h1>", f"<p>{found['rows']:,} rows</p>", html.table(("metric", ""), rows, (1,))]
    return html.document(title, [*body, *shown.build(found["shown"])])
