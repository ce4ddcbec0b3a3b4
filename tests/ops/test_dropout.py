"""The dropout mask: its rate, its independence, who decides it, and torch's generator around it."""

from dataclasses import replace

import pytest
import torch

from peft_fast import native
from peft_fast.ops import Adapter, draw_seed, dropout_mask, lora_linear
from peft_fast.reference.dropout import keep_mask
from tests import cases_lora_embedding, cases_lora_group, cases_lora_mlp, numerics
from tests.cases import DTYPES, Case
from tests.inputs import Layer

PROVIDERS = numerics.providers()
DROPPED = Case("dropped", lead=(67,), K=131, N=40, ranks=(8,), p=(0.3,))


def seeds(n, seed=0):
    torch.manual_seed(seed)
    return draw_seed(n, numerics.DEVICE)


def seen_mask(provider, M, K, p, seed):
    """The mask a provider really used: with A = B = I and W = 0, y of all ones is the scaled mask."""
    eye = torch.eye(K)
    torch.manual_seed(seed)
    return provider(torch.ones(M, K), torch.zeros(K, K), None, [Adapter(eye, eye, 1.0, p)]) != 0


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_keep_rate_over_ten_million_draws(p):
    M, K = 2500, 4000
    kept = dropout_mask(seeds(1)[0], M, K, p)
    sigma = (p * (1 - p)) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) < 5 * sigma / (M * K) ** 0.5
    for line, n in ((kept.double().mean(0), M), (kept.double().mean(1), K)):
        # 4000 columns and 2500 rows: the largest of so many normal deviations stays below 5.5 sigma
        assert (line - (1 - p)).abs().max() < 5.5 * sigma / n**0.5
        assert abs(line.var() / (sigma**2 / n) - 1) < 0.15, "rows or columns vary more or less than chance"


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_siblings_rows_and_neighbours_are_independent(p):
    M, K = 1000, 1000
    one, two = (dropout_mask(s, M, K, p).double() - (1 - p) for s in seeds(2))
    near = dropout_mask(seeds(1)[0] + 1, M, K, p).double() - (1 - p)
    first, variance = one, p * (1 - p)
    pairs = {
        "sibling": (one, two),
        "next seed": (first, near),
        "next column": (one[:, 1:], one[:, :-1]),
        "next row": (one[1:], one[:-1]),
        "eighth column": (one[:, 8:], one[:, :-8]),
        "transposed": (one, one.t()),
    }
    for name, (a, b) in pairs.items():
        assert abs((a * b).mean() / variance) < 5 / a.numel() ** 0.5, name


def test_siblings_in_one_call_have_their_own_masks():
    K = 64
    a, b = Adapter(torch.eye(K), torch.eye(K), 1.0, 0.5), Adapter(torch.eye(K), torch.eye(K), 1000.0, 0.5)
    torch.manual_seed(0)
    y = lora_linear(torch.ones(300, K), torch.zeros(K, K), None, [a, b])
    both = ((y > 1000) & (y.remainder(1000) > 0)).double().mean()
    assert abs(both - 0.25) < 5 * (0.1875 / y.numel()) ** 0.5


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 8), (67, 131), (5, 1024), (0, 9), (5, 0)])
@pytest.mark.parametrize("p", [0.0, 1e-6, 0.05, 0.5, 0.999, 1.0])
def test_compiled_mask_is_the_reference(shape, p):
    for seed in [*seeds(3), torch.tensor(0), torch.tensor(-1), torch.tensor(2**63 - 1), torch.tensor(2**32)]:
        mask = dropout_mask(seed, *shape, p)
        assert mask.dtype == torch.bool and torch.equal(mask, keep_mask(seed, *shape, p))


def test_mask_depends_on_the_element_alone():
    seed = seeds(1)[0]
    whole = dropout_mask(seed, 200, 300, 0.3)
    for M, K in ((1, 300), (200, 1), (199, 299), (64, 77)):
        assert torch.equal(dropout_mask(seed, M, K, 0.3), whole[:M, :K])


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_every_backend_uses_this_mask(provider, p):
    M, K = 77, 130
    with provider.active():
        seen = seen_mask(provider, M, K, p, seed=5)
    assert torch.equal(seen, keep_mask(seeds(1, seed=5)[0], M, K, p))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_mask_does_not_depend_on_threads(provider, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with provider.active():
            seen = seen_mask(provider, 300, 70, 0.3, seed=6)
            mask = dropout_mask(seeds(1, seed=6)[0], 300, 70, 0.3)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(seen, mask) and torch.equal(mask, keep_mask(seeds(1, seed=6)[0], 300, 70, 0.3))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("p", [0.05, 0.25, 0.5])
def test_kept_elements_are_scaled(provider, p):
    torch.manual_seed(1)
    eye = torch.eye(33)
    x = torch.randn(50, 33)
    with provider.active():
        y = provider(x, torch.zeros(33, 33), None, [Adapter(eye, eye, 1.0, p)])
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / (1 - p), rtol=1e-6, atol=0)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_dropping_all_leaves_the_base(provider):
    p = numerics.problem(replace(DROPPED, p=(1.0,)), DTYPES["f32"])
    t = p.tensors
    with provider.active():
        out = numerics.ours(p, provider)
        base = provider(t["x"], t["W"], None, [])
    torch.testing.assert_close(out["y"], base, rtol=1e-6, atol=1e-6)
    assert not out["dA0"].any() and not out["dB0"].any()


@pytest.mark.parametrize("provider", PROVIDERS)
def test_manual_seed_reproduces(provider):
    p = numerics.problem(DROPPED, DTYPES["f32"])
    with provider.active():
        first, again = numerics.ours(p, provider), numerics.ours(p, provider)
        p.seed += 1
        other = numerics.ours(p, provider)
    assert all(numerics.same_bits(first[n], again[n]) for n in first)
    assert not torch.equal(first["y"], other["y"])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_state_of_the_generator(provider):
    """One draw per dropped call; none in eval mode, none in backward; a saved state brings the mask back."""
    p = numerics.problem(DROPPED, DTYPES["f32"])
    t = p.tensors
    with provider.active():
        torch.manual_seed(9)
        start = numerics.rng_state()
        provider(t["x"], t["W"], None, [a._replace(p=0.0) for a in p.adapters(t)])
        assert torch.equal(numerics.rng_state(), start), "p = 0 draws nothing"
        y = provider(t["x"], t["W"], None, p.adapters(t))
        after = numerics.rng_state()
        assert not torch.equal(after, start)
        second = provider(t["x"], t["W"], None, p.adapters(t))
        assert not torch.equal(second, y), "each call has its own mask"
        numerics.set_rng_state(after)
        y.backward(p.g)
        assert torch.equal(numerics.rng_state(), after), "backward draws nothing"
        numerics.set_rng_state(start)
        assert numerics.same_bits(provider(t["x"], t["W"], None, p.adapters(t)), y)
    numerics.set_rng_state(start)
    draw_seed(1, numerics.DEVICE)
    assert torch.equal(numerics.rng_state(), after), "the draw is draw_seed(number of adapters)"


@numerics.each(cases_lora_group.STEP, cases_lora_mlp.STEP, cases_lora_embedding.STEP)
def test_state_of_the_generator_around_groups_and_blocks(provider, case):
    """One draw of a seed for each adapter, and one for the block's own mask; none where nothing is dropped."""
    p = numerics.problem(case, DTYPES["f32"])
    with provider.active():
        torch.manual_seed(9)
        start = numerics.rng_state()
        ys = case.ours(provider, p.tensors)
        after = numerics.rng_state()
        torch.autograd.backward(ys, list(p.gs.values()) if isinstance(ys, tuple) else p.g)
    assert torch.equal(numerics.rng_state(), after), "backward draws nothing"
    numerics.set_rng_state(start)
    if case.dropouts():
        draw_seed(len(case.dropouts()), numerics.DEVICE)
    assert torch.equal(numerics.rng_state(), after)


@numerics.each(cases_lora_group.STEP, cases_lora_mlp.STEP)
def test_each_layer_has_its_own_mask(provider, case):
    """Siblings with equal weights and adapters give different outputs, and so do two calls."""
    same = Layer(40, (8,), (0.5,), (1.0,))
    options = {"layers": (same, same)} if case.op == "lora_group" else {"gate": None, "up": same, "p": 0.5}
    p = numerics.problem(replace(case, **options), DTYPES["f32"])
    t = p.tensors
    if case.op == "lora_group":
        t |= {f"1_{n}": t[f"0_{n}"] for n in ("W", "A0", "B0")}
    with provider.active(), torch.no_grad():
        first, second = numerics.call(p, provider), p.case.ours(provider, t)
    if case.op == "lora_group":
        assert not torch.equal(first[0], first[1])
        first, second = first[0], second[0]
    assert not torch.equal(first, second)


def test_seeds_use_all_their_bits():
    drawn = seeds(4000)
    assert drawn.dtype == torch.int64 and len(drawn.unique()) == 4000 and (drawn >= 0).all()
    bits = torch.stack([(drawn >> i) & 1 for i in range(62)]).double().mean(1)
    assert ((bits - 0.5).abs() < 5 * 0.5 / 4000**0.5).all()


def test_isa_of_the_mask_does_not_matter():
    if not native.load():
        pytest.skip(native.reason())
    seed = seeds(1)[0]
    masks = []
    for isa in numerics.isas():
        with numerics.Provider("cpu", isa=isa).active():
            masks.append(dropout_mask(seed, 97, 203, 0.37))
    assert all(torch.equal(m, keep_mask(seed, 97, 203, 0.37)) for m in masks)
