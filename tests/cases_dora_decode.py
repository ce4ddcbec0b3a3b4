"""The table of awkward inputs of dora_decode: dora_linear's few tokens, without dropout and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from peft_fast.ops import dora_norm
from tests import cases_dora_linear, inputs
from tests.inputs import Leaf, Tensors

MOST = 67  # tokens


@dataclass(frozen=True)
class Case(cases_dora_linear.Case):
    """A case of dora_linear of which nothing trains."""

    op = "dora_decode"
    rounds_adapters = False

    def leaves(self) -> list[tuple[str, Leaf]]:
        """(name, Leaf) of each input."""
        return [(name, leaf._replace(trains=False)) for name, leaf in super().leaves()]

    def ours(self, run: Callable, t: Tensors, **options: object) -> torch.Tensor:
        """What ``run``, of dora_decode's signature, gives for these tensors."""
        W, bias, (adapter,), transposed = self.layer.sibling(t)
        norm = t.get("norm")
        norm = dora_norm(W, adapter, transposed=transposed) if norm is None else norm
        return run(t["x"], W, bias, adapter, t["m"], norm, **options, transposed=transposed, op=self.op)


def _of(case: cases_dora_linear.Case) -> Case:
    layout = {name: kind for name, kind in case.layout.items() if name != "g"}
    own = {f.name: getattr(case, f.name) for f in fields(case)}
    return Case(**own | {"p": (0.0,), "layout": layout, "base_trains": False})


def _cases() -> list[Case]:
    own = [c for c in cases_dora_linear.CASES if c.M <= MOST and "dropout" not in c.name and "twice" not in c.name]
    plain = Case("", lead=(1,), K=600, N=520, ranks=(16,), bias=True)
    return [
        *{c.name: _of(c) for c in own}.values(),
        *[replace(plain, name=f"lead_{m}", lead=(m,)) for m in (1, 2, 7, 8, 9, 16, 32)],
        *[replace(plain, name=f"conv1d_{m}", lead=(m,), transposed=True) for m in (1, 3, 8, 16)],
        replace(plain, name="long_rows", K=2100, N=70),
        replace(plain, name="given_norm", given_norm=True),
    ]


CASES = _cases()
CORNERS = [c for c in CASES if c.name in ("lead_1", "conv1d_3", "bias", "given_norm")]
EMPTY = [_of(case) for case in cases_dora_linear.EMPTY]


def rows() -> list[tuple[Case, str]]:
    """(case, dtypes' name) of the contract."""
    return inputs.rows(CASES, CORNERS)
