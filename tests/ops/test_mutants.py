"""Planted faults: the criterion that accepts an honest implementation must reject each of these."""

from dataclasses import replace

import pytest
import torch

from peft_fast.ops import draw_seed, dropout_mask
from tests import numerics
from tests.cases import CASES, Case

CROWDED = Case("crowded", lead=(261,), K=259, N=189, ranks=(16,), p=(0.3,), bias=True, adapter_bias=True)
LOW = ("bf16", "bf16_f32_adapters")
# values of one sign: cutting off a tail then shows as a bias
POSITIVE = replace(CROWDED, name="crowded_positive", positive=True)

# fault -> outputs that must be rejected
FAULTS = {
    "scale off by 1 %": ("y", "dx", "dA0", "dB0"),
    "scale twice in backward": ("dx", "dA0"),
    "sign of H": ("y", "dB0"),
    "last K column of the base": ("y",),
    "last K column of the adapter": ("y", "dB0"),
    "last K column of dA": ("dA0",),
    "last N column of D": ("dx", "dA0"),
    "last row without the adapter": ("y",),
    "last row of dx without the adapter": ("dx",),
    "last row missing from dA": ("dA0",),
    "last rank missing": ("y",),
    "no 1/(1-p) in forward": ("y", "dB0"),
    "no 1/(1-p) in dx": ("dx",),
    "no 1/(1-p) in dA": ("dA0",),
    "another mask in backward": ("dx", "dA0"),
    "no mask on dx": ("dx",),
    "dropout on the base too": ("y",),
    "no dropout": ("y", "dB0"),
    "dx all zero": ("dx",),
    "dx of the adapter forgotten": ("dx",),
    "dx of the base forgotten": ("dx",),
    "bias forgotten": ("y",),
    "adapter bias unscaled": ("y",),
    "adapter bias gradient unscaled": ("db0",),
    "bias gradient of one row short": ("dbias",),
}
# faults of rounding, which float32 on the same scale does not have
LOW_FAULTS = {
    "H truncated": ("y", "dB0"),
    "y truncated": ("y",),
    "dx truncated": ("dx",),
    "dA accumulated in bf16": ("dA0",),
    "dB accumulated in bf16": ("dB0",),
}


class Honest(torch.autograd.Function):
    """float32 sums, one rounding each of H, D and the outputs; with `fault` planted."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, b, keep, s, p, fault):
        ctx.save_for_backward(x, W, bias, A, B, b, keep)
        xf, Wf, Af, Bf = (t.float() for t in (x, W, A, B))
        if fault == "scale off by 1 %":
            s = s * 1.01
        ctx.spec = s, p, fault
        dropped = xf if fault == "no dropout" else _drop(xf, keep, p, fault == "no 1/(1-p) in forward")
        left = dropped[..., :-1] if fault == "last K column of the adapter" else dropped
        H = _low(s * left @ Af[:, : left.shape[-1]].T, A.dtype, fault == "H truncated")
        if fault == "sign of H":
            H = -H
        ctx.H = H
        base = dropped if fault == "dropout on the base too" else xf
        y = base[..., :-1] @ Wf[:, :-1].T if fault == "last K column of the base" else base @ Wf.T
        r = B.shape[1] - (fault == "last rank missing")
        low = H[..., :r] @ Bf[:, :r].T
        if fault == "last row without the adapter":
            low[-1] = 0
        y = y + low
        if bias is not None and fault != "bias forgotten":
            y = y + bias.float()
        if b is not None:
            y = y + b.float() * (1 if fault == "adapter bias unscaled" else s)
        return _low(y, x.dtype, fault == "y truncated").to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, W, bias, A, B, b, keep = ctx.saved_tensors
        s, p, fault = ctx.spec
        xf, gf, Wf, Af, Bf = (t.float() for t in (x, g, W, A, B))
        if fault == "another mask in backward":
            keep = keep.roll(1, -1)
        N = B.shape[0] - (fault == "last N column of D")
        D = _low(s * (gf[..., :N] @ Bf[:N]), A.dtype)
        if fault == "scale twice in backward":
            D = D * s
        low = D @ Af
        if fault == "last row of dx without the adapter":
            low[-1] = 0
        masked = low if fault in ("no mask on dx", "no dropout") else _drop(low, keep, p, fault == "no 1/(1-p) in dx")
        dx = gf @ Wf * (fault != "dx of the base forgotten") + masked * (fault != "dx of the adapter forgotten")
        if fault == "dx all zero":
            dx = dx * 0
        x2, g2, D2, H2 = (
            t.reshape(-1, t.shape[-1]) for t in (_drop(xf, keep, p, fault == "no 1/(1-p) in dA"), gf, D, ctx.H)
        )
        if fault == "no dropout":
            x2 = xf.reshape(-1, xf.shape[-1])
        rows = len(x2) - (fault == "last row missing from dA")
        dA = _product(D2[:rows], x2[:rows], fault == "dA accumulated in bf16")
        if fault == "last K column of dA":
            dA[:, -1] = 0
        dB = _product(g2, H2, fault == "dB accumulated in bf16")
        dbias = g2[: len(g2) - (fault == "bias gradient of one row short")].sum(0)
        db = g2.sum(0) * (1 if fault == "adapter bias gradient unscaled" else s)
        return (
            _low(dx, x.dtype, fault == "dx truncated").to(x.dtype),
            None,
            None if bias is None else dbias.to(bias.dtype),
            dA.to(A.dtype),
            dB.to(B.dtype),
            None if b is None else db.to(b.dtype),
            *[None] * 4,
        )


def _drop(x, keep, p, unscaled=False):
    if keep is None:
        return x
    return torch.where(keep, x if unscaled or p == 1 else x / (1 - p), 0.0)


def _low(t, dtype, truncated=False):
    """t in float32 with values `dtype` can hold: rounded, or with the tail bfloat16 lacks cut off."""
    if truncated:
        return (t.contiguous().view(torch.int32) & -65536).view(torch.float32)
    return t.to(dtype).float()


def _product(left, right, rounded_sums):
    if not rounded_sums:
        return left.T @ right
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.bfloat16)
    for a, b in zip(left.split(16), right.split(16), strict=True):
        total += (a.T @ b).to(total.dtype)
    return total.float()


def honest(fault=None):
    """lora_linear's signature for one adapter on a (N, K) weight."""

    def call(x, W, bias, adapters, transposed):
        a = adapters[0]
        keep = dropout_mask(draw_seed(1)[0], x.shape[:-1].numel(), x.shape[-1], a.p).view(x.shape) if a.p > 0 else None
        W = W.t() if transposed else W
        return Honest.apply(x, W, bias, a.A, a.B, a.bias, keep, float(a.scaling), a.p, fault)

    return call


@pytest.mark.parametrize("dtypes", ["f32", *LOW])
def test_honest_is_accepted(dtypes):
    assert not numerics.failures(numerics.verdicts(honest(), CROWDED, dtypes, False))


@pytest.mark.parametrize("dtypes", ["f32", *LOW])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_rejected(fault, dtypes):
    rejected = numerics.failures(numerics.verdicts(honest(fault), CROWDED, dtypes, False))
    assert set(FAULTS[fault]) <= set(rejected)


@pytest.mark.parametrize("dtypes", LOW)
@pytest.mark.parametrize("fault", LOW_FAULTS)
def test_fault_of_rounding_is_rejected(fault, dtypes):
    assert not numerics.failures(numerics.verdicts(honest(), POSITIVE, dtypes, False))
    rejected = numerics.failures(numerics.verdicts(honest(fault), POSITIVE, dtypes, False))
    assert set(LOW_FAULTS[fault]) <= set(rejected)


SEEN = [c for c in CASES if len(c.ranks) == 1 and c.p[0] < 1 and c.scaling[0] != 0 and not c.base_trains]


@pytest.mark.parametrize("dtypes", ["f32", *LOW])
def test_one_percent_of_scale_is_seen_in_every_case(dtypes):
    refused, blind = [], []
    for case in SEEN:
        if numerics.failures(numerics.verdicts(honest(), case, dtypes, False)):
            refused.append(case.name)
        if not numerics.failures(numerics.verdicts(honest("scale off by 1 %"), case, dtypes, False)):
            blind.append(case.name)
    assert not refused and not blind
