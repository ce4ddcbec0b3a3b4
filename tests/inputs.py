"""What the cases of all ops are made of: dtypes, leaf tensors, linear layers, and awkward places in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from peft_fast.ops import Adapter, Sibling

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Dtypes:
    """Dtypes of base, x and adapters, and autocast's around the call; the GEMMs run in `compute`."""

    base: torch.dtype
    x: torch.dtype
    adapter: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def compute(self) -> torch.dtype:
        return self.autocast or self.x

    @property
    def mixed(self) -> bool:
        """True where adapters have more bits than the activations they are computed with."""
        return self.adapter != self.compute

    @property
    def exact(self) -> bool:
        """True where the adapters keep their own arithmetic without being told: float16 has too small a range."""
        return self.mixed and self.compute == torch.float16 and self.autocast is None


F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = {
    "f32": Dtypes(F32, F32, F32),
    "bf16": Dtypes(BF16, BF16, BF16),
    "f16": Dtypes(F16, F16, F16),
    "bf16_f32_adapters": Dtypes(BF16, BF16, F32),
    "f16_f32_adapters": Dtypes(F16, F16, F32),
    "bf16_f32_adapters_autocast": Dtypes(BF16, BF16, F32, BF16),
    "f16_f32_adapters_autocast": Dtypes(F16, F16, F32, F16),
    "bf16_f32_adapters_f32_x_autocast": Dtypes(BF16, F32, F32, BF16),
    "f32_autocast": Dtypes(F32, F32, F32, BF16),
    "f32_bf16_x_autocast": Dtypes(F32, BF16, F32, BF16),
}
# the situations that every case runs in; the others see the corners
EVERYWHERE = ("f32", "bf16", "bf16_f32_adapters")


def rows(cases: list, corners: list) -> list[tuple]:
    """(case, dtypes' name) in an order that keeps one problem's backends together."""
    return [(c, d) for d in EVERYWHERE for c in cases] + [
        (c, d) for d in DTYPES if d not in EVERYWHERE for c in corners
    ]


class Leaf(NamedTuple):
    """One input: its dtype is that of its kind, "base", "x", "adapter", or "magnitude", an adapter's never rounded.

    "ids" are token numbers below ``scale``.
    """

    shape: tuple[int, ...]
    kind: str
    scale: float = 1.0
    trains: bool = True
    mean: float = 0.0


@dataclass(frozen=True)
class Layer:
    """One linear layer of a case, and its adapters."""

    N: int = 40
    ranks: tuple[int, ...] = (8,)
    p: tuple[float, ...] = (0.0,)
    scaling: tuple[float, ...] = (2.0,)
    bias: bool = False
    adapter_bias: bool = False
    transposed: bool = False
    base_trains: bool = False
    tensor_scaling: bool = False

    def leaves(self, K: int, young: bool = False, prefix: str = "") -> Iterator[tuple[str, Leaf]]:
        """(name, Leaf) of W, bias and of A, B and b of each adapter."""
        N = self.N
        yield f"{prefix}W", Leaf((K, N) if self.transposed else (N, K), "base", K**-0.5, self.base_trains)
        if self.bias:
            yield f"{prefix}bias", Leaf((N,), "base")
        for i, r in enumerate(self.ranks):
            yield f"{prefix}A{i}", Leaf((r, K), "adapter", K**-0.5)
            yield f"{prefix}B{i}", Leaf((N, r), "adapter", r**-0.5 * (1e-4 if young else 1.0))
            if self.adapter_bias:
                yield f"{prefix}b{i}", Leaf((N,), "adapter", 0.5)

    def sibling(self, t: Tensors, prefix: str = "") -> Sibling:
        """The layer as the ops take it."""
        scale = torch.tensor if self.tensor_scaling else float
        adapters = [
            Adapter(t[f"{prefix}A{i}"], t[f"{prefix}B{i}"], scale(s), p, t.get(f"{prefix}b{i}"))
            for i, (s, p) in enumerate(zip(self.scaling, self.p, strict=True))
        ]
        return Sibling(t[f"{prefix}W"], t.get(f"{prefix}bias"), adapters, self.transposed)

    def dropouts(self, shape: tuple[int, ...]) -> list[tuple[float, tuple[int, ...]]]:
        """(p, shape of what is dropped) of each adapter."""
        return [(p, shape) for p in self.p]

    def roundings(self, M: int, K: int) -> list[int]:
        """Elements of y, dx and of H and D."""
        return [M * self.N, M * K, *(r * min(K, self.N, M) for r in self.ranks)]


def place(values: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """values -> (a view that holds them in layout `kind`, the wider buffer it lies in, NaN or -1 all around)."""
    shape = values.shape
    if kind == "expanded":
        buffer = values[..., :1].clone() if values.dim() == 1 else values[:1].clone()
        return buffer.expand(shape), buffer
    if kind == "transposed":
        view, buffer = _inside(values.mT.contiguous(), 0)
        return view.mT, buffer
    if kind == "permuted":
        order = [*reversed(range(values.dim() - 1)), values.dim() - 1]
        view, buffer = _inside(values.permute(order).contiguous(), 0)
        return view.permute([order.index(i) for i in range(values.dim())]), buffer
    if kind not in VIEWS:
        return _inside(values, 1 if kind == "offset" else 0)
    size, view_of = VIEWS[kind]
    buffer = _filled(size(shape), values)
    view = view_of(buffer, shape)
    view.copy_(values)
    return view, buffer


VIEWS: dict[str, tuple[Callable, Callable]] = {
    "columns": (lambda s: (*s[:-1], s[-1] + 9), lambda buffer, s: buffer[..., 5 : 5 + s[-1]]),
    "rows": (lambda s: (2 * s[0] + 1, *s[1:]), lambda buffer, s: buffer[1::2]),
    "every_other": (lambda s: (*s[:-1], 2 * s[-1] + 1), lambda buffer, s: buffer[..., 1::2]),
}


def _inside(values: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    # 64 elements keep the plain case as aligned as a fresh allocation; one more misaligns it for every vector
    buffer = _filled((values.numel() + 128 + offset,), values)
    view = buffer[64 + offset : 64 + offset + values.numel()].view(values.shape)
    view.copy_(values)
    return view, buffer


def _filled(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.full(shape, torch.nan if like.is_floating_point() else -1, dtype=like.dtype, device=like.device)
