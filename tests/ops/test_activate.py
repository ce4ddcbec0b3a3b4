"""What lies between the products of lora_mlp, alone: h = drop(act(gate)·up) and its backward, in every backend."""

import importlib
import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from benchmarks.criterion import check
from peft_fast import backends
from peft_fast.ops import ACTIVATIONS, draw_seed, dropout_mask
from peft_fast.ops.spec import ActSpec, Spec
from tests import numerics
from tests.cases import place

PROVIDERS = [
    param
    for param in numerics.providers()
    if param.values[0].backend != "reference"
    and backends.has(param.values[0].backend, "lora_mlp")
    and param.values[0].plan in (None, "accumulate")
]
COMPILED = [param for param in PROVIDERS if param.values[0].backend == "cpu"]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
STOCK = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}
KINDS = ("gated", "plain", "first", "second")

each_provider = pytest.mark.parametrize("provider", PROVIDERS)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


class Inputs(NamedTuple):
    """z, what is activated, its factor and the gradient of h, all (M, I); the seed of the block's dropout."""

    z: torch.Tensor
    factor: torch.Tensor
    dh: torch.Tensor
    seed: torch.Tensor
    p: float

    def keep(self, dtype):
        return dropout_mask(self.seed[0], *self.z.shape, self.p).to(dtype).div_(1 - self.p)


def inputs(M, I, dtype, p=0.0):
    torch.manual_seed(M + I)
    z, factor, dh = (torch.randn(M, I, dtype=torch.float64, device="cpu") for _ in range(3))
    z, factor, dh = (t.to(dtype).to(numerics.DEVICE) for t in (2.5 * z, factor, dh))
    return Inputs(z, factor, dh, draw_seed(1, numerics.DEVICE), p)


def ours(provider, activation, kind, t):
    """(h, dz, dfactor), without dfactor where nothing multiplies."""
    backend = importlib.import_module(f"peft_fast.backends.{provider.backend}.lora_mlp")
    halves = kind if kind in ("first", "second") else ""
    spec, seed = ActSpec(activation, halves, t.p), t.seed if t.p > 0 else None
    gate, up = {"gated": (t.z, t.factor), "plain": (None, t.z)}.get(kind, (None, None))
    if halves:
        up = torch.cat((t.z, t.factor) if halves == "first" else (t.factor, t.z), 1)
    with provider.active():
        h = backend.activate(gate, up, seed, spec)
        dgate, dup = backend.activate_backward(t.dh, gate, up, seed, spec)
    if kind == "gated":
        return h, dgate, dup
    assert dgate is None and dup.shape == up.shape
    return (h, dup) if kind == "plain" else (h, *dup.chunk(2, 1)[:: 1 if halves == "first" else -1])


def defined(activation, kind, t, dtype):
    """The same by autograd through torch's functions in ``dtype``: the truth in float64, stock in the inputs' own."""
    z, factor = (v.detach().to(dtype).requires_grad_() for v in (t.z, t.factor))
    h = STOCK[activation](z)
    leaves = (z,) if kind == "plain" else (z, factor)
    if kind != "plain":
        h = h * factor
    if t.p > 0:
        h = h * t.keep(dtype)
    return h.detach(), *torch.autograd.grad(h, leaves, t.dh.to(dtype))


def refused(found, t, activation, kind):
    """Names of the outputs that fail the criterion, with the reason."""
    stock, truth = defined(activation, kind, t, t.z.dtype), defined(activation, kind, t, torch.float64)
    named = zip(("h", "dz", "dfactor"), found, stock, truth, strict=False)
    verdicts = {name: check(*three) for name, *three in named}
    return {f"{kind} p={t.p} {name}": v.reason for name, v in verdicts.items() if not v}


@each_provider
@each_activation
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_less_accurate_than_torch(provider, activation, dtype):
    wrong = {}
    for p in (0.0, 0.3):
        t = inputs(67, 389, DTYPES[dtype], p)
        for kind in KINDS:
            found = ours(provider, activation, kind, t)
            assert all(v.dtype == DTYPES[dtype] for v in found)
            wrong |= refused(found, t, activation, kind)
    assert not wrong


def assert_same(provider, got, want):
    if provider.backend == "cpu":
        assert numerics.same_bits(got.contiguous(), want.contiguous())
    else:  # torch takes the rest of a row with another exponential
        torch.testing.assert_close(got, want)


@each_provider
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_an_element_depends_on_itself_alone(provider, dtype, p):
    """Columns of a narrower call, rows of a shorter one and strided views have the bits of the whole."""
    whole = inputs(19, 150, DTYPES[dtype], p)
    for activation in ("silu", "gelu"):
        wants = ours(provider, activation, "gated", whole)
        for M, I in ((0, 150), (1, 1), (2, 3), (19, 7), (5, 8), (3, 15), (19, 16), (19, 17), (4, 33), (2, 149), (3, 0)):
            part = whole._replace(**{n: getattr(whole, n)[:M, :I] for n in ("z", "factor", "dh")})
            for got, want in zip(ours(provider, activation, "gated", part), wants, strict=True):
                assert_same(provider, got, want[:M, :I])
        for layout in ("columns", "rows", "offset"):
            placed = {n: place(getattr(whole, n), layout) for n in ("z", "factor", "dh")}
            before = {n: buffer.clone() for n, (_, buffer) in placed.items()}
            strided = whole._replace(**{n: view for n, (view, _) in placed.items()})
            for got, want in zip(ours(provider, activation, "gated", strided), wants, strict=True):
                assert_same(provider, got, want)
            assert all(numerics.same_bits(buffer, before[n]) for n, (_, buffer) in placed.items())


@each_provider
def test_halves_are_the_gated_form(provider):
    t = inputs(11, 70, torch.bfloat16, 0.2)
    wants = ours(provider, "gelu_tanh", "gated", t)
    for half in ("first", "second"):
        for got, want in zip(ours(provider, "gelu_tanh", half, t), wants, strict=True):
            assert_same(provider, got, want)


@each_provider
def test_the_mask_is_that_of_dropout_mask(provider):
    for p in (0.05, 0.5, 1.0):
        t = inputs(130, 300, torch.float32, p)
        t = t._replace(z=t.z.abs() + 1, dh=torch.ones_like(t.dh))
        kept = dropout_mask(t.seed[0], 130, 300, p)
        for found in ours(provider, "relu", "plain", t):
            assert torch.equal(found != 0, kept)


@each_provider
@each_activation
def test_nan_stays_in_its_row(provider, activation):
    t = inputs(7, 40, torch.bfloat16)
    for name in ("z", "factor", "dh"):
        broken = getattr(t, name).clone()
        broken[3, 5] = torch.nan
        found = ours(provider, activation, "gated", t._replace(**{name: broken}))
        nan = torch.stack([v.isnan() for v in found])
        assert nan[:, 3].any() and not nan[:, [0, 1, 2, 4, 5, 6]].any()
        if name != "dh":
            assert nan[0, 3, 5], "h of a NaN"


@pytest.mark.parametrize("provider", COMPILED)
@each_activation
def test_every_bfloat16_value(provider, activation):
    """Tails, zeros and overflow: a few ulp from float64, and finite wherever the truth is."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    z = bits.view(torch.bfloat16).float().view(1, -1)
    t = Inputs(z, z, torch.ones_like(z), draw_seed(1), 0.0)
    for name, got, truth in zip(
        ("h", "dz"), ours(provider, activation, "plain", t), defined(activation, "plain", t, torch.float64), strict=True
    ):
        seen = z.isfinite() & truth.isfinite() & (truth.abs() < torch.finfo(torch.float32).max)
        # a derivative is a sum of terms around 1, a tail of h an exponential of a rounded argument
        size = truth.abs().maximum(z.double().abs().clamp_max(1) if name == "h" else torch.tensor(1.0))
        error = (got.double() - truth).abs() / torch.finfo(torch.float32).eps
        assert got[seen].isfinite().all(), name
        assert (error[seen] <= 4 * size[seen]).all(), (name, z[seen][(error[seen] / size[seen]).argmax()])
        assert name == "dz" or got[z.isnan()].isnan().all()


@pytest.mark.parametrize("provider", COMPILED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_down_backward_is_the_three_calls(provider, kind, dtype):
    """One pass for h, dgate and dup has the bits of one after another, for every subset of gradients of down."""
    mlp = importlib.import_module("peft_fast.backends.cpu.lora_mlp")
    linear = importlib.import_module("peft_fast.backends.cpu.lora_linear")
    M, I, N, ranks = 37, 83, 40, [3, 8]
    t = inputs(M, I, DTYPES[dtype], 0.2)
    halves = kind if kind in ("first", "second") else ""
    gate, up = (t.z, t.factor) if kind == "gated" else (None, t.z if kind == "plain" else torch.cat(t[:2], 1))
    W, bias, g = (torch.randn(shape).to(DTYPES[dtype]) for shape in ((N, I), (N,), (M, N)))
    A, B, seed = torch.randn(sum(ranks), I), torch.randn(N, sum(ranks)), draw_seed(2)
    spec = Spec(ranks, [0.5, -2.0], [0.3, 0.0], DTYPES[dtype], False, False, "cpu", "accumulate")
    with provider.active():
        act = ActSpec("gelu", halves, t.p)
        h = mlp.activate(gate, up, t.seed, act)
        _, H = linear.forward(h, W, bias, A, B, seed, spec)
        for wanted in itertools.product((False, True), repeat=3):
            needs = (True, False, *wanted)
            dh, *wants = linear.backward(g, h, W, bias, A, B, H, seed, spec, needs)
            wants = [*mlp.activate_backward(dh, gate, up, t.seed, act), *wants]
            found, *rest = mlp.down_backward(
                gate, up, t.seed, act, g, h * torch.nan, W, bias, A, B, H, seed, spec, needs
            )
            for got, want in zip([*found, *rest], wants, strict=True):
                assert (got is None) == (want is None) and (got is None or numerics.same_bits(got, want))


# fault -> (activation, outputs that must be rejected) in float32, rounded once to bfloat16 too
FAULTS = {
    "tanh for erf": ("gelu", ("h", "dz", "dfactor")),
    "erf for tanh": ("gelu_tanh", ("h", "dz", "dfactor")),
    "no 1/(1-p)": ("silu", ("h", "dz", "dfactor")),
    "another mask in backward": ("silu", ("dz", "dfactor")),
    "no mask in backward": ("silu", ("dz", "dfactor")),
    "dz without the factor": ("silu", ("dz",)),
    "dfactor of z": ("silu", ("dfactor",)),
    "half the derivative": ("gelu", ("dz",)),
    "halves swapped": ("silu", ("h", "dz", "dfactor")),
    "1.7 for 1.702": ("quick_gelu", ("h", "dz", "dfactor")),
    "last column not activated": ("relu", ("h",)),
    "relu for relu2": ("relu2", ("h", "dz", "dfactor")),
}
ROUNDED_AWAY = {"tanh for erf", "erf for tanh", "1.7 for 1.702"}  # below what one rounding to bfloat16 hides


def faulty(fault, activation, t):
    """float32 sums and one rounding, with ``fault`` planted; none is honest."""
    wide = Inputs(*(v.float() for v in t[:3]), t.seed, t.p)
    act = activation
    if fault == "halves swapped":
        wide = wide._replace(z=wide.factor, factor=wide.z)
    if fault in ("tanh for erf", "erf for tanh", "relu for relu2"):
        act = {"tanh for erf": "gelu_tanh", "erf for tanh": "gelu", "relu for relu2": "relu"}[fault]
    if fault == "1.7 for 1.702":
        h, dz, dfactor = defined("quick_gelu", "gated", wide._replace(z=wide.z * (1.7 / 1.702)), torch.float32)
        h = h * (1.702 / 1.7)
    else:
        h, dz, dfactor = defined(act, "gated", wide, torch.float32)
    if fault == "no 1/(1-p)":
        h, dz, dfactor = (v * (1 - t.p) for v in (h, dz, dfactor))
    if "mask in backward" in fault:
        p = t.p if fault == "another mask in backward" else 0.0
        _, dz, dfactor = defined(act, "gated", wide._replace(seed=t.seed + 1, p=p), torch.float32)
    if fault == "dz without the factor":
        dz = dz / wide.factor
    if fault == "dfactor of z":
        dfactor = wide.dh * t.keep(torch.float32) * wide.z
    if fault == "half the derivative":  # z·φ(z) forgotten
        dz = wide.dh * t.keep(torch.float32) * wide.factor * torch.special.ndtr(wide.z)
    if fault == "last column not activated":
        h[:, -1] = (wide.z * wide.factor * t.keep(torch.float32))[:, -1]
    return [v.to(t.z.dtype) for v in (h, dz, dfactor)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_rejected(fault, dtype):
    activation, outputs = FAULTS[fault]
    t = inputs(67, 389, DTYPES[dtype], 0.3)
    assert not refused(faulty("", activation, t), t, activation, "gated")
    if fault in ROUNDED_AWAY and dtype == "bf16":
        return
    wrong = refused(faulty(fault, activation, t), t, activation, "gated")
    assert {f"gated p=0.3 {name}" for name in outputs} <= set(wrong)
