"""Where rows come from: `data` of the config -> the tables of each split.

A file, a folder of files (named by split, or all of them to train on), sub-folders named by split, sub-folders named
by class, a saved dataset, a hub id, or example:NAME.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from peft_fast.errors import DataError, SettingsError, fail
from peft_fast.recipes import examples, files
from peft_fast.recipes.columns import MEDIA
from peft_fast.recipes.config import Config
from peft_fast.recipes.files import Table, Unreadable
from peft_fast.recipes.tasks import Problem, Task

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing", "heldout"),
}
SUFFIXES = {
    "image": (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"),
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif"),
}
# files that lie beside data
BESIDE = re.compile(r"readme|licen[cs]e|requirements|dataset_infos?|notes?|checksums?", re.IGNORECASE)
COCO = ("annotations.json", "_annotations.coco.json", "instances.json")

Tables = dict[str, list[Table]]


def split_of(name: str) -> str | None:
    """The split a file, folder or hub split is named after: train-00000-of-00002 is train's."""
    first = re.split(r"[-_. ]", name.lower())[0]
    return next((split for split, names in SPLITS.items() if first in names), None)


def check(config: Config) -> None:
    """Refuses options that say something of a hub data set where none is read."""
    named = config.data.values() if isinstance(config.data, dict) else [config.data]
    if config.subset and not any(_is_hub(source) for source in named):
        given = f"subset: {config.subset}, and data is no dataset of the hub"
        fail(SettingsError, given, "a hub id", "leave subset out, or pass the id of a dataset that has it")


def _is_hub(source: str) -> bool:
    path = Path(source).expanduser()
    return not examples.named(source) and not path.exists() and not _is_path(source)


def _is_path(source: str) -> bool:
    """Can this be no hub id?"""
    return Path(source).suffix.lower() in files.READERS or source.startswith((".", "/", "~")) or source.count("/") > 1


def tables(data: str | Path | dict[str, str], task: Task, say: Callable[[str], None] = lambda text: None) -> Tables:
    """The tables of every split. Raises DataError with every file that cannot be read."""
    found: Tables = {}
    wrong: list[Problem] = []
    if isinstance(data, dict):
        _share(data)
        named = _apart([Path(source).expanduser() for source in data.values()])
        for split, source in data.items():
            try:
                parts = _tables(str(source), task, say)
                found[split] = parts.get(split) or parts.get("train") or next(iter(parts.values()))
            except Unreadable as error:
                problem, path = error.problem, Path(source).expanduser()
                if problem.file.rstrip("/") == path.name:
                    problem = dataclasses.replace(problem, file=named[path] + "/" * problem.file.endswith("/"))
                wrong.append(problem)
    else:
        try:
            found = _tables(str(data), task, say)
        except Unreadable as error:
            wrong.append(error.problem)
    if wrong:
        listed = "\n  ".join(map(str, wrong))
        fail(DataError, listed, "data that can be read", "correct the files, or pass others with data")
    _name(found)
    return found


def _name(found: Tables) -> None:
    """Gives tables of one name, but of several files, as much of their path as tells them apart."""
    alike: dict[str, list[Table]] = {}
    for table in (table for parts in found.values() for table in parts):
        alike.setdefault(table.file, []).append(table)
    for file, tables in alike.items():
        folder = "/" * file.endswith("/")
        paths = [table.base if folder else table.base / Path(file).name for table in tables]
        if len(set(paths)) > 1:
            named = _apart(paths)
            for table, path in zip(tables, paths, strict=True):
                table.file = f"{named[path]}{folder}"
                table.problems = [dataclasses.replace(problem, file=table.file) for problem in table.problems]


def _apart(paths: Iterable[Path]) -> dict[Path, str]:
    """Of each path its name, and as many folders before it as tell it from the others."""
    parts = {path: Path(os.path.abspath(path)).parts for path in paths}
    found = {}
    for path, own in parts.items():
        size, others = 1, [other for other in parts.values() if other != own]
        while size < len(own) and any(other[-size:] == own[-size:] for other in others):
            size += 1
        found[path] = str(Path(*own[-size:]))
    return found


def _share(data: dict[str, str]) -> None:
    seen: dict[Path, str] = {}
    for split, source in data.items():
        path = Path(source).expanduser().resolve()
        if path.is_file() and path in seen:
            given = f"data: {seen[path]} and {split} are both {source}"
            do = "name another file, or leave the split out: it is made from train"
            fail(DataError, given, "a file of its own for each split", do)
        seen[path] = split


def _tables(source: str, task: Task, say: Callable[[str], None]) -> Tables:
    path = Path(source).expanduser()
    if examples.named(source):
        made = examples.data(source, task.config.network, say)
        return {
            split: [files.read(file)] if file.is_file() else _unit(file, task, f"{file.name}/")
            for split, file in made.items()
        }
    if path.is_file():
        return {"train": [files.read(path)]}
    if path.is_dir():
        return _folder(path, task)
    if _is_path(source):
        beside = path.parent if path.parent.is_dir() else Path()
        near = _near(path.name, [entry.name for entry in beside.iterdir()])
        raise Unreadable(Problem(source, None, None, "no such file or folder", f"{near}Correct the path"))
    return _hub(source, task)


def _near(name: str, names: list[str]) -> str:
    found = difflib.get_close_matches(name, names, 1, 0.75)
    return f"Did you mean {found[0]}? " if found else ""


def _folder(folder: Path, task: Task) -> Tables:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _of_datasets(_datasets(folder.name).load_from_disk(str(folder)), folder.name)
    below = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    named = {split: entry for entry in below if (split := split_of(entry.name))}
    if "train" in named:
        return {split: _unit(entry, task, f"{entry.name}/") for split, entry in named.items()}
    if len(below) == 1 and below[0].name == "data" and not _data_files(folder):
        return _folder(below[0], task)
    by_split: Tables = {}
    for file in _data_files(folder):
        if split := split_of(file.stem):
            by_split.setdefault(split, []).append(file)
    if "train" in by_split:
        return {split: [files.read(file) for file in found] for split, found in by_split.items()}
    if by_split:
        only = ", ".join(file.name for found in by_split.values() for file in found)
        if len(_data_files(folder)) == sum(map(len, by_split.values())):
            fix = "Name a file train.*, or pass data: {train: FILE, …}"
            raise Unreadable(Problem(f"{folder.name}/", None, None, f"{only} and no train file", fix))
    return {"train": _unit(folder, task, f"{folder.name}/")}


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.is_file()
        and entry.suffix.lower() in files.READERS
        and not entry.name.startswith(".")
        and not BESIDE.match(entry.stem)
    )


def _unit(folder: Path, task: Task, name: str) -> list[Table]:
    """The tables of a folder that is one split."""
    media = next((column for column in task.columns if column.holds in MEDIA), None)
    found = _data_files(folder)
    if media is not None:
        if any(column.holds == "boxes" for column in task.columns):
            found = [file for file in found if file.name in COCO] or found
        if not found:
            return [_media(folder, media.holds, media.role, name)]
    kinds = {file.suffix.lower() for file in found}
    if len(kinds) > 1:  # a note in .txt beside tables is none of them
        found = [file for file in found if file.suffix.lower() != ".txt"]
    if not found:
        known = ", ".join(sorted(files.READERS))
        raise Unreadable(Problem(name, None, None, "no data file in this folder", f"Put {known} files there"))
    return [
        files.read(file, f"{name}{file.name}" if len(found) > 1 or name.rstrip("/") in _SPLIT_NAMES else None)
        for file in found
    ]


_SPLIT_NAMES = {name for names in SPLITS.values() for name in names}


def _media(folder: Path, holds: str, role: str, name: str) -> Table:
    """Pictures or recordings in sub-folders named by class, or all in one folder without a class."""
    suffixes = SUFFIXES[holds]
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = [
        (path, entry.name)
        for entry in classes
        for path in sorted(entry.rglob("*"))
        if path.suffix.lower() in suffixes and path.is_file()
    ]
    if found:
        columns = {role: [str(path) for path, _ in found], "label": [label for _, label in found]}
        return files.of_lists(name, columns, base=folder)
    flat = [str(path) for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes and path.is_file()]
    if not flat:
        fix = f"Put {', '.join(suffixes[:4])} … files in sub-folders named by class, or a metadata.csv beside them"
        raise Unreadable(Problem(name, None, None, f"no {holds} file in this folder", fix))
    return files.of_lists(name, {role: flat}, base=folder)


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        do = "pip install 'peft_fast[train]', or pass a CSV or JSONL file"
        fail(DataError, f"data {source}", "the package datasets", do, error)
    return datasets


def _hub(source: str, task: Task) -> Tables:
    datasets, config = _datasets(source), task.config
    do, reached = "let it use the network once, or pass a file or folder", False
    if config.network:
        do, reached = _reached(source)
    try:
        with contextlib.nullcontext() if reached else _offline():
            found = datasets.load_dataset(source, config.subset)
    except Exception as error:  # the hub's errors have no common base
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines)[:300] if lines else type(error).__name__
        given = f"data {source}: no such file or folder here, and as a dataset of the hub: {reason}"
        fail(DataError, given, "a file, a folder, or a dataset that the hub or its cache has", do, error)
    return _of_datasets(found, source)


def _reached(source: str) -> tuple[str, bool]:
    """(what to do if it fails, whether the hub answers): one short question, where datasets would retry for long."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().dataset_info(source, timeout=20)
    except huggingface_hub.errors.HfHubHTTPError:  # the hub answers: let datasets say what is wrong
        return "check the id and `subset`, or pass a file or folder", True
    except Exception:  # no network: the cache may have it
        return "check the network, or pass a file or folder", False
    return "check `subset`, or pass a file or folder", True


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Only what the hub's cache holds: local_files_only would still ask the network for minutes."""
    import datasets
    import huggingface_hub

    flags = [(datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE")]
    before = [getattr(*flag) for flag in flags]
    try:
        for flag in flags:
            setattr(*flag, True)
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            setattr(*flag, value)


def _of_datasets(found: Any, source: str) -> Tables:
    if not isinstance(found, dict):
        return {"train": [files.of_dataset(source, found)]}
    splits: Tables = {}
    for name, rows in found.items():
        if (split := split_of(name)) and split not in splits:  # validation_matched before validation_mismatched
            splits[split] = [files.of_dataset(f"{source} ({name})", rows)]
    if "train" not in splits:
        have = ", ".join(found)
        fix = "Pass one of them as {train: …} from files"
        if len(found) != 1:
            raise Unreadable(Problem(source, None, None, f"splits {have} and no train", fix))
        splits["train"] = [files.of_dataset(source, next(iter(found.values())))]
    return splits


def of_rows(rows: Sequence[Any], task: Task) -> Table:
    """A table of dicts, or of plain values of the first column that prediction needs."""
    from peft_fast.recipes.columns import is_truth

    if all(isinstance(row, dict) for row in rows):
        return files.of_records("rows", list(rows), range(1, len(rows) + 1))
    inputs = [column for column in task.columns if not is_truth(column)]
    needed = [column.role for column in inputs if column.required]
    if len(needed) > 1:
        given = next(row for row in rows if not isinstance(row, dict))
        asked = ", ".join(f'"{role}": "…"' for role in needed)
        do = f"write JSON: '{{{asked}}}' (a dict in Python), or pass a file with these columns"
        fail(DataError, f"{str(given)[:60]!r}, a plain text", f"{' and '.join(needed)} of each row", do)
    role = next(iter(needed), inputs[0].role)
    plain = [row[role] if isinstance(row, dict) and role in row else row for row in rows]
    return files.of_lists("rows", {role: plain})
