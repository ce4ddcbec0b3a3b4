"""What `python -m peft_fast tune` found on this GPU: tiles of kernels, plans of layers, in place of the shipped ones.

One JSON file a GPU model in the cache folder. A file of another GPU or Triton, or a damaged one, is left alone, with
a reason; an entry is taken only if it is one of the candidates that the project has proven.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from peft_fast import settings
from peft_fast.backends.triton import device_reason, version
from peft_fast.native import _constant

SCHEMA = "peft_fast.tuning/1"
PLANS = ("accumulate", "fused")
DTYPES = ("bf16", "fp16", "fp32")

# device index -> (entries, why the file was ignored)
_loaded: dict[int, tuple[dict, str]] = {}
_forced: dict | None = None


def path(gpu_name: str) -> Path:
    """Where the file of a GPU model lies."""
    slug = re.sub("[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    return settings.get().cache_dir / "tuning" / f"{slug}.json"


def load(index: int) -> dict[tuple[str, str, str], object]:
    """{(op, shape class, dtype's name): Tile, or the name of a plan} of a device; read once."""
    return _forced if _forced is not None else _entries(index)[0]


def why_ignored(index: int) -> str:
    """Why the device's file was left alone, in a sentence; empty when it is in use or there is none."""
    return _entries(index)[1]


@_constant
def plan(N: int, K: int, R: int, dropout: bool, dtype: torch.dtype, index: int) -> str:
    """The plan tuned for a layer; `accumulate` where nothing was measured."""
    found = load(index)
    if not found:
        return "accumulate"
    from peft_fast.kernels import tiles

    key = "lora_linear", tiles.shape_class("lora_linear", 0, K, N, R, dropout), tiles.dtype_name(dtype)
    return found.get(key, "accumulate")


@contextlib.contextmanager
def using(entries: dict[tuple[str, str, str], object]) -> Iterator[None]:
    """These entries instead of the file's, for the length of a ``with`` block."""
    global _forced
    before, _forced = _forced, dict(entries)
    try:
        yield
    finally:
        _forced = before


def forget() -> None:
    """Drops what was read, so that a file written since is seen."""
    _loaded.clear()


def _entries(index):
    if index not in _loaded:
        _loaded[index] = _read(index)
    return _loaded[index]


def _read(index):
    if device_reason(index):
        return {}, ""
    properties = torch.cuda.get_device_properties(index)
    file = path(properties.name)
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError) as error:
        return {}, f"{file} is not readable JSON ({(str(error).splitlines() or ['?'])[0]})"
    here = {
        "schema": SCHEMA,
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "triton": version(),
    }
    for key, value in here.items():
        if not isinstance(content, dict) or content.get(key) != value:
            given = content.get(key) if isinstance(content, dict) else type(content).__name__
            return {}, f"{file} is for {key} {given!r}, here it is {value!r}"
    entries = content.get("entries")
    arch = properties.gcnArchName if torch.version.hip else 10 * properties.major + properties.minor
    return checked(entries if isinstance(entries, list) else [], arch), ""


def checked(entries: list, arch: int | str) -> dict[tuple[str, str, str], object]:
    """Entries of a file -> those that name a proven tile or an existing plan."""
    from peft_fast.kernels import tiles

    found = {}
    for entry in entries:
        try:
            key = entry["op"], entry["shape"], entry["dtype"]
            if not all(isinstance(part, str) for part in key) or key[2] not in DTYPES:
                continue
            if key[0] == "lora_linear":
                if entry["plan"] in PLANS:
                    found[key] = entry["plan"]
            elif (tile := tiles.Tile(**entry["tile"])) in tiles.candidates(*key, arch):
                found[key] = tile
        except (KeyError, TypeError, ValueError):
            continue
    return found
