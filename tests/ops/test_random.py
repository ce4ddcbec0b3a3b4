"""Shapes, ranks, options and memory layouts nobody wrote down: the contract on whatever hypothesis finds."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_fast.ops import ACTIVATIONS
from tests import cases_lora_embedding, cases_lora_group, cases_lora_mlp, numerics
from tests.cases import Case
from tests.inputs import DTYPES, Layer

VIEWS = st.sampled_from(["plain", "columns", "transposed", "offset", "every_other"])
SIZES = st.integers(1, 150)
LEADS = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


@st.composite
def layouts(draw, *names):
    """A view of each kind of tensor; a vector has no second dimension to be transposed with."""
    views = {name: draw(VIEWS) for name in names}
    return {n: "plain" if n in ("bias", "ids") and view == "transposed" else view for n, view in views.items()}


@st.composite
def layers(draw, scalings=(0.25, 1.0, -2.0, 3.7)):
    n = draw(st.integers(0, 3))
    return Layer(
        N=draw(SIZES),
        ranks=tuple(draw(st.integers(1, 40)) for _ in range(n)),
        p=tuple(draw(st.sampled_from([0.0, 0.1, 0.5])) for _ in range(n)),
        scaling=tuple(draw(st.sampled_from(scalings)) for _ in range(n)),
        bias=draw(st.booleans()),
        adapter_bias=draw(st.booleans()),
        transposed=draw(st.booleans()),
        base_trains=draw(st.booleans()),
    )


@st.composite
def linears(draw):
    layer = draw(layers())
    options = {name: getattr(layer, name) for name in Layer.__dataclass_fields__ if name != "tensor_scaling"}
    layout = draw(layouts("x", "W", "A", "B", "g", "bias"))
    return Case("random", lead=draw(LEADS), K=draw(SIZES), layout=layout, **options)


# siblings and blocks add up the products of several layers: scalings that leave the base its share
MILD = (0.25, -0.5, 1.0)


@st.composite
def groups(draw):
    members = tuple(draw(st.lists(layers(MILD), min_size=1, max_size=4)))
    layout = draw(layouts("x", "W", "A", "B", "g", "bias"))
    return cases_lora_group.Case("random", members, draw(LEADS), draw(SIZES), layout=layout)


@st.composite
def blocks(draw):
    # relu's kink needs more draws than a random case is worth
    activation = draw(st.sampled_from([name for name in ACTIVATIONS if "relu" not in name]))
    halves = draw(st.sampled_from(["", "", "first", "second"]))
    gate = None if halves else draw(st.none() | layers(MILD))
    layout = draw(layouts("x", "W", "A", "B", "g", "bias"))
    up, down, p = draw(layers(MILD)), draw(layers(MILD)), draw(st.sampled_from([0.0, 0.2]))
    # a product of three factors leaves the errors to its largest elements: there have to be some, here by size
    sizes, lead = st.integers(16, 150), draw(st.lists(st.integers(4, 9), min_size=2, max_size=3).map(tuple))
    down, sizes = replace(down, N=draw(sizes)), (lead, draw(sizes), draw(sizes))
    return cases_lora_mlp.Case("random", activation, halves, gate, up, down, p, *sizes, layout=layout)


@st.composite
def embeddings(draw):
    V = draw(SIZES)
    return cases_lora_embedding.Case(
        "random",
        lead=draw(LEADS),
        V=V,
        D=draw(SIZES),
        ranks=(draw(st.integers(1, 40)),),
        scaling=(draw(st.sampled_from([0.25, -2.0])),),
        padding_idx=draw(st.none() | st.integers(0, V - 1)),
        scale=draw(st.none() | st.sampled_from([0.3, 45.2548])),
        base_trains=draw(st.booleans()),
        ids_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        layout=draw(layouts("ids", "W", "A", "B", "g")),
    )


KINDS = {"lora_linear": linears(), "lora_group": groups(), "lora_mlp": blocks(), "lora_embedding": embeddings()}
ROWS = [
    pytest.param(op, *p.values, dtypes, id=f"{dtypes}-{p.id}-{op}", marks=p.marks)
    for op in KINDS
    for p in numerics.providers(op)
    for dtypes in ("f32", "bf16", "bf16_f32_adapters")
    if numerics.shows(*p.values, dtypes, thoroughly=True)
]
MANY, FEW = ([row for row in ROWS if (row.values[0] == "lora_linear") == many] for many in (True, False))
QUIET = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize(("op", "provider", "dtypes"), MANY)
@settings(max_examples=12, **QUIET)
@given(data=st.data())
def test_contract_on_random_layers(op, provider, dtypes, data):
    judge(data.draw(KINDS[op]), provider, dtypes)


@pytest.mark.parametrize(("op", "provider", "dtypes"), FEW)
@settings(max_examples=5, **QUIET)
@given(data=st.data())
def test_contract_on_random_groups_blocks_and_tables(op, provider, dtypes, data):
    judge(data.draw(KINDS[op]), provider, dtypes)


def judge(case, provider, dtypes):
    if refusal := numerics.takes(provider, DTYPES[dtypes]):
        pytest.skip(refusal)
    assert not numerics.failures(numerics.default_verdicts(provider, case, dtypes))
