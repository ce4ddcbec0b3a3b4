"""Every architecture in bfloat16, as people train it: a bfloat16 base, and a float32 base under autocast."""

import contextlib
import copy

import pytest
import torch

import peft_fast
from tests.architectures import structure, training
from tests.architectures.zoo import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore")
each = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
FACTOR = 4  # of one model's luck: roundings of 8 bits add up to between 0.3 and 2.6 times stock's error


def gradients(model, batch, cast):
    """name -> gradient of one step in float64."""
    context = torch.autocast("cpu", torch.bfloat16) if cast else contextlib.nullcontext()
    with context:
        loss = training.loss_of(model, batch)
    loss.backward()
    found = training.trainable(model)
    assert all(p.grad.dtype is p.dtype for p in found.values())
    return {name: p.grad.double() for name, p in found.items()}


@each
@pytest.mark.parametrize("cast", [False, True], ids=["bfloat16 base", "autocast"])
def test_gradients_in_bfloat16(architecture, cast):
    stock = architecture.adapted(dtype=torch.float32 if cast else torch.bfloat16)
    batch = training.batches(architecture, 1)[0]
    ours, truth = copy.deepcopy(stock), copy.deepcopy(stock).double()
    exact, expected = gradients(truth, batch, False), gradients(stock, batch, cast)

    peft_fast.accelerate(ours)
    for _ in range(architecture.learns):
        gradients(ours, batch, cast)
        training.idle_step(ours)
    got = gradients(ours, batch, cast)
    structure.assert_found(architecture, ours)
    far, near = training.mean_distance(got, exact), training.mean_distance(expected, exact)
    assert far <= FACTOR * near, f"{far:.1e}, stock {near:.1e}"


@pytest.mark.parametrize("name", ["T5", "flan-T5"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_that_stays_in_float32(name, dtype):
    """transformers loads T5 in half precision but for wo: its forward casts between the layers, and is no block."""
    architecture = ARCHITECTURES[name]
    stock = architecture.adapted(dtype=dtype)
    for layer, module in stock.named_modules():
        if layer.endswith("DenseReluDense.wo"):
            module.base_layer.float()
    batch = training.batches(architecture, 1)[0]
    ours, truth = copy.deepcopy(stock), copy.deepcopy(stock).double()
    peft_fast.accelerate(ours)
    exact = gradients(truth, batch, False)
    far, near = (training.mean_distance(gradients(model, batch, False), exact) for model in (ours, stock))
    assert far <= FACTOR * near, f"{far:.1e}, stock {near:.1e}"
    report = peft_fast.report(ours)
    assert not report.slow and not report.blocks and len(report.not_blocks) == 4
