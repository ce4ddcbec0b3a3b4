"""Every live backend, every row of each op's table: no less accurate than PEFT, inputs untouched."""

import pytest
import torch

from tests import (
    cases,
    cases_lora_embedding,
    cases_lora_experts,
    cases_lora_group,
    cases_lora_mixed,
    cases_lora_mlp,
    numerics,
)
from tests.inputs import DTYPES

OPS = [cases, cases_lora_group, cases_lora_mlp, cases_lora_embedding, cases_lora_experts, cases_lora_mixed]
PROVIDERS = numerics.providers()
OF = {table: numerics.providers(table.CASES[0].op) for table in OPS}
# the engines' own tables, in which a tile's edges and a block's come in every way; elsewhere the corners do
ENGINES = (cases, cases_lora_group, cases_lora_mlp)
ROWS = [
    pytest.param(*p.values, case, dtypes, id=f"{p.id}-{case.op}-{dtypes}-{case.name}", marks=p.marks)
    for table in OPS
    for case, dtypes in table.rows()
    for p in OF[table]
    if numerics.shows(*p.values, dtypes, thoroughly=table in ENGINES or case in table.CORNERS)
]


@pytest.mark.parametrize(("provider", "case", "dtypes"), ROWS)
def test_no_less_accurate_than_peft(provider, case, dtypes):
    if refusal := numerics.takes(provider, DTYPES[dtypes]):
        pytest.skip(refusal)
    assert not numerics.failures(numerics.default_verdicts(provider, case, dtypes))


MIXED = [
    pytest.param(*p.values, case, dtypes, id=f"{p.id}-{case.op}-{dtypes}-{case.name}", marks=p.marks)
    for table in OPS
    if table.CASES[0].rounds_adapters  # an embedding is exact as it is
    for dtypes in DTYPES
    if DTYPES[dtypes].mixed and not DTYPES[dtypes].autocast
    for case in table.CORNERS
    for p in OF[table]
]


@pytest.mark.parametrize(("provider", "case", "dtypes"), MIXED)
def test_exact_keeps_the_float32_arithmetic_of_peft(provider, case, dtypes):
    if refusal := numerics.takes(provider, DTYPES[dtypes], exact=True):
        pytest.skip(refusal)
    with provider.active():
        found = numerics.verdicts(provider, case, dtypes, round_adapters=False, exact=True)
    assert not numerics.failures(found)


NOTHING = [
    pytest.param(*p.values, case, id=f"{p.id}-{case.name}", marks=p.marks)
    for table in OPS
    for case in table.EMPTY
    for p in OF[table]
]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("provider", "case"), NOTHING)
def test_no_tokens(provider, case, dtypes):
    if refusal := numerics.takes(provider, DTYPES[dtypes]):
        pytest.skip(refusal)
    p = numerics.problem(case, DTYPES[dtypes])
    with provider.active():
        out = numerics.ours(p, provider)
    for name, shape in case.outputs().items():
        assert out[name].shape == shape
    for name, t in p.tensors.items():
        if t.requires_grad:
            assert numerics.same_bits(out[f"d{name}"], torch.zeros_like(t)), f"d{name} of no tokens is zero"


F64 = [
    pytest.param(*p.values, case, id=f"{p.id}-{case.op}", marks=p.marks)
    for table, case in zip(OPS, [numerics.by_name("three_adapters"), *(t.STEP for t in OPS[1:])], strict=True)
    for p in OF[table]
]


@pytest.mark.parametrize(("provider", "case"), F64)
def test_float64_is_the_reference(provider, case):
    dtypes = type(DTYPES["f32"])(*[torch.float64] * 3)
    if refusal := numerics.takes(provider, dtypes):
        pytest.skip(refusal)
    p = numerics.problem(case, dtypes)
    out, exact = numerics.ours(p, provider), numerics.truth(p)
    for name, value in exact.items():
        torch.testing.assert_close(out[name], value, rtol=1e-12, atol=1e-12)


def test_the_table_names_each_case_once():
    for table in OPS:
        names = [c.name for c in (*table.CASES, *table.EMPTY)]
        assert len(set(names)) == len(names)


def test_memory_is_poisoned():
    assert torch.empty(3).isnan().all() and torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert torch.zeros(2).new_empty(2, 2).isnan().all() and torch.empty_strided((3,), (1,)).isnan().all()


def test_what_the_default_gives_up_beside_float32_adapters():
    """README's Exactness: the documented choice costs accuracy of dA and dB, exact=True does not."""
    problem = numerics.problem(numerics.by_name("rank_16"), DTYPES["bf16_f32_adapters"])
    stock, exact = numerics.stock(problem), numerics.truth(problem)

    def error(found):
        return (found["dA0"].double() - exact["dA0"]).square().mean().sqrt()

    torch_backend = numerics.Provider("torch")
    assert error(numerics.ours(problem, torch_backend)) > 10 * error(stock)
    assert error(numerics.ours(problem, torch_backend, exact=True)) < 1.05 * error(stock) + 1e-6
