"""A search over options: one study, one run a trial, all of it in a folder that a killed search goes on from.

study.db                 optuna's study
trials/0007/             the run of trial 7: config, log, metrics, report; weights only of the best
best.yaml                the best trial's config, ready for `train`
trials.csv, trials.json  what was tried and what came of it
report.html              the same to look at, with importance and parallel coordinates
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peft_fast.errors import DataError, SettingsError, UnsupportedError, fail, program
from peft_fast.recipes import config as configs
from peft_fast.recipes import record, space, trials
from peft_fast.recipes.config import Config

PATIENCE = 3  # failures of one kind from the start on that end a search: it is not the options then
WAIT = 4  # trials that end before any is cut short
REDRAWN = 8  # times that a trial like an earlier one is drawn anew
Event = Callable[[str, dict[str, Any]], None]  # began, step, judged, ended


@dataclasses.dataclass
class Outcome:
    """What a search leaves."""

    folder: Path
    study: Any
    trials: list[dict[str, Any]]
    best: dict[str, Any] | None
    config: Config | None  # the best trial's
    stopped: bool = False
    metric: str = ""


def search(
    config: Config | str | Path,
    count: int = 20,
    timeout: float | None = None,
    study: str | Path | None = None,
    prune: bool = True,
    tell: Event = lambda event, facts: None,
    **options: Any,
) -> Outcome:
    """Tries ``count`` configs, those of an earlier call in the same folder counted; the best by the run's metric."""
    from peft_fast.recipes import data, process, run, tasks

    process.need_packages()
    if importlib.util.find_spec("optuna") is None:
        need, do = "the package that searches", "run `pip install 'peft_fast[train]'`"
        fail(UnsupportedError, "a Python without optuna", need, do)
    config = run.resolve(config, options)
    if count < 1:
        fail(SettingsError, f"trials: {count}", "1 or more", "pass --trials N")
    tried = space.read(config)
    task = tasks.get(config.task)(config)
    metric = config.metric or task.metric
    if metric not in task.judged_by:
        fail(SettingsError, f"metric: {metric}", f"one of {', '.join(sorted(task.judged_by))}", "pass one of these")
    folder = config.out.expanduser()
    with _held(folder, config) as resumed, _quiet(), data.kept():
        rows = data.fingerprint(data.read(config, task), task)
        path = Path(study) if study else folder / "study.db"
        found = _study(path, config, tried, rows, task.judged_by[metric], prune)
        searcher = Search(config, tried, metric, task.judged_by[metric], folder, found, prune, tell)
        if resumed:
            searcher.take_up()
        return searcher.outcome(searcher.go(count, timeout))


@contextlib.contextmanager
def _held(folder: Path, config: Config) -> Iterator[bool]:
    """The folder for this process alone; yields whether a search is in it already."""
    there = (folder / "search.yaml").exists()
    if not there and folder.exists() and any(p.name != ".lock" for p in folder.iterdir()) and not config.overwrite:
        given = f"out: {folder} has {'a run' if record.there(folder) else 'something else'} in it"
        fail(SettingsError, given, "a folder of this search", "pass another --out, or --overwrite")
    with contextlib.ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context((folder / ".lock").open("w"))
        record.hold(lock, folder, "searching")
        if config.overwrite and there:
            for name in ("study.db", "search.yaml", "best.yaml", "trials.csv", "trials.json", "report.html"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "trials", ignore_errors=True)
            there = False
        yield there


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """optuna's own log and its warnings of features that may change."""
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _study(
    path: Path, config: Config, tried: space.Space, rows: dict[str, list[Any]], higher: bool, prune: bool
) -> Any:
    import optuna

    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=WAIT) if prune else optuna.pruners.NopPruner()
    try:
        study = optuna.create_study(
            study_name="peft_fast",
            storage=f"sqlite:///{path}",
            direction="maximize" if higher else "minimize",
            pruner=pruner,
            load_if_exists=True,
        )
    except Exception as error:  # sqlalchemy's kinds are many
        reason = str(error).strip().splitlines()[0][:200]
        fail(DataError, f"study {path}: {reason}", "a study file of this search", "pass another --study", error)
    mine = {"config": _identity(config), "space": repr(tried)}
    before = dict(study.user_attrs)
    if before and {key: before.get(key) for key in mine} != mine:
        changed = _changed(before.get("config", {}), mine["config"]) or ["search"]
        given = f"study {path.name} of other options ({', '.join(changed)})"
        do = "take the options it began with, --overwrite to throw it away, or another --out"
        fail(SettingsError, given, "one config for all trials of a study", do)
    if before.get("rows", rows) != rows:
        had, have = ({name: count for name, (count, _) in one.items()} for one in (before["rows"], rows))
        given = f"study {path.name} of other rows ({had}, now {have})"
        do = "put the data back as it was, --overwrite to throw the study away, or another --out"
        fail(DataError, given, "the same rows for all trials of a study", do)
    for key, value in (mine | {"rows": rows}).items():
        study.set_user_attr(key, value)
    return study


def _identity(config: Config) -> dict[str, Any]:
    """What makes two searches the same."""
    aside = {"out", "overwrite", "resume", "name", "log_every", "report_to", "network", "threads", "search"}
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in aside}


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [key for key in now if before.get(key) != now[key]]


class Search:
    """One process's share of a study."""

    def __init__(
        self,
        config: Config,
        tried: space.Space,
        metric: str,
        higher: bool,
        folder: Path,
        study: Any,
        prune: bool,
        tell: Event,
    ) -> None:
        self.config, self.space, self.metric, self.higher = config, tried, metric, higher
        self.folder, self.study, self.prune, self.tell = folder, study, prune, tell
        self.judged = {"metric": metric, "higher": higher}
        self.trials = trials.Trials(folder, study, metric, higher)
        record.write(folder / "search.yaml", configs.dump(config.model_copy(update={"overwrite": False})))

    def take_up(self) -> None:
        """A trial that a kill cut off counts as failed, and is done again, from its last checkpoint on."""
        import optuna

        for trial in self.study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            self.again(trial.number)

    def again(self, number: int) -> None:
        """End a trial as cut off, and put another like it in the queue."""
        trial = self.study.trials[number]
        first = trial.user_attrs.get("retry_of", number)
        self.aside(number, trials.KILLED)
        if trial.params:
            attributes = {"folder": trial.user_attrs.get("folder"), "retry_of": first}
            self.study.enqueue_trial(trial.params, user_attrs=attributes)

    def aside(self, number: int, why: str) -> None:
        """End a trial that does not count."""
        import optuna

        self.study._storage.set_trial_user_attr(self.study.trials[number]._trial_id, "aside", why)
        self.study.tell(number, state=optuna.trial.TrialState.FAIL)

    def go(self, count: int, timeout: float | None) -> bool:
        """Trials until there are enough or time is up; True where somebody stopped it."""
        began = time.monotonic()
        while len(self.trials.counted()) < count and (timeout is None or time.monotonic() - began < timeout):
            self._hopeless()
            if not self.one():
                return True
            self.trials.write()
        return False

    def _hopeless(self) -> None:
        ended = self.trials.counted()
        reasons = [trial.user_attrs.get("kind") for trial in ended]
        if len(ended) >= PATIENCE and None not in reasons and len(set(reasons)) == 1:
            reason = ended[-1].user_attrs.get("reason", "")
            do = f"try one with `{program()} train` first; then search with --overwrite"
            fail(DataError, f"{len(ended)} trials, all failed: {reason}", "a config that trains", do)

    # ---- one trial

    def one(self) -> bool:
        """Draw, train, tell; False where it was stopped."""
        import optuna

        trial, config, twin = self.draw()
        facts = {
            "number": trials.number(trial),
            "options": trials.drawn(trial),
            **self.judged,
            "folder": str(config.out) if config else "",
        }
        self.tell("began", facts)
        state, value, reason, stopped = optuna.trial.TrialState.FAIL, None, "", False
        try:
            if config is None:
                raise trials.Failed(trial.user_attrs["invalid"])
            value = self.copy(trial, twin) if twin is not None else self.train(trial, config)
            state = optuna.trial.TrialState.COMPLETE
        except optuna.TrialPruned:
            state, reason = optuna.trial.TrialState.PRUNED, "worse than the median of the trials so far"
        except KeyboardInterrupt:
            stopped = True
        except DataError as error:
            if not any(one.state == optuna.trial.TrialState.COMPLETE for one in self.trials.counted()):
                self.again(trial.number)  # no option that is tried mends the data
                raise
            reason = trials.reason(error)
        except Exception as error:  # out of memory, options that do not go together: the next trial may do better
            reason = trials.reason(error)
            trial.set_user_attr("kind", type(error).__name__)
        finally:
            free()
        if stopped:
            self.again(trial.number)
            return False
        if reason:
            trial.set_user_attr("reason", reason)
        self.study.tell(trial, value if state == optuna.trial.TrialState.COMPLETE else None, state=state)
        self._tidy(trial.number)
        self.tell("ended", {**facts, "state": state.name.lower(), "value": value, "reason": reason})
        return True

    def draw(self) -> tuple[Any, Config | None, Any]:
        """(trial, its config, an earlier trial that was the same); what was just tried is drawn again."""
        import optuna

        for attempt in range(REDRAWN + 1):
            # a seed for each trial: a search that goes on draws what it would have drawn
            number = len(self.trials.counted()) * (REDRAWN + 1) + attempt
            seed = (self.config.seed * 1_000_003 + number) % 2**32
            start = min(10, max(4, 2 * len(self.space)))
            self.study.sampler = optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=start, multivariate=True, group=True, constant_liar=False
            )
            trial = self.study.ask()
            values = space.draw(trial, self.config, self.space)
            began = trial.user_attrs.get("folder") or f"{self.trials.next():04d}"
            trial.set_user_attr("folder", began)
            try:
                config = space.options(self.config, values, out=self.folder / "trials" / began, overwrite=True)
            except SettingsError as error:
                trial.set_user_attr("invalid", trials.reason(error))
                return trial, None, None
            trial.set_user_attr("config", configs.dump(config))
            twin = self._twin(trial, config)
            if twin is None or attempt == REDRAWN or trial.user_attrs.get("retry_of") is not None:
                return trial, config, twin
            self.aside(trial.number, f"like trial {trials.number(twin)}")
        raise AssertionError

    def _twin(self, trial: Any, config: Config) -> Any:
        mine = _identity(config)
        for other in self.study.get_trials(deepcopy=False):
            done = other.state.name == "COMPLETE" and other.number != trial.number
            if done and _identity(configs.read(trials.from_yaml(other.user_attrs["config"]))) == mine:
                return other
        return None

    def copy(self, trial: Any, twin: Any) -> float:
        """What an earlier trial of the same config came to."""
        trial.set_user_attr("unlearnt", twin.user_attrs.get("unlearnt", False))
        return twin.value

    def train(self, trial: Any, config: Config) -> float:
        """The best value on the validation rows."""
        from peft_fast.pages import words
        from peft_fast.recipes import run

        if record.there(config.out) and trial.user_attrs.get("retry_of") is not None:
            config = config.model_copy(update={"overwrite": False, "resume": True})
        watch = _watch(self, trial)
        made = run.train(config, callbacks=[watch], say=lambda text: None)
        if made.result["state"] != "done":
            raise KeyboardInterrupt
        best = made.result.get("best") or {}
        value = best.get("value")
        if best.get("step") == 0:  # the value before training is no trial's own
            trial.set_user_attr("unlearnt", True)
            after = self.study.trials[trial.number].intermediate_values.values()
            value = (max if self.higher else min)(after, default=math.nan)
        if value is None:
            value = made.result["final"].get("validation", {}).get(self.metric)
        trial.set_user_attr("seconds", made.result["seconds"])
        trial.set_user_attr("final", trials.finite(made.result["final"]))
        trial.set_user_attr("memory", words.beyond(made.result.get("memory") or {}))
        if value is None or not math.isfinite(value):
            raise trials.Failed(f"{self.metric} was no number")
        return float(value)

    def _tidy(self, number: int) -> None:
        """No checkpoints; weights of the best trial alone."""
        best = self.trials.best()
        for path in (self.folder / "trials").glob("*"):
            shutil.rmtree(path / record.CHECKPOINTS, ignore_errors=True)
            if best is None or path.name != best.user_attrs["folder"]:
                for name in (record.ADAPTER, record.MODEL):
                    shutil.rmtree(path / name, ignore_errors=True)

    def outcome(self, stopped: bool) -> Outcome:
        """All files written, and what is in them."""
        rows, best = self.trials.rows(), self.trials.best()
        self.trials.write(ended=True)
        row = next((row for row in rows if row["best"]), None)
        config = self.trials.config(best) if best else None
        return Outcome(self.folder, self.study, rows, row, config, stopped, self.metric)


def free() -> None:
    """Memory of a trial that is over."""
    import gc

    import torch

    from peft_fast.recipes import process

    gc.collect()
    process.trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _watch(search: Search, trial: Any) -> Any:
    """Reports evaluations to the study, and ends trials that are lost; made here, where transformers is imported."""
    import optuna
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        evaluations = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for entry in state.log_history:  # what an earlier process had judged
                if f"eval_{search.metric}" in entry and entry["step"]:
                    self.report(entry[f"eval_{search.metric}"], prune=False)

        def report(self, value: float, prune: bool = True) -> None:
            self.evaluations += 1
            if math.isfinite(value):
                trial.report(value, self.evaluations)
            if prune and search.prune and trial.should_prune():
                raise optuna.TrialPruned

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            value = (metrics or {}).get(f"eval_{search.metric}")
            if value is not None and state.global_step:
                search.tell("judged", {"value": value, "step": state.global_step, "steps": state.max_steps})
                self.report(value)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            search.tell("step", {"step": state.global_step, "steps": state.max_steps})

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            loss = (logs or {}).get("loss")
            if loss is not None and not math.isfinite(loss):
                raise trials.Failed(f"the loss was no number at step {state.global_step}")

    return Watch()
