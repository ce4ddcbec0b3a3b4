"""The table of awkward inputs of dora_embedding: lora_embedding's, as far as they have one adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from peft_fast.reference import dora_embedding as reference
from tests import cases_lora_embedding as plain
from tests import inputs, stock
from tests.inputs import Dtypes, Leaf, Tensors


@dataclass(frozen=True)
class Case(plain.Case):
    """Sizes, options and memory of one call; m lies around the norm of a column of W + s·(B·A)ᵀ."""

    given_norm: bool = False

    op = "dora_embedding"

    def leaves(self) -> list[tuple[str, Leaf]]:
        """(name, Leaf) of each input."""
        norm = (5 * self.V) ** 0.5
        found = [*super().leaves(), ("m", Leaf((self.D,), "magnitude", 0.2 * norm, mean=norm))]
        return found + [("norm", Leaf((self.D,), "magnitude", 0.1 * norm, False, norm))] * self.given_norm

    def ours(self, run: Callable, t: Tensors, **options: object) -> torch.Tensor:
        """What ``run``, of dora_embedding's signature, gives for these tensors."""
        scale = self.scale if self.number_scale else self._scale(t["W"].dtype)
        options |= {"padding_idx": self.padding_idx, "scale": scale, "norm": t.get("norm"), "op": self.op}
        return run(t["ids"], t["W"], self.adapters(t)[0], t["m"], **options)

    def stock(self, t: Tensors, masks: list) -> torch.Tensor:
        """What PEFT gives."""
        (adapter,) = self.adapters(t)
        scale = self._scale(t["W"].dtype)
        return stock.dora_embedding(t["ids"], t["W"], adapter, t["m"], self.padding_idx, scale)

    def truth(self, t: Tensors, masks: list, dtypes: Dtypes) -> torch.Tensor:
        """The definition, with the scale as PEFT rounds it."""
        scale, (adapter,) = self._scale(dtypes.base), self.adapters(t)
        if scale is not None:
            scale = [scale.to(dtype).double() for dtype in (dtypes.base, dtypes.adapter)]
        wide, norm = torch.float64, t.get("norm")
        return reference.forward(t["ids"], t["W"], adapter, t["m"], self.padding_idx, scale, wide, norm)


def _of(case: plain.Case) -> Case:
    return Case(**{name: getattr(case, name) for name in asdict(case)})


NAMES = (
    *("negative_padding", "gemma", "gemma_number", "one_token", "no_lead", "few_tokens_many_words", "many_tokens"),
    *("int32", "base_trains", "tensor_scaling", "rank_17", "ragged", "young", "columns", "transposed", "misaligned"),
)
CASES = [_of(case) for case in plain.CASES if case.name in NAMES]
EMPTY = [_of(case) for case in plain.EMPTY]
CORNERS = [c for c in CASES if c.name in ("gemma", "base_trains", "young")]
STEP = Case("dora_embedding_step", lead=(3, 11), padding_idx=1, scale=3.3)


def rows() -> list[tuple[Case, str]]:
    """(case, dtypes' name) of the contract."""
    return inputs.rows(CASES, CORNERS)
