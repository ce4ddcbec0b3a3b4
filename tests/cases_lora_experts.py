"""The table of awkward inputs of lora_experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from peft_fast.ops import Adapter, Routing, route_experts
from peft_fast.reference import lora_experts as reference
from tests import stock
from tests.inputs import EVERYWHERE, Dtypes, Leaf, Tensors


@dataclass(frozen=True)
class Case:
    """Sizes, options and memory of one call; `layout` names a kind of view for x, W, bias, A, B, g."""

    name: str
    T: int = 19
    k: int = 2
    E: int = 4
    K: int = 48
    N: int = 40
    ranks: tuple[int, ...] = (8,)
    scaling: tuple[float, ...] = (2.0,)
    tensor_scaling: bool = False
    tokens: bool = False  # x has a row a token, not a row a pair
    bias: bool = False
    transposed: bool = False
    only: tuple[int, ...] = ()  # the experts that are ever chosen
    positive: bool = False
    young: bool = False
    layout: dict[str, str] = field(default_factory=dict, hash=False)

    op = "lora_experts"
    rounds_adapters = True

    @property
    def S(self) -> int:
        return self.T * self.k

    @property
    def chosen(self) -> torch.Tensor:
        """Tokens' experts (T, k), each at most once a token, the first of them seen by half of all tokens."""
        draw = torch.Generator().manual_seed(self.T)
        there = torch.tensor(self.only or tuple(range(self.E)))
        order = torch.rand(self.T, len(there), generator=draw)
        order[: self.T // 2, 0] = 2.0
        return there[order.argsort(1, descending=True)[:, : self.k]]

    @property
    def routing(self) -> Routing:
        """The rows that these choices make."""
        return route_experts(self.chosen, self.E)

    def adapters(self, t: Tensors) -> list[Adapter]:
        """The adapters as the op takes them."""
        scale = torch.tensor if self.tensor_scaling else float
        return [Adapter(t[f"A{i}"], t[f"B{i}"], scale(s)) for i, s in enumerate(self.scaling)]

    def leaves(self) -> list[tuple[str, Leaf]]:
        """(name, Leaf) of each input."""
        E, N, K = self.E, self.N, self.K
        found = [("x", Leaf((self.T if self.tokens else self.S, K), "x"))]
        found += [("W", Leaf((E, K, N) if self.transposed else (E, N, K), "base", K**-0.5, False))]
        found += [("bias", Leaf((E, N), "base"))] if self.bias else []
        for i, r in enumerate(self.ranks):
            found.append((f"A{i}", Leaf((r * E, K), "adapter", K**-0.5)))
            found.append((f"B{i}", Leaf((N, r * E), "adapter", r**-0.5 * (1e-4 if self.young else 1.0))))
        return found

    def outputs(self) -> dict[str, tuple[int, ...]]:
        """The shape of each output."""
        return {"y": (self.S, self.N)}

    def dropouts(self) -> list:
        """PEFT drops nothing here."""
        return []

    def roundings(self) -> list[int]:
        """Elements of y and dx, and of what dA and dB hang on."""
        own = [min(self.K, self.N, m) for m in self.routing.counts.tolist()]
        return [self.S * self.N, self.S * self.K, *(r * sum(own) for r in self.ranks)]

    def ours(self, run: Callable, t: Tensors, **options: object) -> torch.Tensor:
        """What ``run``, of lora_experts' signature, gives for these tensors."""
        options |= {"tokens": self.tokens, "transposed": self.transposed}
        routing = route_experts(t["chosen"], self.E) if "chosen" in t else self.routing
        return run(t["x"], t["W"], routing, t.get("bias"), self.adapters(t), op="lora_experts", **options)

    def stock(self, t: Tensors, masks: list) -> torch.Tensor:
        """What PEFT gives."""
        counts = self.routing.counts.tolist()
        return stock.lora_experts(self._rows(t), t["W"], t.get("bias"), self.adapters(t), counts, self.transposed)

    def truth(self, t: Tensors, masks: list, dtypes: Dtypes) -> torch.Tensor:
        """The definition."""
        counts = self.routing.counts.tolist()
        return reference.forward(self._rows(t), t["W"], t.get("bias"), self.adapters(t), counts, self.transposed)

    def _rows(self, t: Tensors) -> torch.Tensor:
        return t["x"][self.routing.order // self.k] if self.tokens else t["x"]


def _cases() -> list[Case]:
    two = {"ranks": (3, 16), "scaling": (0.5, -1.25)}
    return [
        Case("plain"),
        Case("tokens", tokens=True, k=3),
        Case("bias", bias=True, tokens=True),
        Case("transposed_bias", transposed=True, bias=True),
        Case("transposed_tokens", transposed=True, tokens=True, T=31),
        Case("idle_experts", E=9, only=(1, 4, 5), tokens=True, bias=True),
        Case("one_of_many", E=7, k=1, only=(6,), T=37),
        Case("one_expert", E=1, k=1, T=23, tokens=True),
        Case("one_token", T=1, k=2, tokens=True),
        Case("one_row", T=1, k=1),
        Case("all_experts", k=4, T=13, tokens=True),
        Case("two_adapters", **two, bias=True, tokens=True),
        Case("two_adapters_one_scale", ranks=(5, 2), scaling=(0.5, 0.5)),
        Case("tensor_scaling", tensor_scaling=True, ranks=(3, 16), scaling=(0.5, -2.0)),
        Case("scaling_zero", scaling=(0.0,)),
        Case("no_adapter", ranks=(), scaling=(), tokens=True, bias=True),
        Case("no_adapter_transposed", ranks=(), scaling=(), transposed=True, E=7, only=(2, 5)),
        *[Case(f"rank_{r}", ranks=(r,), K=72, N=56, T=29, tokens=True) for r in (1, 2, 17, 64, 256)],
        *[
            Case(f"ragged_{K}x{N}", K=K, N=N, ranks=(5,), bias=True)
            for K, N in ((1, 1), (3, 130), (127, 33), (257, 65))
        ],
        Case("wider_than_a_tile", T=300, k=2, E=3, K=515, N=389, ranks=(17,), bias=True, tokens=True),
        Case("positive", positive=True, T=67, tokens=True),
        Case("young", young=True, T=67),
        *[Case(f"x_{kind}", layout={"x": kind}, tokens=True) for kind in ("columns", "transposed", "offset", "rows")],
        Case("x_expanded", layout={"x": "expanded"}),
        *[Case(f"W_{kind}", layout={"W": kind}) for kind in ("columns", "transposed", "offset", "every_other")],
        Case("transposed_W_columns", transposed=True, layout={"W": "columns"}),
        *[Case(f"adapter_{kind}", layout={"A": kind, "B": kind}) for kind in ("columns", "transposed", "offset")],
        *[Case(f"g_{kind}", layout={"g": kind}, bias=True) for kind in ("columns", "transposed", "expanded")],
        Case("misaligned", layout=dict.fromkeys(("x", "W", "bias", "A", "B", "g"), "offset"), bias=True, tokens=True),
    ]


CASES = _cases()
EMPTY = [Case("empty_tokens", T=0, tokens=True, bias=True), Case("empty_pairs", T=0, transposed=True)]
CORNERS = [c for c in CASES if c.name in ("plain", "bias", "two_adapters", "idle_experts", "young", "transposed_bias")]
STEP = Case("experts_step", T=7, E=3, K=5, N=6, ranks=(2, 3), scaling=(0.5, 3.0), tokens=True, bias=True)


def rows() -> list[tuple[Case, str]]:
    """(case, dtypes' name) of the contract: autocast changes nothing here, and is the patch's affair."""
    return [(c, d) for d in EVERYWHERE for c in CASES] + [(c, d) for d in ("f16", "f16_f32_adapters") for c in CORNERS]
