"""`peft-fast search CONFIG.yaml`: many fine-tunings, the best options of them, and a report."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any

from peft_fast import settings
from peft_fast.errors import program

SHOWN = 16  # trials of the live table


def app(args: list[str], prog_name: str = "peft-fast search") -> int:
    """Runs the search; exit status 0 when it has a best trial, 1 when none was done, 130 when it was stopped."""
    given = _parser(prog_name).parse_args(args)
    from peft_fast.cli import options as flags
    from peft_fast.recipes import search

    options = flags.given(given)
    with Table(prog_name, given.trials) as table:
        found = search.search(
            given.config,
            given.trials,
            timeout=given.timeout,
            study=given.study,
            prune=given.prune,
            tell=table.tell,
            **options,
        )
    _say(found, table, given, prog_name)
    return 130 if found.stopped else 0 if found.best else 1


def _parser(prog: str) -> argparse.ArgumentParser:
    from peft_fast.cli import options as flags

    parser = argparse.ArgumentParser(
        prog=prog,
        description="Try options, by optuna: each trial is a run of its own, poor ones are cut short.",
        epilog="What is tried stands under `search:` in the config, option -> [values] or {low, high, log, step}; "
        "without it: method, r, alpha, learning rate, dropout and targets. The same command goes on with a search "
        "that was stopped. All options of train can be given too.",
        formatter_class=flags.Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.yaml", help="options, as train takes them")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="trials in all (default 20)")
    parser.add_argument("--timeout", type=float, metavar="S", help="start no trial after so many seconds")
    parser.add_argument("--study", type=Path, metavar="FILE", help="optuna's SQLite file (default OUT/study.db)")
    parser.add_argument(
        "--prune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="cut trials short that are worse than the median at the same evaluation",
    )
    flags.add(parser)
    return parser


def _say(found: Any, table: Table, given: argparse.Namespace, prog: str) -> None:
    from peft_fast.pages import search, words

    lines = []
    if found.best:
        value = words.metric(found.metric, found.best[found.metric])
        lines.append(f"best: trial {found.best['trial']}, {found.metric} {value}")
        lines += search.remarks(found.trials, found.metric)
        lines.append(f"train it again: {program()} train {found.folder / 'best.yaml'}")
    else:
        lines.append("no trial was done: trials.csv says why each ended")
    lines.append(f"report: {found.folder / 'report.html'}")
    if found.stopped:
        lines.append("stopped; the same command goes on where this one was")
    if not settings.get().quiet:
        print("\n".join(lines))


class Table:
    """The trials as they come: a table that is drawn anew on a terminal, a line each elsewhere."""

    def __init__(self, prog: str, trials: int) -> None:
        from rich.console import Console

        self.console = Console(highlight=False)
        self.rows: list[dict[str, Any]] = []
        self.trials = trials
        self.live: Any = None

    def __enter__(self) -> Table:
        if self.console.is_terminal and not settings.get().quiet:
            from rich.live import Live

            self.live = Live(get_renderable=self.draw, console=self.console, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            with contextlib.suppress(Exception):
                self.live.stop()

    def tell(self, event: str, facts: dict[str, Any]) -> None:
        """What `search` says."""
        if event == "began":
            self.rows.append({"state": "running", "at": "", "value": None, "reason": "", **facts})
            return
        row = self.rows[-1]
        if event == "ended":
            row |= facts | {"value": row["value"] if facts["value"] is None else facts["value"]}
            self._line(row)
            return
        row["at"] = f"step {facts['step']}/{facts['steps']}"
        row["value"] = facts.get("value", row["value"])

    def _line(self, row: dict[str, Any]) -> None:
        if self.live or settings.get().quiet:
            return
        self.console.print("  ".join(filter(None, self.cells(row))), markup=False, soft_wrap=True)

    def cells(self, row: dict[str, Any]) -> tuple[str, str, str, str, str]:
        """trial, state, value, options, why."""
        from peft_fast.pages import words

        state = {"complete": "done", "fail": "failed", "pruned": "cut short"}.get(row["state"], row["at"] or "starting")
        value = "–" if row["value"] is None else words.metric(row.get("metric", ""), row["value"])
        given = ", ".join(f"{name}={value}" for name, value in row["options"].items())
        return f"trial {row['number']}", state, value, given, row["reason"]

    def draw(self) -> Any:
        """The last trials."""
        from rich.table import Table as Grid
        from rich.text import Text

        grid = Grid(title=f"{sum(row['state'] != 'running' for row in self.rows)} of {self.trials} trials")
        for name in ("trial", "state", "value", "options", "why"):
            grid.add_column(name, justify="right" if name == "value" else "left", overflow="fold")
        best = self._best()
        for row in self.rows[-SHOWN:]:
            style = "bold green" if row is best else "dim" if row["state"] in ("fail", "pruned") else ""
            grid.add_row(*(Text(cell) for cell in self.cells(row)), style=style)
        return grid

    def _best(self) -> dict[str, Any] | None:
        done = [row for row in self.rows if row["state"] == "complete" and row["value"] is not None]
        higher = all(row.get("higher", True) for row in done)
        return (max if higher else min)(done, key=lambda row: row["value"], default=None)
