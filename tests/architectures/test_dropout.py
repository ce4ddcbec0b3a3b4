"""Every architecture with all its dropouts on: recomputing a layer's forward in backward must change nothing."""

import copy

import pytest
import torch

import peft_fast
from tests.architectures import structure, training
from tests.architectures.zoo import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore")
each = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)


def gradients(model, batch, seed):
    """name -> gradient of one step; the seed draws all masks."""
    torch.manual_seed(seed)
    loss = training.loss_of(model, batch)
    loss.backward()
    found = training.trainable(model)
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in found.values())
    out = {name: p.grad.double().clone() for name, p in found.items()}
    model.zero_grad()
    return out


def ways(architecture, base):
    """How a model may recompute: both ways of torch, one of them, or not at all."""
    if not base.supports_gradient_checkpointing:
        return ["not at all"]
    return [False, True] if architecture.reentrant else [False]


@each
def test_checkpointing_with_dropout(architecture):
    model = architecture.adapted(dropout=0.1, lora_dropout=0.1).train()
    data = training.batches(architecture, 1 + architecture.learns)
    calm = gradients(copy.deepcopy(model).eval(), data[0], 0)
    for reentrant in ways(architecture, model.base_model.model):
        ours = peft_fast.accelerate(copy.deepcopy(model))
        base = ours.base_model.model
        if reentrant is True:
            base.enable_input_require_grads()
        optimizer = torch.optim.SGD(training.trainable(ours).values(), lr=training.RATE)
        for step, batch in enumerate(data):
            if reentrant != "not at all":
                base.gradient_checkpointing_enable({"use_reentrant": reentrant})
            recomputed = gradients(ours, batch, step)
            base.gradient_checkpointing_disable()
            plain = gradients(ours, batch, step)
            assert training.distance(recomputed, plain) < 1e-5, f"step {step}"
            assert step or training.distance(plain, calm) > 1e-2, "no mask does anything"
            for name, p in training.trainable(ours).items():
                p.grad = plain[name].to(p.dtype)
            optimizer.step()
            ours.zero_grad()
        structure.assert_found(architecture, ours)
