"""lora_experts on the Triton backend: its contract, its addresses, and experts of transformers, kernel by kernel."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import peft_fast
from peft_fast import ops, settings
from peft_fast.kernels import device, gemm, lora_experts
from peft_fast.ops import Adapter
from peft_fast.ops.spec import Routing
from tests import cases_lora_experts, numerics
from tests.inputs import DTYPES
from tests.kernels.experts import launches
from tests.kernels.interpreted.addresses import addresses
from tests.kernels.interpreted.rows import rows

BF16, F32 = torch.bfloat16, torch.float32
# blocks of either width, some of one expert, and no size that a tile divides
CROSSING = cases_lora_experts.Case("crossing", T=150, E=3, K=140, N=150, ranks=(17,), bias=True, tokens=True)
TRITON = numerics.Provider("triton", "accumulate")
# where a kernel reads does not depend on the dtype, nor what it rounds on the shape
KINDS = {
    "bf16_f32_adapters": "tokens transposed_bias transposed_tokens idle_experts one_expert one_row two_adapters rank_17"
    " rank_256 ragged_3x130 ragged_257x65 no_adapter_transposed x_columns W_every_other g_expanded misaligned",
    "bf16": "plain crossing",
    "f32": "bias rank_64 tensor_scaling",
    "f16": "transposed_bias young two_adapters",
}
ROWS = rows(KINDS, (*cases_lora_experts.CASES, CROSSING))
MODULES = [device, gemm, lora_experts]
pytestmark = pytest.mark.usefixtures("poisoned_memory", "no_call_left_to_torch")


@pytest.mark.parametrize(("case", "dtypes"), ROWS)
def test_no_less_accurate_than_peft(case, dtypes):
    assert not numerics.failures(numerics.default_verdicts(TRITON, case, dtypes))


@pytest.mark.parametrize("case", cases_lora_experts.EMPTY, ids=lambda c: c.name)
def test_no_tokens(case):
    p = numerics.problem(case, DTYPES["bf16"])
    out = numerics.ours(p, TRITON)
    for name, t in p.tensors.items():
        if t.requires_grad:
            assert numerics.same_bits(out[f"d{name}"], torch.zeros_like(t))


def test_both_widths_of_blocks_and_several_of_an_expert_are_crossed():
    S, E, N, K = CROSSING.S, CROSSING.E, CROSSING.N, CROSSING.K
    wide = lora_experts.product_tile(S, E, N, K, 17, BF16)
    narrow = lora_experts.product_tile(19, 4, 40, 48, 8, BF16)
    assert wide.BM > narrow.BM and CROSSING.routing.counts.max() > 2 * wide.BM


def test_twice_the_same_bits():
    p = numerics.problem(next(c for c in cases_lora_experts.CASES if c.name == "two_adapters"), DTYPES["bf16"])
    first, again = numerics.ours(p, TRITON), numerics.ours(p, TRITON)
    assert all(numerics.same_bits(first[n], again[n]) for n in first)


@pytest.mark.parametrize("tokens", [False, True])
def test_rows_of_no_expert_are_nan_and_touch_no_gradient(tokens):
    """A GPU's routing may have them, behind all others."""
    E, K, N, S = 3, 20, 24, 40
    counts = torch.tensor([17, 0, 20])
    order = torch.arange(S)
    routing = Routing(order, order, counts, 1)
    x, W = torch.randn(S, K, requires_grad=True), torch.randn(E, N, K)
    A, B = torch.randn(2 * E, K, requires_grad=True), torch.randn(N, 2 * E, requires_grad=True)
    y = ops.lora_experts(x, W, routing, None, [Adapter(A, B)], tokens=tokens, backend="triton")
    assert y[37:].isnan().all() and not y[:37].isnan().any()
    grads = torch.autograd.grad(y, [x, A, B], torch.ones_like(y))
    assert grads[0][37:].isnan().all() and not grads[0][:37].isnan().any()
    assert not any(g.isnan().any() for g in grads[1:])
    torch_y = ops.lora_experts(x, W, routing, None, [Adapter(A, B)], tokens=tokens, backend="torch")
    torch.testing.assert_close(torch_y, y, equal_nan=True, rtol=1e-5, atol=1e-5)


class Layer(torch.nn.Module):
    def __init__(self, dtype):
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        super().__init__()
        config = Qwen3MoeConfig(hidden_size=32, moe_intermediate_size=24, num_experts=5, num_experts_per_tok=2)
        config._experts_implementation = "grouped_mm"
        self.experts = Qwen3MoeExperts(config).to(dtype)
        for p in self.experts.parameters():
            torch.nn.init.normal_(p, std=0.2)

    def forward(self, x, chosen, weights):
        return self.experts(x, chosen, weights)


@pytest.mark.parametrize("targets", [["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"]])
def test_the_experts_of_a_model(targets):
    """Through accelerate(), against PEFT's own forward."""
    torch.manual_seed(0)
    config = {"r": 4, "init_lora_weights": False, "target_modules": [], "target_parameters": targets}
    model = peft_fast.accelerate(get_peft_model(Layer(F32), LoraConfig(**config)))
    x, (weights, chosen) = torch.randn(19, 32, requires_grad=True), torch.randn(19, 5).softmax(-1).topk(2)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def step():
        y = model(x, chosen, weights)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    with peft_fast.disabled():
        expected = step()
    with settings.override(backend="triton"):
        got, report = step(), peft_fast.report(model)
        assert not report.slow and not report.handed_back.keys() - {"inside `with peft_fast.disabled()`"}
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


# addresses


def storage(t):
    return t.untyped_storage()._cdata


def of(result, found):
    return [seen for launch in found for seen in launch if storage(seen.tensor) == storage(result) and seen.stores]


SHAPES = {
    "one": ((1,), 0, 1, 1, 1, 0),
    "ragged": ((33, 0, 1, 64), 3, 131, 257, 17, 50),
    "idle": ((0, 0, 40, 0, 0), 0, 64, 128, 16, 0),
    "wide_rank": ((19, 5), 0, 130, 66, 150, 12),
    "nobody_else": ((0, 0, 0), 35, 70, 60, 5, 35),
}
OPS = list(launches((1,), 0, 1, 1, 1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", OPS)
def test_inside_and_once(op, shape):
    with addresses() as found:
        (result,) = launches(*SHAPES[shape][:-1], adapter=F32, tokens=SHAPES[shape][-1])[op]()
    seen = of(result, found)
    if "shrink" in op and SHAPES[shape][1]:  # rows of no expert have no H
        stored = sum(s.stores for s in seen)
        assert stored == sum(SHAPES[shape][0]) * SHAPES[shape][4]
    else:
        assert [s.covered for s in seen] == [True], "every element is stored, by one launch"


MANY = (1 << 23) + 3
FAR = {
    # no routing of so many rows has more blocks, so the last program has the last row
    "rows": ((1, (1 << 26) + 1), 40, 48),
    "K": ((1, 289), MANY, 40),
    "N": ((1, 289), 40, MANY),
}


@pytest.mark.parametrize("shape", FAR)
@pytest.mark.parametrize("op", OPS)
def test_past_two_billion_elements(op, shape):
    """Offsets are computed in 64 bits: the last program reaches exactly the last element."""
    counts, K, N = FAR[shape]
    with addresses(corners=MODULES) as found:
        (result,) = launches(counts, 0, K, N, 16, adapter=F32)[op]()
    assert max(seen.high for seen in of(result, found)) == result.numel() - 1


@pytest.mark.parametrize("op", [op for op in OPS if op != "collect"])
def test_rows_far_apart(op):
    x = torch.empty_strided((67, 72), (1 << 29, 1), dtype=BF16, device="meta")
    with addresses() as found:
        launches((20, 0, 47), 0, 72, 72, 16, x=x)[op]()
    reads = [seen for launch in found for seen in launch if storage(seen.tensor) == storage(x)]
    assert reads and all((seen.low, seen.high) == (0, x.numel() - 1) for seen in reads)


@pytest.mark.parametrize("op", OPS)
def test_no_rows_launch_no_product(op):
    with addresses() as found:
        (result,) = launches((0, 0), 0, 40, 30, 16)[op]()
    stored = sum(seen.stores for launch in found for seen in launch)
    assert stored == (result.numel() if op in ("dA", "dB", "dbias") else 0)
