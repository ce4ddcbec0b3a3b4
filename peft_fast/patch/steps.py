"""Was there an optimizer step since? Then whatever was computed before is done with."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

_watches: weakref.WeakSet[Watch] = weakref.WeakSet()
_hook = None


class Watch:
    """Some adapters, from now on; the fewer of these live, the less an optimizer step has to look at."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self.version = self._version()
        self.stepped = False
        _watches.add(self)

    def written(self) -> bool:
        """Were they written to, in a way that counts versions or by an optimizer that writes to their .data?"""
        return self.stepped or self.version != self._version()

    def sees(self, tensors: Iterable[Tensor]) -> bool:
        """Are these among the tensors?"""
        return {id(t) for t in tensors} <= {id(t) for t in self.tensors}

    def _version(self) -> int:
        return sum(t._version for t in self.tensors if not t.is_inference())


def install() -> None:
    """Has torch tell us of every optimizer step."""
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_stepped)


def uninstall() -> None:
    """Undoes install()."""
    global _hook
    if _hook is not None:
        _hook.remove()
        _hook = None


def _stepped(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
    if waiting := [watch for watch in _watches if not watch.stepped]:
        written = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for watch in waiting:
            watch.stepped = any(id(t) in written for t in watch.tensors)
