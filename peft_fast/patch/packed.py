"""What a quantized base layer is to lora_quantized: a weight that its library would make dense for the same product.

Who has none here (another activation path, a state that is not understood) is called as it is, adapters are added.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from peft_fast import settings
from peft_fast.ops.lora_quantized import product
from peft_fast.ops.nf4 import Codes, Nested, Packed
from peft_fast.patch import plan, unpacking

# tokens from which on our product in bfloat16 takes less time than bitsandbytes' with a weight packed for inference
PACKED = 32


class Rows(NamedTuple):
    """int8 with a scale a row."""

    values: Tensor  # (N, K) int8
    scale: Tensor  # (N, 1) or (1, 1) float32

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return self.values.shape

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W (N, K): an int8 is exact in every float, so this rounds once."""
        return self.values.to(dtype).mul_(self.scale)

    def codes(self, dtype: torch.dtype) -> Codes | None:
        """The same for the compiled kernels, where the values lie together."""
        if not self.values.is_contiguous() or not self.values.numel():
            return None
        scales = self.scale.reshape(-1).contiguous()
        return Codes(self.values, scales, None, None, self.values.numel() // scales.numel())


class Groups(NamedTuple):
    """int8 with a scale and a zero for as many neighbours of a row, which its library makes dense."""

    values: Tensor  # (N, K) int8
    scale: Tensor  # (N, K/group)
    zero: Tensor  # the same, int8
    rounds: torch.dtype  # what the library rounds to
    make: Callable[[], Tensor]

    @property
    def shape(self) -> torch.Size:
        """(N, K)."""
        return self.values.shape

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W (N, K) in ``dtype``, computed in the library's."""
        return self.make().to(dtype)

    def codes(self, dtype: torch.dtype) -> Codes | None:
        """The same for the compiled kernels, where both round alike."""
        if self.rounds not in (dtype, torch.float32):
            return None
        group = self.values.numel() // self.scale.numel()
        scales, zeros = self.scale.reshape(-1).float(), self.zero.reshape(-1)
        return Codes(self.values, scales.contiguous(), None, zeros.contiguous(), group)


class Planes(NamedTuple):
    """HQQ's: unsigned, in 1, 2, 4 or 8 bits, with a scale and a zero of any size for as many neighbours of a row."""

    values: Tensor  # uint8, (groups·bits/8, group)
    scale: Tensor  # (groups, 1)
    zero: Tensor  # the same
    shape: tuple[int, int]
    rounds: torch.dtype  # what the library computes in
    make: Callable[[], Tensor]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W (N, K) in ``dtype``, computed in the library's."""
        return self.make().to(dtype)

    def codes(self, dtype: torch.dtype) -> Codes | None:
        """The same for the compiled kernels, which round after the same steps where the dtype is the library's."""
        if self.rounds is not dtype:
            return None
        scales, zeros = self.scale.reshape(-1).float(), self.zero.reshape(-1).float()
        return Codes(self.values.reshape(-1), scales, None, zeros, self.values.shape[1])


class Called(NamedTuple):
    """A weight that its library makes dense."""

    shape: tuple[int, int]
    make: Callable[[], Tensor]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """W (N, K) in ``dtype``, computed in the library's."""
        return self.make().to(dtype)


class Base(NamedTuple):
    """A base layer: how to multiply by it, if that is known, else only what it is."""

    kind: str
    W: Any = None  # lora_quantized's weight; None: call the layer
    bias: Tensor | None = None
    computes: torch.dtype | None = None  # what it multiplies in outside autocast; None: in x's dtype
    widens: bool = False  # its result has x's dtype even under autocast
    key: tuple = ()  # what its library decides by


def base_of(base: nn.Module) -> Base:
    """The base layer of a LoRA layer that PEFT makes for a quantized one."""
    for library, read in _READERS.items():
        if sys.modules.get(library) is not None and (found := read(base)) is not None:
            return found if found.W is None or not plan.hooked(base) else Base(found.kind)
    return Base(type(base).__name__)


def bitsandbytes_makes(base: nn.Module) -> bool:
    """Is it one of bitsandbytes' layers?"""
    return type(base) is not nn.Linear and isinstance(base, _kinds())


def _kinds():
    """bitsandbytes' classes; () where it is not imported, or something else has its name."""
    layers = getattr(sys.modules.get("bitsandbytes"), "nn", None)
    found = [getattr(layers, name, None) for name in ("Linear4bit", "Linear8bitLt")]
    return tuple(found) if all(isinstance(kind, type) for kind in found) else ()


def _bitsandbytes(base):
    if not bitsandbytes_makes(base):
        return None
    nn4, nn8 = _kinds()
    return _four_bits(base, nn4) if isinstance(base, nn4) else _eight_bits(base, nn8)


def _four_bits(base, kind):
    W, bias = base.weight, base.bias
    state = getattr(W, "quant_state", None)
    name = f"bitsandbytes {getattr(W, 'quant_type', '4-bit')}"
    # before its first call the layer has not chosen what it computes in; packed for inference it is bitsandbytes' own
    if not base.compute_type_is_set or state is None or unpacking.packed(base) or unpacking.kept(state):
        return Base(name)
    if type(base).forward is not kind.forward or len(state.shape) != 2:
        return Base(name)
    nested = None
    if state.nested:
        inner = state.state2
        nested = Nested(inner.code, inner.absmax, state.offset, inner.blocksize)
        name += ", double quant"
    data = W.detach().as_subclass(Tensor)
    packed = Packed(data, state.absmax, state.code, state.blocksize, tuple(state.shape), nested)
    scales = state.absmax if nested is None else nested.absmax
    if W.quant_state is not state:  # another thread packs it
        return Base(name)
    if scales.dtype is not torch.float32 or state.code.dtype is not torch.float32 or not data.is_contiguous():
        return Base(name)
    # bitsandbytes casts a bias of another dtype at its next call
    if bias is not None and base.compute_dtype is not None and bias.dtype is not base.compute_dtype:
        return Base(name)
    return Base(name, packed, bias, base.compute_dtype, True, (state.quant_type, state.blocksize, state.nested))


def _eight_bits(base, kind):
    state, name = base.state, "bitsandbytes int8"
    # on the CPU it trains with the dense weight; elsewhere, and in evaluation, x is quantized too
    known = type(base).forward is kind.forward and base.training and base.weight.device.type == "cpu"
    if not known or state.has_fp16_weights or base.weight.CB is not None or state.CB is None or state.SCB is None:
        return Base(name)
    return Base(name, Rows(state.CB, state.SCB.view(-1, 1) * (1 / 127)), base.bias, key=(state.threshold > 0,))


def settle(base: nn.Module, x: Tensor) -> bool:
    """Has bitsandbytes' layer do now what it does to itself at its first call with such an x; did it?

    Else its second call would go another way than its first, and that may be a checkpoint's recomputation.
    """
    kind = next((k for k in _kinds() if isinstance(base, k)), None)
    if kind is None or type(base).forward is not kind.forward or plan.hooked(base):
        return False
    changed, dtype, bnb = False, x.dtype, sys.modules["bitsandbytes"]
    if kind is bnb.nn.Linear4bit:
        W = base.weight
        if isinstance(W, bnb.nn.Params4bit) and W.quant_state is None and base.quant_state is not None:
            W.quant_state, changed = base.quant_state, True
        if not base.compute_type_is_set:
            base.set_compute_type(x)
            base.compute_type_is_set = changed = True
        dtype = base.compute_dtype or dtype
    elif base.weight.CB is not None:
        base.init_8bit_state()
        changed = True
    if base.bias is not None and base.bias.dtype is not dtype:
        with torch.inference_mode(False):
            base.bias.data = base.bias.data.to(dtype)
        changed = True
    return _usable(base.bias) or changed


def _usable(bias: Tensor | None) -> bool:
    """Has a bias that bitsandbytes cast under inference_mode() saved for a backward again; was it one?"""
    if bias is None or not bias.is_inference() or torch.is_inference_mode_enabled():
        return False
    bias.data = bias.data.clone()
    return True


# classes that were found to be
_plain: set[type] = {nn.Linear}


def plain(base: nn.Module) -> bool:
    """Is it one of the libraries' own classes, whose result nobody else has?"""
    kind = type(base)
    if kind not in _plain and (kind in _kinds() or kind is getattr(sys.modules.get(HQQ), "HQQLinear", None)):
        _plain.add(kind)
    return kind in _plain


def calls(base: nn.Module, tokens: int, dtype: torch.dtype) -> bool:
    """Is the library's own call the fastest for few tokens in evaluation on the CPU? As measured on 1024 x 2816."""
    W = base._parameters.get("weight")
    kind = type(W).__name__
    if kind != "Params4bit":  # what is made dense first loses everywhere
        return kind in ("Int8Params", "Int8Tensor")
    if unpacking.packed(base):
        return True
    packs = getattr(base, "support_avx512bf16_for_cpu", False)
    return packs and (tokens < PACKED or dtype is not torch.bfloat16)


def _torchao(base):
    W = base._parameters.get("weight") if type(base) is nn.Linear else None
    kind = type(W)
    if W is None or not kind.__module__.startswith("torchao."):
        return None
    name = f"torchao {kind.__name__}"
    if W.requires_grad or W.dim() != 2:
        return Base(name)
    N, K = W.shape
    if kind.__name__ == "IntxUnpackedToInt8Tensor" and W.activation_quantization is None:
        rows, group = W.block_size
        zero = W.zero_point
        grouped = rows == 1 and W.scale.numel() * group == N * K and W.scale.shape == zero.shape
        known = zero.dtype is torch.int8 and W.scale.dtype in (W.dtype, torch.float32)
        if grouped and known and W.qdata.is_contiguous():
            packed = Groups(W.qdata, W.scale, zero, W.dtype, W.dequantize)
        else:
            packed = Called((N, K), W.dequantize)
        return Base(name, packed, base.bias, None, True, (W.target_dtype, W.dtype, group))
    if kind.__name__ != "Int8Tensor" or W.act_quant_kwargs is not None or W.act_pre_scale is not None:
        return Base(name)
    rows = W.block_size[-1] == K and W.scale.numel() in (1, N) and W.scale.dtype is torch.float32
    packed = Rows(W.qdata, W.scale.view(-1, 1)) if rows else Called((N, K), W.dequantize)
    return Base(name, packed, base.bias, None, True, (rows, W.scale.numel() == 1, W.dtype))


def _hqq(base):
    kind = getattr(sys.modules["hqq.core.quantize"], "HQQLinear", None)
    if kind is None or not isinstance(base, kind):
        return None
    name = "HQQ"
    if not base.ready or type(base) is not kind or kind.forward is not kind.forward_pytorch_backprop:
        return Base(name)
    name += f" {base.meta['nbits']}-bit"
    packed = _planes(base) or Called(tuple(base.meta["shape"]), base.dequantize)
    key = tuple(base.meta.get(name) for name in ("nbits", "axis", "group_size", "compute_dtype"))
    return Base(name, packed, base.bias, base.compute_dtype, False, key)


# HQQ's packings of which a byte holds whole values
_PLANES = {"8bit_u8": 8, "4bit_u8": 4, "2bit_u8": 2, "1bit_u8": 1}


def _planes(base):
    """The weight of HQQ's layer as it is packed; None where only HQQ can read it."""
    meta, values = base.meta, base.W_q
    bits, scale, zero = _PLANES.get(meta.get("packing")), meta.get("scale"), meta.get("zero")
    if bits is None or scale is None or zero is None or meta.get("quant_scale") or meta.get("quant_zero"):
        return None
    (N, K), dtype = meta["shape"], meta.get("compute_dtype")
    groups, group = scale.numel(), N * K // max(scale.numel(), 1)
    # along the other axis the scale's shape is (1, groups)
    fits = scale.shape == zero.shape == (groups, 1) and scale.dtype is zero.dtype is dtype and groups * group == N * K
    whole = values.is_contiguous() and values.nbytes * 8 == N * K * bits and values.nbytes % max(group, 1) == 0
    if not fits or not whole or not N * K or scale.device != values.device or zero.device != values.device:
        return None
    return Planes(values.detach().view(torch.uint8).view(-1, group), scale, zero, (N, K), dtype, base.dequantize)


HQQ = "hqq.core.quantize"
_READERS = {"bitsandbytes": _bitsandbytes, HQQ: _hqq, "torchao": _torchao}

# what was tried once: layers of one key multiply alike
_trusted: dict[tuple, bool] = {}
# the keys that this thread is trying
_trying = threading.local()


def trusted(base: nn.Module, found: Base, dtype: torch.dtype) -> bool:
    """Does the library's layer give, and differentiate, the product that runs? Tried on two rows, once a kind.

    Once a shape, too: on the CPU bitsandbytes reads blocks that reach over the end of a row differently.
    """
    key = type(base), type(found.W), found.kind, found.key, tuple(found.W.shape), found.bias is None, dtype
    key = *key, base.training, device_of(base), settings.get().backend
    if (known := _trusted.get(key)) is not None:
        return known
    inside = _trying.__dict__.setdefault("keys", set())
    if key in inside:  # asked by what the trial calls
        return False
    # another thread tries for itself: to wait for this one could be to wait for each other, where one thread runs the
    # backward of both
    inside.add(key)
    try:
        agrees = _agrees(base, found, dtype)
    finally:
        inside.discard(key)
    # the first answer stays, whatever it is: a checkpoint's recomputation goes the way of its forward
    return _trusted.setdefault(key, agrees)


def device_of(base: nn.Module) -> torch.device | None:
    """Where a base layer's weight is."""
    weight = base.W_q if hasattr(base, "W_q") else getattr(base, "weight", None)
    return None if weight is None else weight.device


def _agrees(base, found, dtype):
    device = device_of(base)
    # in a checkpointed forward nothing of the trial is to be kept, nor computed again
    hooks = torch.autograd.graph.saved_tensors_hooks(_same, _same)
    try:
        with (
            hooks,
            _disable_current_modes(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            N, K = found.W.shape
            # no random numbers: the user's generators are not ours to move
            x = torch.linspace(-1, 1, 2 * K, device=device).sin().view(2, K).to(dtype).requires_grad_()
            y = base(x)
            g = torch.linspace(1, -1, 2 * N, device=device).cos().view(2, N).to(y.dtype)
            (dx,) = torch.autograd.grad(y, x, g)
            # what runs: the kernels may read the weight as it is kept
            ours = product(x, found.W, found.bias)
            if not _close(y, ours, dtype) or not _close(dx, *torch.autograd.grad(ours, x, g.to(ours.dtype)), dtype):
                return False
            # and in double backward, or where a backend has no such kernels, it is made dense
            W, bias = found.W.dense(dtype).float(), None if found.bias is None else found.bias.float()
            return _close(y, F.linear(x.float(), W, bias), dtype) and _close(dx, g.float() @ W, dtype)
    except Exception:  # whatever a library raises, or no memory is left: nobody asked for this call
        return False


def _same(t):
    return t


def _close(a, b, dtype):
    a, b = a.detach().float(), b.detach().float()
    error = (a - b).square().mean().sqrt()
    return bool(error <= 16 * torch.finfo(dtype).eps * b.square().mean().sqrt() + 1e-30)
