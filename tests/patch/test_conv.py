"""lora.Conv1d, Conv2d and Conv3d: kernels of size 1 as a linear layer where that pays, PEFT's own forward elsewhere."""

import copy
import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import peft_fast
from peft_fast import settings
from peft_fast.ops import packing
from peft_fast.patch import conv, known, plan
from tests.patch.toys import assert_same, both, stock

C, N = 24, 40
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (2, C, 17), 2: (2, C, 6, 5), 3: (2, C, 3, 4, 5)}
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


def model_of(dims=2, dtype=BF16, last=False, low=None, accelerate=True, lora=None, **kwargs):
    torch.manual_seed(0)
    base = nn.Sequential(KINDS[dims](C, N, **{"kernel_size": 1, **kwargs}), nn.Tanh()).to(dtype)
    if last:
        base = base.to(memory_format=conv.CHANNELS_LAST[dims + 2])
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["0"], **(lora or {}))
    model = get_peft_model(base, config, autocast_adapter_dtype=low is None)
    return peft_fast.accelerate(model) if accelerate else model


def image(dims=2, dtype=BF16, last=False):
    x = torch.randn(SIZES[dims], generator=torch.Generator().manual_seed(1)).to(dtype)
    return (x.to(memory_format=conv.CHANNELS_LAST[dims + 2]) if last else x).requires_grad_()


def layer(model):
    return model.base_model.model[0]


def assert_fast(model, x, rtol):
    expected, got, fast, handed_back = both(model, x)
    assert (fast, handed_back) == (1, {})
    assert_same(expected, got, rtol)
    with stock():
        strides = layer(model)(x).stride()
    assert layer(model)(x).stride() == strides, "callers may view the result"


def assert_pefts(model, x, reason):
    expected, got, fast, handed_back = both(model, x)
    assert fast == 0 and len(handed_back) == 1 and reason in next(iter(handed_back)), handed_back
    assert_same(expected, got)


NOTHING = "in channels-first order, which PEFT neither drops nor casts: there is nothing to gain"
ORDERS = [(1, False, False)] + [(d, x, w) for d in (2, 3) for x in (False, True) for w in (False, True)]
DTYPES = {"bf16": (BF16, None, 3e-2), "bf16 adapters": (BF16, BF16, 3e-2), "fp16": (F16, None, 4e-3)}


@pytest.mark.parametrize("dims, x_last, W_last", ORDERS)
@pytest.mark.parametrize("dtype, low, rtol", DTYPES.values(), ids=DTYPES)
def test_orders_of_memory_and_dtypes(dims, x_last, W_last, dtype, low, rtol):
    if dims == 3 and dtype is F16:
        return assert_pefts(model_of(dims, dtype, W_last), image(dims, dtype, x_last), "in float16, whose results")
    if low is dtype and not x_last:
        return assert_pefts(model_of(dims, dtype, W_last, low), image(dims, dtype, x_last), NOTHING)
    assert_fast(model_of(dims, dtype, W_last, low), image(dims, dtype, x_last), rtol)


@pytest.mark.parametrize("dtype, rtol", [(F32, 1e-5), (F64, 1e-12)])
def test_full_precision_is_fast_in_channels_last_order(dtype, rtol):
    assert_fast(model_of(dtype=dtype, last=True), image(dtype=dtype, last=True), rtol)
    assert_pefts(model_of(dtype=dtype), image(dtype=dtype), NOTHING)


OPTIONS = {
    "no bias": {"bias": False},
    "stride": {"stride": 2},
    "stride, one side": {"stride": (2, 1)},
    "dilation": {"dilation": 2},
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
    "lora bias": {"lora": {"lora_bias": True}},
    "trained bias": {"lora": {"bias": "all"}},
    "rslora": {"lora": {"use_rslora": True}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options):
    for last in (False, True):
        assert_fast(model_of(last=last, **options), image(last=last), 3e-2)
    assert_fast(model_of(last=True, dtype=F32, **options), image(last=True, dtype=F32), 1e-5)


def test_trained_bias_has_its_gradient():
    model = model_of(2, F32, last=True, lora={"bias": "lora_only"})
    got = both(model, image(dtype=F32, last=True))[1]
    assert got["base_model.model.0.base_layer.bias"].abs().max() > 0


def test_several_adapters_a_trained_base_and_a_tensor_for_scaling():
    model = model_of(dtype=F32, last=True)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    x = image(dtype=F32, last=True)
    assert_fast(model, x, 1e-5)
    layer(model).scaling["other"] = torch.tensor(1.5)
    assert_fast(model, x, 1e-5)
    layer(model).base_layer.weight.requires_grad_()
    assert_fast(model, x, 1e-5)


def test_autocast():
    model = model_of(dtype=F32)
    with torch.autocast("cpu", dtype=BF16):
        assert_fast(model, image(dtype=F32), 3e-2)


def test_dropout_in_training_is_ours_and_keeps_what_it_should():
    """With A and B that add up all channels, the adapter's part counts what was kept."""
    model = model_of(dtype=F32, lora={"lora_dropout": 0.25})
    own = layer(model)
    for weight in (own.lora_A["default"].weight, own.lora_B["default"].weight):
        nn.init.ones_(weight)
    x = torch.ones(64, C, 8, 8)
    peft_fast.report(model)
    with torch.no_grad():
        part = own.train()(x) - own.base_layer(x)
    assert peft_fast.report(model).fast_calls == 1 and not peft_fast.report(model).handed_back
    low = own.scaling["default"] * 4
    kept = part[:, 0] / low * 0.75
    assert torch.allclose(kept, kept.round(), atol=1e-3) and 0.74 < kept.mean() / C < 0.76
    assert len(kept.round().unique()) > 4
    with torch.no_grad():
        torch.manual_seed(3)
        one = own(x)
        torch.manual_seed(3)
        assert torch.equal(own(x), one) and not torch.equal(own(x), one)


def test_weights_changed_in_place_are_seen():
    model, x = model_of(dtype=F32, last=True), image(dtype=F32, last=True)
    for change in (
        lambda W: W.data.mul_(2),
        lambda W: setattr(W, "data", torch.randn_like(W)),
        lambda W: W.data.copy_(torch.randn_like(W)),
    ):
        change(layer(model).base_layer.weight)
        assert_fast(model, x, 1e-5)
    layer(model).base_layer.weight = nn.Parameter(torch.randn(N, C, 1, 1), requires_grad=False)
    assert_fast(model, x, 1e-5)
    model.merge_adapter()
    assert_pefts(model, x, "merged")
    model.unmerge_adapter()
    assert_fast(model, x, 1e-5)
    assert_fast(model.double(), x.detach().double().requires_grad_(), 1e-12)


def _hooked():
    model = model_of()
    layer(model).base_layer.register_forward_hook(lambda module, args, y: y * 2)
    return model


KEPT = {
    "kernel": (lambda: model_of(kernel_size=3), "kernel is not of size 1"),
    "one side": (lambda: model_of(kernel_size=(1, 3)), "kernel is not of size 1"),
    "groups": (lambda: model_of(groups=2), "with groups"),
    "padding": (lambda: model_of(padding=1), "a convolution that pads"),
    "dora": (lambda: model_of(lora={"use_dora": True}), "DoraConv2dVariant keeps PEFT's forward"),
    "hook": (_hooked, "hooks or a replaced forward on the base layer"),
}


@pytest.mark.parametrize("make, reason", KEPT.values(), ids=KEPT)
def test_the_others_are_pefts_bit_by_bit(make, reason):
    model = make()
    assert reason in peft_fast.report(model).slow["base_model.model.0"]
    assert_pefts(model, image(), reason)


def test_inputs_that_are_pefts():
    model = model_of()
    assert_pefts(model, torch.randn(C, 6, 5).bfloat16(), "not a plain dense batch")
    assert_pefts(model, torch.randn(2, 6, C, 5).bfloat16().transpose(1, 2), "neither in channels-first nor")
    with settings.override(min_tokens=2 * 6 * 5 + 1):
        assert_pefts(model, image(), "few tokens")
    with pytest.raises(RuntimeError):
        model(torch.randn(2, C + 1, 6, 5).bfloat16())
    with model.disable_adapter():
        assert_pefts(model, image(), "disabled")


def test_several_adapters_in_one_batch():
    model = model_of(dtype=F32, last=True).eval()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = image(dtype=F32, last=True)
    with stock():
        expected = model(x, adapter_names=["default", "other"])
    assert torch.equal(model(x, adapter_names=["default", "other"]), expected)


def test_a_tensor_written_after_the_call():
    """Callers write into a layer's result."""
    model, x = model_of(), image()
    for made in (x, image(last=True)):
        y = layer(model)(made)
        y += 1
        y.float().sum().backward()


def test_switches_copies_and_files(tmp_path):
    model, x = model_of(dtype=F32, last=True), image(dtype=F32, last=True)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert_fast(other, x, 1e-5)
        peft_fast.restore(other)
    model.save_pretrained(tmp_path / "fast")
    peft_fast.restore(model)
    model.save_pretrained(tmp_path / "stock")
    name = "adapter_model.safetensors"
    assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    assert both(model, x)[2] == 0 and conv.ConvNd.forward is conv.stock
    peft_fast.enable()
    assert_fast(model, x, 1e-5)
    peft_fast.disable()
    assert conv.ConvNd.forward is conv.stock


def test_training_a_few_steps():
    ends = []
    for fast in (False, True):
        model = model_of(dtype=F32, last=True, accelerate=fast)
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        x = image(dtype=F32, last=True).detach()
        for _ in range(5):
            (model(x) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append({k: v.clone() for k, v in model.state_dict().items()})
    assert_same(*ends, rtol=1e-5)


def test_compiled_in_one_graph():
    model, x = model_of(dtype=F32, last=True), image(dtype=F32, last=True)
    y = model(x)
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(fast(x), y, rtol=1e-5, atol=1e-6)
    fast(x).sum().backward()
    assert layer(model).lora_A["default"].weight.grad is not None
    torch._dynamo.reset()


def test_an_unknown_forward_of_convolutions_leaves_linear_layers_fast(monkeypatch):
    known._judge.cache_clear()
    monkeypatch.setattr(known, "KNOWN_CONV", {})
    try:
        model = model_of()
        assert "forward that peft_fast does not know" in next(iter(peft_fast.report(model).slow.values()))
        assert conv.ConvNd.forward is conv.stock and plan.Linear.forward is not plan.stock_linear
    finally:
        monkeypatch.undo()
        known._judge.cache_clear()
    assert known.forward_known("_ConvNd")[0]


@pytest.mark.parametrize("pack_mb", [0, 8])
def test_the_memory_of_a_weight_that_has_moved_is_not_kept(pack_mb):
    """As by model.to(device): packed copies know a weight by its view, and views keep what they look at."""
    model, x = model_of(dtype=F32, last=True), image(dtype=F32, last=True)
    own, base = layer(model), layer(model).base_layer
    with settings.override(pack_mb=pack_mb):
        for _ in range(2):
            own(x).sum().backward()
        assert len(conv._flat) == bool(pack_mb)
        left = StorageWeakRef(base.weight.untyped_storage())
        base.weight.data = base.weight.data.clone()
        assert left.expired() == (not pack_mb)
        own(x)
        assert left.expired()
        left = StorageWeakRef(base.weight.untyped_storage())
        peft_fast.restore(model)
        base.weight.data = base.weight.data.clone()
        assert left.expired() and not conv._flat


def test_packed_copies_know_a_weight_again():
    model, x = model_of(dtype=F32, last=True), image(dtype=F32, last=True)
    with settings.override(pack_mb=8):
        packing.clear()
        sizes = []
        for _ in range(3):
            layer(model)(x).sum().backward()
            sizes.append(packing.used())
        assert sizes[0] == sizes[1] == sizes[2] > 0
        assert_fast(model, x, 1e-5)
        layer(model).base_layer.weight.data.mul_(2)
        assert_fast(model, x, 1e-5)
        packing.clear()
