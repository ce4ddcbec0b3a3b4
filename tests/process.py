"""The state of a process that its tests share without wishing to: each finds it the same, whatever ran before."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
from collections.abc import Callable

import torch

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
# the first is pytest's for every test; the others libraries set once and for all at their first use
NOT_OURS = (
    "PYTEST_CURRENT_TEST",
    "ACCELERATE_",
    "KMP_",
    "TORCHINDUCTOR_CACHE_DIR",
    "CUDA_MODULE_LOADING",
    "TRITON_",
    "KINETO_",
)
LIBRARIES = ("transformers", "datasets", "peft", "accelerate", "huggingface_hub")


def seed() -> None:
    """Every generator starts the same."""
    random.seed(0)
    torch.manual_seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)


def _deterministic(flags: tuple[bool, bool, bool]) -> None:
    torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])
    torch.utils.deterministic.fill_uninitialized_memory = flags[2]


def _autocast(state: tuple[bool, torch.dtype]) -> None:
    torch.set_autocast_enabled("cpu", state[0])
    torch.set_autocast_dtype("cpu", state[1])


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(NOT_OURS)}


def _set_environment(before: dict[str, str]) -> None:
    for name in _environment().keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


# what -> (how to read it, how to set it)
ALWAYS: dict[str, tuple[Callable[[], object], Callable[..., object]]] = {
    "torch's threads": (torch.get_num_threads, torch.set_num_threads),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "gradients": (torch.is_grad_enabled, torch._C._set_grad_enabled),
    "autocast": (lambda: (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")), _autocast),
    "deterministic algorithms": (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        _deterministic,
    ),
    "float32 products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "environment": (_environment, _set_environment),
    "folder": (os.getcwd, os.chdir),
    "sys.path": (lambda: list(sys.path), lambda before: sys.path.__setitem__(slice(None), before)),
    "sys.argv": (lambda: list(sys.argv), lambda before: sys.argv.__setitem__(slice(None), before)),
    "signals": (
        lambda: [signal.getsignal(signum) for signum in HANDLED],
        lambda before: [signal.signal(*pair) for pair in zip(HANDLED, before, strict=True) if pair[1] is not None],
    ),
    "garbage collection": (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    "logging": (lambda: logging.root.level, logging.root.setLevel),
}


def _of_modules() -> dict[str, tuple[Callable[[], object], Callable[..., object]]]:
    """The same of modules that may not be imported yet."""
    found, modules = {}, sys.modules
    if settings := modules.get("peft_fast.settings"):
        found["settings"] = lambda: settings._current, lambda before: setattr(settings, "_current", before)
    if (native := modules.get("peft_fast.native")) and native._load.cache_info().currsize and native.load():
        found["instruction set"] = native.isa, native.set_isa
    if tuning := modules.get("peft_fast.backends.triton.tuning"):
        found["forced tiles"] = lambda: tuning._forced, lambda before: setattr(tuning, "_forced", before)
    for name in LIBRARIES:
        if name in modules:
            log = logging.getLogger(name)
            found[f"verbosity of {name}"] = lambda log=log: log.level, log.setLevel
    if pyplot := modules.get("matplotlib.pyplot"):
        found["open figures"] = pyplot.get_fignums, lambda before: pyplot.close("all")
        # the backend is found at the first figure
        params = modules["matplotlib"].rcParams
        found["matplotlib"] = lambda: {k: v for k, v in dict.items(params) if k != "backend"}, params.update
    return found


def state() -> dict[str, object]:
    """What it is now."""
    return {name: read() for name, (read, _) in (ALWAYS | _of_modules()).items()}


def restore(before: dict[str, object]) -> list[str]:
    """Undoes what a test has left changed -> what that was, in words.

    What was not there before, or was None, has been imported or read for the first time since, and stays.
    """
    told = []
    for name, (read, put) in (ALWAYS | _of_modules()).items():
        was, now = before.get(name), read()
        if was is not None and was != now:
            told.append(f"{name}: {_unlike(was, now)}")
            put(was)
    return told


def _unlike(was: object, now: object) -> str:
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        was, now = ({key: one.get(key) for key in keys} for one in (was, now))
    return f"{was!r:.200} before, {now!r:.200} after it"


def forget_what_was_compiled() -> None:
    """Graphs and their counters: torch gives up on a function that was compiled too often, by whomever."""
    frames, utils = (sys.modules.get(f"torch._dynamo.{name}") for name in ("convert_frame", "utils"))
    if frames and utils and (frames.FRAME_COUNTER or utils.counters):
        torch._dynamo.reset()
        utils.counters.clear()
