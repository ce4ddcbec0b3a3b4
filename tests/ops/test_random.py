"""Shapes, ranks, options and memory layouts nobody wrote down: the contract on whatever hypothesis finds."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import numerics
from tests.cases import DTYPES, Case

PROVIDERS = numerics.providers()
VIEWS = st.sampled_from(["plain", "columns", "transposed", "offset", "every_other"])
SIZES = st.integers(1, 150)


@st.composite
def cases(draw):
    n = draw(st.integers(0, 3))
    lead = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    names = ("x", "W", "A", "B", "g") + (("bias",) if (bias := draw(st.booleans())) else ())
    views = {name: draw(VIEWS) for name in names}
    return Case(
        "random",
        lead=lead,
        K=draw(SIZES),
        N=draw(SIZES),
        ranks=tuple(draw(st.integers(1, 40)) for _ in range(n)),
        p=tuple(draw(st.sampled_from([0.0, 0.1, 0.5])) for _ in range(n)),
        scaling=tuple(draw(st.sampled_from([0.25, 1.0, -2.0, 3.7])) for _ in range(n)),
        bias=bias,
        adapter_bias=draw(st.booleans()),
        transposed=draw(st.booleans()),
        base_trains=draw(st.booleans()),
        # a vector has no second dimension to be transposed with
        layout={name: "plain" if name == "bias" and view == "transposed" else view for name, view in views.items()},
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16_f32_adapters"])
@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_contract_on_random_cases(provider, dtypes, case):
    if refusal := numerics.takes(provider, DTYPES[dtypes]):
        pytest.skip(refusal)
    assert not numerics.failures(numerics.default_verdicts(provider, case, dtypes))
