"""Checkpoints that are whole or not there, and that a run goes on from as if it had never been stopped.

    checkpoints/checkpoint-120/          whole: it got its name when the last byte of it was on the disk
    checkpoints/.checkpoint-130.saving/  being written; what a killed process left of it goes at the next start

A checkpoint is the Trainer's, with three differences: MANIFEST.json holds size and hash of every file; peft_fast.json
holds what the Trainer forgets; and of a model of which only a part trains, only that part is written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from peft_fast.errors import CheckpointError, UnsupportedError, fail
from peft_fast.patch import resume
from peft_fast.recipes import weights

MANIFEST, STATE = "MANIFEST.json", "peft_fast.json"
VERSION = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_HIDDEN = re.compile(r"\.(checkpoint-\d+)\.(saving|replaced|deleting)")
CHUNK = 1 << 20


# ---- folders


def latest(folder: str | Path, say: Callable[[str], None] | None = None) -> Path | None:
    """The newest checkpoint below ``folder`` that is whole; ``say`` hears why a newer one is left out."""
    say = say or (lambda text: warnings.warn(text, stacklevel=3))
    second = None
    for path in reversed(_all(Path(folder))):
        if why := damage(path):
            say(f"{path.name} is damaged and left out: {why}")
            continue
        best = best_of(path)
        if best is None or best == path or not (why := damage(best)):
            return path
        # what came after the best one cannot be had without it: an older checkpoint may find it again
        say(f"{path.name} names {best.name} as the best, which is damaged: {why}")
        second = second or path
    return second


def damage(path: Path) -> str:
    """What is wrong with a checkpoint; empty if every file is as it was written."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name, (size, digest) in files.items():
            if (found := (path / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            if _sha256(path / name) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST}: {error}"
    return ""


def clean(folder: str | Path) -> list[str]:
    """Removes what killed processes left of checkpoints they were writing or removing -> their names."""
    folder, left = Path(folder), []
    for path in sorted(folder.glob(".checkpoint-*")):
        if not (match := _HIDDEN.fullmatch(path.name)):
            continue
        left.append(path.name)
        name, what = match.groups()
        if what == "replaced" and not (folder / name).exists():
            path.rename(folder / name)  # killed between taking the old one away and putting the new one in its place
        else:
            shutil.rmtree(path, ignore_errors=True)
    return left


def best_of(path: Path) -> Path | None:
    """The folder of the best checkpoint as one of its neighbours knows it; a run's folder may have been moved."""
    with contextlib.suppress(OSError, ValueError):
        state = json.loads((path / "trainer_state.json").read_text())
        # null: the best is known by its value alone, since nothing was saved at its step
        if state.get("best_model_checkpoint"):
            return path.parent / f"checkpoint-{state.get('best_global_step')}"
    return None


def rotate(folder: Path, newest: Path, keep: int) -> None:
    """Leaves the ``keep`` newest checkpoints up to ``newest`` and the best ones that they name."""
    # the beginning is there for nothing but to be the best
    course = [path for path in _all(folder) if 0 < _step(path) <= _step(newest)]
    kept = {*course[-max(keep, 1) :], newest}
    kept |= {best for path in list(kept) if (best := best_of(path)) is not None}
    # steps above the newest are of a course that was left, or damaged
    for path in _all(folder):
        if path not in kept:
            _remove(path)


def _all(folder: Path) -> list[Path]:
    """Every checkpoint, the oldest first."""
    return sorted((p for p in folder.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def _remove(path: Path) -> None:
    """Takes a checkpoint away: first its name, so that no half of it is ever taken for a whole one."""
    gone = path.with_name(f".{path.name}.deleting")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _seal(folder: Path, step: int) -> None:
    """Writes the manifest, and has the disk take every file and folder."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    files = {p.relative_to(folder).as_posix(): [p.stat().st_size, _sha256(p)] for p in paths}
    _write(folder / MANIFEST, {"version": VERSION, "step": step, "files": files})
    for path in [*paths, folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _sync(path)


def _place(work: Path, final: Path) -> None:
    """Gives a finished folder its name."""
    aside = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    work.rename(final)
    _sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        given = f"{path}: no {STATE} that can be read"
        do = "go on from one that this package wrote, or start a new run"
        fail(UnsupportedError, given, "a checkpoint of peft_fast", do, error)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _all_or_nothing(work: Path, step: int) -> Iterator[None]:
    """Nothing is left of a folder that could not be written whole."""
    try:
        yield
    except BaseException as error:
        size = sum(p.stat().st_size for p in work.rglob("*") if p.is_file())
        shutil.rmtree(work, ignore_errors=True)
        if _is_disk(error, work.parent):
            _no_room(work.parent, step, size, error)
        raise


def _is_disk(error: BaseException, folder: Path) -> bool:
    """Did the disk refuse? torch and safetensors have errors of their own for that."""
    theirs = "PytorchStreamWriter", "inline_container", "iostream error", "os error", "I/O error"
    return isinstance(error, OSError) or (
        isinstance(error, Exception)
        and (any(text in str(error) for text in theirs) or shutil.disk_usage(folder).free < CHUNK)
    )


def _no_room(folder: Path, step: int, size: int, error: BaseException) -> NoReturn:
    free = shutil.disk_usage(folder).free
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
    why = "the disk is full" if full or free < CHUNK else str(error).splitlines()[0]
    fail(
        CheckpointError,
        f"the checkpoint of step {step}, {size / 1e6:,.1f} MB of it written to {folder}: {why}",
        f"room for a checkpoint more than are kept, and the right to write; {free / 1e6:,.1f} MB are free",
        "make room and go on with --resume: the checkpoints before are whole",
        error,
    )


# ---- the Trainer


def _begin(restore: Callable[[], None]) -> Any:
    """A callback that calls ``restore`` when the loop has been set up, before its first step."""
    from transformers import TrainerCallback

    class Begin(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            restore()

    return Begin()


class AtomicCheckpoints:
    """For a class of transformers' Trainer to inherit from first: its checkpoints are the ones above.

    ``own_state`` and ``load_own_state`` are for what the class itself counts.
    """

    _work: Path | None = None  # where a checkpoint is being written
    _saved: dict[str, Any] | None = None  # peft_fast.json of the checkpoint that this run goes on from
    _from: Path | None = None
    _keep: int | None = None
    _begin: Any = None
    _before = 0.0  # seconds of training before this process

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint shall keep for this class, as JSON."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Takes back what own_state() gave."""

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; ``resume_from_checkpoint`` is best what latest() found."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = latest(self.args.output_dir)
        if self.args.save_total_limit is not None:
            # Trainer would rotate by other rules, and remove the last checkpoint at the end if one is to be kept
            self._keep, self.args.save_total_limit = self.args.save_total_limit, None
        self._prints, self._changed = weights.fingerprints(self.model), set()
        self._note_trained()  # what is thawed later too: the best checkpoint has to undo that as well
        self._from = self._saved = None
        if resume_from_checkpoint:
            self._from = Path(resume_from_checkpoint)
            self._saved = _read(self._from)
            weights.compare(self._saved["frozen"], self._prints, self._from)
            self._changed.update(self._saved["changed"])
            self.args.eval_on_start = False
        if self._begin is None:
            self._begin = _begin(self._restore)
            self.add_callback(self._begin)
        return super().train(self._from and str(self._from), *args, **kwargs)

    # ---- writing

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._work or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A whole checkpoint under its name, or none; then the older ones that are not kept go."""
        folder, state = Path(self._get_output_dir(trial)), self.state
        final = folder / f"checkpoint-{state.global_step}"
        work = folder / f".{final.name}.saving"
        # Trainer adds to the list of each class of which there are several callbacks, at every save
        names = [type(callback).__name__ for callback in self._exportable()]
        state.stateful_callbacks = {name: [] if names.count(name) > 1 else {} for name in names}
        with _all_or_nothing(work, state.global_step):
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            self._work = work
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._work = None
            inner = work / final.name
            best = folder / f"checkpoint-{state.best_global_step}"  # None: there is no such folder
            state.best_model_checkpoint = str(best) if best == final or best.is_dir() else None
            state.save_to_json(str(inner / "trainer_state.json"))
            _write(inner / STATE, self._state())
            _seal(inner, state.global_step)
            _place(inner, final)
            work.rmdir()
        if self._keep:
            rotate(folder, final, self._keep)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self._work is None:
            return super()._save(output_dir, state_dict)
        # without the tokenizer and the arguments: they are the run's, and the same at every step
        self._note_trained()
        weights.save(self.model, Path(output_dir), self._changed)

    def _note_trained(self) -> None:
        self._changed.update(name for name, p in self.model.named_parameters() if p.requires_grad)

    def _state(self) -> dict[str, Any]:
        """What Trainer forgets."""
        return {
            "version": VERSION,
            # before its last step: a run that had done all may be given more of them
            "stopped": self.control.should_training_stop and self.state.global_step < self.state.max_steps,
            "loss": self._tr_loss.item(),
            "loss_total": self._total_loss_scalar,
            "loss_step": self._globalstep_last_logged,
            "first_step": self._initial_global_step,
            "seconds": self._before + time.time() - self._began,
            "changed": sorted(self._changed),
            "frozen": {name: found for name, found in self._prints.items() if name not in self._changed},
            "groups": resume.state(self.model),
            "own": self.own_state(),
        }

    def _exportable(self) -> list[Any]:
        from transformers.trainer_callback import ExportableState

        return [c for c in [*self.callback_handler.callbacks, self.control] if isinstance(c, ExportableState)]

    # ---- going on

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        weights.load(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # other parameters than it has moments for
            weights.another_model(self._from, f"another optimizer: {error}", error)

    def _load_best_model(self) -> None:
        weights.load(self.model, Path(self.state.best_model_checkpoint))

    def _load_callback_state(self) -> None:
        """Gives the callbacks that are there their values back; Trainer would make new ones."""
        state = self.state
        best = best_of(self._from)
        if best is not None and (why := "" if best == self._from else damage(best)):
            warnings.warn(f"{best.name}, the best so far, is forgotten: {why}", stacklevel=2)
            state.best_metric = state.best_global_step = best = None
        state.best_model_checkpoint = best and str(best)
        left = {n: [*found] if isinstance(found, list) else [found] for n, found in state.stateful_callbacks.items()}
        for callback in self._exportable():
            found = left.get(type(callback).__name__)
            if callback is self.control or not found:
                continue
            values = found.pop(0)["attributes"]
            if hasattr(callback, "load_state"):
                callback.load_state(values)
            else:
                vars(callback).update(values)
        self.load_own_state(self._saved["own"])

    def _restore(self) -> None:
        """Puts the loop where the checkpoint left it; Trainer has just begun it."""
        self._began, self._before = time.time(), 0.0
        self._note_trained()  # the other callbacks have said by now what does
        if (saved := self._saved) is None:
            return
        self._before = saved["seconds"]
        self._tr_loss = torch.full_like(self._tr_loss, saved["loss"])
        self._total_loss_scalar = saved["loss_total"]
        self._globalstep_last_logged = saved["loss_step"]
        self._initial_global_step = saved["first_step"]
        resume.restore_state(self.model, saved["groups"])
        self._load_rng_state(str(self._from))
        if saved["stopped"] and self.state.global_step < self.state.max_steps:
            # stopped early: it stays so, unless this run is given more patience
            stoppers = [c for c in self.callback_handler.callbacks if hasattr(c, "early_stopping_patience_counter")]
            patient = [c for c in stoppers if c.early_stopping_patience_counter < c.early_stopping_patience]
            self.control.should_training_stop = not patient or patient != stoppers
        elif self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # of a run that was over, Trainer would do one step more
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        return super()._finalize_training(trial, num_train_samples, start_time - self._before)
