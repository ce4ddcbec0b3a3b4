"""Loads the compiled extension: torch operators (libpeft_fast.so) and the pybind11 module (peft_fast._C)."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import struct
from collections.abc import Callable
from pathlib import Path

import torch

from peft_fast import settings

LIBRARY = Path(__file__).with_name("libpeft_fast.so")
LIST = 4  # what patch/decode.py gives csrc/layer.h, which has the same number
_reason = "not loaded yet"
_few_tokens: int | None = None
_isa = "none"


def _constant(function):
    # torch.compiler.assume_constant_result without its import of dynamo: a traced graph takes the value as it is
    function._dynamo_marked_constant = True
    return function


@_constant
def load() -> bool:
    """True once torch.ops.peft_fast holds the compiled operators; never raises, the cause is in reason()."""
    return _load()


@functools.cache
def _load() -> bool:
    global _reason, _few_tokens, _isa
    from peft_fast.backends.cpu import fakes

    library = settings.get().library or LIBRARY
    if not library.exists():
        _reason = "the extension is not built; run `python -m peft_fast build`"
        return False
    try:
        _check_whole(library)
        torch.ops.load_library(str(library))
        _isa = torch.ops.peft_fast.set_isa(settings.get().isa)
        # fails for a library of older sources, which lacks an operator
        fakes.register()
        _few_tokens = ctypes.cast(ctypes.CDLL(str(library)).peft_fast_few_tokens, ctypes.c_void_p).value
    except (OSError, AttributeError, RuntimeError) as error:
        _reason = f"{library.name} does not load ({str(error).splitlines()[0]}); run `python -m peft_fast build`"
        return False
    _reason = ""
    return True


def _check_whole(path: Path) -> None:
    """OSError for a 64-bit ELF file that is cut short: to load one ends the process with a bus error."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) == 64 and head.startswith(b"\x7fELF\x02"):
        (table,), (size, count) = struct.unpack_from("<Q", head, 0x28), struct.unpack_from("<HH", head, 0x3A)
        if path.stat().st_size < table + size * count:
            raise OSError("the file is cut short")


@_constant
def reason() -> str:
    """Why the compiled operators are missing, in a sentence; empty when they are loaded."""
    load()
    return _reason


def set_isa(name: str) -> str:
    """Chooses the instruction set of the CPU kernels ("auto" or one of settings.ISAS); returns the one now in use."""
    global _isa
    load()
    _isa = torch.ops.peft_fast.set_isa(name)
    return _isa


@_constant
def isa() -> str:
    """The instruction set the CPU kernels use now."""
    return _isa if load() else "none"


@functools.cache
def capabilities() -> dict:
    """What the processor has and how the extension was built, from peft_fast._C; empty when it is not built."""
    module = _module()
    return {} if module is None else dict(module.capabilities())


@_constant
def tuned_vendor() -> bool:
    """Are torch's float32 GEMMs tuned for this very processor: oneMKL's, on one of Intel's?"""
    return _tuned_vendor()


@functools.cache
def _tuned_vendor() -> bool:
    intel = getattr(_module(), "intel", None)  # a build of older sources has none
    return torch.backends.mkl.is_available() and intel is not None and intel()


@functools.cache
def adapters() -> Callable | None:
    """What looks at the modules of adapters (csrc/adapters.h), or None: it is not built, or of older sources."""
    return getattr(_module(), "adapters", None)


@functools.cache
def layer() -> Callable | None:
    """What looks at a whole LoRA layer (csrc/call.h), or None: it is not built, or of older sources."""
    return getattr(_module(), "layer", None) if getattr(_module(), "LIST", None) == LIST else None


@functools.cache
def decode() -> Callable | None:
    """What runs a whole LoRA layer for few tokens (csrc/call.h), or None: it is not built, or of older sources."""
    return getattr(_module(), "decode", None) if layer() is not None else None


def decoded(of: object = None, forget: bool = False) -> int:
    """How many calls that has answered: those of one layer, begun anew if they are to be forgotten, or all."""
    return _module().calls(0 if of is None else id(of), forget) if decode() is not None else 0


def keep(of: object, tokens: int, low_bf16: bool, norm: torch.Tensor, probe: torch.Tensor, check: torch.Tensor) -> None:
    """Gives decode() the norm of a DoRA layer's weight, for as many tokens and as long as the probe gives check."""
    if decode() is not None:
        _module().keep(of, tokens, low_bf16, norm, probe, check)


def few_tokens() -> int | None:
    """Where the compiled operators' library has few_tokens (csrc/cpu/few_tokens.h), or None."""
    return _few_tokens if load() else None


@functools.cache
def _module():
    spec = importlib.util.find_spec("peft_fast._C")
    if spec is None:
        return None
    try:
        _check_whole(Path(spec.origin))
        return importlib.import_module("peft_fast._C")
    except (ImportError, OSError):
        return None
