"""The table of awkward inputs of lora_decode: lora_linear's few tokens, without dropout and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from tests import cases, inputs
from tests.inputs import Leaf, Tensors

MOST = 131  # tokens


@dataclass(frozen=True)
class Case(cases.Case):
    """A case of lora_linear of which nothing trains."""

    op = "lora_decode"
    rounds_adapters = False

    def leaves(self) -> list[tuple[str, Leaf]]:
        """(name, Leaf) of each input."""
        return [(name, leaf._replace(trains=False)) for name, leaf in super().leaves()]

    def roundings(self) -> list[int]:
        """Elements of y and of H."""
        return [self.M * self.N, *(r * min(self.M, self.K) for r in self.ranks)]

    def ours(self, run: Callable, t: Tensors, **options: object) -> torch.Tensor:
        """What ``run``, of lora_decode's signature, gives for these tensors."""
        return super().ours(run, t, op="lora_decode", **options)


def _of(case: cases.Case) -> Case:
    layout = {name: kind for name, kind in case.layout.items() if name != "g"}
    own = {f.name: getattr(case, f.name) for f in fields(case)}
    return Case(**own | {"p": (0.0,) * len(case.ranks), "layout": layout, "base_trains": False})


def _cases() -> list[Case]:
    found = {}
    for case in cases.CASES:
        if case.M <= MOST and case.name not in ("dropout_0.5", "dropout_0.9", "dropout_1.0", "g_transposed"):
            found[case.name] = _of(case)
    plain = Case("", lead=(1,), K=600, N=520, ranks=(16,), bias=True)
    more = [
        *[replace(plain, name=f"lead_{m}", lead=(m,)) for m in (1, 2, 3, 4, 5, 8, 9, 16, 32, 97)],
        *[replace(plain, name=f"conv1d_{m}", lead=(m,), transposed=True) for m in (1, 2, 3, 4, 7, 16, 67)],
        replace(plain, name="long_chain", K=5000, N=70),
        # rows of float32 as long as a page: eight of them at a time, then four, then one
        replace(plain, name="long_rows", K=1030, N=77),
        # so narrow that sums of many ranks are made at once, the last of which must not reach the next token's
        replace(plain, name="narrow", lead=(3,), K=48, N=40, ranks=(32, 29), p=(0.0,) * 2, scaling=(0.5, 2.0)),
        # of products of pairs too
        replace(plain, name="longer_chain", K=9000, N=40),
        replace(plain, name="long_chain_narrow", lead=(5,), K=1100, N=40),
        replace(plain, name="long_chain_conv1d", K=5000, N=70, transposed=True),
        replace(plain, name="long_chain_tokens", lead=(5,), K=5000, N=70),
        replace(
            plain, name="adapter_biases", lead=(3,), ranks=(3, 40), p=(0.0,) * 2, scaling=(0.5, 2.0), adapter_bias=True
        ),
        replace(plain, name="conv1d_adapter_bias", lead=(3,), adapter_bias=True, transposed=True, N=300),
    ]
    return [*found.values(), *more]


CASES = _cases()
CORNERS = [c for c in CASES if c.name in ("both_biases", "three_adapters", "lead_1", "conv1d_3")]
EVERYWHERE = "lead_1 lead_3 lead_8 lead_97 conv1d_1 conv1d_7 long_chain rank_17 three_adapters".split()
EMPTY = [_of(case) for case in cases.EMPTY]


def rows() -> list[tuple[Case, str]]:
    """(case, dtypes' name) of the contract."""
    return inputs.rows(CASES, CORNERS)
