"""check(x, W, …): what an op takes, or an error that says what was given, what is needed and what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_fast.errors import DeviceError, DtypeError, SettingsError, ShapeError, fail

MAX_RANK = 1024
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


NUMBERS = (float, int, torch.SymFloat, torch.SymInt)


def check_kinds(x, W, bias, adapters):
    """Tensors are dense and hold data, adapters have a number or a tensor for a scaling and a probability."""
    if hasattr(adapters, "scaling"):
        fail(SettingsError, "one adapter by itself", "a list of adapters", "pass adapters=[adapter]")
    _check_dense(("x", x), ("W", W), ("bias", bias))
    for a in adapters:
        if not hasattr(a, "scaling"):
            given = f"an adapter of type {type(a).__name__}"
            fail(SettingsError, given, "a peft_fast.ops.Adapter", "pass Adapter(A, B, scaling, p, bias)")
        _check_dense(("A", a.A), ("B", a.B), ("adapter bias", a.bias))
        if not isinstance(a.scaling, (*NUMBERS, Tensor)):
            fail(SettingsError, f"scaling={a.scaling!r}", "a float or a 0-d tensor", "pass lora_alpha / r")
        if not isinstance(a.p, NUMBERS) or not 0 <= a.p <= 1:
            fail(SettingsError, f"p={a.p!r}", "a dropout probability from 0 to 1", "pass the p of the dropout module")


def _check_dense(*tensors):
    for name, t in tensors:
        if t is None and name.endswith("bias"):
            continue
        if not isinstance(t, Tensor):
            fail(SettingsError, f"{name} of type {type(t).__name__}", "a torch.Tensor", f"convert {name} to a tensor")
        if t.layout is not torch.strided:
            fail(SettingsError, f"{name} of layout {t.layout}", "a dense tensor", f"pass {name}.to_dense()")
        if t.device.type == "meta":
            fail(DeviceError, f"{name} on meta", "a device that holds data", f"move {name} with to_empty() and load it")


def check(x, dtype, W, bias, adapters, transposed):
    """Shapes, dtypes and devices fit; ``dtype`` is the one computed in: x's, or autocast's."""
    if x.dtype not in FLOATS:
        fail(DtypeError, f"x of {x.dtype}", "float64, float32, bfloat16 or float16", "convert x with x.to(...)")
    if x.dim() == 0 or W.dim() != 2:
        fail(
            ShapeError,
            f"x {tuple(x.shape)}, W {tuple(W.shape)}",
            "x (..., K) and a 2-d W",
            "see lora_linear's docstring",
        )
    K, N = W.shape if transposed else W.shape[::-1]
    if x.shape[-1] != K:
        fail(
            ShapeError,
            f"x {tuple(x.shape)} with W {tuple(W.shape)}, transposed={transposed}",
            f"x (..., K) with K = {K}",
            "check the layer's in_features, or pass transposed=True for a (K, N) weight",
        )
    if bias is not None and bias.shape != (N,):
        fail(ShapeError, f"bias {tuple(bias.shape)}", f"({N},)", "pass the bias of the same layer as W")
    tensors = [("W", W)] if bias is None else [("W", W), ("bias", bias)]
    for a in adapters:
        if a.A.dim() != 2 or a.B.dim() != 2 or a.A.shape[1] != K or a.B.shape != (N, a.A.shape[0]):
            fail(
                ShapeError,
                f"A {tuple(a.A.shape)}, B {tuple(a.B.shape)}",
                f"A (r, {K}) and B ({N}, r)",
                "check that the adapter belongs to this layer",
            )
        if not 0 < a.A.shape[0] <= MAX_RANK:
            fail(ShapeError, f"r = {a.A.shape[0]}", f"a rank from 1 to {MAX_RANK}", "leave an empty adapter out")
        if a.A.dtype != a.B.dtype or a.A.dtype not in FLOATS:
            fail(DtypeError, f"A {a.A.dtype}, B {a.B.dtype}", "one float dtype for both", "cast the adapter")
        if a.bias is not None and a.bias.shape != (N,):
            fail(ShapeError, f"adapter bias {tuple(a.bias.shape)}", f"({N},)", "pass lora_B's own bias")
        if isinstance(a.scaling, Tensor) and a.scaling.dim():
            fail(
                ShapeError,
                f"scaling {tuple(a.scaling.shape)}",
                "a float or a 0-d tensor",
                "pass one scaling per adapter",
            )
        tensors += [("A", a.A), ("B", a.B)] if a.bias is None else [("A", a.A), ("B", a.B), ("adapter bias", a.bias)]
    for label, tensor in tensors:
        if tensor.dtype not in FLOATS:
            fail(DtypeError, f"{label} of {tensor.dtype}", "float64, float32, bfloat16 or float16", f"convert {label}")
        if tensor.device != x.device:
            fail(
                DeviceError,
                f"x on {x.device}, {label} on {tensor.device}",
                "one device",
                f"move {label} with .to(x.device)",
            )
    if W.dtype != dtype and (W.dtype != torch.float32 or dtype == torch.float64):
        fail(
            DtypeError,
            f"x {x.dtype}, W {W.dtype}",
            f"W of {dtype}, in which this runs, or float32",
            "cast x, or run under torch.autocast",
        )


def check_embedding(ids, W, adapters, padding_idx, scale):
    """What lora_embedding takes."""
    check_kinds(ids, W, None, adapters)
    if ids.dtype not in (torch.int32, torch.int64):
        fail(DtypeError, f"ids of {ids.dtype}", "int32 or int64", "pass token numbers")
    if W.dtype not in FLOATS:
        fail(DtypeError, f"W of {W.dtype}", "float64, float32, bfloat16 or float16", "convert W")
    if W.dim() != 2:
        fail(ShapeError, f"W {tuple(W.shape)}", "a 2-d W (V, D)", "pass the embedding's weight")
    V, D = W.shape
    for a in adapters:
        if a.A.dim() != 2 or a.B.dim() != 2 or a.A.shape[1] != V or a.B.shape != (D, a.A.shape[0]):
            given, need = f"A {tuple(a.A.shape)}, B {tuple(a.B.shape)}", f"A (r, {V}) and B ({D}, r)"
            fail(ShapeError, given, need, "check that the adapter belongs to this embedding")
        if not 0 < a.A.shape[0] <= MAX_RANK:
            fail(ShapeError, f"r = {a.A.shape[0]}", f"a rank from 1 to {MAX_RANK}", "leave an empty adapter out")
        if a.A.dtype != a.B.dtype or a.A.dtype not in FLOATS:
            fail(DtypeError, f"A {a.A.dtype}, B {a.B.dtype}", "one float dtype for both", "cast the adapter")
        if a.p or a.bias is not None:
            given = "an adapter with dropout or a bias"
            fail(SettingsError, given, "p=0 and no bias, as PEFT's lora.Embedding", "leave them out")
        if isinstance(a.scaling, Tensor) and a.scaling.dim():
            given = f"scaling {tuple(a.scaling.shape)}"
            fail(ShapeError, given, "a float or a 0-d tensor", "pass one scaling per adapter")
    for label, tensor in [("W", W), *(("A", a.A) for a in adapters), *(("B", a.B) for a in adapters)]:
        if tensor.device != ids.device:
            given = f"ids on {ids.device}, {label} on {tensor.device}"
            fail(DeviceError, given, "one device", f"move {label} with .to(ids.device)")
    if padding_idx is not None and not -V <= padding_idx < V:
        fail(ShapeError, f"padding_idx={padding_idx}", f"a token from {-V} to {V - 1}", "pass the embedding's own")
    if scale is not None and not isinstance(scale, NUMBERS) and not (isinstance(scale, Tensor) and scale.numel() == 1):
        fail(SettingsError, f"scale={scale!r}", "a number or a tensor of one element", "pass the base's embed_scale")
