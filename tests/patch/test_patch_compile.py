"""torch.compile: no graph break, no recompile without a cause, and every switch is seen by compiled code."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import peft_fast
from peft_fast import settings
from tests.patch.test_blocks import mlp
from tests.patch.test_experts import layer_of as experts
from tests.patch.test_experts import tokens
from tests.patch.test_groups import attention, learned
from tests.patch.toys import assert_same, conv1d, inputs, layers, step, stock, toy


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("layer", [nn.Linear, conv1d], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_step_in_one_graph(layer, dtype):
    model = toy(layer, dtype, lora_bias=True, bias="all")
    expected = step(model, (inputs(dtype=dtype),), {})
    calls = peft_fast.report(model).fast_calls
    fast, counter = compiled(model)
    for _ in range(3):
        got = step(fast, (inputs(dtype=dtype),), {})
    got = {name.replace("_orig_mod.", ""): t for name, t in got.items()}
    assert_same(expected, got, rtol=1e-5 if dtype is torch.float32 else 3e-2)
    assert counter.frame_count == 1
    report = peft_fast.report(model)
    assert (report.fast_calls, report.handed_back) == (calls, {}), "counters move inside compiled code"


def test_dropout_autocast_several_adapters_and_dynamic_shapes():
    model = toy(lora_dropout=0.2)
    model.add_adapter("other", model.peft_config["default"].__class__(r=2, target_modules=["up"]))
    model.base_model.set_adapter(["default", "other"])
    fast, counter = compiled(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for rows in (4, 5, 6, 7):
            y = fast(inputs(rows, 32))
            assert y.dtype is torch.bfloat16
            y.sum().backward()
    assert counter.frame_count == 2  # the first shape, then one for all others
    assert all(lora.lora_B["default"].weight.grad.abs().sum() > 0 for lora in layers(model))


def test_tensor_scaling_does_not_recompile():
    model = toy()
    for lora in layers(model):
        lora.scaling["default"] = torch.tensor(1.0)
    fast, counter = compiled(model)
    ys = []
    for value in (1.0, 2.0, 3.0):
        for lora in layers(model):
            lora.scaling["default"].fill_(value)
        ys.append(fast(inputs()).sum().item())
        assert ys[-1] == pytest.approx(model(inputs()).sum().item(), rel=1e-5)
    assert len(set(ys)) == 3 and counter.frame_count == 1


def test_handed_back_layers_compile_too():
    model = toy(autocast_adapter_dtype=False)
    for lora in layers(model):
        lora.lora_A.bfloat16()
        lora.lora_B.bfloat16()
    with stock():
        expected = model(inputs())
    fast, _ = compiled(model)
    assert torch.equal(fast(inputs()), expected)
    report = peft_fast.report(model)
    assert report.handed_back == {}, "counters move inside compiled code"
    assert report.traced == ("adapters of lower precision than the base, or of float64 beside it",)
    assert "PEFT's own where torch.compile met it: adapters of lower precision" in str(report)


NAMES = ["default", "__base__", "default", "default"]
# what PEFT keeps -> a model, x, what else the call is given; PEFT's own forward is one graph only for few tokens
KEPT = {
    "few tokens": (toy, inputs, {}),
    "a mixed batch under torch.compile": (toy, inputs, {"adapter_names": NAMES}),
    "experts under torch.compile": (experts, tokens, {}),
}


@pytest.mark.parametrize("reason", KEPT)
def test_what_compiled_code_leaves_to_peft_is_told(reason):
    """In whichever process: compiled code belongs to no model."""
    make, x, options = KEPT[reason]
    model, x, few = make().eval(), x(4, 32).detach() if x is inputs else x().detach(), reason == "few tokens"
    with stock(), torch.no_grad():
        expected = model(x, **options)
    fast = torch.compile(model, fullgraph=few, backend="eager")
    assert peft_fast.report(model).traced == ()
    with settings.override(min_tokens=128 if few else 0), torch.no_grad():
        for _ in range(2):
            assert torch.equal(fast(x, **options), expected)
    report = peft_fast.report(model)
    (told,) = report.traced
    assert told.startswith(reason) and not report.handed_back
    assert f"PEFT's own where torch.compile met it: {told}" in str(report)
    assert peft_fast.report().traced == (told,)


def traced(model):
    """(compiled model, list that grows by the text of every graph dynamo makes)."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph.forward

    return torch.compile(model, fullgraph=True, backend=backend), graphs


PEFTS = "built-in function linear"  # PEFT's forward calls one for each matrix, ours none


def test_switches_reach_compiled_code():
    model = toy()
    fast, graphs = traced(model)
    fast(inputs())
    with peft_fast.disabled():
        fast(inputs())
    assert len(graphs) == 2, "disabled() was not seen"
    fast(inputs())
    assert len(graphs) == 2, "leaving disabled() compiled again"
    peft_fast.restore(model)
    fast(inputs())
    assert len(graphs) == 3, "restore() was not seen"
    assert [PEFTS in graph for graph in graphs] == [False, True, True]


def test_disable_reaches_compiled_code():
    model = toy()
    fast, graphs = traced(model)
    fast(inputs())
    peft_fast.disable()
    fast(inputs())
    assert [PEFTS in graph for graph in graphs] == [False, True]


def test_accelerate_a_compiled_model():
    fast, graphs = traced(peft_fast.restore(toy()))
    assert peft_fast.accelerate(fast) is fast
    fast(inputs())
    assert [PEFTS in graph for graph in graphs] == [False]


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_blocks_in_one_graph(p):
    model = mlp(lora_dropout=p)
    expected = step(model, (inputs(),), {})
    runs = peft_fast.report(model).block_calls
    fast, counter = compiled(model)
    for _ in range(3):
        got = step(fast, (inputs(),), {})
    assert_same(expected, {name.replace("_orig_mod.", ""): t for name, t in got.items()}, rtol=1e-5)
    assert counter.frame_count == 1 and peft_fast.report(model).block_calls == runs == 1


def test_switches_reach_compiled_blocks():
    model = mlp()
    fast, graphs = traced(model)
    fast(inputs())
    with settings.override(blocks=False):
        fast(inputs())
    with peft_fast.disabled():
        fast(inputs())
    fast(inputs())
    peft_fast.restore(model)
    fast(inputs())
    assert [PEFTS in graph for graph in graphs] == [False, False, True, True]
    assert ["silu" in graph for graph in graphs] == [False, True, True, True]


def test_siblings_compile_whether_or_not_they_are_a_group():
    """Compiled code has all layers before it, and no use for what one of them keeps for another."""
    model = learned(attention(lora_dropout=0.1))
    before = peft_fast.report(model).group_calls
    fast, counter = compiled(model)
    for _ in range(2):
        fast(inputs()).sum().backward()
    assert counter.frame_count == 1 and peft_fast.report(model).group_calls == before
    model(inputs())
    assert peft_fast.report(model).group_calls == before + 1
