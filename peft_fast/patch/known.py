"""Is the installed PEFT's forward one that was read? Only then may the guard stand in for it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import textwrap

from peft_fast.errors import UnsupportedError, fail
from peft_fast.patch import guard

# fingerprint of what the guard replaces -> the PEFT releases that have it, each read line by line
KNOWN = {"66a8ce4cd854a0ce": "0.19.0 and 0.19.1", "c9cecdc0a0d2ff89": "0.20.0 to 0.21.2"}

REPLACED = "another library has replaced PEFT's lora.Linear.forward"


def require_peft() -> None:
    """Raises UnsupportedError if PEFT is not installed."""
    try:
        found = importlib.util.find_spec("peft") is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        need = "the package peft, 0.19 or newer"
        fail(UnsupportedError, "a Python without PEFT", need, "run `pip install peft`")


def peft_version() -> str:
    """The installed PEFT's version, without importing it."""
    try:
        return importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def fingerprint(functions: tuple) -> str:
    """16 hex digits of the functions' source, without indentation and trailing blanks."""
    sources = (textwrap.dedent(inspect.getsource(f)) for f in functions)
    text = "\n".join(line.rstrip() for source in sources for line in source.strip().splitlines())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def replaced_functions() -> tuple:
    """PEFT's Linear.forward and the small methods the guard reads past."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = ("active_adapters", "active_adapter", "merged", "disable_adapters")
    small = [getattr(BaseTunerLayer, name).fget for name in names]
    return guard.stock_forward, *small, BaseTunerLayer._cast_input_dtype


@functools.cache
def _judge() -> tuple[bool, str]:
    functions = replaced_functions()
    if hasattr(functions[0], "__wrapped__"):
        return False, REPLACED
    try:
        source = fingerprint(functions)
    except (OSError, TypeError) as error:
        return False, f"the source of PEFT's lora.Linear.forward cannot be read ({error})"
    if source in KNOWN:
        return True, f"PEFT {peft_version()} has the forward of {KNOWN[source]}"
    return False, f"PEFT {peft_version()} has a lora.Linear.forward that peft_fast does not know ({source})"


def forward_known() -> tuple[bool, str]:
    """(True, which one) if the installed PEFT's forward is known, else (False, why not); imports PEFT."""
    require_peft()
    guard.load()
    if guard.Linear.forward not in (guard.stock_forward, guard.forward):
        return False, REPLACED
    return _judge()
