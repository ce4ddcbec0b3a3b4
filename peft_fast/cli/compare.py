"""`peft-fast compare RUN…`: finished runs side by side, as a table, a page and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft_fast.cli.parser import Parser
from peft_fast.errors import DataError, SettingsError, fail


def app(args: list[str], prog_name: str = "peft-fast compare") -> int:
    """Prints the table and writes compare.html, compare.png and compare.json; exit status 0."""
    parser = Parser(
        prog=prog_name, description="Compare finished runs: metric, minutes, memory, and the options that differ."
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, or a folder that has runs in it")
    add("--metric", metavar="NAME", help="compare by this metric (default: what the first run was judged by)")
    add("--out", type=Path, default=Path("compare"), metavar="DIR", help="folder of page and picture (default compare)")
    add("--no-files", action="store_true", help="print the table and write nothing")
    given = parser.parse_args(args)
    results = [result for path in given.runs for result in read(path)]
    _known(results, given.metric)
    show(results, given.metric)
    if not given.no_files:
        write(results, given.out, given.metric)
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    """The result of a run, or of every run below a folder."""
    from peft_fast.recipes import record

    path = path.expanduser()
    if not record.there(path):
        below = sorted(p.parent for p in path.glob("*/metrics.json")) or sorted(
            p.parent for p in path.glob("*/*/metrics.json")
        )
        if below:
            return [record.read(folder) for folder in below]
    return [record.read(path)]


def _known(results: list[dict[str, Any]], name: str | None) -> None:
    from peft_fast.pages import compare as page

    if name and all(page.score(result, name) is None for result in results):
        there = sorted({key for result in results for scores in (result.get("final") or {}).values() for key in scores})
        fail(SettingsError, f"--metric {name}", "one of " + ", ".join(there), "no run has that metric: pass one it has")


def show(results: list[dict[str, Any]], name: str | None) -> None:
    """The table on the terminal, warnings below it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from peft_fast.pages import compare as page

    console = Console(highlight=False)
    for head, body in (page.rows(results, name), page.options(results)):
        made = Table()
        for i, column in enumerate(head):
            side = "right" if i and head[0] == "run" else "left"
            made.add_column(Text(column), justify=side, overflow="fold", no_wrap=column == "of rows")
        for row in body:
            made.add_row(*(Text(cell) for cell in row))
        if body and len(head) > 1:
            console.print(made)
    for text in page.warnings(results):
        console.print(f"warning: {text}", markup=False, soft_wrap=True)


def write(results: list[dict[str, Any]], folder: Path, name: str | None) -> None:
    """compare.html, compare.png, compare.json."""
    from peft_fast.pages import compare as page

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "compare.html").write_text(page.build(results, name), encoding="utf-8")
        page.draw(results, folder / "compare.png", name)
        (head, body), differ = page.rows(results, name), page.differing(results)
        plain = [
            dict(zip(head, row, strict=True))
            | {"options": {key: (result.get("config") or {}).get(key) for key in differ}}
            for row, result in zip(body, results, strict=True)
        ]
        text = json.dumps({"runs": plain, "warnings": page.warnings(results)}, indent=1, ensure_ascii=False)
        (folder / "compare.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        fail(DataError, f"--out {folder}: {error.strerror}", "a folder that can be written", "pass another", error)
    print(f"page: {folder / 'compare.html'}   picture: {folder / 'compare.png'}")
