"""`import peft_fast.auto`, anywhere in a script: every PEFT LoRA layer of the process is fast from then on.

If PEFT's LoRA layers are not imported yet, a finder waits for exactly `peft.tuners.lora.layer`, enables
peft_fast when that module's body has run, and removes itself. The module defines the class the guard sits
on, and nothing can have used it before, so the place of the import line does not matter. A script that never
imports PEFT pays nothing, and without PEFT installed nothing happens.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec

from peft_fast import settings

LAYER = "peft.tuners.lora.layer"


class Waiter(importlib.abc.MetaPathFinder):
    """Finds nothing itself; adds one call after the body of ``LAYER``."""

    looking = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The other finders' spec for ``LAYER``, with enable() behind its loader; None for other names."""
        if name != LAYER or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec is None or spec.loader is None:
            return None
        loader, run = spec.loader, spec.loader.exec_module

        def exec_module(module):
            del loader.exec_module
            run(module)
            sys.meta_path.remove(self)
            _enable()

        # on the loader object, not a loader of ours: inspect and linecache keep the real one
        loader.exec_module = exec_module
        return spec


def _enable() -> None:
    from peft_fast.patch import enable

    enable()


# a wrong environment variable is an error here, not in the middle of importing PEFT
settings.get()
if LAYER in sys.modules:
    _enable()
elif not any(isinstance(finder, Waiter) for finder in sys.meta_path):
    sys.meta_path.insert(0, Waiter())
