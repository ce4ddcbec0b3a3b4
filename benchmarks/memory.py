"""Bytes, not estimates: what autograd keeps for backward, and the peak of torch's allocator over a step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], object], kept: Iterable[Tensor]) -> int:
    """Bytes of distinct storages that `forward` saves for backward, those of `kept` left out.

    A storage is counted once and whole: a saved view keeps all of it alive.
    """
    known = {_storage(t) for t in kept}
    sizes: dict[int, int] = {}
    alive = []  # a freed storage's address could be handed out again and be taken for the old one

    def pack(t: Tensor) -> Tensor:
        if _storage(t) not in known:
            sizes[_storage(t)] = t.untyped_storage().nbytes()
            alive.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    del result
    return sum(sizes.values())


def peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Most bytes torch's allocator held during `step`, beyond what was alive before it.

    CUDA: max_memory_allocated. CPU: every allocation and release that torch's profiler records, summed in
    order: exact for tensors, those inside operators included; what libraries take past torch is unseen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # the profiler announces its own start on stderr otherwise
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as prof:
        step()
    events = (e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]")
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
