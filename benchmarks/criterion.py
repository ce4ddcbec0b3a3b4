"""Is `out` as good as stock? One criterion for tests and benchmarks.

    e = out − truth      e0 = stock − truth      truth: float64 on the same rounded inputs

    rms(e)  ≤ 1.05·rms(e0) + f·rms(truth)
    max|e|  ≤ 2·max|e0| + F·max|truth|
    |mean(e)| ≤ 4·rms(e)/√n + f·rms(truth)

A fixed tolerance cannot see a LoRA scale that is 1 % wrong in bf16; this can.

The rms of n independent Gaussian errors is itself known only to a part 1/√(2n), the ratio of two to 1/√n; errors of
products of Gaussians have longer tails, about twice that. From 2048 on it is inside the 5 % the first line allows;
with fewer, three such deviations, less those of 2048, are added to 1.05.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ENOUGH = 2048  # independent roundings whose rms is known well enough
# (f, F) in units of the dtype's eps; float64 is compared with an equally rounded float64 truth
SLACK = {
    torch.bfloat16: (1 / 64, 1 / 4),
    torch.float16: (1 / 64, 1 / 4),
    torch.float32: (4.0, 8.0),
    torch.float64: (64.0, 512.0),
}


@dataclass(frozen=True)
class Verdict:
    """`ok`, one sentence why not, and the figures: rms, max and mean with what each was allowed."""

    ok: bool
    reason: str
    rms: float = 0.0
    rms_stock: float = 0.0
    rms_allowed: float = 0.0
    max: float = 0.0
    max_stock: float = 0.0
    max_allowed: float = 0.0
    mean: float = 0.0
    mean_allowed: float = 0.0

    def __bool__(self) -> bool:
        return self.ok

    @property
    def match(self) -> float:
        """Error as a fraction of the allowed error: at most 1 when `ok`, 0 is exact."""
        pairs = ((self.rms, self.rms_allowed), (self.max, self.max_allowed), (self.mean, self.mean_allowed))
        return max((e / a if a > 0 else (0.0 if e == 0 else float("inf")) for e, a in pairs), default=0.0)


def check(
    out: torch.Tensor,
    stock: torch.Tensor,
    truth: torch.Tensor,
    dtype: torch.dtype | None = None,
    roundings: int | None = None,
) -> Verdict:
    """out, stock, truth: one shape; `dtype` is the precision judged by (default: out's own).

    Pass the activations' dtype for an output kept in fp32 whose arithmetic ran in bf16, and in `roundings` how many
    independent ones made the errors if that is fewer than the elements (all of dA hangs on the few of D).
    """
    if not (out.shape == stock.shape == truth.shape):
        return Verdict(False, f"shapes differ: out {tuple(out.shape)}, truth {tuple(truth.shape)}")
    if out.numel() == 0:
        return Verdict(True, "empty")
    eps = torch.finfo(dtype or out.dtype).eps
    f, F = (c * eps for c in SLACK[dtype or out.dtype])
    out, stock, truth = (t.detach().double() for t in (out, stock, truth))
    finite = truth.isfinite()
    if not torch.equal(out.isfinite(), finite):
        return Verdict(False, "NaN or Inf at other places than in the truth")
    t = truth[finite]
    if t.numel() == 0:
        return Verdict(True, "nothing finite to compare")
    e, e0 = out[finite] - t, stock[finite] - t
    e0 = e0[e0.isfinite()]  # stock may overflow where the truth does not
    rms_t, rms_e, rms_0 = _rms(t), _rms(e), _rms(e0)
    max_t, max_e, max_0 = _max(t), _max(e), _max(e0)
    mean = abs(e.mean().item())
    n = max(1, min(roundings or ENOUGH, e.numel(), ENOUGH))
    rms_allowed = (1.05 + 6 * (n**-0.5 - ENOUGH**-0.5)) * rms_0 + f * rms_t
    max_allowed = 2 * max_0 + F * max_t
    mean_allowed = 4 * rms_e / e.numel() ** 0.5 + f * rms_t
    wrong = []
    if rms_e > rms_allowed:
        wrong.append(f"rms error {rms_e:.3g} is above {rms_allowed:.3g} (stock {rms_0:.3g})")
    if max_e > max_allowed:
        wrong.append(f"max error {max_e:.3g} is above {max_allowed:.3g} (stock {max_0:.3g})")
    if mean > mean_allowed:
        wrong.append(f"mean error {mean:.3g} is above {mean_allowed:.3g}: a bias, not rounding")
    return Verdict(
        not wrong, "; ".join(wrong) or "within the criterion",
        rms_e, rms_0, rms_allowed, max_e, max_0, max_allowed, mean, mean_allowed,
    )  # fmt: skip


def _rms(v: torch.Tensor) -> float:
    return v.square().mean().sqrt().item() if v.numel() else 0.0


def _max(v: torch.Tensor) -> float:
    return v.abs().max().item() if v.numel() else 0.0
