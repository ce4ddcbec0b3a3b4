"""Numbers from interleaved samples: median, quartiles, and a paired ratio with its bootstrap interval."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

RESAMPLES = 2000


def median(samples: Sequence[float]) -> float:
    return _quantile(samples, 0.5)


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """The spread every table shows: half of the samples lie between these two."""
    return _quantile(samples, 0.25), _quantile(samples, 0.75)


def ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """(ratio, low, high): median over rounds of a[i] / b[i] and its 95 % bootstrap interval.

    Rounds are paired because the machine's speed drifts: a[i] and b[i] were taken within one round.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"paired samples are needed, got {len(a)} and {len(b)}")
    r = torch.tensor(a, dtype=torch.float64) / torch.tensor(b, dtype=torch.float64)
    generator = torch.Generator().manual_seed(len(a))
    pick = torch.randint(len(a), (RESAMPLES, len(a)), generator=generator)
    medians = r[pick].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return r.quantile(0.5).item(), low, high


def contains(interval: tuple[float, float, float], value: float) -> bool:
    return interval[1] <= value <= interval[2]


def rotation(n: int, round_: int, seed: int = 0) -> list[int]:
    """The order of `n` providers in a round: shuffled anew every n rounds, rotated by one in between.

    So each provider takes each place equally often and no two always follow one another.
    """
    order = list(range(n))
    random.Random(f"{seed}.{round_ // n}").shuffle(order)
    k = round_ % n
    return order[k:] + order[:k]


def _quantile(samples: Sequence[float], q: float) -> float:
    return torch.tensor(samples, dtype=torch.float64).quantile(q).item()
