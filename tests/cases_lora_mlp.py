"""The table of awkward inputs of lora_mlp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from peft_fast.ops import ACTIVATIONS, Sibling
from peft_fast.reference import lora_mlp as reference
from tests import inputs, stock
from tests.inputs import Dtypes, Layer, Leaf, Tensors

# scaled so that gate and up stay near 1: products of large values have tails that few draws do not show
PLAIN, DROPPED, FROZEN = Layer(scaling=(0.5,)), Layer(scaling=(0.5,), p=(0.3,)), Layer(ranks=(), p=(), scaling=())


@dataclass(frozen=True)
class Case:
    """Sizes, layers and memory of one call; N of gate and up is I, that of down is the output's.

    `layout` names a kind of view for x, W, bias, A, B, b, g.
    """

    name: str
    activation: str = "silu"
    halves: str = ""
    gate: Layer | None = None
    up: Layer = PLAIN
    down: Layer = PLAIN
    p: float = 0.0
    lead: tuple[int, ...] = (37,)
    K: int = 48
    I: int = 56
    positive: bool = False
    young: bool = False
    layout: dict[str, str] = field(default_factory=dict, hash=False)

    op = "lora_mlp"
    rounds_adapters = True

    @property
    def M(self) -> int:
        return torch.Size(self.lead).numel()

    @property
    def layers(self) -> dict[str, tuple[int, Layer]]:
        """Name -> (input width, layer) in the order of the seeds."""
        up = replace(self.up, N=2 * self.I if self.halves else self.I)
        gate = {} if self.gate is None else {"gate": (self.K, replace(self.gate, N=self.I))}
        return {**gate, "up": (self.K, up), "down": (self.I, self.down)}

    def _siblings(self, t: Tensors) -> list[Sibling]:
        return [layer.sibling(t, f"{name}_") for name, (_, layer) in self.layers.items()]

    def leaves(self) -> list[tuple[str, Leaf]]:
        """(name, Leaf) of each input."""
        parts = [leaf for n, (K, layer) in self.layers.items() for leaf in layer.leaves(K, self.young, f"{n}_")]
        return [("x", Leaf((*self.lead, self.K), "x")), *parts]

    def outputs(self) -> dict[str, tuple[int, ...]]:
        """The shape of each output."""
        return {"y": (*self.lead, self.down.N)}

    def dropouts(self) -> list[tuple[float, tuple[int, ...]]]:
        """(p, shape) of each mask, in the order of their seeds."""
        masks = [mask for K, layer in self.layers.values() for mask in layer.dropouts((*self.lead, K))]
        return [*masks, (self.p, (*self.lead, self.I))] if self.p > 0 else masks

    def roundings(self) -> list[int]:
        """Elements of what the others hang on, fewer where a kink or squares leave the errors to a few of them."""
        found = [n for K, layer in self.layers.values() for n in layer.roundings(self.M, K)]
        return [*found, self.M * self.I // {"relu": 64, "relu2": 16}.get(self.activation, 1)]

    def ours(self, run: Callable, t: Tensors, **options: object) -> torch.Tensor:
        """What ``run``, of lora_mlp's signature, gives for these tensors."""
        *first, down = self._siblings(t)
        gate = first[0] if self.gate is not None else None
        options |= {"activation": self.activation, "halves": self.halves, "p": self.p}
        return run(t["x"], first[-1], down, gate, op="lora_mlp", **options)

    def stock(self, t: Tensors, masks: list) -> torch.Tensor:
        """What a model with PEFT's layers gives."""
        *first, down = self._siblings(t)
        return stock.lora_mlp(t["x"], first, down, self.activation, self.halves, self.p, masks)

    def truth(self, t: Tensors, masks: list, dtypes: Dtypes) -> torch.Tensor:
        """The definition."""
        *first, down = self._siblings(t)
        keep = masks[-1] if self.p > 0 else None
        masks = masks[:-1] if self.p > 0 else masks
        return reference.forward(t["x"], first, down, self.activation, self.halves, self.p, masks, keep)


def _cases() -> list[Case]:
    everything = Layer(ranks=(3, 16), p=(0.5, 0.0), scaling=(0.5, -0.8), bias=True, adapter_bias=True)
    crowded = replace(everything, base_trains=True, N=33)
    biased = replace(DROPPED, bias=True)
    return [
        *[Case(f"{act}_gated", act, gate=DROPPED, up=DROPPED, down=DROPPED) for act in ACTIVATIONS],
        *[Case(f"{act}_plain", act, up=biased, down=biased) for act in ACTIVATIONS],
        Case("first_half", halves="first", up=DROPPED, lead=(2, 17)),
        Case("second_half", "gelu", halves="second", up=biased, p=0.2),
        Case("own_dropout", "gelu_tanh", gate=PLAIN, p=0.3),
        Case("own_dropout_plain", "relu2", p=0.5),
        Case("own_dropout_drops_all", p=1.0, gate=PLAIN, down=biased),
        Case("everything", "gelu", gate=everything, up=FROZEN, down=crowded, p=0.1),
        Case("frozen", gate=FROZEN, up=FROZEN, down=FROZEN),
        Case("frozen_plain", "gelu", up=replace(FROZEN, bias=True), down=replace(FROZEN, bias=True), p=0.1),
        Case("down_alone", gate=FROZEN, up=FROZEN, down=DROPPED),
        Case("gate_alone", gate=DROPPED, up=FROZEN, down=FROZEN),
        Case("up_alone", "gelu", halves="first", up=DROPPED, down=FROZEN),
        Case("conv1d", "gelu_tanh", up=replace(biased, transposed=True), down=replace(biased, transposed=True)),
        Case("base_trains", gate=replace(PLAIN, base_trains=True), down=replace(biased, base_trains=True)),
        Case("one_token", gate=PLAIN, lead=(1,), I=130),
        Case("no_lead", "gelu", lead=(), p=0.1),
        Case("ragged", gate=biased, up=biased, down=replace(biased, N=131), lead=(67,), K=127, I=259),
        Case("wider_than_a_tile", gate=PLAIN, lead=(261,), K=72, I=515, p=0.1),
        Case("young", gate=DROPPED, lead=(67,), young=True),
        Case(
            "everything_awkward",
            gate=everything,
            up=everything,
            down=everything,
            lead=(3, 13),
            layout={"x": "permuted", "W": "columns", "A": "transposed", "B": "columns", "g": "permuted", "b": "offset"},
        ),
        Case("strided", "gelu", halves="second", layout={"x": "every_other", "W": "every_other", "g": "every_other"}),
    ]


CASES = _cases()
EMPTY = [
    Case("empty_mlp", gate=DROPPED, lead=(0,), p=0.1),
    Case("empty_halves", "gelu", halves="first", down=FROZEN, lead=(3, 0)),
]
CORNERS = [c for c in CASES if c.name in ("silu_gated", "gelu_plain", "first_half", "everything", "young")]
STEP = Case(
    "mlp_step",
    gate=Layer(ranks=(4,), p=(0.3,), bias=True),
    up=FROZEN,
    down=Layer(24, (4, 8), (0.3, 0.0), (2.0, 0.5), bias=True),
    p=0.1,
    lead=(3, 11),
    K=40,
    I=52,
)


def rows() -> list[tuple[Case, str]]:
    """(case, dtypes' name) of the contract."""
    return inputs.rows(CASES, CORNERS)
