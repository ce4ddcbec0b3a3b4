"""The gate on ops over several layers: what PEFT computes passes, every planted fault is refused."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from peft_fast.benchmarks import blocks, gate, lora_embedding, lora_group, lora_mlp
from peft_fast.benchmarks.lora_linear import adapted

CPU = torch.device("cpu")
SHAPES = {
    "group": (lora_group, (64, 64, (96, 32, 40))),
    "gated": (lora_mlp, (64, 64, 96, "silu", "gated", True)),
    "halved": (lora_mlp, (64, 64, 96, "gelu", "halved", True)),
    "plain": (lora_mlp, (64, 64, 96, "gelu_tanh", "plain", True)),
    "frozen": (lora_mlp, (64, 64, 96, "silu", "gated", False)),
}


def made(kind, dtype):
    torch.manual_seed(0)
    module, shape = SHAPES[kind]
    return module.build(dtype, CPU, *shape)


def judged(block, p, run=None, masks=None, fast=False):
    """Verdicts of `run(x, weights, masks)`, PEFT's own formula unless told otherwise."""
    fp32 = block.x.dtype == torch.float32
    net = adapted(block.net, block.layers, 8, p, fp32) if block.layers else block.net
    layers = blocks.modules(block, net)
    draws = gate.each(gate.torch_mask(block.x.dtype))

    def formula(x):
        ws = [gate.weights(layer, x.dtype) for layer in layers]
        if block.layers:
            ws = [w._replace(A=A, B=B) for w, (A, B) in zip(ws, map(gate.adapter, layers), strict=True)]
        keeps = draws([x.new_empty(len(x), w.W.shape[1]) for w in ws], [w.p for w in ws])
        return (run or block.formula)(x, ws, keeps)

    return gate.check_op(layers, block.formula, formula, block.x, block.gs, masks or draws, fast)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SHAPES)
def test_pefts_own_sequence_of_calls_passes(kind, dtype, p):
    block = made(kind, dtype)
    verdicts = judged(block, p)
    assert all(verdicts.values()), {k: v.reason for k, v in verdicts.items()}
    n = {"group": 3, "gated": 3, "halved": 2, "plain": 2, "frozen": 0}[kind]
    ys = {"y0", "y1", "y2"} if kind == "group" else {"y0"}
    assert set(verdicts) == ys | {"dx", "path"} | {f"d{t}{i}" for t in "AB" for i in range(n)}


def other_scale(block, x, ws, keeps):
    return block.formula(x, [ws[0], ws[1]._replace(scaling=1.01 * ws[1].scaling), *ws[2:]], keeps)


def a_siblings_mask(block, x, ws, keeps):
    return block.formula(x, ws, [keeps[1], keeps[0], *keeps[2:]])


def not_divided(block, x, ws, keeps):
    return block.formula(x, [w._replace(p=0.0) for w in ws], keeps)


def no_second_adapter(block, x, ws, keeps):
    return block.formula(x, [ws[0], ws[1]._replace(B=0 * ws[1].B), *ws[2:]], keeps)


def stale_x(block, x, ws, keeps):
    return [*block.formula(x, ws, keeps)[:2], block.formula(x * 1.01, ws, keeps)[2]]


def the_activation_as_if_straight(block, x, ws, keeps):
    """In the backward pass alone."""
    *first, down = zip(ws, keeps, strict=True)
    z, up = (gate.lora(x, *layer) for layer in first)
    return [gate.lora((z + (F.silu(z) - z).detach()) * up, *down)]


FAULTS = [(fault, kind) for fault in (other_scale, a_siblings_mask, not_divided, no_second_adapter) for kind in SHAPES]
FAULTS = [(f, k) for f, k in FAULTS if k != "frozen" and not (f is a_siblings_mask and k in ("plain", "halved"))]
FAULTS += [(the_activation_as_if_straight, kind) for kind in ("gated", "frozen")] + [(stale_x, "group")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault, kind", FAULTS, ids=lambda v: getattr(v, "__name__", v))
def test_faults_are_refused(fault, kind, dtype):
    block = made(kind, dtype)
    assert not all(judged(block, 0.1, run=partial(fault, block)).values())


@pytest.mark.parametrize("kind", ["group", "gated"])
def test_an_op_that_is_not_ours_is_not_called_ours(kind):
    verdicts = judged(made(kind, torch.float32), 0.0, fast=True)
    assert not verdicts["path"] and verdicts["y0"]


def test_many_tokens_are_judged_by_the_first_and_the_last(monkeypatch):
    monkeypatch.setattr(gate, "MOST_TOKENS", 16)
    block = made("group", torch.bfloat16)
    assert all(judged(block, 0.1).values())

    def last_row(x, ws, keeps):
        ys = block.formula(x, ws, keeps)
        return [*ys[:2], torch.cat([ys[2][:-1], 1.1 * ys[2][-1:]])]

    verdicts = judged(block, 0.1, run=last_row)
    assert not verdicts["y2"] and verdicts["y0"]


def embedding(scale):
    torch.manual_seed(0)
    rows = lora_embedding.providers((64, 128, 64, scale), "bf16", lora_embedding.Options(scale="full"))
    return {row.name: row for row in rows}


@pytest.mark.parametrize("scale", [False, True])
def test_an_embedding_as_peft_computes_it_passes(scale):
    rows = embedding(scale)
    verdicts = rows["stock"].gate()
    assert set(verdicts) == {"y", "dA", "dB", "path"}
    assert all(verdicts.values()), {k: v.reason for k, v in verdicts.items()}


@pytest.mark.parametrize("fault", ["scale", "ids"])
def test_a_wrong_embedding_is_refused(monkeypatch, fault):
    real = lora_embedding._op

    def wrong(layer, backend=None):
        if fault == "scale":
            layer.base_layer.embed_scale, kept = layer.base_layer.embed_scale * 1.02, layer.base_layer.embed_scale
            run = real(layer, backend)
            layer.base_layer.embed_scale = kept
            return run
        return lambda ids: real(layer, backend)(ids.roll(1))

    monkeypatch.setattr(lora_embedding, "_op", wrong)
    assert not all(embedding(True)["peft_fast"].gate().values())
