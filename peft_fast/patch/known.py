"""Is the installed PEFT's forward one that was read? Only then may the guard stand in for it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import textwrap

from peft_fast.errors import UnsupportedError, fail
from peft_fast.patch import conv, embedding, experts, guard, plan

# fingerprint of what a guard replaces -> the PEFT releases that have it, each read line by line
KNOWN = {"66a8ce4cd854a0ce": "0.19.0 and 0.19.1", "c9cecdc0a0d2ff89": "0.20.0 to 0.21.2"}
KNOWN_EMBEDDING = {"de128fadd2f41a1f": "0.19.0 and 0.19.1", "8d9b761f1f5636e7": "0.20.0 to 0.21.2"}
KNOWN_CONV = {"30dbfe6a6948c4f0": "0.19.0 and 0.19.1", "6d4572ab159f663c": "0.20.0 to 0.21.2"}
KNOWN_WRAPPER = {"723ce13c2ad99204": "0.19.0 to 0.20.0", "882c674fce54e2b0": "0.21.0 to 0.21.2"}


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


def replaced_functions(name: str = "Linear") -> tuple:
    """A class's forward in PEFT, by the name of the class, and the small methods its guard reads past."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = ("active_adapters", "active_adapter", "merged", "disable_adapters")
    small = [getattr(BaseTunerLayer, name).fget for name in names]
    if name == "Linear":
        return plan.stock_linear, *small, BaseTunerLayer._cast_input_dtype
    if name == "_ConvNd":
        return conv.stock, *small, BaseTunerLayer._cast_input_dtype
    if name == "ParamWrapper":
        methods = ("_activate_lora", "get_delta_factors", "get_delta_weight", "update_layer", "_get_in_out_features")
        own = vars(experts.ParamWrapper)
        return experts.stock, *[own[m] for m in methods if m in own]
    return plan.stock_embedding, plan.Embedding._embed, *small, BaseTunerLayer._get_embed_scale


@functools.cache
def _judge(name: str) -> tuple[bool, str]:
    functions = replaced_functions(name)
    if hasattr(functions[0], "__wrapped__"):
        return False, _replaced(name)
    try:
        source = fingerprint(functions)
    except (OSError, TypeError) as error:
        return False, f"the source of PEFT's lora.{name}.forward cannot be read ({error})"
    known = {"Linear": KNOWN, "Embedding": KNOWN_EMBEDDING, "_ConvNd": KNOWN_CONV, "ParamWrapper": KNOWN_WRAPPER}[name]
    if source in known:
        return True, f"PEFT {peft_version()} has the forward of {known[source]}"
    return False, f"PEFT {peft_version()} has a lora.{name}.forward that peft_fast does not know ({source})"


def _replaced(name: str) -> str:
    return f"another library has replaced PEFT's lora.{name}.forward"


def forward_known(name: str = "Linear") -> tuple[bool, str]:
    """(True, which one) if the installed PEFT's forward is known, else (False, why not); imports PEFT."""
    require_peft()
    guard.load()
    embedding.load()
    conv.load()
    experts.load()
    kind, stock, ours = {
        "Linear": (plan.Linear, plan.stock_linear, guard.forward),
        "Embedding": (plan.Embedding, plan.stock_embedding, embedding.forward),
        "_ConvNd": (conv.ConvNd, conv.stock, conv.forward),
        "ParamWrapper": (experts.ParamWrapper, experts.stock, experts.forward),
    }[name]
    if kind.forward not in (stock, ours):
        return False, _replaced(name)
    return _judge(name)
