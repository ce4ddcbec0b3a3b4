"""The table of awkward inputs of lora_add: those of lora_linear that are about adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from peft_fast.reference import lora_add as reference
from tests import cases, inputs, stock
from tests.inputs import Dtypes, Leaf, Tensors


@dataclass(frozen=True)
class Case(cases.Case):
    """A case of lora_linear whose base product is given; its layout of W is that of base."""

    op = "lora_add"

    __hash__ = cases.Case.__hash__

    def leaves(self) -> list[tuple[str, Leaf]]:
        """(name, Leaf) of each input."""
        lead = self.lead
        own = [(name, leaf) for name, leaf in self.layer.leaves(self.K, self.young) if name not in ("W", "bias")]
        return [("x", Leaf((*lead, self.K), "x")), ("W", Leaf((*lead, self.N), "x")), *own]

    def _adapters(self, t: Tensors) -> list:
        return self.layer.sibling(t).adapters

    def ours(self, run: Callable, t: Tensors, **options: object) -> torch.Tensor:
        """What ``run``, of lora_add's signature, gives for these tensors."""
        return run(t["W"], t["x"], self._adapters(t), op="lora_add", **options)

    def stock(self, t: Tensors, masks: list) -> torch.Tensor:
        """What PEFT gives."""
        return stock.lora_add(t["W"], t["x"], self._adapters(t), masks)

    def truth(self, t: Tensors, masks: list, dtypes: Dtypes) -> torch.Tensor:
        """The definition."""
        return reference.forward(t["W"], t["x"], self._adapters(t), masks)


def _made(case: cases.Case) -> Case:
    return Case(**{field.name: getattr(case, field.name) for field in fields(case)})


NAMES = (
    "tokens_1",
    "tokens_131",
    "rank_1",
    "rank_256",
    "ragged_257x65",
    "wider_than_a_tile",
    "ranks_many_tokens",
    "leading_3",
    "adapter_bias",
    "tensor_scaling",
    "young",
    "three_adapters",
    "dropout_0.5",
    "dropout_1.0",
    "x_permuted",
    "x_expanded",
    "W_every_other",
    "A_transposed",
    "B_columns",
    "g_expanded",
    "everything_awkward",
)
CASES = [_made(case) for case in cases.CASES if case.name in NAMES]
EMPTY = [_made(case) for case in cases.EMPTY if not case.base_trains]
CORNERS = [c for c in CASES if c.name in ("dropout_0.5", "three_adapters", "rank_1", "young")]
STEP = next(c for c in CASES if c.name == "three_adapters")


def rows() -> list[tuple[Case, str]]:
    """(case, dtypes' name) of the contract."""
    return inputs.rows(CASES, CORNERS)
