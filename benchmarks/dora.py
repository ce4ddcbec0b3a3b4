"""What the benchmarks of DoRA share: inference inside PEFT's DoraCaching and without it, single tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from . import gate
from .harness import Provider
from .lora_linear import inference

JUDGED = 32  # single tokens that the gate looks at


def cached(run: Callable, enabled: bool = True) -> Callable:
    """The same inside DoraCaching: a magnitude's norm, and with stock PEFT B·A, are kept from the first call on.

    Not ``enabled``: they are computed anew, whatever is kept.
    """
    from peft.helpers import DoraCaching

    def call(*args, **kwargs):
        with DoraCaching(enabled):
            return run(*args, **kwargs)

    return call


def one_token(
    made: Callable[..., nn.Module], x: Tensor, xs: Tensor, truth: Callable[[Tensor], Tensor], end: str = ""
) -> list[Provider]:
    """stock and peft_fast on x (1, ...), judged on xs; ``made(fast=)`` makes a layer with DoRA.

    ``end``: of their names, where adapters have the base's dtype; without one also cached.
    """
    rows, ways = [], [("", lambda run: run), (" cached", cached)]
    for words, around in ways[:1] if end else ways:
        # of their own: a call outside DoraCaching clears what is kept
        stock, ours = (made(fast=fast).eval() for fast in (False, True))
        verdicts = partial(gate.check_tokens, around(ours), around(stock), truth, xs)
        rows += [inference(f"stock{words}{end}", around(stock), x, list(stock.parameters()))]
        rows += [inference(f"peft_fast{words}{end}", around(ours), x, list(ours.parameters()), verdicts)]
    return rows
