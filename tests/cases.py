"""The table of awkward inputs of lora_linear: a new option is a new row here, not a new test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from peft_fast.reference import lora_linear as reference
from tests import inputs, stock
from tests.inputs import DTYPES, EVERYWHERE, Dtypes, Layer, Leaf, Tensors, place

__all__ = ["CASES", "CORNERS", "DTYPES", "EMPTY", "EVERYWHERE", "Case", "Dtypes", "place", "rows"]


@dataclass(frozen=True)
class Case:
    """Sizes, options and memory of one call; `layout` names a kind of view for x, W, bias, A, B, b, g."""

    name: str
    lead: tuple[int, ...] = (37,)
    K: int = 48
    N: int = 40
    ranks: tuple[int, ...] = (8,)
    p: tuple[float, ...] = (0.0,)
    scaling: tuple[float, ...] = (2.0,)
    tensor_scaling: bool = False
    bias: bool = False
    adapter_bias: bool = False
    transposed: bool = False
    base_trains: bool = False
    positive: bool = False  # all values of one sign, so that a bias in the rounding adds up
    young: bool = False  # B and g as small as after a first step: s·g·B is far below float16's range
    layout: dict[str, str] = field(default_factory=dict, hash=False)

    op = "lora_linear"
    rounds_adapters = True  # some backends round float32 adapters to the activations' dtype

    @property
    def M(self) -> int:
        return torch.Size(self.lead).numel()

    @property
    def layer(self) -> Layer:
        options = self.bias, self.adapter_bias, self.transposed, self.base_trains, self.tensor_scaling
        return Layer(self.N, self.ranks, self.p, self.scaling, *options)

    def leaves(self) -> list[tuple[str, Leaf]]:
        """(name, Leaf) of each input."""
        return [("x", Leaf((*self.lead, self.K), "x")), *self.layer.leaves(self.K, self.young)]

    def outputs(self) -> dict[str, tuple[int, ...]]:
        """The shape of each output."""
        return {"y": (*self.lead, self.N)}

    def dropouts(self) -> list[tuple[float, tuple[int, ...]]]:
        """(p, shape) of each mask, in the order of their seeds."""
        return self.layer.dropouts((*self.lead, self.K))

    def roundings(self) -> list[int]:
        """Elements of y, dx, dA, dB and of H and D, on whose roundings the others hang."""
        return self.layer.roundings(self.M, self.K)

    def ours(self, run: Callable, t: Tensors, **options: object) -> torch.Tensor:
        """What ``run``, of lora_linear's signature, gives for these tensors."""
        W, bias, adapters, transposed = self.layer.sibling(t)
        return run(t["x"], W, bias, adapters, transposed=transposed, **options)

    def stock(self, t: Tensors, masks: list) -> torch.Tensor:
        """What PEFT gives."""
        return stock.lora_linear(t["x"], self.layer.sibling(t), masks)

    def truth(self, t: Tensors, masks: list, dtypes: Dtypes) -> torch.Tensor:
        """The definition."""
        W, bias, adapters, transposed = self.layer.sibling(t)
        return reference.forward(t["x"], W, bias, adapters, masks, transposed)


def _sizes() -> list[Case]:
    tokens = [Case(f"tokens_{m}", lead=(m,)) for m in (1, 2, 7, 31, 67, 131)]
    ranks = [Case(f"rank_{r}", lead=(29,), K=72, N=56, ranks=(r,)) for r in (1, 2, 3, 16, 17, 64, 256)]
    ragged = [
        Case(f"ragged_{K}x{N}", lead=(19,), K=K, N=N, ranks=(5,), bias=True)
        for K, N in ((1, 1), (3, 130), (127, 33), (257, 65), (65, 259), (520, 17))
    ]
    wide = [Case("wider_than_a_tile", lead=(261,), K=515, N=389, ranks=(17,), bias=True, p=(0.1,))]
    # K in several passes, W in several chunks, and ranks that share tiles while tokens come in several blocks
    large = [
        Case("k_in_passes", lead=(37,), K=4500, N=72, ranks=(4,), p=(0.1,)),
        Case("k_in_stretches", lead=(300,), K=1100, N=70, ranks=(64,)),
        Case("rank_256_many_rows", lead=(530,), K=384, N=70, ranks=(256,)),
        Case("ranks_many_rows", lead=(530,), K=70, N=384, ranks=(64, 64, 130), p=(0.0,) * 3, scaling=(1.0, 0.5, 2.0)),
        Case("w_in_chunks", lead=(14,), K=1030, N=2090, ranks=(48,), bias=True),
        *[Case(f"rank_{r}_many_tokens", lead=(530,), K=40, N=70, ranks=(r,)) for r in (33, 48, 80)],
        Case("ranks_many_tokens", lead=(530,), K=70, N=40, ranks=(16, 32), p=(0.0, 0.0), scaling=(0.5, 3.0)),
    ]
    leading = [
        Case("leading_0", lead=(), bias=True, p=(0.25,)),
        Case("leading_2", lead=(3, 11), bias=True, p=(0.25,)),
        Case("leading_3", lead=(2, 3, 5), bias=True, p=(0.25,)),
    ]
    return tokens + ranks + ragged + wide + large + leading


def _options() -> list[Case]:
    dropouts = [Case(f"dropout_{p}", lead=(41,), K=50, ranks=(4,), p=(p,)) for p in (0.05, 0.5, 0.9, 1.0)]
    return [
        Case("bias", bias=True),
        Case("adapter_bias", adapter_bias=True),
        Case("both_biases", bias=True, adapter_bias=True, p=(0.3,)),
        Case("base_trains", bias=True, base_trains=True, p=(0.3,)),
        Case("conv1d", transposed=True, bias=True, p=(0.1,)),
        Case("conv1d_base_trains", transposed=True, bias=True, base_trains=True),
        Case("no_adapter", ranks=(), p=(), scaling=(), bias=True),
        Case("tensor_scaling", tensor_scaling=True, p=(0.2,)),
        Case("positive", lead=(131,), positive=True, p=(0.1,), bias=True),
        Case("young", lead=(67,), young=True, p=(0.1,)),
        Case("scaling_zero", scaling=(0.0,)),
        Case("scaling_negative", scaling=(-0.37,)),
        Case("two_adapters", ranks=(3, 16), p=(0.0, 0.0), scaling=(0.5, 3.0)),
        Case(
            "three_adapters",
            ranks=(2, 17, 8),
            p=(0.5, 0.0, 0.05),
            scaling=(0.5, -1.25, 3.0),
            bias=True,
            adapter_bias=True,
        ),
        *dropouts,
    ]


def _layouts() -> list[Case]:
    base = Case("", lead=(23,), K=40, N=56, bias=True, p=(0.2,))
    plain = replace(base, p=(0.0,))
    each = [
        replace(base, name=f"{tensor}_{kind}", layout={tensor: kind})
        for tensor, kinds in {
            "x": ("columns", "rows", "transposed", "offset", "every_other"),
            "W": ("columns", "transposed", "offset", "every_other"),
            "A": ("columns", "transposed", "offset"),
            "B": ("columns", "transposed", "offset"),
            "g": ("columns", "transposed", "every_other", "expanded"),
            "bias": ("every_other",),
        }.items()
        for kind in kinds
    ]
    return each + [
        replace(plain, name="x_expanded", lead=(5, 7), layout={"x": "expanded"}),
        replace(plain, name="x_columns_undropped", layout={"x": "columns", "g": "columns"}),
        replace(base, name="x_permuted", lead=(3, 5, 7), layout={"x": "permuted", "g": "permuted"}),
        replace(base, name="conv1d_W_columns", transposed=True, layout={"W": "columns"}),
        replace(base, name="conv1d_W_transposed", transposed=True, layout={"W": "transposed"}),
        replace(
            base,
            name="everything_awkward",
            lead=(3, 13),
            adapter_bias=True,
            layout={
                "x": "permuted",
                "W": "columns",
                "A": "transposed",
                "B": "columns",
                "g": "permuted",
                "b": "offset",
            },
        ),
    ]


SIZES, OPTIONS, LAYOUTS = _sizes(), _options(), _layouts()
CASES = SIZES + OPTIONS + LAYOUTS
EMPTY = [
    Case("empty_1d_batch", lead=(0,), bias=True, p=(0.5,)),
    Case("empty_inner", lead=(3, 0), adapter_bias=True, base_trains=True, bias=True),
    Case("empty_outer", lead=(0, 4, 2), transposed=True, bias=True),
]
# dtypes other than the three that every case runs in see one plain, one dropped and one crowded case
CORNERS = [
    c
    for c in CASES
    if c.name in ("bias", "dropout_0.5", "three_adapters", "conv1d", "wider_than_a_tile", "rank_1", "young")
]


def rows() -> list[tuple[Case, str]]:
    """(case, dtypes' name) of the contract."""
    return inputs.rows(CASES, CORNERS)
