"""torch.compile, opcheck, fake tensors, autocast, copies and pickles of modules that call the op."""

import copy
import io
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_fast import native
from peft_fast.ops import Adapter, draw_seed, fast_calls, lora_linear
from tests import numerics
from tests.cases import DTYPES, Case

PROVIDERS = numerics.providers()
STEP = Case("compiled", lead=(2, 13), K=40, N=24, ranks=(8,), p=(0.0,), bias=True)
compiled_ops = pytest.mark.skipif(not native.load(), reason=native.reason() or "live")


class Layer(nn.Module):
    """A user's module around lora_linear."""

    def __init__(self, p=0.0, provider=lora_linear, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(40, 24, dtype=dtype).requires_grad_(False)
        self.A = nn.Parameter(torch.randn(8, 40) / 6)
        self.B = nn.Parameter(torch.randn(24, 8) / 3)
        self.p, self.provider = p, provider

    def forward(self, x):
        adapter = Adapter(self.A, self.B, 2.0, self.p if self.training else 0.0)
        return self.provider(x, self.base.weight, self.base.bias, [adapter])


def step(module, x, seed=0):
    torch.manual_seed(seed)
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    return {"y": y.detach(), "dx": x.grad, "dA": module.A.grad.clone(), "dB": module.B.grad.clone()}


def assert_same(a, b):
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_fullgraph(provider, p):
    layer = Layer(p, provider)
    x = torch.randn(2, 13, 40)
    with provider.active():
        eager = step(layer, x)
        traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
        compiled = step(traced, x)
    assert_same(eager, compiled)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_dynamic_tokens(provider):
    layer = Layer(0.0, provider)
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with provider.active():
        for tokens in (13, 7, 64):
            x = torch.randn(2, tokens, 40)
            assert_same(step(layer, x), step(traced, x))
    assert torch._dynamo.utils.counters["frames"]["ok"] <= 2, "one graph for every token count"


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_fullgraph_under_autocast(provider, inside):
    layer = Layer(0.0, provider)
    x = torch.randn(2, 13, 40)

    class Inside(Layer):
        def forward(self, x):
            with torch.autocast(numerics.DEVICE.type, dtype=torch.bfloat16):
                return super().forward(x)

    if inside:
        layer.__class__ = Inside
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with provider.active(), torch.autocast(numerics.DEVICE.type, dtype=torch.bfloat16, enabled=not inside):
        eager, compiled = step(layer, x), step(traced, x)
    assert eager["y"].dtype == compiled["y"].dtype == torch.bfloat16
    for name in eager:
        torch.testing.assert_close(compiled[name], eager[name], rtol=0.02, atol=0.05, msg=name)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor():
    layer, x = Layer(), torch.randn(4, 40)
    assert_same(step(layer, x), step(torch.compile(layer, fullgraph=True), x))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_tensor_scaling_does_not_recompile(provider):
    layer = Layer(0.0, provider)

    def run(x, scaling):
        return provider(x, layer.base.weight, layer.base.bias, [Adapter(layer.A, layer.B, scaling)])

    traced = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 40)
    with provider.active(), torch._dynamo.config.patch(error_on_recompile=True):
        for scaling in (0.5, 2.0, -3.0):
            s = torch.tensor(scaling)
            torch.testing.assert_close(traced(x, s), run(x, s), rtol=1e-5, atol=1e-5)


def operator_calls():
    """(operator, arguments) of each compiled tensor operator, in the options that change its outputs."""
    ops = torch.ops.peft_fast
    for dtypes in ("f32", "bf16", "bf16_f32_adapters"):
        for case in (
            STEP,
            replace(STEP, p=(0.3,), transposed=True, bias=False, lead=(5,)),
            replace(STEP, ranks=(3, 4), p=(0.5, 0.0), scaling=(1.0, -2.0)),
        ):
            p = numerics.problem(case, DTYPES[dtypes])
            t = {n: v.detach() for n, v in p.tensors.items()}
            A = torch.cat([t[f"A{i}"] for i in range(len(case.ranks))])
            B = torch.cat([t[f"B{i}"] for i in range(len(case.ranks))], 1)
            seed = draw_seed(len(case.ranks)) if any(case.p) else None
            spec = (list(case.ranks), list(case.scaling), list(case.p), case.transposed)
            yield ops.lora_linear, (t["x"], t["W"], t.get("bias"), A, B, seed, *spec)
            H = torch.randn(case.M, A.shape[0])
            for needs, wide_dx in (
                ([True] * 5, False),
                ([True, False, False, False, False], True),
                ([False, False, True, True, True], False),
            ):
                yield ops.lora_linear_backward, (p.g, t["x"], t["W"], A, B, H, seed, *spec, needs, wide_dx)
    yield ops.dropout_mask, (draw_seed(1)[0], 5, 9, 0.3)


@compiled_ops
def test_opcheck():
    for op, arguments in operator_calls():
        torch.library.opcheck(op.default, arguments)


@compiled_ops
def test_fake_kernels_promise_what_the_kernels_give():
    for op, arguments in operator_calls():
        real = op(*arguments)
        with FakeTensorMode() as mode:
            fake = op(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments])
        for r, f in zip(*(v if isinstance(v, tuple) else (v,) for v in (real, fake)), strict=True):
            assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()), op


def test_deepcopy_and_pickle():
    layer, x = Layer(0.3), torch.randn(6, 40)
    expected = step(layer, x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    others = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)
    for other in others:
        found = step(other, x)
        assert all(numerics.same_bits(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_autocast_ends_where_it_should(provider):
    """y in autocast's dtype inside, in x's outside; gradients in each parameter's dtype."""
    layer = Layer(0.0, provider)
    x = torch.randn(3, 40, requires_grad=True)
    with provider.active():
        with torch.autocast(numerics.DEVICE.type, dtype=torch.bfloat16):
            inside = layer(x)
            with torch.autocast(numerics.DEVICE.type, enabled=False):
                island = layer(x)
        outside = layer(x)
        inside.float().sum().backward()
    assert (inside.dtype, island.dtype, outside.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert numerics.same_bits(island, outside)
    assert x.grad.dtype == layer.A.grad.dtype == layer.B.grad.dtype == torch.float32


def test_calls_are_counted_in_eager_only():
    layer, x = Layer(), torch.randn(3, 40)
    before = fast_calls()
    layer(x)
    with torch.no_grad():
        layer(x)
    assert fast_calls() == before + 2
