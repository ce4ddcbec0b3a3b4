"""h = drop(act(z)·u), dz = drop(dh)·u·act′(z) and du = drop(dh)·act(z): float32 inside, one rounding each.

z and u are rows of any distance: two tensors, or the halves of one. Without u, h = drop(act(z)).
"""

from __future__ import annotations

import triton
import triton.language as tl

from peft_fast.kernels.device import cdiv, keep_tile, kept_scale, on
from peft_fast.kernels.launch import launch
from peft_fast.kernels.tiles import Tile

# every element once: a few vectors a thread, in whole groups of the mask
TILE = Tile(16, 0, 128, num_warps=4, num_stages=1)


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """z float32 -> act(z), act′(z); NaN stays NaN."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(z)
        y = z * s
        slope = s + y * (1 - s)
    elif ACTIVATION == "gelu":
        s = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        y = z * s
        slope = s + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(t)) / 2 is the sigmoid of 2·t, without the cancellation
        s = tl.sigmoid(z * (1.5957691216057308 + 0.07135481282553484 * z * z))
        y = z * s
        slope = s + y * (1 - s) * (1.5957691216057308 + 0.21406443847660452 * z * z)
    elif ACTIVATION == "quick_gelu":
        s = tl.sigmoid(1.702 * z)
        y = z * s
        slope = s + 1.702 * y * (1 - s)
    elif ACTIVATION == "relu":
        y = tl.where(z < 0, 0.0, z)
        slope = tl.where(z <= 0, 0.0, 1.0)
    else:
        tl.static_assert(ACTIVATION == "relu2", "an activation without a kernel")
        r = tl.where(z < 0, 0.0, z)
        y = r * r
        slope = 2 * r
    return y, slope


@triton.jit(do_not_specialize=["M"])
def _lora_mlp_activate_kernel(
    z_ptr,
    u_ptr,
    h_ptr,
    seed_ptr,
    scales,
    M,
    N,
    z_sm,
    u_sm,
    h_sm,
    ACTIVATION: tl.constexpr,
    PRODUCT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    blocks = tl.cdiv(N, BN)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(0) % blocks * BN
    cols = first + tl.arange(0, BN)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    z = tl.load(z_ptr + rows[:, None] * z_sm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    h, _ = activated(z, ACTIVATION)
    if PRODUCT:
        h *= tl.load(u_ptr + rows[:, None] * u_sm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if THRESHOLD > 0:
        keep = keep_tile(tl.load(seed_ptr), rows, first, THRESHOLD, BM, BN)
        h = tl.where(keep, h * scales[0], 0.0)
    tl.store(h_ptr + rows[:, None] * h_sm + cols[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _lora_mlp_activate_backward_kernel(
    dh_ptr,
    z_ptr,
    u_ptr,
    dz_ptr,
    du_ptr,
    seed_ptr,
    scales,
    M,
    N,
    dh_sm,
    z_sm,
    u_sm,
    dz_sm,
    du_sm,
    ACTIVATION: tl.constexpr,
    PRODUCT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    blocks = tl.cdiv(N, BN)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(0) % blocks * BN
    cols = first + tl.arange(0, BN)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    dh = tl.load(dh_ptr + rows[:, None] * dh_sm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if THRESHOLD > 0:
        keep = keep_tile(tl.load(seed_ptr), rows, first, THRESHOLD, BM, BN)
        dh = tl.where(keep, dh * scales[0], 0.0)
    z = tl.load(z_ptr + rows[:, None] * z_sm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    y, dz = activated(z, ACTIVATION)
    if PRODUCT:
        dz *= tl.load(u_ptr + rows[:, None] * u_sm + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        du = (dh * y).to(du_ptr.dtype.element_ty)
        tl.store(du_ptr + rows[:, None] * du_sm + cols[None, :], du, mask=mask)
    dz = (dh * dz).to(dz_ptr.dtype.element_ty)
    tl.store(dz_ptr + rows[:, None] * dz_sm + cols[None, :], dz, mask=mask)


def activate(z, u, seed, activation, p):
    """z (M, N), u (M, N) | None, unit column strides, seed (1,) | None -> h (M, N) = drop(act(z)·u)."""
    h = z.new_empty(z.shape)
    _launch(_lora_mlp_activate_kernel, (z, u, h), seed, activation, u is not None, p)
    return h


def activate_backward(dh, z, u, dz, du, seed, activation, p):
    """dh, z (M, N), u (M, N) | None -> dz (M, N) and, beside u, du (M, N), which are written to."""
    _launch(_lora_mlp_activate_backward_kernel, (dh, z, u, dz, du), seed, activation, u is not None, p)


def _launch(kernel, tensors, seed, activation, product, p):
    M, N = tensors[0].shape
    if not M or not N:
        return
    with on(tensors[0]):
        launch(
            kernel,
            (cdiv(M, TILE.BM) * cdiv(N, TILE.BK),),
            (*tensors, seed, (kept_scale(p),)),
            (M,),
            (N, *(0 if t is None else t.stride(0) for t in tensors)),
            (activation, product, round(p * 65536), TILE.BM, TILE.BK),
            TILE,
        )
