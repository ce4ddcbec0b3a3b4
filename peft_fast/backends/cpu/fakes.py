"""Shapes and dtypes of the compiled operators, for torch.compile, export and meta tensors."""

from __future__ import annotations

import functools

import torch


@functools.cache
def register() -> None:
    """Registers the fake kernels; needs the operators to be loaded."""
    torch.library.register_fake("peft_fast::lora_linear", _lora_linear)
    torch.library.register_fake("peft_fast::lora_linear_backward", _lora_linear_backward)
    torch.library.register_fake("peft_fast::lora_group", _lora_group)
    torch.library.register_fake("peft_fast::lora_group_backward", _lora_group_backward)
    torch.library.register_fake("peft_fast::lora_mlp_activate", _lora_mlp_activate)
    torch.library.register_fake("peft_fast::lora_mlp_activate_backward", _lora_mlp_activate_backward)
    torch.library.register_fake("peft_fast::lora_mlp_down_backward", _lora_mlp_down_backward)
    torch.library.register_fake("peft_fast::lora_embedding", _lora_embedding)
    torch.library.register_fake("peft_fast::lora_embedding_backward", _lora_embedding_backward)
    torch.library.register_fake("peft_fast::lora_decode", _lora_decode)
    torch.library.register_fake("peft_fast::dora_decode", _dora_decode)
    torch.library.register_fake("peft_fast::lora_mixed", _lora_mixed)
    torch.library.register_fake("peft_fast::lora_experts", _lora_experts)
    torch.library.register_fake("peft_fast::lora_experts_infer", _lora_experts_infer)
    torch.library.register_fake("peft_fast::lora_experts_backward", _lora_experts_backward)
    torch.library.register_fake("peft_fast::dora_norm", _dora_norm)
    torch.library.register_fake("peft_fast::dora_linear", _dora_linear)
    torch.library.register_fake("peft_fast::dora_linear_backward", _dora_linear_backward)
    torch.library.register_fake("peft_fast::nf4", _nf4)
    torch.library.register_fake("peft_fast::nf4_scales", _nf4_scales)
    torch.library.register_fake("peft_fast::lora_quantized", _lora_quantized)
    torch.library.register_fake("peft_fast::lora_quantized_backward", _lora_quantized_backward)
    torch.library.register_fake("peft_fast::dropout_mask", _dropout_mask)


def _lora_linear(x, W, bias, A, B, seed, ranks, scalings, ps, transposed, packed=None):
    (y,), H = _lora_group(x, [W], [bias], A, [B], seed, [len(ranks)], ranks, scalings, ps, [transposed], [packed])
    return y, H


def _lora_linear_backward(g, x, W, A, B, H, seed, ranks, scalings, ps, transposed, needs, wide_dx, packed=None):
    needs = needs[0], [needs[2]], needs[3], [needs[4]]
    lists = [len(ranks)], ranks, scalings, ps, [transposed], *needs, wide_dx, [packed]
    dx, dA, (dB,), (dbias,) = _lora_group_backward([g], x, [W], A, [B], H, seed, *lists)
    return dx, dA, dB, dbias


def _lora_group(x, Ws, biases, A, Bs, seed, counts, ranks, scalings, ps, transposed, packed):
    ys = [x.new_empty(*x.shape[:-1], W.shape[1 if t else 0]) for W, t in zip(Ws, transposed, strict=True)]
    M = 1
    for size in x.shape[:-1]:
        M = M * size
    return ys, x.new_empty(M, A.shape[0], dtype=torch.float32)


def _lora_group_backward(
    gs, x, Ws, A, Bs, H, seed, counts, ranks, scalings, ps, transposed,
    needs_x, needs_bias, needs_A, needs_B, wide_dx, packed,
):  # fmt: skip
    dx = x.new_empty(x.shape if needs_x else (0,), dtype=torch.float32 if wide_dx else x.dtype)
    dA = A.new_empty(A.shape if needs_A and A.shape[0] else (0,))
    dBs = [B.new_empty(B.shape if need and B.shape[1] else (0,)) for B, need in zip(Bs, needs_B, strict=True)]
    dbiases = [
        x.new_empty((g.shape[-1] if need else 0,), dtype=torch.float32) for g, need in zip(gs, needs_bias, strict=True)
    ]
    return dx, dA, dBs, dbiases


def _lora_mlp_activate(gate, up, seed, activation, halves, p):
    return up.new_empty(up.shape[0], up.shape[1] // 2 if halves else up.shape[1])


def _lora_mlp_activate_backward(dh, gate, up, seed, activation, halves, p):
    return up.new_empty(up.shape[0] if gate is not None else 0, dh.shape[1]), up.new_empty(up.shape)


def _lora_mlp_down_backward(
    g, W, A, B, H, seed, ranks, scalings, ps, transposed, needs, packed, gate, up, h_seed, activation, halves, p
):
    dgate = up.new_empty(up.shape[0] if gate is not None else 0, W.shape[0 if transposed else 1])
    dA = A.new_empty(A.shape if needs[1] and ranks else (0,))
    dB = B.new_empty(B.shape if needs[2] and ranks else (0,))
    return dgate, up.new_empty(up.shape), dA, dB, up.new_empty((g.shape[-1] if needs[0] else 0,), dtype=torch.float32)


def _lora_embedding(ids, W, A, B, scale, scaling):
    M = ids.shape[0]
    return W.new_empty(M, W.shape[1]), W.new_empty(M, A.shape[0], dtype=torch.float32)


def _lora_embedding_backward(g, ids, A, B, H, scale, scaling, padding, needs):
    r, V = A.shape
    return A.new_empty(r if needs[0] else 0, V), B.new_empty(B.shape[0] if needs[1] else 0, r)


def _lora_decode(x, W, bias, As, Bs, low_biases, scalings, transposed, order=(), counts=()):
    return x.new_empty(*x.shape[:-1], W.shape[1 if transposed else 0])


def _dora_decode(x, W, bias, A, B, scaling, m, norm, probe, transposed):
    N = W.shape[1 if transposed else 0]
    return x.new_empty(*x.shape[:-1], N), norm.new_empty(N if probe is not None else 0)


def _nf4(data, scales, code, block, N, K, bf16):
    return scales.new_empty(N, K, dtype=torch.bfloat16 if bf16 else torch.float32)


def _nf4_scales(absmax, code, outer, offset, block):
    return outer.new_empty(absmax.numel())


def _lora_quantized(x, W, codes, scales, meaning, zeros, block, bias, A, B, seed, ranks, scalings, ps):
    return _lora_linear(x, W, bias, A, B, seed, ranks, scalings, ps, False)


def _lora_quantized_backward(
    g, x, W, codes, scales, meaning, zeros, block, A, B, H, seed, ranks, scalings, ps, needs, wide_dx
):  # fmt: skip
    needs = needs[0], False, *needs[1:]
    return _lora_linear_backward(g, x, W, A, B, H, seed, ranks, scalings, ps, False, needs, wide_dx)


def _dora_norm(W, A, B, scaling, transposed):
    return W.new_empty(B.shape[0], dtype=torch.float32)


def _dora_linear(x, W, bias, A, B, c, seed, scaling, p, transposed, keep, packed=None):
    M, N = _rows(x), W.shape[1 if transposed else 0]
    half = x.dtype == torch.bfloat16 and torch.ops.peft_fast.isa() in ("avx512_bf16", "amx")
    z = x.new_empty(M if keep else 0, N, dtype=x.dtype if half else torch.float32)
    return x.new_empty(*x.shape[:-1], N), x.new_empty(M, A.shape[0], dtype=torch.float32), z


def _dora_linear_backward(g, x, W, A, B, c, H, Z, seed, scaling, p, transposed, needs, wide_dx, packed=None):
    N = B.shape[0]
    dx = x.new_empty(x.shape if needs[0] else (0,), dtype=torch.float32 if wide_dx else x.dtype)
    dA, dB = A.new_empty(A.shape[0] if needs[2] else 0, A.shape[1]), B.new_empty(N if needs[3] else 0, B.shape[1])
    dbias, dm = (x.new_empty(N if need else 0, dtype=torch.float32) for need in (needs[1], needs[4]))
    return dx, dA, dB, dbias, dm


def _lora_experts(x, W, bias, A, B, order, counts, k, ranks, scalings, transposed):
    S = order.shape[0]
    return x.new_empty(S, B.shape[1]), x.new_empty(S, A.shape[1], dtype=torch.float32)


def _lora_experts_infer(x, W, bias, As, Bs, order, counts, k, scalings, transposed, few):
    return x.new_empty(order.shape[0], W.shape[2 if transposed else 1])


def _lora_experts_backward(g, x, W, A, B, H, order, counts, k, ranks, scalings, transposed, needs):
    dx = x.new_empty((order.shape[0], x.shape[1]) if needs[0] else (0,))
    dA, dB = (t.new_empty(t.shape if need else (0,)) for t, need in zip((A, B), needs[1:3], strict=True))
    return dx, dA, dB, x.new_empty((W.shape[0], g.shape[1]) if needs[3] else (0,), dtype=torch.float32)


def _rows(x):
    M = 1
    for size in x.shape[:-1]:
        M = M * size
    return M


def _dropout_mask(seed, M, K, p):
    return seed.new_empty(M, K, dtype=torch.bool)


def _lora_mixed(y, x, As, Bs, biases, order, counts, scalings):
    return None  # it writes into y
