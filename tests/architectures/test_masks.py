"""Groups and blocks of real classes drop as stock does: the same mean and spread, and no mask drawn twice."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_fast
from tests.architectures import training
from tests.architectures.zoo import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = 4000
P = 0.3


def each(*names):
    return pytest.mark.parametrize("architecture", [ARCHITECTURES[name] for name in names], ids=names)


def pair(architecture):
    """Stock and ours with all dropouts on."""
    stock = architecture.adapted(dropout=P, lora_dropout=P).train()
    return stock, peft_fast.accelerate(copy.deepcopy(stock))


def row_of(module):
    """(ROWS, K): what a module could be called with, one row many times."""
    first = next(m for m in module.modules() if isinstance(m, (nn.Linear, Conv1D)))
    torch.manual_seed(3)
    return torch.randn(first.weight.shape[0 if isinstance(first, Conv1D) else 1]).repeat(ROWS, 1)


def assert_same_spread(ours, stock):
    """Means within six standard errors, deviations within a sixth: without a mask or a scale they are far apart."""
    ours, stock = ours.detach().double(), stock.detach().double()
    spread = stock.std(0)
    assert spread.min() > 0
    assert ((ours.mean(0) - stock.mean(0)).abs() <= 6 * (2 / ROWS) ** 0.5 * spread).all()
    assert ((ours.std(0) / spread - 1).abs() < 1 / 6).all()


@each("DistilBERT", "ModernBERT", "GPT-2", "Llama", "Phi-3", "T5", "flan-T5", "DETR", "Wav2Vec2")
def test_a_block_drops_as_stock_does(architecture):
    stock, ours = pair(architecture)
    name = sorted(architecture.expected_blocks(ours))[0]
    x = row_of(ours.get_submodule(name))
    before = peft_fast.report(ours).block_calls
    assert_same_spread(ours.get_submodule(name)(x), stock.get_submodule(name)(x))
    assert peft_fast.report(ours).block_calls == before + 1


@each("BERT", "GPT-J", "DeepSeek-V3", "BART", "DETR", "Time series transformer")
def test_a_group_draws_a_mask_for_every_layer(architecture):
    stock, ours = pair(architecture)
    names = sorted(architecture.expected_groups(ours))[0]
    x = row_of(ours.get_submodule(names[0]))
    for _ in range(2):
        tensor = x.clone()
        found = [ours.get_submodule(name)(tensor) for name in names]
        training.idle_step(ours)
    assert peft_fast.report(ours).group_calls == 1
    for y, name in zip(found, names, strict=True):
        assert_same_spread(y, stock.get_submodule(name)(x))
    one, other = ((y - y.mean(0)).double() for y in found[:2])
    correlation = (one[:, :, None] * other[:, None]).mean(0) / (one.std(0)[:, None] * other.std(0))
    assert correlation.abs().max() < 7 / ROWS**0.5
