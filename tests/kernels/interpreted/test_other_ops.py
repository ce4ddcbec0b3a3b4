"""The numeric contract of the other ops with Triton kernels, kernel by kernel in Python."""

import pytest
import torch

from peft_fast import ops
from tests import (
    cases_dora_linear,
    cases_lora_decode,
    cases_lora_embedding,
    cases_lora_group,
    cases_lora_mlp,
    numerics,
)
from tests.inputs import DTYPES, Layer
from tests.kernels.interpreted.rows import rows

# tiles here are 32 rows by 128 columns: every block is crossed, and no sibling ends where a tile does
CROSSING = cases_lora_group.Case(
    "crosses_tiles",
    (
        Layer(N=140, ranks=(16,), p=(0.1,), bias=True),
        Layer(N=33, ranks=(), p=(), scaling=()),
        Layer(N=200, ranks=(40, 3), p=(0.3, 0.0), scaling=(0.5, 2.0)),
    ),
    lead=(35,),
    K=140,
)
# op -> its table, and the cases of each situation
TABLES = {
    "lora_group": (
        cases_lora_group,
        {
            "bf16": "one_token qkv_biased different frozen frozen_first rank_256 all_dropped base_trains many"
            " everything_awkward strided crosses_tiles",
            "f32": "different crosses_tiles",
            "f16_f32_adapters_autocast": "qkv_biased",
        },
    ),
    "lora_mlp": (
        cases_lora_mlp,
        {
            "bf16": "silu_gated gelu_plain gelu_tanh_gated quick_gelu_plain relu_gated relu2_plain first_half"
            " second_half own_dropout own_dropout_drops_all everything frozen ragged strided",
            "f32": "silu_plain gelu_gated gelu_tanh_plain quick_gelu_gated relu_plain relu2_gated second_half",
        },
    ),
    "lora_embedding": (
        cases_lora_embedding,
        {
            "bf16": "gemma one_word many_tokens rank_17 columns",
            "bf16_f32_adapters": "padding gemma one_word many_tokens int32 tensor_scaling rank_256 ragged"
            " base_trains ids_every_other transposed",
            "f32": "padding gemma",
            "f16": "plain",
        },
    ),
    "lora_decode": (
        cases_lora_decode,
        {
            "bf16_f32_adapters": "lead_1 lead_3 conv1d_7 long_chain_narrow rank_17 rank_256 three_adapters"
            " adapter_biases tensor_scaling everything_awkward x_every_other ragged_1x1 no_adapter",
            "bf16": "lead_32 three_adapters",
            "f32": "lead_3 conv1d_3 long_chain_narrow both_biases",
            "f16": "three_adapters",
            "f16_f32_adapters_autocast": "both_biases",
        },
    ),
    "dora_linear": (
        cases_dora_linear,
        {
            "bf16": "bias dropout_0.5",
            "bf16_f32_adapters": "tokens_1 tokens_67 rank_17 rank_256 bias base_trains conv1d dropout_0.5 dropout_1.0"
            " young x_columns_undropped W_columns g_columns x_permuted bias_every_other",
            "f32": "bias dropout_0.5 base_trains",
            "f16_f32_adapters_autocast": "bias",
        },
    ),
}
# the plan of a block is that of its linear layers
PROVIDERS = {op: [p for p in numerics.gpu_providers(op) if op == "lora_group" or p.plan != "fused"] for op in TABLES}
ROWS = [
    pytest.param(provider, *row.values, id=f"{row.id}-{provider}")
    for op, (table, kinds) in TABLES.items()
    for row in rows(kinds, [case for case in (*table.CASES, CROSSING) if case.op == op], f"{op}-")
    for provider in PROVIDERS[op]
]
EMPTY = [
    pytest.param(provider, case, id=f"{op}-{provider}-{case.name}")
    for op, (table, _) in TABLES.items()
    for case in table.EMPTY
    for provider in PROVIDERS[op]
]
pytestmark = pytest.mark.usefixtures("poisoned_memory", "no_call_left_to_torch")


@pytest.mark.parametrize(("provider", "case", "dtypes"), ROWS)
def test_no_less_accurate_than_peft(provider, case, dtypes):
    assert not numerics.failures(numerics.default_verdicts(provider, case, dtypes))


@pytest.mark.parametrize(("provider", "case"), EMPTY)
def test_no_tokens(provider, case):
    p = numerics.problem(case, DTYPES["bf16"])
    out = numerics.ours(p, provider)
    for name, t in p.tensors.items():
        if t.requires_grad:
            assert numerics.same_bits(out[f"d{name}"], torch.zeros_like(t))


@pytest.mark.parametrize("op", TABLES)
def test_twice_the_same_bits(op):
    table = TABLES[op][0]
    case = next(
        c for c in table.CASES if c.name in ("qkv_biased", "own_dropout", "many_tokens", "dropout_0.5", "lead_3")
    )
    for provider in PROVIDERS[op]:
        p = numerics.problem(case, DTYPES["bf16_f32_adapters"])
        first, again = numerics.ours(p, provider), numerics.ours(p, provider)
        assert all(numerics.same_bits(first[n], again[n]) for n in first)


def test_a_token_that_is_none_reads_nothing():
    """On a GPU nothing asks whether ids are in range: what is not gives rows of NaN, and no gradient."""
    ids = torch.tensor([3, -1, 9, 1 << 40, 3])
    W, A, B = torch.randn(9, 20), torch.randn(4, 9, requires_grad=True), torch.randn(20, 4)
    y = ops.lora_embedding(ids, W, [ops.Adapter(A, B)], backend="triton")
    assert y.isnan().any(1).tolist() == y.isnan().all(1).tolist() == [False, True, True, True, False]
    (dA,) = torch.autograd.grad(y[[0, 4]].sum(), A)
    assert (dA != 0).any(0).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("provider", PROVIDERS["lora_group"], ids=str)
def test_a_sibling_without_adapters_is_the_frozen_layer(provider):
    p = numerics.problem(CROSSING, DTYPES["bf16"])
    frozen = ops.lora_linear(p.tensors["x"], p.tensors["1_W"], backend=provider.backend, plan=provider.plan)
    assert numerics.same_bits(numerics.ours(p, provider)["y1"], frozen.detach())
