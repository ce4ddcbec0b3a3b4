"""What the ops are given, and what their backends need beside tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# gelu is exact, by erf; quick_gelu is z·sigmoid(1.702·z)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2")


class Adapter(NamedTuple):
    """One low-rank adapter: A (r, K), B (N, r), both of one dtype, and what PEFT stores beside them."""

    A: Tensor
    B: Tensor
    scaling: float | Tensor = 1.0  # a float or a 0-d tensor
    p: float = 0.0  # dropout probability in effect: 0 in eval mode
    bias: Tensor | None = None  # (N,), B's bias, scaled with the adapter


class Sibling(NamedTuple):
    """One linear layer with what adapts it: W (N, K), or (K, N) if transposed, bias (N,)."""

    W: Tensor
    bias: Tensor | None = None
    adapters: Sequence[Adapter] = ()
    transposed: bool = False


class Spec(NamedTuple):
    """What the kernels need beside tensors: adapter i owns ranks[i] rows of A and columns of B."""

    ranks: list[int]
    scalings: list[float]
    ps: list[float]
    dx_dtype: torch.dtype  # of x as the caller gave it, before autocast
    transposed: bool
    exact: bool
    backend: str
    plan: str


class GroupSpec(NamedTuple):
    """The same for siblings with one x: sibling i has counts[i] of the adapters, which lie sibling after sibling."""

    counts: list[int]
    ranks: list[int]
    scalings: list[float]
    ps: list[float]
    dx_dtype: torch.dtype
    transposed: list[bool]
    exact: bool
    backend: str
    plan: str

    def one(self) -> Spec:
        """The only sibling's own."""
        return Spec(*self[1:5], self.transposed[0], *self[6:])

    def widths(self) -> list[int]:
        """Columns of H that each sibling has."""
        ranks = iter(self.ranks)
        return [sum(next(ranks) for _ in range(count)) for count in self.counts]


class ActSpec(NamedTuple):
    """h = drop_p(act(gate)·up); without a gate act(up), or act of one half of up times the other."""

    activation: str
    halves: str  # "first" or "second", the activated half of up (M, 2·I); else empty
    p: float


class EmbeddingSpec(NamedTuple):
    """One adapter of an embedding."""

    scaling: float
    padding_idx: int  # the token whose column of A has no gradient; -1 for none
    backend: str


class MixedSpec(NamedTuple):
    """Rows of a batch by adapter: ``order`` has those of the first adapter, counts[0] of them, then the second's, …"""

    order: list[int]
    counts: list[int]
    scalings: list[float]
    padding_idx: int  # -1 for none
    backend: str


class Routing(NamedTuple):
    """Pairs of token and expert, k a token, sorted by expert: row s is pair order[s], of token order[s] // k."""

    order: Tensor  # (S,) int64
    inverse: Tensor  # (S,) the row of each pair
    counts: Tensor  # (E,) rows of each expert
    k: int


class ExpertsSpec(NamedTuple):
    """What the kernels of lora_experts need beside tensors: adapter i owns ranks[i] of A (E, R, K) and B (N, R·E)."""

    ranks: list[int]
    scalings: list[float]
    tokens: bool  # x has a row a token, which each of its experts reads; else a row a pair
    transposed: bool
    exact: bool
    backend: str
