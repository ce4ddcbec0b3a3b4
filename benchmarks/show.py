"""What the user sees while a benchmark runs: rich tables and a progress bar, or plain lines without rich."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from . import machine, targets

COLUMNS = (
    "", "ms", "IQR", "× baseline [95 %]", "CPU ×", "speed-up [95 %]", "saved MiB", "peak MiB", "error",
)  # fmt: skip
WIDE = 140  # columns of a terminal that hold them all
NARROW = (0, 1, 3, 5, 6, 8)


def cells(row: dict) -> list[list[str]]:
    """A measured row of a document -> one list of cells per provider."""
    out = []
    for name, phases in row["providers"].items():
        total = phases["total"]
        size = row["bytes"][name]
        match = row["match"].get(name)
        out.append([
            name, _phases(phases), f"{total['q1_ms']:.2f}–{total['q3_ms']:.2f}", interval(total.get("ratio")),
            f"{total['cpu_ratio'][0]:.2f}" if "cpu_ratio" in total else "", interval(total.get("speedup")),
            f"{size['saved'] / 2**20:.1f}", f"{size['peak'] / 2**20:.1f}",
            "" if match is None else f"{match:.2f}",
        ])  # fmt: skip
    return out


def interval(value: list[float] | None) -> str:
    return f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]" if value else ""


def caption(row: dict) -> str:
    """The row's title, its rounds and its A/A pair."""
    aa = row["aa"]
    verdict = "" if aa["ok"] else "  NOISY: the machine was not quiet, do not quote this row"
    return f"{row['title']}   {row['rounds']} rounds   A/A {interval(aa['ratio'])}{verdict}"


def run_cells(row: dict) -> list[list[str]]:
    """A row of whole runs -> a head and one list of cells per run."""
    head = ["", "perplexity", "tokens/s", "ms a step", "peak MiB, process", "peak MiB of a step", "saved MiB"]
    lines = [head]
    for name, run in row["runs"].items():
        before, after = run["perplexity"]
        sizes = (f"{run[key] / 2**20:,.0f}" for key in ("peak_resident_bytes", "step_bytes", "saved_bytes"))
        step = 1e3 * run["seconds"] / row["settings"]["steps"]
        lines.append([name, f"{before:.2f} → {after:.2f}", f"{run['tokens_per_second']:,.0f}", f"{step:,.0f}", *sizes])
    return lines


def verdict(row: dict) -> str:
    """The speed-up of whole runs and what their perplexities say."""
    layers = row["runs"]["peft_fast"]["layers"]
    apart = f"perplexity {100 * (row['perplexity_ratio'] - 1):+.2f} % from stock PEFT's"
    speed = f"{interval(row['speedup'])} times stock PEFT's speed"
    why = f"; {row['apart']}" if row["apart"] else ""
    joined = f"{layers['groups']} groups and {layers['blocks']} blocks"
    return f"{speed}, {apart}, {layers['fast']} of {layers['of']} layers fast, {joined}{why}"


def _phases(phases: dict) -> str:
    parts = [f"{f['ms']:.2f}" for phase, f in phases.items() if phase != "total"]
    return f"{phases['total']['ms']:.2f}" + (f" ({' + '.join(parts)})" if len(parts) > 1 else "")


class Plain:
    """Lines on stdout; the same interface as Rich."""

    def header(self, document: dict) -> None:
        print(f"{document['bench']} · {machine.line(document['machine'])}", flush=True)
        for key in ("load_average", "peft_fast"):
            print(f"{key}: {document['machine'][key]}", flush=True)

    @contextlib.contextmanager
    def progress(self, cases: int) -> Iterator[Plain]:
        yield self

    def case(self, title: str) -> None:
        print(f"… {title}", file=sys.stderr, flush=True)

    def round(self, done: int, of: int) -> None:
        pass

    def refused(self, title: str, reason: str) -> None:
        print(f"\n{title}\n{reason}", flush=True)

    def row(self, row: dict) -> None:
        if "providers" not in row:
            matches = ", ".join(f"{name} {match:.2f}" for name, match in row["match"].items())
            print(f"{row['title']}: error / allowed: {matches}", flush=True)
            _notes(row)
            return
        print("\n" + caption(row))
        _lines([list(COLUMNS), *cells(row)])
        _notes(row)

    def runs(self, row: dict) -> None:
        print("\n" + row["title"], flush=True)
        _lines(run_cells(row))
        print(verdict(row), flush=True)

    def targets(self, found: list) -> None:
        _lines([["target", "needed", "found", ""], *targets.lines(found)])


class Rich(Plain):
    """Tables and a progress bar on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console()

    @contextlib.contextmanager
    def progress(self, cases: int) -> Iterator[Rich]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=self.console, transient=True) as self.bar:
            self.all = self.bar.add_task("cases", total=cases)
            self.one = self.bar.add_task("")
            yield self

    def case(self, title: str) -> None:
        self.bar.update(self.one, description=title, completed=0, total=None)

    def round(self, done: int, of: int) -> None:
        self.bar.update(self.one, completed=done, total=of)

    def row(self, row: dict) -> None:
        self.bar.advance(self.all)
        if "providers" not in row:
            super().row(row)
            return
        from rich.table import Table

        # a narrow terminal has the figures; the spread, the host and the peak are in the document
        shown = range(len(COLUMNS)) if self.console.width >= WIDE else NARROW
        table = Table(title=caption(row), title_justify="left", title_style="bold")
        for i in shown:
            table.add_column(COLUMNS[i], no_wrap=i == 0)
        for line in cells(row):
            style = "bold" if line[0].startswith("peft_fast") else ""
            table.add_row(*(line[i] for i in shown), style=style)
        self.console.print(table)
        _notes(row)

    def targets(self, found: list) -> None:
        from rich.table import Table

        table = Table("target", "needed", "found", "", title="targets", title_justify="left", title_style="bold")
        for line, target in zip(targets.lines(found), found, strict=True):
            table.add_row(*line, style={True: "green", False: "red", None: "dim"}[target.met])
        self.console.print(table)


def _lines(table: list[list[str]]) -> None:
    """Rows of cells in columns of equal width."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip(), flush=True)


def _notes(row: dict) -> None:
    for name, why in row.get("left_out", {}).items():
        print(f"without {name}: {' '.join(why.split())}", flush=True)
    if "starved" in row:
        print(f"the GPU waited for the host in: {', '.join(row['starved'])}", flush=True)


def best() -> Plain:
    """Rich where it is installed and somebody is watching, plain lines otherwise."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            return Rich()
    return Plain()
