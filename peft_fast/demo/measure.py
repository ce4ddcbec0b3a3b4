"""What a contender is asked after training: bytes saved for backward, peaks, and where the time goes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

STEPS = 3
# the first group whose prefix fits an operator's name takes its time
GROUPS = (
    ("peft_fast operators", ("peft_fast::", "PeftFast", "Lora")),
    (
        "matrix products",
        ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul", "mkldnn"),
    ),
    ("random masks", ("aten::bernoulli", "aten::native_dropout", "aten::dropout", "aten::div_")),
    (
        "casts and copies",
        ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous", "aten::cat"),
    ),
    (
        "attention, norms",
        (
            "aten::_softmax",
            "aten::native_layer_norm",
            "aten::scaled_dot",
            "aten::_scaled_dot",
            "aten::_flash",
        ),
    ),
    (
        "element by element",
        (
            "aten::mul",
            "aten::add",
            "aten::sub",
            "aten::div",
            "aten::gelu",
            "aten::tanh",
            "aten::where",
            "aten::silu",
        ),
    ),
    (
        "optimizer",
        ("Optimizer.", "aten::_foreach", "aten::_fused", "aten::lerp", "aten::addcmul", "aten::addcdiv"),
    ),
)
REST = "the rest"


def everything(run: Any, fast: bool, profile: bool) -> dict[str, Any]:
    """Measurements of a trained Trainer's model on one fixed batch of its training rows; ``profile``: by operator."""
    import torch

    import peft_fast
    from peft_fast import ops
    from peft_fast.benchmarks import memory

    model = run.model
    model.train()
    batch = run._prepare_inputs(run.data_collator(run.train_dataset[: run.args.train_batch_size]))

    def forward() -> torch.Tensor:
        with run.compute_loss_context_manager():
            return model(**batch).loss

    def step() -> None:
        forward().backward()
        model.zero_grad()

    step()
    kept = [*model.parameters(), *model.buffers(), *batch.values()]
    saved = memory.saved_bytes(forward, kept)
    profiled = dict(zip(("ops_ms", "profiled_ms"), op_times(step, run.args.device), strict=True)) if profile else {}
    found = peft_fast.report(model)
    layers = {"fast": list(found.fast), "slow": dict(found.slow), "handed_back": dict(found.handed_back)}
    layers |= {"groups": len(found.groups), "blocks": len(found.blocks)}
    return {
        "saved_bytes": saved,
        "step_bytes": memory.peak_bytes(step, run.args.device),
        **profiled,
        "tokens_in_batch": int(batch["attention_mask"].sum()),
        "fast_calls": ops.fast_calls(),
        **(layers if fast else {}),
    }


def op_times(step: Any, device: Any) -> tuple[dict[str, float], float]:
    """Milliseconds a step by group of operators, and in all, as torch's profiler sees ``STEPS`` of them."""
    import time

    import torch

    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    begin = time.perf_counter()
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(STEPS):
            step()
        if cuda:
            torch.cuda.synchronize()
    total = (time.perf_counter() - begin) * 1e3 / STEPS
    times = {name: 0.0 for name, _ in GROUPS}
    for event in profile.key_averages():
        self_us = event.self_device_time_total if cuda else event.self_cpu_time_total
        group = next((name for name, starts in GROUPS if event.key.startswith(starts)), None)
        if group:
            times[group] += self_us / 1e3 / STEPS
    # what no group claims, and the Python in between
    times[REST] = max(0.0, total - sum(times.values()))
    return times, total


def resident_bytes() -> int:
    """Resident memory of this process now."""
    import psutil

    return psutil.Process().memory_info().rss


def reset_peak_resident() -> None:
    """Let the peak start anew; where the system cannot (not Linux) it covers the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_resident_bytes() -> int:
    """Highest resident memory since the reset."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line:
            return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
