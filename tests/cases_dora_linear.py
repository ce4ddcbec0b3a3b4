"""The table of awkward inputs of dora_linear: lora_linear's, as far as they have one adapter and that no bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from peft_fast.reference import dora_linear as reference
from tests import cases, inputs, stock
from tests.inputs import Dtypes, Leaf, Tensors


@dataclass(frozen=True)
class Case(cases.Case):
    """Sizes, options and memory of one call; W + s·B·A has rows of a norm about 2, and m lies around it."""

    given_norm: bool = False  # the caller has the norm, on which derivatives may then not hang

    op = "dora_linear"

    def leaves(self) -> list[tuple[str, Leaf]]:
        """(name, Leaf) of each input."""
        found = [*super().leaves(), ("m", Leaf((self.N,), "magnitude", 0.3, mean=1.0 if self.young else 2.0))]
        return found + [("norm", Leaf((self.N,), "magnitude", 0.1, False, 2.0))] * self.given_norm

    def ours(self, run: Callable, t: Tensors, **options: object) -> torch.Tensor:
        """What ``run``, of dora_linear's signature, gives for these tensors."""
        W, bias, (adapter,), transposed = self.layer.sibling(t)
        options |= {"norm": t.get("norm"), "transposed": transposed, "op": self.op}
        return run(t["x"], W, bias, adapter, t["m"], **options)

    def stock(self, t: Tensors, masks: list) -> torch.Tensor:
        """What PEFT gives."""
        return stock.dora_linear(t["x"], self.layer.sibling(t), t["m"], masks)

    def truth(self, t: Tensors, masks: list, dtypes: Dtypes) -> torch.Tensor:
        """The definition."""
        W, bias, (adapter,), transposed = self.layer.sibling(t)
        return reference.forward(t["x"], W, bias, adapter, t["m"], masks[0], transposed, t.get("norm"))


def _of(case: cases.Case) -> Case:
    return Case(**{name: getattr(case, name) for name in asdict(case)})


# those of lora_linear's that differ in what is DoRA's: columns, magnitudes, two products with dropout
NAMES = (
    *("tokens_1", "tokens_67", "rank_1", "rank_17", "rank_256", "ragged_127x33", "ragged_3x130", "wider_than_a_tile"),
    *("k_in_passes", "rank_33_many_tokens", "leading_2", "bias", "base_trains", "conv1d", "conv1d_base_trains"),
    *("tensor_scaling", "positive", "young", "scaling_zero", "dropout_0.5", "dropout_1.0", "x_columns_undropped"),
    *("W_columns", "W_transposed", "A_transposed", "B_columns", "g_columns", "x_permuted"),
    *("conv1d_W_columns", "bias_every_other"),
)
# where so much is dropped that both products run
TWICE = [
    Case("k_in_passes_twice", lead=(37,), K=2500, N=72, ranks=(4,), p=(0.4,)),
    Case("conv1d_wider_than_a_tile_twice", lead=(61,), K=515, N=389, ranks=(17,), p=(0.4,), bias=True, transposed=True),
]
# where so little is that every instruction set takes it off the one product, AMX too
LISTED = [
    Case("hardly_dropped", lead=(61,), K=515, N=389, ranks=(17,), p=(0.01,), bias=True),
    Case("k_in_passes_hardly_dropped", lead=(37,), K=2500, N=72, ranks=(4,), p=(0.01,)),
    Case("conv1d_hardly_dropped", lead=(61,), K=515, N=389, ranks=(17,), p=(0.01,), transposed=True),
]
CASES = [_of(case) for case in cases.CASES if case.name in NAMES] + TWICE + LISTED
EMPTY = [_of(case) for case in cases.EMPTY if not case.adapter_bias]
CORNERS = [c for c in CASES if c.name in ("bias", "dropout_0.5", "conv1d", "rank_1", "young")]
STEP = Case("dora_step", lead=(3, 11), N=24, ranks=(4,), p=(0.3,), bias=True)


def rows() -> list[tuple[Case, str]]:
    """(case, dtypes' name) of the contract."""
    return inputs.rows(CASES, CORNERS)
