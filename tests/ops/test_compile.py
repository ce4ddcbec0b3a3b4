"""torch.compile, opcheck, fake tensors, autocast, copies and pickles of modules that call the op."""

import copy
import io
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from peft_fast import native
from peft_fast.ops import Adapter, draw_seed, fast_calls, lora_linear, route_experts
from tests import (
    cases_lora_embedding,
    cases_lora_experts,
    cases_lora_group,
    cases_lora_mlp,
    inputs,
    numerics,
)
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


STEPS = [replace(table.STEP, lead=(2, 13)) for table in (cases_lora_group, cases_lora_mlp, cases_lora_embedding)]
BARE, DROPPED = inputs.Layer(24, (), (), ()), inputs.Layer(24, (3,), (0.1,), (1.0,))
STEPS += [
    cases_lora_mlp.Case("halves_step", "gelu", "first", up=BARE, down=DROPPED),
    cases_lora_mlp.Case("frozen_step", gate=BARE, up=BARE, down=BARE, p=0.1),
]


@numerics.each(*STEPS, every_isa=False)
def test_fullgraph_of_groups_and_blocks(provider, case):
    check_fullgraph(provider, case, "f32")


@numerics.each(*STEPS[:3], every_isa=False)
def test_fullgraph_beside_float32_adapters(provider, case):
    check_fullgraph(provider, case, "bf16_f32_adapters")


def function_of(provider, p):
    """What is compiled, and what it is given: experts are routed inside, as they are in a model."""
    tensors = p.tensors | ({"chosen": p.case.chosen} if p.case.op == "lora_experts" else {})
    names, case = list(tensors), p.case
    return tensors, lambda *given: case.ours(provider, dict(zip(names, given, strict=True)))


def check_fullgraph(provider, case, dtypes):
    p = numerics.problem(case, DTYPES[dtypes])
    tensors, forward = function_of(provider, p)
    traced = torch.compile(forward, fullgraph=True, backend="aot_eager")

    def run(function):
        torch.manual_seed(p.seed)
        return p.run(lambda t: function(*t.values()), tensors)

    with provider.active():
        eager, compiled = run(forward), run(traced)
    assert set(eager) == set(compiled)
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtypes == "f32" else {"rtol": 0.02, "atol": 0.3}
    for name in eager:
        assert eager[name].dtype == compiled[name].dtype
        torch.testing.assert_close(compiled[name], eager[name], **tolerance, msg=name)


@numerics.each(cases_lora_experts.STEP, only=("cpu", "torch"), every_isa=False)
def test_fullgraph_of_experts_beside_float32_adapters(provider, case):
    check_fullgraph(provider, case, "bf16_f32_adapters")


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["kept", "dropped"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_dynamic_tokens(provider, p):
    """One graph serves every number of tokens: what dynamo compiles again after the first is a specialized size."""
    layer, first, graphs = Layer(p, provider), 0, CompileCounterWithBackend("aot_eager")
    traced = torch.compile(layer, fullgraph=True, backend=graphs, dynamic=True)
    with provider.active():
        for tokens in (13, 7, 64):
            x = torch.randn(2, tokens, 40)
            assert_same(step(layer, x), step(traced, x))
            first = first or graphs.frame_count
    assert graphs.frame_count == first, "one graph for every token count"


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
    yield from experts_calls(ops)
    yield from block_calls(ops)
    yield from embedding_calls(ops)


def experts_calls(ops):
    T, k, E, K, N, r = 5, 2, 3, 12, 7, 4
    routing = route_experts(torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [2, 0]]), E)
    x, g, W = torch.randn(T, K).bfloat16(), torch.randn(T * k, N).bfloat16(), torch.randn(E, N, K).bfloat16()
    bias, A, B, H = torch.randn(E, N).bfloat16(), torch.randn(E, r, K), torch.randn(E, N, r), torch.randn(T * k, r)
    where, spec = (routing.order, routing.counts, k), ([1, 3], [0.5, -1.0], False)
    flat = A.flatten(0, 1), torch.randn(N, r * E)
    yield ops.lora_experts, (x, W, bias, A, B, *where, *spec)
    for few in (0, 16):
        yield ops.lora_experts_infer, (x, W, bias, *([t] for t in flat), *where, [0.5], False, few)
    for needs in ([True] * 4, [False, True, False, True], [True, False, True, False]):
        yield ops.lora_experts_backward, (g, x, W, A, B, H, *where, *spec, needs)
    full, low = (*routing, [1, 3], [0.5, -1.0], True, False, False), H.bfloat16()
    yield ops.torch_lora_experts, (x, W, bias, A, flat[1], *full)
    for needs in ([True] * 4, [False, True, True, False]):
        yield ops.torch_lora_experts_backward, (g, x, W, bias, A, flat[1], low, *full, needs)


def block_calls(ops):
    M, I, N, r = 5, 12, 7, 3
    shapes = {"gate": (M, I), "up": (M, I), "wide": (M, 2 * I), "dh": (M, I), "W": (N, I), "g": (M, N)}
    t = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    down = (t["g"], t["W"], torch.randn(r, I), torch.randn(N, r), torch.randn(M, r), None, [r], [2.0], [0.0], False)
    for tensors, halves, p in (((t["gate"], t["up"]), "", 0.0), ((None, t["wide"]), "second", 0.3)):
        block = (*tensors, draw_seed(1) if p else None, "silu", halves, p)
        yield ops.lora_mlp_activate, block
        yield ops.lora_mlp_activate_backward, (t["dh"], *block)
        yield ops.lora_mlp_down_backward, (*down, [not halves] * 3, None, *block)


def embedding_calls(ops):
    M, V, D, r = 5, 11, 6, 3
    W, g, ids = torch.randn(V, D).bfloat16(), torch.randn(M, D).bfloat16(), torch.randint(0, V, (M,))
    A, B, H = torch.randn(r, V), torch.randn(D, r), torch.randn(M, r)
    for scale, needs in ((None, [True, False]), (torch.tensor([2.0, 2.0]), [False, True])):
        yield ops.lora_embedding, (ids, W, A, B, scale, 0.5)
        yield ops.lora_embedding_backward, (g, ids, A, B, H, scale, 0.5, 3, needs)


@compiled_ops
def test_opcheck():
    for op, arguments in operator_calls():
        torch.library.opcheck(op.default, arguments)


@compiled_ops
def test_fake_kernels_promise_what_the_kernels_give():
    for op, arguments in operator_calls():
        real = op(*arguments)
        with FakeTensorMode() as mode:
            fake = op(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
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
