"""Errors: one base class; every message says what was given, what is needed, what to do next."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn


class PeftFastError(Exception):
    """Base of every error peft_fast raises."""

    parts: tuple[str, str, str] = ("", "", "")  # what was given, what is needed, what to do


class ShapeError(PeftFastError, ValueError):
    """Sizes that do not fit together."""


class DtypeError(PeftFastError, TypeError):
    """Dtypes that do not fit together."""


class DeviceError(PeftFastError, RuntimeError):
    """Tensors on different devices, or a device no backend serves."""


class SettingsError(PeftFastError, ValueError):
    """A setting or environment variable with a value outside its table."""


class UnsupportedError(PeftFastError, RuntimeError):
    """A state, version or model that peft_fast does not take."""


class DataError(PeftFastError, ValueError):
    """Input data (files, rows, columns) that cannot be used."""


class CheckpointError(PeftFastError, OSError):
    """A checkpoint that could not be written: a full disk, no permission."""


class BuildError(PeftFastError, RuntimeError):
    """The extension could not be built or loaded."""


def program() -> str:
    """How this program is started, for messages that say what to run: as it was, and else as always works."""
    return "peft-fast" if Path(sys.argv[0]).stem == "peft-fast" else "python -m peft_fast"


def fail(cls: type[PeftFastError], given: str, need: str, do: str, cause: BaseException | None = None) -> NoReturn:
    """Raise ``cls`` with the three-line message every error of the package has."""
    error = cls(f"given: {given}\nneeded: {need}\ndo: {do}")
    error.parts = (given, need, do)
    raise error from cause
