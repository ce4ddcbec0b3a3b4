"""DoRA layers are fast and stock's in every state that PEFT gives them, and PEFT's own where they are not read."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import DoraCaching
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_fast
from benchmarks.gate import our_mask
from peft_fast import ops, settings
from peft_fast.patch import dora
from tests.patch.toys import (
    K,
    assert_fast,
    assert_handed_back,
    assert_same,
    both,
    conv1d,
    inputs,
    layers,
    step,
    stock,
    toy,
)

LINEAR = pytest.mark.parametrize("layer", [nn.Linear, conv1d], ids=["linear", "conv1d"])


def trained(model, spread=0.3):
    """As after some steps: no magnitude is its column's norm any more."""
    for module in model.modules():
        for magnitude in getattr(module, "lora_magnitude_vector", {}).values():
            with torch.no_grad():
                magnitude.weight.mul_(1 + spread * torch.randn_like(magnitude.weight))
    return model


def made(layer=nn.Linear, *args, **config):
    return trained(toy(layer, *args, use_dora=True, **config))


CONFIGS = {
    "dora": {},
    "r=1": {"r": 1},
    "rank above the layer": {"r": 64},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"up": 3}, "alpha_pattern": {"down": 20}},
    "B = 0": {"init_lora_weights": True},
    "bias=all": {"bias": "all"},
    "bias=lora_only": {"bias": "lora_only"},
}


@LINEAR
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_config(config, layer):
    model = made(layer, **config)
    assert_fast(model, inputs())
    assert_fast(model.eval(), inputs())
    assert peft_fast.report(model).slow == {}


@LINEAR
@pytest.mark.parametrize("shape", [(7, K), (2, 3, K), (2, 1, 3, K), (0, K), (1, K)], ids=str)
def test_shapes(shape, layer):
    assert_fast(made(layer), inputs(*shape))


def test_one_dimension_gets_pefts_shape():
    model = made()
    with stock():
        expected = model(inputs(K)).shape
    assert model(inputs(K)).shape == expected == (1, K), "PEFT's columns make a row of a vector"
    assert_handed_back(model, inputs(K), reason="PEFT makes a row of it", mixed=True)


def test_few_tokens_are_no_reason():
    with settings.override(min_tokens=1000):
        assert_fast(made(), inputs(1, K))


@LINEAR
def test_trainable_base(layer):
    model = made(layer)
    for lora in layers(model):
        lora.base_layer.weight.requires_grad_()
        lora.base_layer.bias.requires_grad_()
    assert_fast(model, inputs())


def test_base_without_bias_and_other_memory():
    model = made(lambda k, n: nn.Linear(k, n, bias=False))
    assert_fast(model, inputs())
    assert_fast(model, inputs(5, K, 2).transpose(1, 2))
    with torch.no_grad():
        assert_fast(model, inputs().detach())
    with torch.inference_mode():
        assert_fast(model, inputs().detach())


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {  # base, adapters kept in float32, magnitudes in, x, autocast: rtol
    "fp64": (torch.float64, False, None, torch.float64, None, 1e-12),
    "bf16 base, fp32 adapters": (BF16, True, None, BF16, None, 4e-2),
    "bf16 base, fp32 adapters, bf16 magnitudes": (BF16, True, BF16, BF16, None, 4e-2),
    "bf16": (BF16, False, None, BF16, None, 6e-2),
    "bf16 base and adapters, fp32 magnitudes": (BF16, False, F32, BF16, None, 6e-2),
    "fp16 base, fp32 adapters": (F16, True, None, F16, None, 5e-3),
    "fp32 under autocast": (F32, True, None, F32, BF16, 4e-2),
    "bf16 base, fp32 adapters under autocast": (BF16, True, None, F32, BF16, 4e-2),
}


@LINEAR
@pytest.mark.parametrize("base, wide, of_m, given, cast, rtol", DTYPES.values(), ids=DTYPES)
def test_dtypes(base, wide, of_m, given, cast, rtol, layer):
    model = made(layer, base, autocast_adapter_dtype=wide)
    for lora in layers(model):
        if of_m:
            lora.lora_magnitude_vector.to(of_m)
    with torch.autocast("cpu", dtype=cast or BF16, enabled=cast is not None):
        assert_fast(model, inputs(dtype=given), rtol=rtol)


def test_dropout_is_pefts_on_the_same_masks(monkeypatch):
    """PEFT's own forward, its dropout replaced by the masks that the op drew: values and every gradient."""
    model = made(lora_dropout=0.3, base_dtype=torch.float64, autocast_adapter_dtype=False, bias="all")
    for lora in layers(model):
        lora.base_layer.weight.requires_grad_()
    x = inputs(dtype=torch.float64)
    got = step(model, (x,), {})
    assert peft_fast.report(model).handed_back == {}

    def forward(self, x):
        return x * our_mask(x.flatten(0, -2), self.p).view(x.shape) / (1 - self.p)

    monkeypatch.setattr(nn.Dropout, "forward", forward)
    with stock():
        expected = step(model, (x,), {})
    assert_same(expected, got, 1e-12)
    with stock():
        other = step(model, (x,), {}, seed=8)
    assert not torch.allclose(other["y"], got["y"])


def test_the_layers_own_flag_decides_on_dropout():
    """PEFT asks the layer whether it trains, not its dropout."""
    model = made(lora_dropout=0.5)
    for lora in layers(model):
        lora.training = False
    assert all(lora.lora_dropout["default"].training for lora in layers(model))
    assert_fast(model, inputs())
    for lora in layers(model):
        lora.training = True
        lora.lora_dropout.eval()
    assert_fast(model, inputs())


def test_scalings_are_read_at_every_call():
    model = made()
    for value in (torch.tensor(1.5), 0.3, 0.0, -1.0):
        for lora in layers(model):
            lora.scaling["default"] = value
        assert_fast(model, inputs())
    for lora in layers(model):
        lora.set_scale("default", 2.0)
    assert_fast(model, inputs())


def test_weights_written_behind_every_counter_are_seen(tmp_path):
    """Base, adapters and magnitudes by .data, by load_state_dict and by a merge and back: nothing stale is left."""
    model, x = made(), inputs()
    assert_fast(model, x)
    (up, down) = layers(model)
    up.base_layer.weight.data[3] *= 5
    assert_fast(model, x)
    up.base_layer.weight.data = torch.randn_like(up.base_layer.weight)
    assert_fast(model, x)
    up.lora_A["default"].weight.data[0] += 1
    for value in (0, 2):
        down.lora_magnitude_vector["default"].weight.data[1] = value
        assert_fast(model, x)
    model.load_state_dict({name: t * 1.5 for name, t in model.state_dict().items()})
    assert_fast(model, x)
    model.merge_adapter()
    assert_handed_back(model, x, reason="merged")
    model.unmerge_adapter()
    assert_fast(model, x)
    with model.disable_adapter():
        assert_handed_back(model, x, reason="the adapters are disabled")


@pytest.mark.parametrize("layer", [nn.Linear, conv1d], ids=["linear", "conv1d"])
def test_merged_is_the_same(layer):
    model, x = made(layer).eval(), inputs()
    y = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)


def test_switching_deleting_and_mixing_adapters():
    model, x = made(), inputs()
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
    config = LoraConfig(r=3, use_dora=True, target_modules=["up"], init_lora_weights=False)
    model.add_adapter("other", config)
    trained(model)
    for name, calls in (("other", 1), ("plain", 2), ("default", 2)):
        model.set_adapter(name)
        assert_fast(model, x, calls=calls) if calls == 2 else assert_handed_back(
            model, x, reason="no active", mixed=True
        )
    model.base_model.set_adapter(["default", "plain"])
    assert_handed_back(model, x, reason="several active adapters, one of them DoRA")
    assert set(peft_fast.report(model).slow.values()) == {"several active adapters, one of them DoRA"}
    model.set_adapter("other")
    model.delete_adapter("default")
    model.set_adapter("plain")
    assert_fast(model, x)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_with_dropout_gives_the_gradients_without(reentrant):
    model = made(lora_dropout=0.3)
    plain = step(model, (inputs(),), {})

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    got = {name.replace("inner.", ""): t for name, t in step(Checkpointed(), (inputs(),), {}).items()}
    assert_same(plain, got)


def test_copies_files_and_state_are_pefts(tmp_path):
    model, x = made(), inputs()
    expected = step(model, (x,), {})
    for other in (copy.deepcopy(model),):
        assert_same(expected, step(other, (x,), {}))
        assert peft_fast.report(other).slow == {}
    model.save_pretrained(tmp_path / "fast")
    names = set(model.state_dict())
    peft_fast.restore(model)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path / "stock")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "fast" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()
    base = model.unload()
    loaded = peft_fast.accelerate(PeftModel.from_pretrained(base, tmp_path / "fast", is_trainable=True))
    assert_same(expected, step(loaded, (x,), {}))


def test_the_result_may_be_written_into():
    model = made()
    with stock():
        expected = step(Doubled(model), (inputs(),), {})
    assert_same(expected, step(Doubled(model), (inputs(),), {}), 1e-5)


class Doubled(nn.Module):
    """Writes into what a layer returns, as PEFT's own code does."""

    def __init__(self, model):
        super().__init__()
        self.up, self.down = model.base_model.model.up, model.base_model.model.down

    def forward(self, x):
        y = self.up(x)
        y += 1
        y *= 2
        return self.down(y)


def test_steps_follow_stocks():
    def losses(fast):
        model = made(seed=3)
        if not fast:
            peft_fast.restore(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for _ in range(20):
            loss = (model(inputs(16, K)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    fast, slow = losses(True), losses(False)
    assert fast[-1] < 0.7 * fast[0]
    torch.testing.assert_close(torch.tensor(fast), torch.tensor(slow), rtol=1e-4, atol=1e-5)


def test_pefts_cache_keeps_the_norm_as_long_as_pefts(monkeypatch):
    calls = itertools.count()
    monkeypatch.setattr(dora, "dora_norm", lambda *a, **k: (next(calls), ops.dora_norm(*a, **k))[1])
    model, x = made().eval(), inputs(40, K).detach()  # fewer tokens have their norm from here at each call
    y = model(x)
    assert next(calls) == 0, "nobody asked for it"
    with DoraCaching():
        for _ in range(3):
            torch.testing.assert_close(model(x), y)
        assert next(calls) == 3, "one norm for each of the two layers"
        model.train()
        model(x)
        assert next(calls) == 4, "training needs a norm of its own each time"
        model.eval()
        model(x)
    assert next(calls) == 7
    layers(model)[0].lora_B["default"].weight.data += 1
    assert_fast(model, x)
    with DoraCaching():
        assert_fast(model, x)


REFUSED = {
    "hook on the magnitude": lambda lora: lora.lora_magnitude_vector["default"].register_forward_hook(lambda *a: None),
    "float64": lambda lora: lora.lora_magnitude_vector.double(),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_what_is_not_read_is_pefts(change):
    model = made()
    for lora in layers(model):
        change(lora)
    with stock():
        try:
            expected = step(model, (inputs(),), {})
        except RuntimeError:
            return
    assert_same(expected, step(model, (inputs(),), {}))
    assert peft_fast.report(model).fast_calls == 0


def test_an_unknown_peft_is_pefts(monkeypatch):
    monkeypatch.setattr(dora, "KNOWN", {})
    dora._known.cache_clear()
    model = made()
    assert_handed_back(model, inputs(), reason="DoraLinearLayer that peft_fast does not know")
    monkeypatch.undo()
    dora._known.cache_clear()
    assert_fast(model, inputs())


@LINEAR
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_compiles_in_one_graph(layer, p):
    torch._dynamo.reset()
    model = made(layer, lora_dropout=p)
    expected = step(model, (inputs(),), {})
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = {name.replace("_orig_mod.", ""): t for name, t in step(fast, (inputs(),), {}).items()}
    assert_same(expected, got, rtol=1e-5)
    torch._dynamo.reset()


def test_siblings_with_and_without_magnitudes():
    """Layers that read one x, DoRA beside plain ones: groups and blocks leave the first alone."""
    model = trained(
        get_peft_model(Three(), LoraConfig(r=4, target_modules=["q"], use_dora=True, init_lora_weights=False))
    )
    model.add_adapter("plain", LoraConfig(r=4, target_modules=["k", "v"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "plain"])
    peft_fast.accelerate(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(4):
        model(inputs()).sum().backward()
        optimizer.step()
        expected, got, _, handed_back = both(model, inputs())
        assert handed_back == {}
        assert_same(expected, got, 1e-5)


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, K) for _ in range(3))

    def forward(self, x):
        return torch.tanh(self.q(x) + self.k(x) * self.v(x))
