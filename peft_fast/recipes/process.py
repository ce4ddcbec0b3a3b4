"""The process around a run: its packages, its device, its generators and threads, its memory."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from peft_fast.errors import SettingsError, UnsupportedError, fail
from peft_fast.recipes.config import Config

if TYPE_CHECKING:
    import torch

NEEDS = ("transformers", "peft", "accelerate", "datasets", "rich", "psutil")


def need_packages() -> None:
    """Refuses a Python without the libraries of training, all that is missing in one message."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        given = f"a Python without {', '.join(missing)}"
        fail(UnsupportedError, given, "the packages of fine-tuning", "run `pip install 'peft_fast[train]'`")


def device_of(config: Config) -> Any:
    """Where it runs."""
    import torch

    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        do = "see `python -m peft_fast doctor`, or leave device out"
        fail(SettingsError, "device: cuda", "a GPU that torch can use", do)
    return torch.device("cuda", torch.cuda.current_device()) if gpu and config.device != "cpu" else torch.device("cpu")


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Python's, numpy's and torch's generators are afterwards where they were."""
    import random

    import numpy
    import torch

    python, arrays, cpu = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def as_it_was(config: Config) -> Iterator[None]:
    """The process's generators, threads and libraries' verbosity as a run wants them, and back."""
    import datasets
    import torch
    import transformers

    threads, level = torch.get_num_threads(), transformers.logging.get_verbosity()
    bars, theirs = datasets.are_progress_bars_disabled(), transformers.logging.is_progress_bar_enabled()
    with generators_kept(), warnings.catch_warnings():
        try:
            # of libraries about each other
            warnings.simplefilter("ignore", FutureWarning)
            if config.threads:
                torch.set_num_threads(config.threads)
            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            datasets.disable_progress_bars()
            yield
        finally:
            torch.set_num_threads(threads)
            transformers.logging.set_verbosity(level)
            if theirs:
                transformers.logging.enable_progress_bar()
            if not bars:
                datasets.enable_progress_bars()


class Memory:
    """Bytes before the model was there (then it is made) and at the highest of training (from `begin` on)."""

    def __init__(self, device: Any) -> None:
        self.device, self.before = device, memory(device)

    def begin(self) -> None:
        """Forgets the peak so far: loading has one of its own."""
        import torch

        from peft_fast.demo.measure import reset_peak_resident

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_peak_resident()

    def end(self) -> dict[str, int]:
        """Both, as the result has them."""
        import torch

        from peft_fast.demo.measure import peak_resident_bytes

        gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if gpu else peak_resident_bytes()
        return {"peak_bytes": peak, "before_bytes": self.before}


def trim() -> None:
    """What the C library holds and nobody uses goes back to the system, or the next model would seem to need less."""
    import ctypes

    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


def memory(device: torch.device) -> int:
    """Bytes in use: of the GPU's allocator, or of the process."""
    import torch

    from peft_fast.demo.measure import resident_bytes

    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()
