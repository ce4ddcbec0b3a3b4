"""Is a LoRA layer right? y, dx, dA, dB of any PEFT layer against float64, with the dropout mask it drew."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .criterion import Verdict, check

NAMES = ("y", "dx", "dA", "dB")
ENOUGH = 2048  # elements: the rms of fewer roundings is known too badly, so more inputs are drawn
MOST_DRAWS = 64
MOST_TOKENS = 512  # that float64 judges, the first and the last: it takes a GPU up to 64 times as long as what is timed


class Weights(NamedTuple):
    """W (N,K), bias (N,) or None, A (r,K), B (N,r): detached, rounded to the activations' dtype."""

    W: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    scaling: float
    p: float


def weights(layer: nn.Module, dtype: torch.dtype) -> Weights:
    """The tensors of a PEFT LoRA layer with one adapter, on nn.Linear or Conv1D."""
    (name,) = layer.active_adapters
    W = layer.base_layer.weight.detach()
    W = W if isinstance(layer.base_layer, nn.Linear) else W.T
    bias = getattr(layer.base_layer, "bias", None)
    drop = layer.lora_dropout[name]
    p = drop.p if isinstance(drop, nn.Dropout) and layer.training else 0.0
    A, B = (lora[name].weight.detach().to(dtype) for lora in (layer.lora_A, layer.lora_B))
    return Weights(W, None if bias is None else bias.detach(), A, B, float(layer.scaling[name]), p)


def check_layer(
    layer: nn.Module,
    x: Tensor,
    g: Tensor,
    mask: Callable[[Tensor, float], Tensor],
    run: Callable[[Tensor], Tensor] | None = None,
    fast: bool = False,
) -> dict[str, Verdict]:
    """x (M,K), g (M,N) -> verdict per output; `mask(x, p)` is the keep-mask drawn from the generator's state.

    `run` replaces the layer's own forward (a peer that only borrows the layer's tensors). The verdict "path"
    refuses an accelerated layer that ran PEFT's forward, and a stock layer that ran peft_fast's arithmetic.
    The layer runs on all tokens. Past MOST_TOKENS, y and dx are judged on so many, half of them the first and half the
    last, and g is zero on the others, so that dA and dB are sums over all tokens with the terms of these; what many
    terms do to a sum is the numeric contract's subject.
    """
    from peft_fast.ops import fast_calls

    w = weights(layer, x.dtype)
    exact = Weights(*(v.double() if isinstance(v, Tensor) else v for v in w))
    found, before = [], fast_calls()
    few = _judged(x)
    draws = -(-ENOUGH // min(x.numel(), g.numel(), w.A.numel(), w.B.numel()))
    for draw in range(min(draws, MOST_DRAWS)):
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            if draw:
                x, g = torch.randn_like(x), torch.randn_like(g)
            g = _zero_but(g, few)
            torch.manual_seed(draw)
            keep = mask(x, w.p) if w.p else None
            torch.manual_seed(draw)
            y, dx, dA, dB = _results(layer, run or layer, x, g)
        x0, g0, keep = x[few], g[few], None if keep is None else keep[few]
        wide = x0.double(), g0.double()
        found.append(((y[few], dx[few], dA, dB), _formula(w, x0, g0, keep), _formula(exact, *wide, keep)))
    path = _path(fast, fast_calls() > before)
    checks = {}
    for i, name in enumerate(NAMES):
        o, s, t = (torch.cat([draw[kind][i].flatten() for draw in found]) for kind in range(3))
        checks[name] = check(o, s, t, dtype=x.dtype)
    return {**checks, "path": path}


def _judged(x: Tensor) -> Tensor | slice:
    """Which rows of x (M,K) are: indices, or all."""
    M, half = x.shape[0], MOST_TOKENS // 2
    if M <= MOST_TOKENS:
        return slice(None)
    return torch.cat([torch.arange(half), torch.arange(M - half, M)]).to(x.device)


def _zero_but(g: Tensor, few: Tensor | slice) -> Tensor:
    """A copy of g (M,N) with zeros in the rows that are not judged."""
    out = torch.zeros_like(g)
    out[few] = g[few]
    return out


def _results(layer: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    (name,) = layer.active_adapters
    leaves = x.detach().clone().requires_grad_(), layer.lora_A[name].weight, layer.lora_B[name].weight
    y = run(leaves[0])
    return (y.detach(), *torch.autograd.grad(y, leaves, g))


def _path(wanted: bool, fast: bool) -> Verdict:
    ran = "peft_fast's own arithmetic" if fast else "PEFT's forward"
    return Verdict(wanted == fast, f"the layer ran {ran}, so its time would be another provider's")


def _formula(w: Weights, x: Tensor, g: Tensor, keep: Tensor | None) -> tuple[Tensor, ...]:
    """PEFT's own sequence of calls, in the dtype of its arguments -> y, dx, dA, dB."""
    x, A, B = (t.detach().requires_grad_() for t in (x, w.A, w.B))
    if keep is None:
        dropped = x
    elif x.is_cuda:  # as torch's dropout does it there: scaled in float32, rounded once
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dropped = (wide * keep * (1 / (1 - w.p))).to(x.dtype)
    else:  # and on the CPU: the scaled mask is rounded to the dtype, then multiplied
        dropped = x * keep.to(x.dtype).div(1 - w.p)
    y = F.linear(x, w.W, w.bias) + F.linear(F.linear(dropped, A), B) * w.scaling
    return (y.detach(), *torch.autograd.grad(y, (x, A, B), g))


def torch_mask(dtype: torch.dtype) -> Callable[[Tensor, float], Tensor]:
    """The mask nn.Dropout draws for a (M,K) input of `dtype`."""
    return lambda x, p: F.dropout(torch.ones_like(x, dtype=dtype), p, training=True) != 0


def our_mask(x: Tensor, p: float) -> Tensor:
    """The mask peft_fast draws for one adapter on x (M,K)."""
    from peft_fast.ops import draw_seed, dropout_mask

    return dropout_mask(draw_seed(1, x.device)[0], *x.shape, p)
