"""The folder of a run: what is in it, who may write to it, and files that are whole or absent.

config.yaml              the options that were given
task.json                what the training rows taught: class names and the like
log.jsonl                an entry a line, as they come
checkpoints/             checkpoint-N, each whole or absent
adapter/ or model/       what came out: PEFT's files, or a whole model, with the tokenizer or processor
metrics.json             the result
report.html              the result, to look at
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from peft_fast.errors import CheckpointError, DataError, SettingsError, fail
from peft_fast.recipes import config as configs
from peft_fast.recipes.config import Config

CONFIG, TASK, LOG, RESULT, REPORT = "config.yaml", "task.json", "log.jsonl", "metrics.json", "report.html"
CHECKPOINTS, ADAPTER, MODEL, BOARD, LOCK = "checkpoints", "adapter", "model", "tensorboard", ".lock"
BEFORE = ".before"  # of a run that is thrown away, until the new one has done a step
OURS = (CONFIG, TASK, LOG, RESULT, REPORT, CHECKPOINTS, ADAPTER, MODEL, BOARD, LOCK)
# options that a run which goes on may be given anew: none changes what the steps so far have done
LATER = {"out", "overwrite", "resume", "epochs", "steps", "early_stopping", "min_delta", "keep", "save_every"}
LATER |= {"log_every", "report_to", "name", "network", "threads", "device", "eval_batch_size", "search"}


def read(folder: str | Path) -> dict[str, Any]:
    """The result of a run, metrics.json; DataError where there is none."""
    folder = Path(folder).expanduser()
    try:
        return json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        unfinished = (folder / CONFIG).exists()
        given = f"{folder}: " + (f"a run without {RESULT}" if unfinished else "no folder of a run")
        do = "let it finish: the same command with --resume" if unfinished else "name a folder that train wrote to"
        fail(DataError, given, "the folder of a run", do, error)


def there(folder: Path) -> bool:
    """Is there a run in this folder?"""
    return any((folder / name).exists() for name in (CONFIG, RESULT, CHECKPOINTS))


def config_of(folder: str | Path, *also: Any, **options: Any) -> Config:
    """The config of the run in a folder, with ``options`` over it; ``also`` as `config.read` takes it."""
    folder = Path(folder).expanduser()
    if not (folder / CONFIG).exists():
        do = "name it with --out; a run that ended in its first seconds left nothing to go on with: start it again "
        do += "with its own options, --resume or not"
        fail(SettingsError, f"{folder}: no {CONFIG}", "the folder of a run", do)
    return configs.read(folder / CONFIG, *also, **options)


def hold(lock: IO[str], folder: Path, doing: str) -> None:
    """Locks the file until it is closed; refuses a folder in which another process is ``doing`` something."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: nothing warns of two runs in one folder there
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        given = f"out: {folder}, where another process is {doing}"
        fail(SettingsError, given, "a folder for this run alone", "wait for it, or pass another --out", error)
    except OSError:  # nor on a file system without locks
        return


def write_json(path: Path, value: Any) -> None:
    """Strict JSON, whole or not at all; what is not finite becomes null."""
    write(path, json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write(path: Path, text: str) -> None:
    """A text file that is never half there, a lost power supply included."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


@dataclasses.dataclass
class Record:
    """A run's hold on its folder, from `look` (nothing is written) over `open` to `close`.

    A run that ends before its first step (`begin`) leaves the folder as it was.
    """

    config: Config
    lock: IO[str] | None = None
    lines: IO[str] | None = None
    begun: bool = False
    threads: int = 0  # it ran by before, or does now
    fresh: bool = False  # nothing of it was there before `open`
    made: list[Path] = dataclasses.field(default_factory=list)  # folders that were not there, the innermost first

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.config.out.expanduser()

    def look(self) -> None:
        """Refuses a folder that cannot take the run, before anything expensive happens."""
        folder, config = self.folder, self.config
        if folder.exists() and not folder.is_dir():
            fail(SettingsError, f"out: {folder}, a file", "a folder", "pass another --out")
        with contextlib.suppress(OSError), (folder / LOCK).open() as lock:
            hold(lock, self.folder, "training")  # asked again when the folder is taken
        if config.resume and (folder / CONFIG).exists():
            self._same()
        # nothing there yet: a job that is always started with --resume begins once
        elif there(folder) and not config.overwrite and not config.resume:
            do = f"--resume goes on with it, --overwrite throws it away, --out takes another folder than {folder}"
            fail(SettingsError, f"out: {folder} has a run in it", "a folder without one", do)
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        try:
            tempfile.TemporaryFile(dir=parent).close()
        except OSError as error:
            fail(SettingsError, f"out: {folder}: {error.strerror}", "a folder to write to", "pass another --out", error)

    def _same(self) -> None:
        """A run that goes on is the run that stopped."""
        before, now = config_of(self.folder), self.config
        had, given = before.model_dump(mode="json"), now.model_dump(mode="json")
        changed = [name for name in given if name not in LATER and given[name] != had[name]]
        pairs = {name: (_in_force(now, name), _in_force(before, name)) for name in changed}
        if lines := [f"{name}: {a}, the run in {self.folder} has {b}" for name, (a, b) in pairs.items() if a != b]:
            do = "leave these out (`--resume --out DIR` alone is enough), or start a run of its own with another --out"
            fail(SettingsError, "\n  ".join(["--resume with", *lines]), "the options the run began with", do)

    def open(self, facts: dict[str, Any], rows: dict[str, int]) -> None:
        """Takes the folder: config.yaml and task.json are in it from now on."""
        import torch

        self.threads = torch.get_num_threads()
        self.made = [path for path in (self.folder, *self.folder.absolute().parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take()
        self.fresh = not self.config.resume or not there(self.folder)
        learnt = _plain({"task": self.config.task, "facts": facts, "rows": rows, "threads": self.threads})
        if self.config.resume:
            self.threads = self._before(learnt).get("threads", self.threads)
        else:
            self._aside()
        write(self.folder / CONFIG, configs.dump(self.config.model_copy(update={"resume": False, "overwrite": False})))
        write_json(self.folder / TASK, learnt)
        self.lines = (self.folder / LOG).open("a", encoding="utf-8")

    def _take(self) -> None:
        lock = (self.folder / LOCK).open("w")
        try:
            hold(lock, self.folder, "training")
        except SettingsError:
            lock.close()
            raise
        self.lock = lock

    def _before(self, learnt: dict[str, Any]) -> dict[str, Any]:
        """What the run began with; refuses other rows."""
        try:
            before = json.loads((self.folder / TASK).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # killed before it was there: nothing has been learnt yet either
            return {}
        if (before.get("facts"), before.get("rows")) != (learnt["facts"], learnt["rows"]):
            given = f"--resume: other rows than {self.folder} began with ({before.get('rows')}, now {learnt['rows']})"
            do = "put the data back as it was, or start a run of its own with another --out"
            fail(DataError, given, "the same rows", do)
        return before

    def _ours(self) -> list[Path]:
        """What a run leaves, and nothing else that may be in the folder."""
        return [path for name in OURS if name != LOCK and os.path.lexists(path := self.folder / name)]

    def _aside(self) -> None:
        """Puts the run that is to be overwritten aside."""
        before = self.folder / BEFORE
        shutil.rmtree(before, ignore_errors=True)
        for path in self._ours():
            before.mkdir(exist_ok=True)
            path.rename(before / path.name)

    def begin(self) -> None:
        """A step is done: from now on the run stays, and what it replaces goes."""
        if not self.begun:
            self.begun = True
            shutil.rmtree(self.folder / BEFORE, ignore_errors=True)

    def _undo(self) -> None:
        """The folder as it was before `open`."""
        for path in self._ours():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        before = self.folder / BEFORE
        for path in before.iterdir() if before.exists() else ():
            path.rename(self.folder / path.name)
        (self.folder / LOCK).unlink(missing_ok=True)
        for path in (before, *self.made):
            with contextlib.suppress(OSError):
                path.rmdir()

    def log(self, entry: dict[str, Any]) -> None:
        """One line, on the disk's way at once."""
        if self.lines:
            self.lines.write(json.dumps(_plain(entry), allow_nan=False) + "\n")
            self.lines.flush()

    def back_to(self, step: int) -> None:
        """Drops the entries of steps that will be done again; `step` is that of the checkpoint, or -1."""
        if self.lines:
            self.lines.close()
        path = self.folder / LOG
        kept = [line for line in _lines(path) if line.get("step", 0) <= step]
        saved = {"kind": "checkpoint", "step": step}
        if step >= 0 and saved not in kept:  # killed between the checkpoint and its entry
            kept.append(saved)
        write(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.lines = path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Lets go of the folder."""
        with contextlib.suppress(OSError):  # what could not be written was said when it was written
            if self.lines:
                self.lines.close()
        if self.fresh and not self.begun:
            self.fresh = False
            with contextlib.suppress(OSError):
                self._undo()
        if self.lock:
            self.lock.close()
        self.lines = self.lock = None


def _in_force(config: Config, name: str) -> str:
    """An option's value as a message says it; where that is found out later, with what it means."""
    from peft_fast.recipes import tasks

    computed = {"learning_rate": config.rate, "head_learning_rate": config.head_rate}
    computed["metric"] = config.metric or tasks.get(config.task).metric
    value, field = computed.get(name, getattr(config, name)), Config.model_fields[name]
    # what a description says of a value: of 0, or of none that was given
    said = "default" if value is None else r"\b0" if value == 0 and not isinstance(value, bool) else None
    meaning = re.search(rf"{said}: (.+)", field.description) if said else None
    return f"{value!r} ({meaning[1]})" if meaning else repr(value)


def full(error: Exception, folder: Path) -> None:
    """Raises CheckpointError in place of what a disk without room made something raise."""
    what = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
    if not what or isinstance(error, CheckpointError):
        return
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    name = getattr(error, "filename", None)
    given = f"{Path(name).name if name else 'a file'} could not be written to {folder}: the disk is full"
    need = f"room for the run; {shutil.disk_usage(place).free / 1e6:,.1f} MB are free"
    fail(CheckpointError, given, need, "make room and start again; with --resume from the last checkpoint", error)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a log; a last line that a kill cut off is left out."""
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def _plain(value: Any) -> Any:
    """What JSON has words for: numpy's numbers and tuples become plain, NaN and infinity null."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
