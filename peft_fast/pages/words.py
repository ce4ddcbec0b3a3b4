"""Figures of runs as the words that reports and terminal share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# metrics in [0, 1] that people read as per cent; the others keep their own scale
SHARES = ("accuracy", "precision", "recall", "f1", "exact", "auc", "map", "mar", "wer", "cer", "share", "within")


def metric(name: str, value: Any) -> str:
    """A metric's value as it is read: shares in per cent, everything else with four digits."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "–" if value is None else str(value)
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    if abs(value) <= 1.5 and share_of_one(name):
        return f"{100 * value:.1f} %"
    return plain(value)


def share_of_one(name: str) -> bool:
    """Is it by its name a metric that people read as per cent?"""
    return any(word in SHARES for word in name.lower().split("_"))


def plain(value: float) -> str:
    """Four digits that count, thousands apart."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def rate(value: float) -> str:
    """A speed: 1,254, and below ten 3.4."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}"


def seconds(value: float | None) -> str:
    """8.2 s, 3 min 20 s, 2 h 05 min."""
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(value: float | None) -> str:
    """Bytes in MiB or GiB."""
    if value is None:
        return "–"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"


def beyond(memory: dict[str, Any]) -> int | None:
    """Of a result's memory the peak beyond what the process held before the model was there."""
    peak = memory.get("peak_bytes")
    return None if peak is None else max(0, peak - (memory.get("before_bytes") or 0))


def whose(machine: Mapping[str, Any] | None) -> str:
    """Whose memory a result's figures are, and what is in them besides a step's tensors."""
    if (machine or {}).get("gpu"):
        return "torch's on the GPU"
    return "the process's, with its libraries and what its allocator could not give back"


def count(value: float | None) -> str:
    """22.7 M, 14.3 k, 812."""
    if value is None:
        return "–"
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.1f} {letter}"
    return f"{value:.0f}"


def title(task: str) -> str:
    """A task's name as a heading."""
    text = task.replace("-", " ")
    return text[:1].upper() + text[1:].replace("causal lm", "causal LM").replace("ausal lm", "ausal LM")


def final(result: Mapping[str, Any]) -> tuple[str, str, float | None]:
    """(split, metric, value) that a run is summed up by: the test split's if there is one."""
    name = result.get("metric") or "loss"
    for split in ("test", "validation"):
        value = (result.get("final") or {}).get(split, {}).get(name)
        if value is not None:
            return split, name, value
    best = result.get("best") or {}
    return "validation", name, best.get("value")


def share(result: Mapping[str, Any]) -> str:
    """Trainable weights and their share."""
    model = result.get("model") or {}
    trainable, whole = model.get("trainable"), model.get("parameters")
    if not trainable or not whole:
        return "–"
    share = 100 * trainable / whole
    return f"{count(trainable)} of {count(whole)} ({share:{'.0f' if share >= 10 else '.2g'}} %)"


def speed(result: Mapping[str, Any]) -> str:
    """Throughput with its unit."""
    found = result.get("throughput") or {}
    rate = found.get("per_second")
    return "–" if rate is None else f"{plain(rate)} {found.get('unit', 'rows')}/s"


def number(value: Any) -> float:
    """What JSON wrote for a number: null is NaN."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def smooth(values: Sequence[float], half_life: float = 6.0) -> list[float]:
    """Exponential mean that passes over gaps."""
    keep, total, weight, out = 0.5 ** (1 / half_life), 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight if weight and math.isfinite(value) else math.nan)
    return out
