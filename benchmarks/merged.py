"""In and out of `peft_fast.merged`, beside PEFT's merge_adapter and unmerge_adapter. Rows of generate.

PEFT subtracts what it added, which bfloat16 does not undo; ours copies the weights and gives the old ones back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .criterion import Verdict
from .harness import Provider


def providers(made: Callable[[], tuple[nn.Module, nn.Module]]) -> list[Provider]:
    """stock and peft_fast; ``made`` gives two models with equal adapters, stock PEFT's and ours."""
    import peft_fast

    stock, ours = made()
    block = contextlib.ExitStack()
    phases = {"merge": lambda: block.enter_context(peft_fast.merged(ours)), "unmerge": block.close}
    return [
        Provider("stock", {"merge": stock.merge_adapter, "unmerge": stock.unmerge_adapter}, _tensors(stock)),
        Provider("peft_fast", phases, _tensors(ours), partial(verdicts, made)),
    ]


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def verdicts(made: Callable[[], tuple[nn.Module, nn.Module]]) -> dict[str, Verdict]:
    """Inside the weights have PEFT's merged bits, after it the bits from before."""
    import peft_fast

    stock, ours = made()
    before = {name: w.clone() for name, w in ours.named_parameters()}
    stock.merge_adapter()
    with peft_fast.merged(ours):
        merged = _unequal(dict(stock.named_parameters()), ours)
    changed = _unequal(before, ours)
    return {
        "merged": Verdict(not merged, f"other merged weights than PEFT's: {merged}"),
        "restored": Verdict(not changed, f"weights that changed: {changed}"),
    }


def _unequal(wanted: dict[str, torch.Tensor], model: nn.Module) -> str:
    """The first parameter that is not what is wanted; empty if all are."""
    return next((name for name, w in model.named_parameters() if not torch.equal(w, wanted[name])), "")
