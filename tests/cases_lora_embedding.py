"""The table of awkward inputs of lora_embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from peft_fast.ops import Adapter
from peft_fast.reference import lora_embedding as reference
from tests import inputs, stock
from tests.inputs import Dtypes, Leaf, Tensors


@dataclass(frozen=True)
class Case:
    """Sizes, options and memory of one call; `layout` names a kind of view for ids, W, A, B, g."""

    name: str
    lead: tuple[int, ...] = (37,)
    V: int = 61
    D: int = 48
    ranks: tuple[int, ...] = (8,)
    scaling: tuple[float, ...] = (2.0,)
    tensor_scaling: bool = False
    padding_idx: int | None = None
    scale: float | None = None
    number_scale: bool = False  # a number, which is rounded to W's dtype at once
    base_trains: bool = False
    ids_dtype: torch.dtype = torch.int64
    positive: bool = False
    young: bool = False
    layout: dict[str, str] = field(default_factory=dict, hash=False)

    op = "lora_embedding"
    rounds_adapters = False

    @property
    def M(self) -> int:
        return torch.Size(self.lead).numel()

    def adapters(self, t: Tensors) -> list[Adapter]:
        """The adapters as the op takes them."""
        scale = torch.tensor if self.tensor_scaling else float
        return [Adapter(t[f"A{i}"], t[f"B{i}"], scale(s)) for i, s in enumerate(self.scaling)]

    def _scale(self, dtype: torch.dtype) -> torch.Tensor | None:
        if self.scale is None:
            return None
        return torch.tensor(self.scale, dtype=dtype if self.number_scale else torch.float32)

    def leaves(self) -> list[tuple[str, Leaf]]:
        """(name, Leaf) of each input."""
        found = [("ids", Leaf(self.lead, "ids", self.V)), ("W", Leaf((self.V, self.D), "base", 1.0, self.base_trains))]
        for i, r in enumerate(self.ranks):
            found.append((f"A{i}", Leaf((r, self.V), "adapter")))
            found.append((f"B{i}", Leaf((self.D, r), "adapter", r**-0.5 * (1e-4 if self.young else 1.0))))
        return found

    def outputs(self) -> dict[str, tuple[int, ...]]:
        """The shape of each output."""
        return {"y": (*self.lead, self.D)}

    def dropouts(self) -> list:
        """PEFT drops nothing here."""
        return []

    def roundings(self) -> list[int]:
        """Elements of what the others hang on."""
        return [self.M * self.D, *(r * min(self.M, self.D, self.V) for r in self.ranks)]

    def ours(self, run: Callable, t: Tensors, **options: object) -> torch.Tensor:
        """What ``run``, of lora_embedding's signature, gives for these tensors."""
        scale = self.scale if self.number_scale else self._scale(t["W"].dtype)
        options |= {"padding_idx": self.padding_idx, "scale": scale}
        return run(t["ids"], t["W"], self.adapters(t), op="lora_embedding", **options)

    def stock(self, t: Tensors, masks: list) -> torch.Tensor:
        """What PEFT gives."""
        return stock.lora_embedding(t["ids"], t["W"], self.adapters(t), self.padding_idx, self._scale(t["W"].dtype))

    def truth(self, t: Tensors, masks: list, dtypes: Dtypes) -> torch.Tensor:
        """The definition, with the scale as PEFT rounds it."""
        scale = self._scale(dtypes.base)
        if scale is not None:
            scale = [scale.to(dtype).double() for dtype in (dtypes.base, dtypes.adapter)]
        return reference.forward(t["ids"], t["W"], self.adapters(t), self.padding_idx, scale, torch.float64)


def _cases() -> list[Case]:
    gemma = {"scale": 45.2548, "padding_idx": 0}
    return [
        Case("plain"),
        Case("padding", padding_idx=3, lead=(5, 31)),
        Case("negative_padding", padding_idx=-2, base_trains=True, lead=(5, 31)),
        Case("gemma", **gemma, lead=(2, 19)),
        Case("gemma_number", **gemma, number_scale=True),
        Case("one_token", lead=(1,)),
        Case("no_lead", lead=()),
        Case("few_tokens_many_words", V=1031, lead=(13,)),
        Case("one_word", V=1, lead=(130,)),
        Case("many_tokens", V=7, lead=(3, 5, 41)),
        Case("int32", ids_dtype=torch.int32),
        Case("base_trains", base_trains=True),
        Case("tensor_scaling", tensor_scaling=True, **gemma),
        Case("no_adapter", ranks=(), scaling=(), base_trains=True),
        Case("two_adapters", ranks=(3, 16), scaling=(0.5, -1.25), **gemma),
        *[Case(f"rank_{r}", ranks=(r,), D=72) for r in (1, 17, 256)],
        Case("ragged", D=131, ranks=(5,), lead=(67,)),
        Case("positive", positive=True, lead=(131,)),
        Case("young", young=True),
        Case("ids_every_other", layout={"ids": "every_other", "g": "columns"}, lead=(3, 17)),
        Case("columns", layout={"W": "columns", "A": "columns", "B": "columns"}),
        Case("transposed", layout={"W": "transposed", "A": "transposed", "B": "transposed", "g": "transposed"}),
        Case("misaligned", layout=dict.fromkeys(("ids", "W", "A", "B", "g"), "offset"), **gemma),
        Case("expanded", layout={"g": "expanded"}),
    ]


CASES = _cases()
EMPTY = [Case("empty_ids", lead=(0,)), Case("empty_inner_ids", lead=(3, 0), scale=2.0)]
CORNERS = [c for c in CASES if c.name in ("plain", "gemma", "base_trains", "young")]
STEP = Case("embedding_step", lead=(3, 11), padding_idx=1, scale=3.3)


def rows() -> list[tuple[Case, str]]:
    """(case, dtypes' name) of the contract."""
    return inputs.rows(CASES, CORNERS)
