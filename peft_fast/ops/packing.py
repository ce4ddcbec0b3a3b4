"""Frozen weights in the order the CPU tiles read them, kept between calls where PEFT_FAST_PACK_MB has room for them.

None are by default: reading a weight for its digest costs most of what packing it does, and the copies (one for the
forward, one for dx) are twice its memory. Measured with AMX, 128 to 2048 tokens: 0 to 4 % of a layer's time.

A copy is used only while its weight is the same object, at the same address, of the same version *and* of the same
digest: ``weight.data`` may be written without any version counting, which is how PEFT merges.
"""

from __future__ import annotations

import threading
import weakref

import torch

from peft_fast import native, settings

# tokens past which packing anew is lost in the noise of the GEMM
MAX_TOKENS = 4096

_lock = threading.Lock()
_entries: dict[tuple, tuple] = {}
_bytes = 0


def budget() -> int:
    """Bytes that packed copies may take, all layers together."""
    return settings.get().pack_mb << 20


def used() -> int:
    """Bytes that packed copies take now."""
    return _bytes


def clear() -> None:
    """Drops every packed copy."""
    with _lock:
        while _entries:
            _drop(next(iter(_entries)))


def packed(W: torch.Tensor, x: torch.Tensor, transposed: bool, for_dx: bool) -> torch.Tensor | None:
    """W (N, K) or (K, N) -> its packed copy for forward or dx, or None where there is none to have."""
    if torch.compiler.is_compiling() or not (limit := budget()):
        return None
    if W.requires_grad or not W.is_contiguous() or x.shape[:-1].numel() > MAX_TOKENS or W.is_inference():
        return None
    half = x.dtype == torch.bfloat16
    key = (id(W), transposed, for_dx, half)
    # a full cache takes no newcomer: layers run in a cycle, where evicting the oldest evicts the next one needed
    if key not in _entries and W.numel() * _element(half) > limit - _bytes:
        return None
    state = (W.data_ptr(), W._version, W.shape, W.dtype, native.isa(), torch.ops.peft_fast.weight_digest(W))
    with _lock:
        entry = _entries.get(key)
        if entry is not None and entry[1] == state:
            return entry[2]
    copy = torch.ops.peft_fast.pack_weight(W, transposed, for_dx, half)
    _keep(key, W, state, copy, limit)
    return copy


def _element(half):
    # engines without bfloat16 products widen while they pack
    return 2 if half and native.isa() in ("avx512_bf16", "amx") else 4


def _keep(key, W, state, copy, limit):
    global _bytes
    with _lock:
        for stale in [k for k, (weight, *_) in _entries.items() if weight() is None or k == key]:
            _drop(stale)
        if _bytes + copy.nbytes > limit:
            return
        _entries[key] = (weakref.ref(W, lambda _, key=key: _forget(key)), state, copy)
        _bytes += copy.nbytes


def _drop(key):
    global _bytes
    entry = _entries.pop(key, None)
    if entry is not None:
        _bytes -= entry[2].nbytes


def _forget(key):
    # called by the garbage collector, possibly while this thread holds the lock
    if _lock.acquire(blocking=False):
        try:
            _drop(key)
        finally:
            _lock.release()
