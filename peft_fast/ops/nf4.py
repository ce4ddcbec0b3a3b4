"""dequantize(W) -> a dense weight: W[i] = code[nibble i]·absmax[i // blocksize], NF4 and FP4 of bitsandbytes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peft_fast import dispatch
from peft_fast.backends import modules
from peft_fast.errors import DtypeError, ShapeError, fail
from peft_fast.ops.checks import FLOATS
from peft_fast.reference import nf4 as reference

backends = modules("nf4")


class Nested(NamedTuple):
    """Scales that are quantized themselves: absmax[j] = code[byte j]·absmax[j // blocksize] + offset."""

    code: Tensor  # (256,) float32
    absmax: Tensor  # (⌈blocks/blocksize⌉,) float32
    offset: Tensor  # () float32
    blocksize: int


class Codes(NamedTuple):
    """A weight as kernels read it that never make it dense: n values row by row, each times its block's scale.

    Planes: a byte holds 8/bits of them that lie n·bits/8 apart, the earliest in its high bits; the difference to the
    zero is rounded to the dtype asked for, then the product with the scale.
    """

    data: Tensor  # contiguous: n int8; (⌈n/2⌉,) uint8 of two each, the earlier in the high nibble; or uint8 planes
    scales: Tensor  # (⌈n/block⌉,) float32
    meaning: Tensor | None  # (16,) float32, what each nibble means; None for int8
    zeros: Tensor | None  # (⌈n/block⌉,) what is taken off: int8 of each int8, or float32 of planes; None for nothing
    block: int


class Packed(NamedTuple):
    """A weight of 16 values a scale: n = N·K of them row by row, two a byte, the earlier in the high nibble."""

    data: Tensor  # (⌈n/2⌉,) or any shape of as many bytes, contiguous
    absmax: Tensor  # (⌈n/blocksize⌉,) float32, or uint8 where nested
    code: Tensor  # (16,) float32, what each nibble means
    blocksize: int
    shape: tuple[int, int]
    nested: Nested | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W (N, K) in ``dtype``, computed in float32 and rounded once."""
        return dequantize(self, dtype)

    def codes(self, dtype: torch.dtype) -> Codes:
        """The same for the compiled kernels, its scales no longer nested."""
        _check(self, dtype)
        data = self.data.reshape(-1).view(torch.uint8)
        return Codes(data, backends["cpu"].scales(self), self.code.contiguous(), None, self.blocksize)


def dequantize(W: Packed, dtype: torch.dtype, *, backend: str | None = None) -> Tensor:
    """W -> (N, K) in ``dtype``: float32 products, rounded once.

    Raises ShapeError or DtypeError (both PeftFastError). Not differentiable: such a weight is frozen.
    Source: Dettmers et al., "QLoRA" (arXiv 2305.14314), section 3, and bitsandbytes' QuantState for the layout.
    """
    _check(W, dtype)
    with torch.no_grad():
        wide = torch.promote_types(dtype, torch.float32)
        name, *_ = dispatch.pick(W.absmax, dtype, W.code, backend=backend, op="nf4")
        if name == "reference":
            return reference.dequantize(*_as(wide, W)).to(dtype)
        return backends[name].dequantize(W, dtype)


def _as(wide: torch.dtype, W: Packed) -> Packed:
    nested = W.nested
    if nested is not None:
        nested = nested._replace(
            code=nested.code.to(wide), absmax=nested.absmax.to(wide), offset=nested.offset.to(wide)
        )
    absmax = W.absmax if nested is not None else W.absmax.to(wide)
    return W._replace(data=W.data.reshape(-1).view(torch.uint8), absmax=absmax, code=W.code.to(wide), nested=nested)


def _check(W, dtype):
    n, size = W.shape[0] * W.shape[1], W.blocksize
    blocks = -(-n // size) if size > 0 else 0
    data, absmax, code, nested = W.data, W.absmax, W.code, W.nested
    if dtype not in FLOATS:
        fail(DtypeError, f"dtype={dtype}", "float64, float32, bfloat16 or float16", "ask for one of these")
    scales = nested.absmax if nested is not None else absmax
    if scales.dtype != torch.float32 or code.dtype != torch.float32:
        given = f"scales of {scales.dtype}, code of {code.dtype}"
        fail(DtypeError, given, "float32 for both", "pass the quantization state as bitsandbytes made it")
    if nested is not None and absmax.dtype != torch.uint8:
        need = "uint8, which the nested scales belong to"
        fail(DtypeError, f"absmax of {absmax.dtype}", need, "leave nested out for scales that are not quantized")
    if (
        not data.is_contiguous()
        or data.numel() * data.element_size() < -(-n // 2)
        or absmax.numel() != blocks
        or code.numel() != 16
    ):
        given = f"{data.nbytes} bytes, {absmax.numel()} scales and {code.numel()} values for W {tuple(W.shape)}"
        need = f"at least {-(-n // 2)} contiguous bytes, {blocks} scales of {size} each, 16 values"
        fail(ShapeError, given, need, "pass the packed weight with its own state, not repacked for inference")
    if nested is not None and (
        nested.code.numel() != 256
        or nested.offset.numel() != 1
        or nested.absmax.numel() != -(-blocks // nested.blocksize)
    ):
        given = f"{nested.code.numel()} values, {nested.absmax.numel()} scales, {nested.offset.numel()} offsets"
        need = f"256 values, a scale for {nested.blocksize} of {blocks}, one offset"
        fail(ShapeError, given, need, "pass state2 of the weight's own state")
