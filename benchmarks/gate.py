"""Is a LoRA layer right, or an op over several? y, dx, dA, dB against float64, with the dropout masks that it drew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .criterion import Verdict, check

ENOUGH = 2048  # elements: the rms of fewer roundings is known too badly, so more inputs are drawn
MOST_DRAWS = 64
MOST_TOKENS = 512  # that float64 judges, the first and the last: it takes a GPU up to 64 times as long as what is timed


class Weights(NamedTuple):
    """W (N,K), bias (N,) or None, A (r,K), B (N,r), or None without an adapter, m (N,) with DoRA: detached.

    All in one dtype, but m in its own, which is also what PEFT holds the norm in that m is divided by. `b` (N,) is the
    adapter's own bias, `trained` the names of what trains.
    """

    W: Tensor
    bias: Tensor | None
    A: Tensor | None
    B: Tensor | None
    scaling: float
    p: float
    m: Tensor | None = None
    norm_dtype: torch.dtype | None = None
    b: Tensor | None = None
    trained: tuple[str, ...] = ()


Formula = Callable[[Tensor, list[Weights], list[Tensor | None]], Sequence[Tensor]]
Mask = Callable[[Tensor, float], Tensor]
Masks = Callable[[list[Tensor], list[float]], list[Tensor | None]]


def weights(layer: nn.Module, dtype: torch.dtype) -> Weights:
    """The tensors of nn.Linear or Conv1D, or of a PEFT LoRA layer with one adapter on them, A and B in `dtype`."""
    base = getattr(layer, "base_layer", layer)
    W = base.weight.detach()
    # a convolution of size 1 is a linear layer; Conv1D of transformers lies the other way round
    W = W.flatten(1) if isinstance(base, (nn.Linear, nn.Conv1d, nn.Conv2d)) else W.T
    bias = getattr(base, "bias", None)
    bias = None if bias is None else bias.detach()
    if base is layer:
        return Weights(W, bias, None, None, 0.0, 0.0)
    (name,) = layer.active_adapters
    drop = layer.lora_dropout[name]
    p = drop.p if isinstance(drop, nn.Dropout) and layer.training else 0.0
    A, B = (t.detach().to(dtype).flatten(1) for t in adapter(layer))
    b, m = layer.lora_B[name].bias, magnitude(layer)
    return Weights(
        W, bias, A, B, float(layer.scaling[name]), p, None if m is None else m.detach(), None if m is None else m.dtype,
        None if b is None else b.detach().to(dtype), tuple(trained(layer)),
    )  # fmt: skip


def in_float64(w: Weights) -> Weights:
    """The same tensors, widened."""
    return Weights(*(v.double() if isinstance(v, Tensor) else v for v in w))


def adapter(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A (r,K) and B (N,r) of a PEFT LoRA layer with one adapter, the parameters themselves."""
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def magnitude(layer: nn.Module) -> Tensor | None:
    """m (N,) of a PEFT LoRA layer with one adapter, the parameter itself; None where that is not DoRA."""
    (name,) = layer.active_adapters
    found = getattr(layer, "lora_magnitude_vector", {})
    return found[name].weight if name in found else None


def trained(layer: nn.Module) -> dict[str, Tensor]:
    """What trains of a PEFT LoRA layer with one adapter, by its name in Weights: the parameters themselves."""
    (name,) = layer.active_adapters
    A, B = adapter(layer)
    base = getattr(layer.base_layer, "bias", None)
    base = base if base is not None and base.requires_grad else None
    found = {"A": A, "B": B, "m": magnitude(layer), "b": layer.lora_B[name].bias, "bias": base}
    return {name: t for name, t in found.items() if t is not None}


def check_layer(
    layer: nn.Module,
    x: Tensor,
    g: Tensor,
    mask: Mask,
    run: Callable[[Tensor], Tensor] | None = None,
    fast: bool = False,
) -> dict[str, Verdict]:
    """x (M,K), g (M,N) -> verdict per output; `mask(x, p)` is the keep-mask drawn from the generator's state.

    `run` replaces the layer's own forward (a peer that only borrows the layer's tensors).
    """
    return check_op([layer], one_layer, run or layer, x, [g], each(mask), fast)


def check_op(
    layers: Sequence[nn.Module],
    formula: Formula,
    run: Callable[[Tensor], Tensor | Sequence[Tensor]],
    x: Tensor,
    gs: Sequence[Tensor],
    masks: Masks,
    fast: bool = False,
) -> dict[str, Verdict]:
    """x (M,K) and what `run` makes of it with the tensors of `layers`, gs its gradients (M,N) -> verdict per output.

    `formula` is PEFT's own sequence of calls on the same tensors; `masks` gives the keep-mask of each layer's input.
    The verdict "path" refuses one of ours that ran PEFT's forward, and a stock one that ran peft_fast's arithmetic.
    Everything runs on all tokens. Past MOST_TOKENS, y and dx are judged on so many, half of them the first and half the
    last, and g is zero on the others, so that dA and dB are sums over all tokens with the terms of these; what many
    terms do to a sum is the numeric contract's subject.
    """
    from peft_fast.ops import fast_calls

    ws = [weights(layer, x.dtype) for layer in layers]
    exact = [in_float64(w) for w in ws]
    adapted = [layer for layer, w in zip(layers, ws, strict=True) if w.A is not None]
    leaves = [t for layer in adapted for t in trained(layer).values()]
    found, before = [], fast_calls()
    few = _judged(x)
    draws = -(-ENOUGH // min(t.numel() for t in (x, *gs, *leaves)))
    for draw in range(min(draws, MOST_DRAWS)):
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            if draw:  # the generator goes back after every draw: without a seed all would be the same
                torch.manual_seed(MOST_DRAWS + draw)
                x, gs = torch.randn_like(x), [torch.randn_like(g) for g in gs]
            gs = [_zero_but(g, few) for g in gs]
            torch.manual_seed(draw)
            keeps = masks([_like_input(x, w) for w in ws], [w.p for w in ws])
            torch.manual_seed(draw)
            ours = _results(run, x, leaves, gs)
        x0, gs0 = x[few], [g[few] for g in gs]
        keeps = [None if keep is None else keep[few] for keep in keeps]
        stock = _formula(formula, ws, x0, gs0, keeps)
        truth = _formula(formula, exact, x0.double(), [g.double() for g in gs0], keeps)
        n = len(gs) + 1  # y of each layer, and dx: of few rows; then sums over rows
        found.append(([t[few] for t in ours[:n]] + ours[n:], stock, truth))
    names = _names(ws, len(gs))
    verdicts = {}
    for i, name in enumerate(names):
        o, s, t = (torch.cat([draw[kind][i].flatten() for draw in found]) for kind in range(3))
        verdicts[name] = check(o, s, t, dtype=x.dtype)
    return {**verdicts, "path": path(fast, fast_calls() > before)}


def check_tokens(
    ours: Callable[[Tensor], Tensor],
    stock: Callable[[Tensor], Tensor],
    truth: Callable[[Tensor], Tensor],
    xs: Tensor,
    fast: bool = True,
) -> dict[str, Verdict]:
    """xs (M, ...) as M calls of one token without gradients -> verdict of y, and whether each ran what it is named.

    ``truth`` is given all of them at once and computes in float64; not ``fast``: ours may have left them to PEFT.
    """
    from peft_fast.ops import fast_calls

    with torch.no_grad():
        counts, found = [fast_calls()], []
        for run in (ours, stock):
            found.append(torch.cat([run(x) for x in xs.split(1)]))
            counts.append(fast_calls())
        verdicts = {"y": check(*found, truth(xs), dtype=found[0].dtype)}
    before, between, after = counts
    verdicts |= {"path": path(True, between - before >= len(xs))} if fast else {}
    return verdicts | {"path of stock": path(False, after > between)}


def one_layer(x: Tensor, ws: list[Weights], keeps: list[Tensor | None]) -> list[Tensor]:
    """The formula of a single LoRA layer."""
    return [lora(x, ws[0], keeps[0])]


def lora(x: Tensor, w: Weights, keep: Tensor | None, linear: Callable = F.linear) -> Tensor:
    """PEFT's own sequence of calls for one layer, in the dtype of its arguments."""
    y = linear(x, w.W, w.bias)
    if w.A is None:
        return y
    if keep is None:
        dropped = x
    elif x.is_cuda:  # as torch's dropout does it there: scaled in float32, rounded once
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dropped = (wide * keep * (1 / (1 - w.p))).to(x.dtype)
    else:  # and on the CPU: the scaled mask is rounded to the dtype, then multiplied
        dropped = x * keep.to(x.dtype).div(1 - w.p)
    low = linear(linear(dropped, w.A), w.B, w.b)
    if w.m is None:
        return y + low * w.scaling
    if keep is not None:
        base = linear(dropped, w.W)
    else:
        base = y if w.bias is None else y - w.bias
    norm = torch.linalg.norm(w.W + w.scaling * (w.B @ w.A).detach(), dim=1)
    c = w.m / norm.to(w.norm_dtype).to(norm.dtype)
    return (y + ((c - 1) * base + c * low * w.scaling)).to(y.dtype)


def _names(ws: list[Weights], outputs: int) -> list[str]:
    """y, dx, dA, dB, and dm with DoRA, db and dbias where those train; of several layers y0, y1, …"""
    number = [str(i) if len(ws) > 1 else "" for i in range(max(len(ws), outputs))]
    gradients = [f"d{name}{number[i]}" for i, w in enumerate(ws) for name in w.trained]
    return [*(f"y{number[i]}" for i in range(outputs)), "dx", *gradients]


def _like_input(x: Tensor, w: Weights) -> Tensor:
    """What a layer is given: of x's rows, as wide as W."""
    return x.new_empty(()).expand(x.shape[0], w.W.shape[1])


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


def _results(run: Callable, x: Tensor, leaves: list[Tensor], gs: Sequence[Tensor]) -> list[Tensor]:
    """y of each output, dx, dA, dB, …"""
    x = x.detach().clone().requires_grad_()
    ys = run(x)
    ys = [ys] if isinstance(ys, Tensor) else list(ys)
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, [x, *leaves], gs)]


def path(wanted: bool, fast: bool) -> Verdict:
    """Did the arithmetic run that the provider is named after?"""
    ran = "peft_fast's own arithmetic" if fast else "PEFT's forward"
    return Verdict(wanted == fast, f"the layer ran {ran}, so its time would be another provider's")


def _formula(formula: Formula, ws: list[Weights], x: Tensor, gs: list[Tensor], keeps: list) -> list[Tensor]:
    """The formula's y, dx, dA, dB, in the order of _results."""
    ws = [w._replace(**{name: _leaf(getattr(w, name)) for name in w.trained}) for w in ws]
    leaves = [getattr(w, name) for w in ws for name in w.trained]
    return _results(lambda x: formula(x, ws, keeps), x, leaves, gs)


def _leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def each(mask: Mask) -> Masks:
    """Masks drawn one layer after another."""
    return lambda inputs, ps: [mask(x, p) if p else None for x, p in zip(inputs, ps, strict=True)]


def torch_mask(dtype: torch.dtype) -> Mask:
    """The mask nn.Dropout draws for a (M,K) input of `dtype`."""
    return lambda x, p: F.dropout(torch.ones_like(x, dtype=dtype), p, training=True) != 0


def our_mask(x: Tensor, p: float) -> Tensor:
    """The mask peft_fast draws for one adapter on x (M,K)."""
    from peft_fast.ops import draw_seed, dropout_mask

    return dropout_mask(draw_seed(1, x.device)[0], *x.shape, p)


def our_masks(inputs: list[Tensor], ps: list[float]) -> list[Tensor | None]:
    """The masks that one op of ours draws for all its layers at once."""
    from peft_fast.ops import draw_seed, dropout_mask

    if not any(ps):
        return [None] * len(ps)
    seeds = draw_seed(len(ps), inputs[0].device)
    drawn = zip(seeds, inputs, ps, strict=True)
    return [dropout_mask(seed, *x.shape, p) if p else None for seed, x, p in drawn]
