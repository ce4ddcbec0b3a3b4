"""The table of awkward inputs of lora_group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from peft_fast.ops import Sibling
from peft_fast.reference import lora_group as reference
from tests import inputs, stock
from tests.inputs import Dtypes, Layer, Leaf, Tensors

PLAIN, FROZEN, DROPPED = Layer(), Layer(ranks=(), p=(), scaling=()), Layer(p=(0.3,))


@dataclass(frozen=True)
class Case:
    """Sizes, siblings and memory of one call; `layout` names a kind of view for x, W, bias, A, B, b, g."""

    name: str
    layers: tuple[Layer, ...] = (PLAIN, PLAIN, PLAIN)
    lead: tuple[int, ...] = (37,)
    K: int = 48
    positive: bool = False
    young: bool = False
    layout: dict[str, str] = field(default_factory=dict, hash=False)

    op = "lora_group"
    rounds_adapters = True

    def _siblings(self, t: Tensors) -> list[Sibling]:
        return [layer.sibling(t, f"{i}_") for i, layer in enumerate(self.layers)]

    @property
    def M(self) -> int:
        return torch.Size(self.lead).numel()

    def leaves(self) -> list[tuple[str, Leaf]]:
        """(name, Leaf) of each input."""
        parts = [leaf for i, layer in enumerate(self.layers) for leaf in layer.leaves(self.K, self.young, f"{i}_")]
        return [("x", Leaf((*self.lead, self.K), "x")), *parts]

    def outputs(self) -> dict[str, tuple[int, ...]]:
        """The shape of each output."""
        return {f"y{i}": (*self.lead, layer.N) for i, layer in enumerate(self.layers)}

    def dropouts(self) -> list[tuple[float, tuple[int, ...]]]:
        """(p, shape) of each mask, in the order of their seeds."""
        return [mask for layer in self.layers for mask in layer.dropouts((*self.lead, self.K))]

    def roundings(self) -> list[int]:
        """Elements of what the others hang on."""
        return [n for layer in self.layers for n in layer.roundings(self.M, self.K)]

    def ours(self, run: Callable, t: Tensors, **options: object) -> tuple[torch.Tensor, ...]:
        """What ``run``, of lora_group's signature, gives for these tensors."""
        return run(t["x"], self._siblings(t), op="lora_group", **options)

    def stock(self, t: Tensors, masks: list) -> list[torch.Tensor]:
        """What PEFT gives, layer by layer."""
        masks = iter(masks)
        return [stock.lora_linear(t["x"], s, [next(masks) for _ in s.adapters]) for s in self._siblings(t)]

    def truth(self, t: Tensors, masks: list, dtypes: Dtypes) -> list[torch.Tensor]:
        """The definition."""
        return reference.forward(t["x"], self._siblings(t), masks)


def _cases() -> list[Case]:
    different = (
        Layer(N=56, ranks=(3, 16), p=(0.5, 0.0), scaling=(0.5, 3.0), bias=True, adapter_bias=True),
        Layer(N=17, ranks=(17,), transposed=True, scaling=(-1.25,), bias=True),
        FROZEN,
        Layer(N=130, ranks=(1,), p=(0.05,), base_trains=True),
    )
    qkv = [Layer(N=N, p=(0.1,), scaling=(0.5,)) for N in (64, 16, 16)]
    biased = tuple(replace(layer, bias=True) for layer in qkv)
    return [
        Case("one", (replace(PLAIN, bias=True),)),
        Case("two", (PLAIN, replace(PLAIN, N=24)), lead=(31,)),
        Case("three"),
        Case("qkv_grouped_queries", tuple(qkv), lead=(2, 29), K=64),
        Case("qkv_biased", biased, lead=(2, 29), K=64),
        Case("different", different, lead=(41,)),
        Case("one_token", biased, lead=(1,)),
        Case("prime_tokens", (PLAIN, FROZEN), lead=(67,), K=127),
        Case("no_lead", (DROPPED, PLAIN), lead=()),
        Case("frozen", (FROZEN, replace(FROZEN, N=17, bias=True))),
        Case("frozen_first", (FROZEN, DROPPED, PLAIN)),
        Case("frozen_but_trains", (replace(FROZEN, base_trains=True), PLAIN)),
        Case("ranks", tuple(replace(PLAIN, ranks=(r,)) for r in (1, 2, 3, 64)), lead=(29,), K=72),
        Case("rank_256", (replace(PLAIN, ranks=(256,)), replace(PLAIN, N=17)), lead=(29,)),
        Case("scalings", (replace(PLAIN, scaling=(0.0,)), replace(PLAIN, scaling=(-0.37,)), PLAIN)),
        Case("tensor_scaling", (replace(DROPPED, tensor_scaling=True), PLAIN)),
        Case("all_dropped", (replace(PLAIN, p=(1.0,)), DROPPED)),
        Case("conv1d", (replace(DROPPED, transposed=True, bias=True), replace(PLAIN, transposed=True, N=33))),
        Case("base_trains", (replace(DROPPED, base_trains=True, bias=True), replace(PLAIN, base_trains=True))),
        Case("many", tuple(replace(DROPPED, N=8 + i, ranks=(1 + i % 3,)) for i in range(9)), lead=(23,)),
        Case("wider_than_a_tile", (Layer(N=389, ranks=(17,), p=(0.1,), bias=True), PLAIN), lead=(261,), K=515),
        Case("w_in_chunks", (Layer(N=1130, ranks=(16,), bias=True), Layer(N=1090, ranks=(17,))), lead=(61,), K=530),
        Case("positive", biased, lead=(131,), K=64, positive=True),
        Case("young", (DROPPED, PLAIN), lead=(67,), young=True),
        Case(
            "everything_awkward",
            tuple(replace(layer, bias=True, adapter_bias=True) for layer in qkv),
            lead=(3, 13),
            K=40,
            layout={"x": "permuted", "W": "columns", "A": "transposed", "B": "columns", "g": "permuted", "b": "offset"},
        ),
        Case("strided", biased, lead=(23,), layout={"x": "every_other", "W": "every_other", "g": "every_other"}),
        Case("misaligned", biased, lead=(23,), layout=dict.fromkeys(("x", "W", "A", "B", "g", "bias"), "offset")),
    ]


CASES = _cases()
EMPTY = [Case("empty_group", (DROPPED, PLAIN), lead=(0,)), Case("empty_inner_group", (FROZEN, PLAIN), lead=(3, 0))]
CORNERS = [c for c in CASES if c.name in ("three", "different", "qkv_biased", "young")]
STEP = Case(
    "group_step",
    (Layer(24, (4, 8), (0.3, 0.0), (2.0, 0.5), bias=True), replace(FROZEN, N=17), Layer(9, (3,), (0.1,), (1.0,))),
    lead=(3, 11),
    K=40,
)


def rows() -> list[tuple[Case, str]]:
    """(case, dtypes' name) of the contract."""
    return inputs.rows(CASES, CORNERS)
