"""Every architecture of the table: five steps as stock's, with every layer, group and block that must be found."""

import copy

import pytest

import peft_fast
from peft_fast import settings
from tests.architectures import structure, training
from tests.architectures.zoo import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore")
each = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)


@each
def test_five_steps_are_stocks(architecture):
    stock = architecture.adapted()
    steps = 4 + architecture.learns
    data = training.batches(architecture, steps)
    ours = copy.deepcopy(stock)
    names = [*structure.lora_layers(stock), *architecture.expected_blocks(stock)]
    calls = training.count_calls(stock, names, data[0])
    truth = training.exact(stock, data)
    expected = training.train(stock, data)

    with structure.unchanged(ours):
        peft_fast.accelerate(ours)
    got = training.train(ours, data)
    training.assert_rounding(architecture, steps, got, expected, truth)
    structure.assert_found(architecture, ours)
    operations = structure.operations(architecture, ours, calls)
    assert got.operations == operations
    report = peft_fast.report(ours)
    assert sum(report.handed_back.values()) == steps * sum(calls[name] for name in report.slow)
    assert report.fast_calls == steps * sum(calls[name] for name in report.fast)


CHOSEN = {
    "BERT": "query value",
    "GPT-2": "",
    "Llama": "q_proj v_proj",
    "Gemma3": "q_proj v_proj",
    "T5": "q v",
    "BART": "q_proj v_proj",
}


@pytest.mark.parametrize("name", CHOSEN)
def test_the_layers_that_peft_chooses(name):
    """Adapters on q and v: a group of two but none in cross-attention, and blocks of frozen layers."""
    architecture = ARCHITECTURES[name]
    stock = architecture.adapted(target_modules=None)
    data = training.batches(architecture, 3)
    ours = copy.deepcopy(stock)
    truth = training.exact(stock, data)
    expected = training.train(stock, data)
    peft_fast.accelerate(ours)
    training.assert_rounding(architecture, 3, training.train(ours, data), expected, truth)
    report = peft_fast.report(ours)
    assert set(report.fast) == set(structure.lora_layers(ours))
    found = {" ".join(sorted(layer.rpartition(".")[2] for layer in group)) for group in report.groups}
    assert found == set(filter(None, [CHOSEN[name]]))
    # a frozen block runs as one only where that saves memory: with a gate
    blocks = architecture.expected_blocks(ours) if name in ("Llama", "Gemma3") else set()
    assert set(report.blocks) == blocks and report.block_calls == len(blocks) * len(data)


@pytest.mark.parametrize("name", ["Llama", "flan-T5", "DINOv2 giant"])
def test_without_blocks_gate_and_up_are_a_group(name):
    architecture = ARCHITECTURES[name]
    model = peft_fast.accelerate(architecture.adapted())
    with settings.override(blocks=False):
        training.train(model, training.batches(architecture, 2))
        found = peft_fast.report(model).groups
    expected = len(architecture.expected_groups(model)) + len(architecture.expected_blocks(model))
    assert len(found) == expected
