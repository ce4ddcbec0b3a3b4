"""What keeps a block from running as one, and the switches, copies and other libraries around it."""

import copy
import io
import types

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn import functional as F

import peft_fast
from peft_fast import settings
from peft_fast.patch import blocks
from tests.patch.test_blocks import Gated, I, Plain, assert_block, assert_layers, inner, mlp, runs
from tests.patch.toys import K, adapt, assert_fast, assert_same, both, inputs, stock

HOOKED = "hooks or a replaced forward on {}"
IN_THE_WAY = {
    "hook on a layer": (lambda m: inner(m).up.register_forward_hook(lambda *a: None), HOOKED.format("up"), 3),
    "hook on a base": (
        lambda m: inner(m).up.base_layer.register_forward_hook(lambda *a: None),
        "up: hooks or a replaced forward on the base layer",
        2,
    ),
    "hook on the activation": (
        lambda m: inner(m).act.register_forward_hook(lambda *a: None),
        "its activation is a SiLU, or one with hooks",
        3,
    ),
    "own forward of a layer": (
        lambda m: setattr(inner(m).down, "forward", types.MethodType(type(inner(m).down).forward, inner(m).down)),
        HOOKED.format("down"),
        3,
    ),
    "another activation": (
        lambda m: setattr(inner(m), "act", nn.Tanh()),
        "its activation is a Tanh, or one with hooks",
        3,
    ),
    "another layer": (
        lambda m: setattr(inner(m), "down", nn.Sequential(nn.Linear(I, K))),
        "not asked for: call peft_fast.accelerate(model)",
        2,
    ),
    "disabled adapters": (lambda m: inner(m).gate.enable_adapters(False), "gate: the adapters are disabled", 2),
    "merged": (lambda m: inner(m).gate.merge(), "gate: the adapter is merged into the base weight", 2),
    "layers of two dtypes": (lambda m: inner(m).down.double(), "its layers have different dtypes", None),
}


@pytest.mark.parametrize("change, reason, fast", IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_what_is_in_the_way(change, reason, fast):
    model = mlp()
    assert_block(model)
    change(model)
    if fast is None:
        assert set(peft_fast.report(model).not_blocks.values()) == {reason}
        with pytest.raises(RuntimeError):
            model(inputs())
    else:
        assert_layers(model, reason, fast)


def test_dora_on_one_layer():
    model = mlp()
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["up"], use_dora=True))
    model.base_model.set_adapter(["default", "dora"])
    assert_layers(model, "up: DoraLinearVariant keeps PEFT's forward", 2)


def test_liger_and_whoever_binds_a_forward_wins():
    """The module's own forward calls the layers: they are fast inside it."""
    model = mlp()
    inner(model).forward = types.MethodType(lambda self, x: Gated.forward(self, x) * 2, inner(model))
    assert_layers(model, "another library has replaced the forward of this module", 3)


def test_a_forward_called_by_a_subclass_is_not_taken_for_the_subclass():
    class Twice(Gated):
        def forward(self, x):
            return super().forward(x) * 2

    also = mlp()  # puts a guard on Gated, too
    model = mlp(Twice)
    assert next(iter(peft_fast.report(model).not_blocks.values())) == "its forward uses super"
    expected, got, fast, _ = both(model, inputs())
    assert fast == 3 and runs(model) == 0
    assert_same(expected, got, 1e-5)
    assert_block(also)


def test_keywords_and_more_arguments_are_the_modules_own():
    model = mlp()
    assert torch.equal(model(x=inputs()), model(x=inputs())) and runs(model) == 0
    with pytest.raises(TypeError):
        inner(model)(inputs(), 1)


def test_switches():
    model = mlp()
    with settings.override(blocks=False):
        assert_layers(model, "PEFT_FAST_BLOCKS is 0")
    with peft_fast.disabled():
        assert both(model, inputs())[2] == 0
    with settings.override(min_tokens=100):
        assert both(model, inputs())[2] == 0
    with model.disable_adapter():
        assert both(model, inputs())[2] == 0
    assert_block(model)


def test_only_the_accelerated_model_has_blocks():
    model, other = mlp(), mlp()
    peft_fast.restore(other)
    assert_block(model)
    both(other, inputs())
    assert runs(other) == 0 and not peft_fast.report(other).blocks


def test_restore_undoes_it():
    forward = Gated.forward
    model = mlp()
    assert Gated.forward is not forward and blocks.BLOCK in inner(model).__dict__
    peft_fast.restore(model)
    assert Gated.forward is forward
    assert not any(key.startswith("_peft_fast") for m in model.modules() for key in m.__dict__)
    peft_fast.accelerate(model)
    peft_fast.disable()
    assert Gated.forward is forward
    peft_fast.accelerate(model)
    assert_block(model)


def test_a_class_that_another_library_patches_after_us_keeps_its_patch():
    model = mlp()
    ours, calls = Gated.forward, []
    try:
        Gated.forward = lambda self, x: calls.append(1) or ours(self, x)
        assert both(model, inputs())[2] == 3 and len(calls) == 2 and runs(model) == 0
        theirs = Gated.forward
        peft_fast.restore(model)
        assert Gated.forward is theirs
    finally:
        Gated.forward = ours
        blocks.uninstall()


def test_copies_stay_blocks_and_say_so_in_plain_values():
    model = mlp()
    stored = inner(model).__dict__[blocks.BLOCK]
    assert type(stored) is tuple and stored == ("gate", "up", "down", "act", "", (), (), ())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert b"peft_fast.patch" not in file.getvalue()
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert_block(twin)
    assert not any("block" in key for key in model.state_dict())


def test_an_attribute_that_the_forward_reads_is_watched():
    class Scaled(Plain):
        def forward(self, x):
            return self.down(F.dropout(self.act(self.up(x)), self.p, self.training))

    model = mlp(Scaled)
    assert_block(model)
    inner(model).p = 0.9
    assert_layers(model.eval(), "self.p has changed since the block was found")
    peft_fast.accelerate(model)
    assert_block(model)
    assert not torch.equal(model.train()(inputs()), model.eval()(inputs()))


def test_enable_finds_blocks_after_the_first_step():
    peft_fast.restore(model := mlp())
    peft_fast.enable()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(inputs()).sum().backward()
    assert set(peft_fast.report(model).not_blocks.values()) == {"it starts after the next optimizer step"}
    model(inputs()).sum().backward()
    assert runs(model) == 0
    with torch.no_grad():
        model.eval()(inputs())
        assert runs(model) == 1  # nothing of that is computed again
    model.train()
    optimizer.step()
    assert_block(model)
    peft_fast.disable()
    assert both(model, inputs())[2] == 0


def test_what_torch_defines_is_left_alone():
    model = adapt(lambda: nn.Sequential(nn.Linear(K, I), nn.ReLU(), nn.Linear(I, K)), ["0", "2"])
    assert nn.Sequential.forward.__module__.startswith("torch") and not peft_fast.report(model).blocks
    assert_fast(model, inputs())
    torch.jit.script(nn.Sequential(nn.Linear(2, 2)))


def test_traces_and_exports_hold_pefts_own_operators():
    model, x = mlp().eval(), inputs().detach()
    y = model(x)
    program = torch.export.export(model, (x,))
    with stock():
        expected = torch.export.export(model, (x,))
    assert [str(n.target) for n in program.graph.nodes] == [str(n.target) for n in expected.graph.nodes]
    assert torch.allclose(program.module()(x), y, rtol=1e-5, atol=1e-6)
    assert torch.func.vmap(model)(x).shape == y.shape and runs(model) == 1


def test_accelerate_hooks_on_the_module_leave_its_layers_fast():
    hooks = pytest.importorskip("accelerate.hooks")
    model = mlp()
    hooks.add_hook_to_module(inner(model), hooks.ModelHook())
    assert_layers(model, "another library has replaced the forward of this module")


def test_a_module_with_two_layers_that_is_no_block_says_why():
    class NoBlock(Plain):
        def forward(self, x):
            return self.down(self.up(x)) * 2

    model = mlp(NoBlock)
    assert set(peft_fast.report(model).not_blocks.values()) == {
        "its forward is not down(act(gate(x))·up(x)) or down(act(up(x)))"
    }
    assert "layer by layer: its forward is not" in str(peft_fast.report(model))
