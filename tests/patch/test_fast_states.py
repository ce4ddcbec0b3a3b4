"""What must be fast: vanilla adapters in every configuration, shape and dtype situation, equal to stock."""

import pytest
import torch
from torch import nn

from peft_fast import settings
from peft_fast.patch import blocks, groups
from tests.patch.test_training import TOKENS, llama
from tests.patch.toys import K, N, assert_fast, both, conv1d, inputs, layers, toy

CONFIGS = {
    "vanilla": {},
    "r=1": {"r": 1},
    "rank above the layer": {"r": 64},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"up": 3}, "alpha_pattern": {"down": 20}},
    "one layer": {"targets": ("down",)},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa by iteration": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "B = 0": {"init_lora_weights": True},
    "lora_bias": {"lora_bias": True},
    "bias=all": {"bias": "all"},
    "bias=lora_only": {"bias": "lora_only"},
    "lora_bias and bias=all": {"bias": "all", "lora_bias": True},
}


@pytest.mark.parametrize("layer", [nn.Linear, conv1d], ids=["linear", "conv1d"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_config(config, layer):
    if layer is conv1d and config.get("init_lora_weights") == "olora":
        pytest.skip("PEFT's own OLoRA makes A and B the wrong way round for Conv1D")
    model = toy(layer, **config)
    if config.get("lora_bias"):
        for lora in layers(model):
            nn.init.normal_(lora.lora_B["default"].bias)
    assert_fast(model, inputs())
    trains_bias = "bias" in config
    assert all(lora.base_layer.bias.requires_grad is trains_bias for lora in layers(model))


def test_base_without_bias():
    assert_fast(toy(lambda k, n: nn.Linear(k, n, bias=False)), inputs())


@pytest.mark.parametrize("layer", [nn.Linear, conv1d], ids=["linear", "conv1d"])
def test_trainable_base(layer):
    model = toy(layer, lora_dropout=0.1)
    for lora in layers(model):
        lora.base_layer.weight.requires_grad_()
        lora.base_layer.bias.requires_grad_()
    assert_fast(model.eval(), inputs())


@pytest.mark.parametrize("shape", [(K,), (7, K), (2, 3, K), (2, 1, 3, K), (0, K), (2, 0, K)], ids=str)
@pytest.mark.parametrize("layer", [nn.Linear, conv1d], ids=["linear", "conv1d"])
def test_shapes(shape, layer):
    assert_fast(toy(layer), inputs(*shape))


def test_input_that_is_not_contiguous():
    model = toy()
    assert_fast(model, inputs(5, K, 2).transpose(1, 2))
    assert_fast(model, inputs(5, 2 * K)[:, ::2])
    assert_fast(model, inputs(5, 1, K).expand(5, 3, K))


def test_input_without_gradient_no_grad_and_inference_mode():
    model, x = toy(), inputs().detach()
    assert_fast(model, x)
    with torch.no_grad():
        assert_fast(model, x)
    with torch.inference_mode():
        assert_fast(model, x)


def test_adapters_that_are_not_contiguous():
    model = toy()
    for lora in layers(model):
        for module in (lora.lora_A["default"], lora.lora_B["default"]):
            module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())
            assert not module.weight.is_contiguous()
    assert_fast(model, inputs())


def test_several_active_adapters_are_summed():
    model = toy(lora_bias=True)
    other = model.peft_config["default"].__class__(r=7, target_modules=["up"], init_lora_weights=False)
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    for lora in layers(model):
        nn.init.normal_(lora.lora_B["default"].bias)
    assert_fast(model, inputs())
    alone = both(model, inputs())[1]["y"]
    model.base_model.set_adapter(["default"])
    assert not torch.allclose(alone, both(model, inputs())[1]["y"])


def test_scale_changes_are_read_at_every_call():
    model, x = toy(), inputs()
    seen = set()
    for change in (
        lambda lora: None,
        lambda lora: lora.set_scale("default", 3.0),
        lambda lora: lora.scale_layer(0.5),
        lambda lora: lora.unscale_layer(2.0),
        lambda lora: lora.unscale_layer(),
        lambda lora: lora.scaling.update(default=0.0),
        lambda lora: lora.scaling.update(default=5),
    ):
        for lora in layers(model):
            change(lora)
        assert_fast(model, x)
        seen.add(both(model, x)[1]["y"].sum().item())
    assert len(seen) == 6  # the fifth is the first again


@pytest.mark.parametrize("layer", [nn.Linear, conv1d], ids=["linear", "conv1d"])
def test_scaling_as_tensor(layer):
    model = toy(layer, lora_bias=True)
    for lora in layers(model):
        lora.scaling["default"] = torch.tensor(1.5)
    assert_fast(model, inputs())


def test_dropout_in_eval_mode_is_stock():
    assert_fast(toy(lora_dropout=0.5).eval(), inputs())


def test_the_flag_of_the_dropout_module_counts():
    model, x = toy(lora_dropout=0.5), inputs()
    quiet, loud = both(model.eval(), x)[1]["y"], both(model.train(), x)[1]["y"]
    assert not torch.allclose(quiet, loud)
    for lora in layers(model):
        lora.lora_dropout.eval()
    assert_fast(model, x)
    model.eval()
    for lora in layers(model):
        lora.lora_dropout.train()
    assert torch.equal(both(model, x)[1]["y"], loud)
    for lora in layers(model):
        lora.lora_dropout["default"].p = 0.0
    assert_fast(model, x)


def test_dropout_drops_at_the_right_rate_and_scale():
    """Expectation over masks is the p = 0 result; one mask is not."""
    model = toy(targets=("up",), lora_dropout=0.3)
    lora = layers(model)[0]
    x = torch.ones(4000, K)
    with torch.no_grad():
        torch.manual_seed(0)
        y = lora(x)
        mean, expected = y.mean(0), lora.eval()(x[:1])[0]
    assert y.std(0).min() > 0
    assert ((mean - expected).abs() < 6 * y.std(0) / 4000**0.5).all()


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = {  # base, adapters, input, autocast: tolerance
    "fp32": (F32, F32, F32, None, 1e-5),
    "fp64": (F64, F64, F64, None, 1e-12),
    "bf16 with bf16 adapters": (BF16, BF16, BF16, None, 3e-2),
    "bf16 with fp32 adapters": (BF16, F32, BF16, None, 3e-2),
    "fp16 with fp32 adapters": (F16, F32, F16, None, 4e-3),
    "fp16 with fp16 adapters": (F16, F16, F16, None, 4e-3),
    "fp32 under bf16 autocast": (F32, F32, F32, BF16, 3e-2),
    "fp32 under bf16 autocast, bf16 input": (F32, F32, BF16, BF16, 3e-2),
    "bf16 base, fp32 adapters under autocast": (BF16, F32, BF16, BF16, 3e-2),
    "bf16 base, fp32 input under autocast": (BF16, F32, F32, BF16, 3e-2),
    "bf16 base and adapters under autocast": (BF16, BF16, BF16, BF16, 3e-2),
    "fp32 base, bf16 adapters under autocast": (F32, BF16, F32, BF16, 3e-2),
    "fp32 under fp16 autocast": (F32, F32, F32, F16, 4e-3),
}


@pytest.mark.parametrize("layer", [nn.Linear, conv1d], ids=["linear", "conv1d"])
@pytest.mark.parametrize("base, adapters, given, cast, rtol", DTYPES.values(), ids=DTYPES)
def test_dtypes(base, adapters, given, cast, rtol, layer):
    """Output and gradient dtypes are asserted equal to stock's in every situation."""
    model = toy(layer, base, autocast_adapter_dtype=False)
    for lora in layers(model):
        lora.lora_A.to(adapters)
        lora.lora_B.to(adapters)
    with torch.autocast("cpu", dtype=cast or BF16, enabled=cast is not None):
        assert_fast(model, inputs(6, K, dtype=given), rtol=rtol)


def test_exact_setting_is_closer_to_stock():
    model, x = toy(base_dtype=BF16, lora_alpha=64), inputs(64, K, dtype=BF16)
    assert layers(model)[0].lora_A["default"].weight.dtype is F32

    def distance():
        expected, got, fast, _ = both(model, x)
        assert fast == 2
        return (expected["y"].float() - got["y"].float()).square().mean().item()

    usual = distance()
    with settings.override(exact=True):
        assert distance() < usual / 4


def test_result_owns_its_storage():
    lora = layers(toy(targets=("up",)))[0]
    y = lora(inputs())
    assert y._base is None and y.is_contiguous() and y.shape == (2, 5, N)
    y += 1
    y.sum().backward()


@pytest.mark.parametrize("exact", [True, False])
def test_exact_reaches_groups_and_blocks(monkeypatch, exact):
    """PEFT_FAST_EXACT is about every operator that the layers run by."""
    asked = []
    for module, op in ((groups, "lora_group"), (blocks, "lora_mlp")):
        run = getattr(module, op)

        def spy(*args, op=op, run=run, **options):
            asked.append((op, options["exact"]))
            return run(*args, **options)

        monkeypatch.setattr(module, op, spy)
    model = llama()
    with settings.override(exact=exact):
        for _ in range(3):
            model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert set(asked) == {("lora_group", exact), ("lora_mlp", exact)}
