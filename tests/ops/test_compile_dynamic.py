"""torch.compile with dynamic=True: one graph of every op serves every number of tokens, whatever the values."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from peft_fast.ops import Adapter, lora_quantized
from peft_fast.ops.nf4 import dequantize
from tests import (
    cases_dora_embedding,
    cases_dora_linear,
    cases_lora_add,
    cases_lora_decode,
    cases_lora_experts,
    cases_lora_mixed,
    nf4_writer,
    numerics,
)
from tests.cases import DTYPES
from tests.ops.test_compile import STEPS, assert_same, compiled_ops, function_of


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check_dynamic_tokens(provider, case):
    traced, first, graphs = None, 0, CompileCounterWithBackend("aot_eager")
    with provider.active():
        for tokens in (13, 7):
            p = numerics.problem(sized(case, tokens), DTYPES["f32"])
            tensors, forward = function_of(provider, p)
            traced = traced or torch.compile(forward, fullgraph=True, backend=graphs, dynamic=True)
            eager = p.run(lambda t: numerics.call(p, provider, t), tensors)  # noqa: B023
            torch.manual_seed(p.seed)
            compiled = p.run(lambda t: traced(*t.values()), tensors)  # noqa: B023
            assert_same(compiled, eager)
            first = first or graphs.frame_count
    assert graphs.frame_count == first, "one graph for every token count"


@numerics.each(*STEPS[:3], only=("cpu", "triton"), every_isa=False)
def test_dynamic_tokens_of_groups_and_blocks(provider, case):
    check_dynamic_tokens(provider, case)


OTHERS = [
    cases_dora_linear.STEP,
    replace(cases_dora_linear.STEP, name="dora_step_undropped", p=(0.0,)),
    cases_dora_embedding.STEP,
    cases_lora_mixed.STEP,
    cases_lora_experts.STEP,
    cases_lora_add.STEP,
    cases_lora_decode.Case("decode_step", K=40, N=24, ranks=(4,), bias=True),
]


def sized(case, tokens):
    """The case with as many tokens in each of its rows."""
    if case.op == "lora_experts":
        return replace(case, T=tokens)
    return replace(case, lead=(tokens,) if case.op == "lora_mixed" else (2, tokens))


@numerics.each(*[c for c in OTHERS if c.op != "dora_embedding"], only=("cpu", "triton"), every_isa=False)
def test_dynamic_tokens_of_other_ops(provider, case):
    check_dynamic_tokens(provider, case)


@numerics.each(cases_lora_experts.STEP, cases_dora_embedding.STEP, only=("torch", "reference"))
def test_dynamic_tokens_where_torch_runs(provider, case):
    check_dynamic_tokens(provider, case)


@pytest.mark.slow
@numerics.each(*OTHERS, only=("torch", "reference"))
def test_dynamic_tokens_of_other_ops_of_torch(provider, case):
    check_dynamic_tokens(provider, case)


@numerics.each(cases_lora_experts.STEP, only=("cpu", "torch"), every_isa=False)
def test_experts_infer_in_one_graph_whatever_the_rows(provider, case):
    """Few rows an expert and many take different ways through the kernels, but not through the graph."""
    graphs, traced, first = CompileCounterWithBackend("aot_eager"), None, 0
    with provider.active(), torch.no_grad():
        for tokens in (4, 150, 2):
            tensors, forward = function_of(provider, numerics.problem(sized(case, tokens), DTYPES["f32"]))
            traced = traced or torch.compile(forward, fullgraph=True, backend=graphs, dynamic=True)
            torch.testing.assert_close(traced(*tensors.values()), forward(*tensors.values()), rtol=1e-5, atol=1e-5)
            first = first or graphs.frame_count
    assert graphs.frame_count == first


@numerics.each(cases_lora_experts.STEP, only=("cpu",), every_isa=False)
def test_a_wrong_choice_of_experts_is_refused_in_compiled_code_too(provider, case):
    tensors, forward = function_of(provider, numerics.problem(case, DTYPES["f32"]))
    traced = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for wrong in (-1, case.E):
        chosen = tensors["chosen"].clone()
        chosen[-1, 0] = wrong
        for train in (False, True):
            with torch.set_grad_enabled(train), pytest.raises(RuntimeError, match="routing of other rows"):
                traced(*(tensors | {"chosen": chosen}).values())


@compiled_ops
@pytest.mark.parametrize("nested", [False, True])
def test_dynamic_tokens_of_a_quantized_weight(nested):
    W = nf4_writer.write(torch.randn(24, 40), nested=nested)
    A, B = torch.randn(4, 40, requires_grad=True), torch.randn(24, 4, requires_grad=True)
    graphs = CompileCounterWithBackend("aot_eager")

    def forward(x):
        return lora_quantized(x, W, None, [Adapter(A, B, 2.0)]) + dequantize(W, torch.float32).sum()

    traced, first = torch.compile(forward, fullgraph=True, backend=graphs, dynamic=True), 0
    for tokens in (13, 7, 64):
        x = torch.randn(2, tokens, 40, requires_grad=True)
        found = [(y := run(x), *torch.autograd.grad(y.square().sum(), (x, A, B))) for run in (traced, forward)]
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)
        first = first or graphs.frame_count
    assert graphs.frame_count == first, "one graph for every token count"


@pytest.mark.slow
@numerics.each(*STEPS[:3], only=("torch",))
def test_dynamic_tokens_of_groups_and_blocks_of_torch(provider, case):
    check_dynamic_tokens(provider, case)
