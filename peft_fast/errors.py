"""Errors: one base class; every message says what was given, what is needed, what to do next."""

from __future__ import annotations

from typing import NoReturn


class PeftFastError(Exception):
    """Base of every error peft_fast raises."""


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


class BuildError(PeftFastError, RuntimeError):
    """The extension could not be built or loaded."""


def fail(cls: type[PeftFastError], given: str, need: str, do: str, cause: BaseException | None = None) -> NoReturn:
    """Raise ``cls`` with the three-line message every error of the package has."""
    raise cls(f"given: {given}\nneeded: {need}\ndo: {do}") from cause
