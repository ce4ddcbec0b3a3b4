"""Faults planted in the torch backend of groups, blocks and embeddings: the contract must reject each of them."""

import pytest
import torch

from peft_fast.backends.torch import lora_embedding, lora_group, lora_linear, lora_mlp
from tests import cases_lora_embedding, cases_lora_group, cases_lora_mlp, numerics
from tests.inputs import Layer

TORCH = numerics.Provider("torch")
ONE = Layer(72, (16,), (0.3,), (0.8,), bias=True)
GROUP = cases_lora_group.Case("planted_group", (ONE, ONE, Layer(40, (3,), (0.0,), (-0.6,))), lead=(131,), K=96)
GATED = cases_lora_mlp.Case("planted_gated", gate=ONE, up=ONE, down=ONE, p=0.2, lead=(131,), K=96, I=104)
PLAIN = cases_lora_mlp.Case("planted_plain", "gelu", up=ONE, down=ONE, lead=(131,), K=96, I=104)
HALVES = cases_lora_mlp.Case("planted_halves", "gelu_tanh", "first", up=ONE, down=ONE, lead=(131,), K=96, I=104)
TABLE = cases_lora_embedding.Case("planted_table", (331,), V=61, D=72, ranks=(16,), padding_idx=7, scale=2.7)
CASES = {case.name: case for case in (GROUP, GATED, PLAIN, HALVES, TABLE)}


def argument(i, change):
    """A fault in argument i of a function."""

    def fault(run, *args):
        args = list(args)
        args[i] = change(args[i])
        return run(*args)

    return fault


def result(change, i=None):
    """A fault in the result, or in element i of it."""

    def fault(run, *args):
        found = run(*args)
        return change(found) if i is None else (*found[:i], change(found[i]), *found[i + 1 :])

    return fault


def last(t, dim):
    """t, without its last row or column."""
    kept = t.clone()
    kept.select(dim, -1).zero_()
    return kept


def first_of(change):
    return lambda many: [change(many[0]), *many[1:]]


def no_rescaling(x, seed, p):
    return torch.where(numerics.dropout_mask(seed, *x.shape, p), x, 0)


def field(**changes):
    return lambda spec: spec._replace(**{name: change(getattr(spec, name)) for name, change in changes.items()})


def swapped(many):
    return [many[1], many[0], *many[2:]]


def overwritten(dA, ids, D):
    dA[:, ids] = D.t()
    return dA


louder = field(scalings=lambda s: [s[0] * 1.01, *s[1:]])
off = field(p=lambda p: 0.0)
# fault -> case, module, function, how it goes wrong, outputs that must be rejected
FAULTS = {
    "scale of a sibling off by 1 %": (GROUP, lora_group, "forward", argument(-1, louder), "y0 d0_B0"),
    "scale off by 1 % in backward": (GROUP, lora_group, "backward", argument(-2, louder), "dx d0_A0"),
    "the neighbour's mask in forward": (GROUP, lora_group, "forward", argument(5, lambda s: s.roll(1)), "y0 y1"),
    "the neighbour's mask in backward": (GROUP, lora_group, "backward", argument(7, lambda s: s.roll(1)), "dx d0_A0"),
    "one mask for all": (GROUP, lora_group, "forward", argument(5, lambda s: s[:1].expand(3)), "y1 d1_B0"),
    "no 1/(1-p)": (GROUP, lora_linear, "dropped", lambda _, *args: no_rescaling(*args), "y0 dx d0_A0 d1_B0"),
    "siblings swapped": (GROUP, lora_group, "forward", result(swapped, 0), "y0 y1"),
    "gradients swapped": (GROUP, lora_group, "backward", argument(0, swapped), "dx d0_A0 d1_B0 d0_bias"),
    "biases swapped": (GROUP, lora_group, "forward", argument(2, swapped), "y0 y1"),
    "stale x": (GROUP, lora_group, "backward", argument(1, lambda x: x.roll(1, 0)), "d0_A0 d1_A0 d2_A0"),
    "H of the neighbour": (GROUP, lora_group, "backward", argument(6, lambda H: H.roll(16, 1)), "d0_B0 d1_B0"),
    "last token missing from x": (GROUP, lora_group, "backward", argument(1, lambda x: last(x, 0)), "d0_A0 d2_A0"),
    "last column of a gradient": (
        GROUP,
        lora_group,
        "backward",
        argument(0, first_of(lambda g: last(g, 1))),
        "dx d0_A0",
    ),
    "dx of a base forgotten": (GROUP, lora_linear, "add_base", argument(1, lambda parts: list(parts)[1:]), "dx"),
    "dx of the adapters forgotten": (GROUP, lora_linear, "expand_dx", result(torch.zeros_like), "dx"),
    "dA of the last column": (GROUP, lora_linear, "outer", result(lambda dA: last(dA, 1)), "d0_A0 d2_A0"),
    "another activation": (PLAIN, lora_mlp, "activate", argument(3, field(activation=lambda _: "gelu_tanh")), "y"),
    "its derivative of another": (
        PLAIN,
        lora_mlp,
        "activate_backward",
        argument(4, field(activation=lambda _: "silu")),
        "dx dup_A0 dup_B0",
    ),
    "gate and up swapped": (GATED, lora_mlp, "activate", lambda run, a, b, *rest: run(b, a, *rest), "y ddown_B0"),
    "halves swapped": (HALVES, lora_mlp, "activate", argument(3, field(halves=lambda _: "second")), "y ddown_A0"),
    "halves of the gradient swapped": (
        HALVES,
        lora_mlp,
        "activate_backward",
        result(lambda d: d.roll(d.shape[1] // 2, 1), 1),
        "dx dup_A0 dup_B0",
    ),
    "no dropout of h": (GATED, lora_mlp, "activate", argument(3, off), "y ddown_A0"),
    "no dropout of dh": (GATED, lora_mlp, "activate_backward", argument(4, off), "dx dup_A0 dgate_B0"),
    "another mask of dh": (GATED, lora_mlp, "activate_backward", argument(3, lambda s: s + 1), "dx dup_A0 dgate_A0"),
    "h twice as large in backward": (GATED, lora_mlp, "activate_backward", argument(0, lambda d: 2 * d), "dx dgate_A0"),
    "no gradient of gate": (GATED, lora_mlp, "activate_backward", result(torch.zeros_like, 0), "dx dgate_A0 dgate_B0"),
    "no gradient of up": (GATED, lora_mlp, "activate_backward", result(torch.zeros_like, 1), "dx dup_A0 dup_B0"),
    "last token of h": (GATED, lora_mlp, "activate", result(lambda h: last(h, 0)), "y"),
    "last column of h": (GATED, lora_mlp, "activate", result(lambda h: last(h, 1)), "y ddown_A0"),
    "scale of an embedding off by 1 %": (
        TABLE,
        lora_embedding,
        "forward",
        argument(-1, field(scaling=lambda s: 1.01 * s)),
        "y",
    ),
    "scale off by 1 % in its backward": (
        TABLE,
        lora_embedding,
        "backward",
        argument(-2, field(scaling=lambda s: 1.01 * s)),
        "dA0 dB0",
    ),
    "Gemma's scale forgotten": (TABLE, lora_embedding, "forward", argument(4, lambda _: None), "y"),
    "Gemma's scale forgotten in backward": (TABLE, lora_embedding, "backward", argument(5, lambda _: None), "dA0 dB0"),
    "padding trains": (TABLE, lora_embedding, "backward", argument(-2, field(padding_idx=lambda _: -1)), "dA0"),
    "padding trains nothing": (
        TABLE,
        lora_embedding,
        "backward",
        argument(4, lambda H: torch.where(H == H[0], 0, H)),
        "dB0",
    ),
    "words that occur twice": (TABLE, lora_embedding, "_scatter", lambda _, *args: overwritten(*args), "dA0"),
    "the next word": (TABLE, lora_embedding, "forward", argument(0, lambda ids: (ids + 1) % 61), "y dB0"),
    "the next word's gradient": (TABLE, lora_embedding, "backward", argument(1, lambda ids: (ids + 1) % 61), "dA0"),
}
# closer to each other than bfloat16 sees
NEAR = ("another activation",)


@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16_f32_adapters"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_without_a_fault(case, dtypes):
    assert not numerics.failures(numerics.default_verdicts(TORCH, case, dtypes))


@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16_f32_adapters"])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_rejected(fault, dtypes, monkeypatch):
    case, module, name, wrong, outputs = FAULTS[fault]
    if fault in NEAR and dtypes != "f32":
        pytest.skip("closer to the right one than bfloat16 sees")
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: wrong(right, *args))
    rejected = numerics.failures(numerics.default_verdicts(TORCH, case, dtypes))
    assert set(outputs.split()) <= set(rejected)
