"""check(x, W, …): what an op takes, or an error that says what was given, what is needed and what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_fast.errors import DeviceError, DtypeError, SettingsError, ShapeError, fail
from peft_fast.ops.spec import Adapter

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


def check_adapter(
    a: Adapter, K: int, N: int, owner: str, like: tuple[str, Tensor], count: int = 1, bare: str = ""
) -> None:
    """A (r·count, K) and B (N, r·count) are an adapter of ``owner``, on the device of ``like`` = (name, tensor).

    ``bare`` is the class of PEFT's whose adapters have neither dropout nor a bias, if it is one.
    """
    A, B = a.A, a.B
    rows = A.shape[0] if A.dim() == 2 else 0
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != K or B.shape != (N, rows) or rows % count:
        r = "r" if count == 1 else f"r·{count}"
        given, need = f"A {tuple(A.shape)}, B {tuple(B.shape)}", f"A ({r}, {K}) and B ({N}, {r})"
        fail(ShapeError, given, need, f"check that the adapter belongs to this {owner}")
    if not 0 < rows // count <= MAX_RANK:
        fail(ShapeError, f"r = {rows // count}", f"a rank from 1 to {MAX_RANK}", "leave an empty adapter out")
    if A.dtype != B.dtype or A.dtype not in FLOATS:
        fail(DtypeError, f"A {A.dtype}, B {B.dtype}", "one float dtype for both", "cast the adapter")
    if bare and (a.p or a.bias is not None):
        fail(SettingsError, "an adapter with dropout or a bias", f"p=0 and no bias, as PEFT's {bare}", "leave them out")
    if a.bias is not None and a.bias.shape != (N,):
        fail(ShapeError, f"adapter bias {tuple(a.bias.shape)}", f"({N},)", "pass lora_B's own bias")
    if isinstance(a.scaling, Tensor) and a.scaling.dim():
        given = f"scaling {tuple(a.scaling.shape)}"
        fail(ShapeError, given, "a float or a 0-d tensor", "pass one scaling per adapter")
    for label, t in (("A", A), ("B", B), ("adapter bias", a.bias)):
        if t is not None:
            check_float(label, t)
            check_device(label, t, *like)


def check_float(label: str, t: Tensor) -> None:
    """A dtype that is computed with."""
    if t.dtype not in FLOATS:
        fail(DtypeError, f"{label} of {t.dtype}", "float64, float32, bfloat16 or float16", f"convert {label}")


def check_device(label: str, t: Tensor, name: str, like: Tensor) -> None:
    """On the device of another tensor."""
    if t.device != like.device:
        given = f"{name} on {like.device}, {label} on {t.device}"
        fail(DeviceError, given, "one device", f"move {label} with .to({name}.device)")


def check(x, dtype, W, bias, adapters, transposed):
    """Shapes, dtypes and devices fit; ``dtype`` is the one computed in: x's, or autocast's."""
    check_float("x", x)
    if x.dim() == 0 or W.dim() != 2:
        given = f"x {tuple(x.shape)}, W {tuple(W.shape)}"
        fail(ShapeError, given, "x (..., K) and a 2-d W", "see lora_linear's docstring")
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
    for label, t in (("W", W), ("bias", bias)):
        if t is not None:
            check_float(label, t)
            check_device(label, t, "x", x)
    for a in adapters:
        check_adapter(a, K, N, "layer", ("x", x))
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
    check_float("W", W)
    if W.dim() != 2:
        fail(ShapeError, f"W {tuple(W.shape)}", "a 2-d W (V, D)", "pass the embedding's weight")
    check_device("W", W, "ids", ids)
    V, D = W.shape
    for a in adapters:
        check_adapter(a, V, D, "embedding", ("ids", ids), bare="lora.Embedding")
    if padding_idx is not None and not -V <= padding_idx < V:
        fail(ShapeError, f"padding_idx={padding_idx}", f"a token from {-V} to {V - 1}", "pass the embedding's own")
    if scale is not None and not isinstance(scale, NUMBERS) and not (isinstance(scale, Tensor) and scale.numel() == 1):
        fail(SettingsError, f"scale={scale!r}", "a number or a tensor of one element", "pass the base's embed_scale")
