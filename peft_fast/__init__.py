"""One line makes a PEFT fine-tuning faster: `model = peft_fast.accelerate(get_peft_model(...))`."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

# public name -> where it lives; loaded at first use, so that importing peft_fast costs nothing
_WHERE = {
    "accelerate": "peft_fast.patch",
    "restore": "peft_fast.patch",
    "report": "peft_fast.patch",
    "enable": "peft_fast.patch",
    "disable": "peft_fast.patch",
    "disabled": "peft_fast.patch",
    "merged": "peft_fast.patch",
    "train": "peft_fast.recipes.run",
}
__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
