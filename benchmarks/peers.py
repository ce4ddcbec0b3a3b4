"""y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ as others do it: the autograd.Function one writes first, and installed projects' own."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor


class Addmm(torch.autograd.Function):
    """x (M,K), W (N,K), bias (N,) or None, A (r,K), B (N,r), all of one dtype -> y (M,N), by in-place addmm."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, s, p):
        xd, keep = (x, None) if p == 0 else torch.native_dropout(x, p, True)
        H = xd @ A.T  # (M, r)
        y = F.linear(x, W, bias).addmm_(H, B.T, alpha=s)
        ctx.save_for_backward(xd, keep, W, A, B, H)
        ctx.s, ctx.p = s, p
        return y

    @staticmethod
    def backward(ctx, g):
        xd, keep, W, A, B, H = ctx.saved_tensors
        D = (g @ B).mul_(ctx.s)  # (M, r)
        if keep is None:
            dx = (g @ W).addmm_(D, A)
        else:
            dx = (g @ W).add_((D @ A).mul_(keep), alpha=1 / (1 - ctx.p))
        return dx, None, None, D.T @ xd, (g.T @ H).mul_(ctx.s), None, None


def addmm(x: Tensor, w, A: Tensor, B: Tensor) -> Tensor:
    """The peer on the tensors of a gate.Weights, with A and B as the leaves."""
    return Addmm.apply(x, w.W, w.bias, A, B, w.scaling, w.p)


def addmm_mask(x: Tensor, p: float) -> Tensor:
    """The mask Addmm draws for x (M,K)."""
    return torch.native_dropout(torch.ones_like(x), p, True)[1]


# project -> (module, autograd.Function), of those that have one for a single LoRA layer.
# Liger-Kernel has none; LoRAFusion draws its mask from a generator of its own, so nothing can check its dropout.
FUNCTIONS = {
    "unsloth": ("unsloth.kernels.fast_lora", "LoRA_W"),
    "axolotl": ("axolotl.kernels.lora", "LoRA_O"),
}


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another project's Function, called with the arguments that its forward names."""

    name: str
    function: type[torch.autograd.Function]

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(inspect.signature(inspect.unwrap(self.function.forward)).parameters)[1:]

    @property
    def drops(self) -> bool:
        return "X_drop" in self.arguments

    def __call__(self, x: Tensor, w, A: Tensor, B: Tensor) -> Tensor:
        """x (M,K), a gate.Weights, A and B the leaves -> y (M,N)."""
        x3 = x.unsqueeze(0)  # batch and tokens: they take no other shape
        given = {"X": x3, "W": w.W, "b": w.bias, "W_quant": None, "A": A, "B": B, "S": w.scaling, "s": w.scaling}
        given |= {"X_drop": F.dropout(x3, w.p) if w.p else None, "lora_bias": None, "magnitude": None}
        if unknown := set(self.arguments) - set(given):
            raise TypeError(f"{self.name} has a signature of another version: {sorted(unknown)}")
        return self.function.apply(*(given[name] for name in self.arguments)).squeeze(0)


def installed() -> list[str]:
    """The projects in FUNCTIONS that this Python has; nothing is imported."""
    return [name for name in FUNCTIONS if importlib.util.find_spec(name)]


def found(p: float) -> list[Peer]:
    """The peers that import here and can do dropout `p`. Importing them may patch PEFT: a process of their own."""
    peers = []
    for name in installed():
        module, function = FUNCTIONS[name]
        try:
            peers.append(Peer(name, getattr(importlib.import_module(module), function)))
        except Exception as error:  # whatever another project raises when it is imported
            print(f"{name} does not import: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return [peer for peer in peers if p == 0 or peer.drops]
