"""The trials of a search: what counts, which is best, and the files that show it."""

from __future__ import annotations

import csv
import io
import math
import os
import time
from pathlib import Path
from typing import Any

import yaml

from peft_fast.errors import PeftFastError
from peft_fast.recipes import config as configs
from peft_fast.recipes import record
from peft_fast.recipes.config import Config

KILLED = "killed"
GAP = 60.0  # seconds between two drawings of the plots while a search goes on
STATES = {"COMPLETE": "done", "FAIL": "failed"}


class Failed(Exception):
    """A trial that came to nothing, and why."""


class Trials:
    """A study's trials, read anew each time."""

    def __init__(self, folder: Path, study: Any, metric: str, higher: bool) -> None:
        self.folder, self.study, self.metric, self.higher = folder, study, metric, higher
        self.pictures: dict[str, bytes] = {}
        self.drawn = time.monotonic()

    def all(self) -> list[Any]:
        """Those that were tried; cut off and doubled ones left out."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if "aside" not in trial.user_attrs]

    def next(self) -> int:
        """The number of the trial that is drawn next: doubled ones have none."""
        return max((number(trial) for trial in self.all() if trial.user_attrs.get("folder")), default=-1) + 1

    def counted(self) -> list[Any]:
        """Those that came to an end."""
        return [trial for trial in self.all() if trial.state.is_finished()]

    def best(self) -> Any:
        """The best trial; of equals the first, whose weights are kept."""
        sign = 1 if self.higher else -1
        done = [trial for trial in self.all() if trial.state.name == "COMPLETE"]
        return max(done, key=lambda trial: (sign * trial.value, -trial.number), default=None)

    def rows(self) -> list[dict[str, Any]]:
        """A trial a row, as JSON."""
        best = self.best()
        return [
            {
                "trial": number(trial),
                "again": trial.user_attrs.get("retry_of") is not None,
                "state": STATES.get(trial.state.name, trial.state.name.lower()),
                self.metric: trial.value if trial.state.name == "COMPLETE" else _last(trial),
                "seconds": trial.user_attrs.get("seconds"),
                "memory_bytes": trial.user_attrs.get("memory"),
                "best": best is not None and trial.number == best.number,
                "unlearnt": trial.user_attrs.get("unlearnt", False),
                "reason": trial.user_attrs.get("reason", ""),
                "options": drawn(trial),
                "folder": f"trials/{trial.user_attrs.get('folder')}",
            }
            for trial in self.all()
        ]

    def write(self, ended: bool = False) -> None:
        """Everything but the study itself, which is written as it goes; plots now and then, and when it has ended."""
        from peft_fast.pages import search as page

        rows, best = self.rows(), self.best()
        record.write_json(self.folder / "trials.json", rows)
        record.write(self.folder / "trials.csv", self._csv(rows))
        if best is not None:
            record.write(self.folder / "best.yaml", configs.dump(self.config(best)))
        if ended or time.monotonic() - self.drawn > GAP:
            self.pictures = page.draw(self.study, self.metric)
            self.drawn = time.monotonic()
        page.write(rows, self.metric, self.higher, self.pictures, self.folder)

    def _csv(self, rows: list[dict[str, Any]]) -> str:
        names = list(dict.fromkeys(name for row in rows for name in row["options"]))
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["trial", "state", self.metric, "seconds", *names, "reason"])
        for row in rows:
            values = [row["options"].get(name, "") for name in names]
            writer.writerow([row["trial"], row["state"], row[self.metric], row["seconds"], *values, row["reason"]])
        return text.getvalue()

    def config(self, trial: Any) -> Config:
        """A trial's config as one to train by."""
        given = from_yaml(trial.user_attrs["config"])
        for name in ("overwrite", "resume", "search"):
            given.pop(name, None)
        return configs.read(given | {"out": str(Path(os.path.relpath(self.folder)) / "best")})


def number(trial: Any) -> int:
    """A trial's number, which is its folder's: without gaps, and one that is done again keeps it."""
    return int(trial.user_attrs.get("folder") or trial.number)


def drawn(trial: Any) -> dict[str, Any]:
    """What a trial tries, by option."""
    given = trial.params or getattr(trial, "system_attrs", {}).get("fixed_params", {})  # a trial that waits
    return {name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in given.items()}


def _last(trial: Any) -> float | None:
    values = trial.intermediate_values
    return values[max(values)] if values else None


def from_yaml(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)


def finite(value: Any) -> Any:
    """Without what JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def reason(error: BaseException) -> str:
    """One line of why a trial failed."""
    text = str(error).strip()
    if isinstance(error, PeftFastError):
        return " ".join(text.removeprefix("given: ").partition("\nneeded:")[0].split())[:300]
    if "out of memory" in text.lower() or isinstance(error, MemoryError) or "can't allocate memory" in text.lower():
        return "out of memory"
    return text if isinstance(error, Failed) else f"{type(error).__name__}: {' '.join(text.split())[:300]}"
