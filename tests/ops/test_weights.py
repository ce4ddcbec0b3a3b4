"""A frozen W may be repacked and kept: whatever happens to it between calls must be seen by the next."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from peft_fast import settings
from peft_fast.ops import Adapter, packing
from tests import numerics
from tests.cases import DTYPES, Case

PROVIDERS = [p for p in numerics.providers() if p.values[0].backend == "cpu"]
WIDE = Case("packed", lead=(300,), K=256, N=320, ranks=(8,), p=(0.1,), bias=True)

pytestmark = [
    pytest.mark.parametrize("provider", PROVIDERS),
    pytest.mark.parametrize("pack_mb", [0, 64]),
    pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str),
]


@pytest.fixture(autouse=True)
def _budget(pack_mb):
    with settings.override(pack_mb=pack_mb):
        yield


def layer(dtype):
    torch.manual_seed(0)
    base = nn.Linear(256, 320, dtype=dtype).requires_grad_(False)
    adapter = Adapter(torch.randn(8, 256, dtype=dtype) / 16, torch.randn(320, 8, dtype=dtype) / 3, 2.0)
    return base, adapter, torch.randn(300, 256, dtype=dtype, requires_grad=True)


def both_ways(provider, base, adapter, x):
    y = provider(x, base.weight, base.bias, [adapter])
    (dx,) = torch.autograd.grad(y, [x], torch.ones_like(y))
    return y.detach(), dx


WRITES = {
    "mul_": lambda m: m.weight.mul_(2),
    "data.copy_": lambda m: m.weight.data.copy_(torch.randn(320, 256)),
    "data.mul_ (no version)": lambda m: m.weight.data.mul_(-1),
    "new data": lambda m: setattr(m.weight, "data", torch.randn_like(m.weight)),
    "numpy memory": lambda m: m.weight.view(torch.uint8).numpy()[:, ::7].fill(3),
    "one element": lambda m: m.weight.data[77, 33].fill_(50.0),
    "load_state_dict": lambda m: m.load_state_dict({n: t * 3 for n, t in m.state_dict().items()}),
    "new parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.randn_like(m.weight), requires_grad=False)),
    "there and back": lambda m: m.to(torch.float64).to(m.dtype_before),
}


@pytest.mark.parametrize("write", WRITES)
def test_every_write_is_seen(provider, pack_mb, dtype, write):
    base, adapter, x = layer(dtype)
    base.dtype_before = dtype
    with provider.active():
        for _ in range(4):
            both_ways(provider, base, adapter, x)
        with torch.no_grad():
            WRITES[write](base)
        after = both_ways(provider, base, adapter, x)
        fresh = nn.Linear(256, 320, dtype=dtype).requires_grad_(False)
        fresh.weight.data, fresh.bias.data = base.weight.clone(), base.bias.clone()
        expected = both_ways(provider, fresh, adapter, x)
    assert all(numerics.same_bits(a, b) for a, b in zip(after, expected, strict=True))


def test_packed_equals_unpacked(provider, pack_mb, dtype):
    base, adapter, x = layer(dtype)
    with provider.active():
        calls = [both_ways(provider, base, adapter, x) for _ in range(4)]
        with settings.override(pack_mb=0):
            unpacked = both_ways(provider, base, adapter, x)
    for call in calls:
        assert all(numerics.same_bits(a, b) for a, b in zip(call, unpacked, strict=True))


def test_packed_is_no_less_accurate(provider, pack_mb, dtype):
    name = "f32" if dtype == torch.float32 else "bf16"
    for case in (WIDE, replace(WIDE, name="packed_conv1d", transposed=True)):
        p = numerics.problem(case, DTYPES[name])
        with provider.active():
            outs = [numerics.ours(p, provider) for _ in range(4)]
        for out in outs:
            assert not numerics.failures(numerics.judge(p.case, [out], [numerics.stock(p)], [numerics.truth(p)]))
        assert p.untouched()


def test_weights_are_let_go(provider, pack_mb, dtype):
    base, adapter, x = layer(dtype)
    with provider.active():
        for _ in range(4):
            both_ways(provider, base, adapter, x)
        weight = weakref.ref(base.weight)
        del base
        gc.collect()
    assert weight() is None


def test_budget(provider, pack_mb, dtype):
    packing.clear()
    with provider.active(), settings.override(pack_mb=min(pack_mb, 1)):
        layers = [layer(dtype) for _ in range(6)]
        for _ in range(3):
            for one in layers:
                both_ways(provider, *one)
                assert packing.used() <= packing.budget()
        assert pack_mb <= 0 or packing.used() > 0
    del layers, one
    gc.collect()
    assert packing.used() == 0, "copies go with their weights"


def test_a_full_cache_keeps_what_it_has(provider, pack_mb, dtype):
    """Layers run in a cycle: where newcomers evict, every call of a model above the budget packs in vain."""
    packing.clear()
    with provider.active(), settings.override(pack_mb=1):
        layers = [layer(dtype) for _ in range(6)]
        for one in layers:
            both_ways(provider, *one)
        kept = {key: entry[2].data_ptr() for key, entry in packing._entries.items()}
        assert 0 < len(kept) < 12
        for one in layers:
            both_ways(provider, *one)
        assert {key: entry[2].data_ptr() for key, entry in packing._entries.items()} == kept
    packing.clear()


def test_a_dead_weights_address_is_reused(provider, pack_mb, dtype):
    """The allocator hands a freed W's memory to the next: same address, same shape, other numbers."""
    _, adapter, x = layer(dtype)
    with provider.active():
        for seed in range(6):
            torch.manual_seed(seed)
            base = nn.Linear(256, 320, dtype=dtype).requires_grad_(False)
            for _ in range(3):
                y, dx = both_ways(provider, base, adapter, x)
            with settings.override(pack_mb=0):
                expected = both_ways(provider, base, adapter, x)
            assert numerics.same_bits(y, expected[0]) and numerics.same_bits(dx, expected[1])
            del base
