"""The table of awkward inputs of lora_mixed: rows of a batch with an adapter each, behind a frozen layer's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from peft_fast.ops import Adapter
from peft_fast.reference import lora_mixed as reference
from tests import inputs, stock
from tests.inputs import Dtypes, Leaf, Tensors


@dataclass(frozen=True)
class Case:
    """``owners``: the adapter of each batch row, -1 for none; ``lead``: the other leading dimensions of x.

    With V, x are tokens and the base is a table of V words. `layout` names a kind of view for x, ids, A, B, b and g.
    """

    name: str
    owners: tuple[int, ...] = (0, -1, 1, 0)
    lead: tuple[int, ...] = (9,)
    K: int = 48
    N: int = 40
    V: int = 0
    ranks: tuple[int, ...] = (8, 3)
    scaling: tuple[float, ...] = (2.0, -0.5)
    tensor_scaling: bool = False
    bias: bool = False
    adapter_bias: bool = False
    padding_idx: int | None = None
    positive: bool = False
    young: bool = False
    trains: bool = False  # adapters want gradients; x, or the table, always does
    layout: dict[str, str] = field(default_factory=dict, hash=False)

    op = "lora_mixed"
    ids_dtype = torch.int64
    rounds_adapters = False  # they keep their own arithmetic, as PEFT's do

    @property
    def rows(self) -> tuple[int, ...]:
        return (len(self.owners), *self.lead)

    def adapters(self, t: Tensors) -> list[Adapter]:
        """The adapters as the op takes them."""
        scale = torch.tensor if self.tensor_scaling else float
        return [Adapter(t[f"A{i}"], t[f"B{i}"], scale(s), 0.0, t.get(f"b{i}")) for i, s in enumerate(self.scaling)]

    def leaves(self) -> list[tuple[str, Leaf]]:
        """(name, Leaf) of each input; an adapter that no row has gets no gradient."""
        K, N = self.V or self.K, self.N
        if self.V:
            found = [("ids", Leaf(self.rows, "ids", self.V)), ("W", Leaf((K, N), "base", 1.0, True))]
        else:
            found = [("x", Leaf((*self.rows, K), "x")), ("W", Leaf((N, K), "base", K**-0.5, False))]
        if self.bias:
            found.append(("bias", Leaf((N,), "base")))
        for i, r in enumerate(self.ranks):
            used, young = self.trains and i in self.owners, 1e-4 if self.young else 1.0
            found.append((f"A{i}", Leaf((r, K), "adapter", 1.0 if self.V else K**-0.5, used)))
            found.append((f"B{i}", Leaf((N, r), "adapter", r**-0.5 * young, used)))
            if self.adapter_bias:
                found.append((f"b{i}", Leaf((N,), "adapter", 0.5, used)))
        return found

    def outputs(self) -> dict[str, tuple[int, ...]]:
        """The shape of each output."""
        return {"y": (*self.rows, self.N)}

    def dropouts(self) -> list:
        """Mixed batches are not dropped."""
        return []

    def roundings(self) -> list[int]:
        """Elements of y and of H; where adapters train, of the H of the one with the fewest rows."""
        T = torch.Size(self.lead).numel()
        low = [r * min(count * T, self.K, self.N) for i, r in enumerate(self.ranks) if (count := self.owners.count(i))]
        return [len(self.owners) * T * self.N, min(low) if self.trains and low else sum(low) or self.N]

    def base(self, t: Tensors) -> torch.Tensor:
        """What the frozen layer gives."""
        return F.embedding(t["ids"], t["W"], self.padding_idx) if self.V else F.linear(t["x"], t["W"], t.get("bias"))

    def ours(self, run: Callable, t: Tensors, **options: object) -> torch.Tensor:
        """What ``run``, of lora_mixed's signature, gives for these tensors."""
        options.pop("exact", None)  # it always is
        x = t["ids"] if self.V else t["x"]
        options |= {"padding_idx": self.padding_idx} if self.V else {}
        return run(x, self.base(t), self.adapters(t), self.owners, op=self.op, **options)

    def stock(self, t: Tensors, masks: list) -> torch.Tensor:
        """What PEFT gives."""
        x = t["ids"] if self.V else t["x"]
        return stock.lora_mixed(x, self.base(t), self.adapters(t), self.owners, self.padding_idx)

    def truth(self, t: Tensors, masks: list, dtypes: Dtypes) -> torch.Tensor:
        """The definition."""
        x = t["ids"] if self.V else t["x"]
        return reference.forward(x, self.base(t), self.adapters(t), self.owners, self.padding_idx)


def _crowd(n: int, of: int, **options: object) -> dict:
    """n rows over ``of`` adapters of different rank and scaling, every fifth row without one."""
    owners = tuple(-1 if i % 5 == 4 else (7 * i + 3) % of for i in range(n))
    ranks = tuple((1, 2, 3, 4, 8, 16, 5, 7)[i % 8] for i in range(of))
    return {"owners": owners, "ranks": ranks, "scaling": tuple(0.25 * (i % 9) - 1.1 for i in range(of)), **options}


def _cases() -> list[Case]:
    one = {"owners": (0,), "ranks": (8,), "scaling": (2.0,)}
    words = {"V": 61, "lead": (11,)}
    plain = Case("", owners=(1, 0, -1), lead=(7,))
    layouts = {
        "x": ("columns", "rows", "transposed", "offset", "permuted", "every_other", "expanded"),
        "A": ("columns", "transposed", "offset"),
        "B": ("columns", "transposed", "offset"),
        "g": ("columns", "expanded"),
        "b": ("every_other",),
    }
    return [
        Case("plain"),
        Case("bias", bias=True, adapter_bias=True, trains=True, lead=(67,)),
        Case("decode", lead=(1,), owners=(1, 0, 2, -1, 1), ranks=(4, 16, 1), scaling=(1.0, 0.5, 4.0)),
        Case("two_dims", lead=(), owners=(1, 0, -1, 1)),
        Case("deep", lead=(2, 3), owners=(1, 0, -1)),
        Case("one_row", **one),
        Case("one_token", lead=(), **one),
        Case("one_adapter_everywhere", owners=(0,) * 5, ranks=(8,), scaling=(2.0,)),
        Case("base_alone", owners=(-1, -1)),
        Case("adapter_without_rows", trains=True, owners=(2, -1, 2), ranks=(4, 8, 2), scaling=(1.0, 2.0, 3.0)),
        Case("sorted", owners=(0, 0, 1, 1)),
        Case("backwards", owners=(1, 1, 0, -1)),
        Case("tensor_scaling", tensor_scaling=True, adapter_bias=True),
        Case("scaling_zero", scaling=(0.0, 1.5)),
        Case("sixty_four", **_crowd(80, 64, lead=(1,))),
        Case("crowd_at_decode", **_crowd(33, 16, lead=(1,), K=130, N=67)),
        Case(
            "ranks_to_256", owners=(0, 1, 2, 3, -1), ranks=(256, 1, 64, 33), scaling=(0.5, 1.0, 2.0, -1.0), lead=(17,)
        ),
        Case("many_tokens", owners=(0, 1, 0, -1), lead=(131,)),
        Case("many_rows_of_one", owners=(0,) * 70 + (1,) * 3, lead=(5,)),
        Case("k_in_passes", K=2500, N=72, lead=(5,)),
        Case("n_in_groups", K=40, N=2090, lead=(5,)),
        *[Case(f"ragged_{K}x{N}", K=K, N=N, ranks=(5, 17), lead=(3,)) for K, N in ((1, 1), (3, 130), (257, 65))],
        Case("positive", positive=True, lead=(31,)),
        Case("young", young=True, trains=True, lead=(31,)),
        Case("words", **words),
        Case("words_padding", padding_idx=3, trains=True, V=61, lead=(41,)),
        Case("words_crowd", **_crowd(40, 16, V=61, lead=(3,))),
        Case("words_at_decode", V=61, lead=(1,)),
        Case("words_ids_every_other", V=61, lead=(11,), layout={"ids": "every_other", "A": "columns"}),
        *[
            replace(plain, name=f"{name}_{kind}", adapter_bias=name == "b", layout={name: kind})
            for name, kinds in layouts.items()
            for kind in kinds
        ],
        replace(
            plain,
            name="everything_awkward",
            lead=(3, 5),
            adapter_bias=True,
            layout={"x": "permuted", "A": "transposed", "B": "columns", "b": "offset", "g": "permuted"},
        ),
    ]


CASES = _cases()
EMPTY = [
    Case("empty_batch", owners=(), ranks=(), scaling=()),
    Case("empty_rows", owners=(0, 0), lead=(0,), ranks=(8,), scaling=(2.0,)),
]
CORNERS = [c for c in CASES if c.name in ("plain", "bias", "decode", "young", "crowd_at_decode")]
STEP = Case(
    "mixed_step", owners=(2, -1, 0, 1, 2), ranks=(2, 17, 8), scaling=(0.5, -1.25, 3.0), adapter_bias=True, trains=True
)


def rows() -> list[tuple[Case, str]]:
    """(case, dtypes' name) of the contract."""
    plain = [case for case in CASES if not case.layout]
    return [*inputs.rows(plain, CORNERS), *((case, "f32") for case in CASES if case.layout)]
