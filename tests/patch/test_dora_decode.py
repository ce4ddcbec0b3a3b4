"""DoRA, few tokens without gradients: the norm is kept as long as the probe finds W + s·B·A as it was."""

import functools

import pytest
import torch
from peft.helpers import DoraCaching
from torch import nn

import peft_fast
from peft_fast import native, ops, settings
from peft_fast.patch import decode, dora
from peft_fast.patch import norms as kept_norms
from tests.patch.decoding import assert_right, dora_model, magnitude
from tests.patch.toys import K, adapt, conv1d, inputs, layers, toy

pytestmark = [
    pytest.mark.skipif(not native.load(), reason=f"the compiled operators: {native.reason()}"),
    pytest.mark.usefixtures("as_shipped"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"autocast_adapter_dtype": False}, {"lora_dropout": 0.1, "use_rslora": True}])
@pytest.mark.parametrize("shape", [(1, K), (1, 1, K), (2, 3, K), (8, K)])
def test_the_norm_is_computed_once(dtype, config, shape, norms):
    model, x = dora_model(dtype, **config), inputs(*shape, dtype=dtype).detach()
    before = native.decoded()
    assert assert_right(model, x) == 2 and len(norms) == 2 and native.decoded() == before
    for _ in range(3):
        assert assert_right(model, x) == 2
    assert len(norms) == 2 and native.decoded() == before + 6
    report = peft_fast.report(model)
    assert (report.fast_calls, report.handed_back) == (8, {})


def test_a_vector_becomes_a_row():
    model, x = dora_model(), inputs(K).detach()
    assert assert_right(model, x) == 1  # the one behind it
    with torch.no_grad():
        assert model(x).shape == (1, K)


def test_calls_are_counted_as_any():
    model, x = dora_model(), inputs(1, K).detach()
    before = ops.fast_calls()
    with torch.no_grad():
        model(x), model(x)
    assert ops.fast_calls() == before + 4


@pytest.mark.parametrize("layer", [nn.Linear, conv1d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_tokens(layer, dtype, norms):
    """The order of its sums may be another, the norm is the same."""
    model = dora_model(dtype, layer=layer)
    for tokens in (1, 5, 1, 5, 8, 9, 31, 1, 8, 33, 150, 9, 150):
        taken = assert_right(model, inputs(tokens, K, dtype=dtype).detach())
        assert taken == (2 if tokens <= 8 and layer is nn.Linear else 0)
    assert len(norms) == 2
    for layer in layers(model):
        layer.base_layer.weight.data[1, 2] += 0.5
    for tokens in (150, 1, 9, 150):
        assert_right(model, inputs(tokens, K, dtype=dtype).detach())
    assert len(norms) == 4
    report = peft_fast.report(model)
    assert (report.fast_calls, report.handed_back) == (2 * 17, {})


def test_a_square_weight_whose_norm_is_that_of_columns():
    model = adapt(lambda: nn.Sequential(nn.Linear(K, K)), ["0"], use_dora=True).eval()
    layer = layers(model)[0]
    for turned, fast in ((False, 1), (True, 0)):
        magnitude(layer).fan_in_fan_out = turned
        for tokens in (2, 2, 200):
            assert assert_right(model, inputs(tokens, K).detach()) == (fast if tokens == 2 else 0)


def test_who_watches_or_cannot_is_right_too():
    model, x = dora_model(), inputs(2, K).detach()
    assert_right(model, x)
    for name in ("torch", "reference"):
        with settings.override(backend=name):
            assert assert_right(model, x) == 0
    with settings.override(exact=True):
        assert assert_right(model, x) == 2
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert_right(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_right(model, x)
    assert assert_right(toy(conv1d, use_dora=True).eval(), x) == 0  # by dora_linear
    assert_right(model.double(), x.double())


@pytest.mark.parametrize("layer", [nn.Linear, conv1d])
@pytest.mark.parametrize("tokens", [1, 9, 32, 33])
def test_the_norm_that_peft_was_asked_to_keep(tokens, layer, norms, monkeypatch):
    """peft.helpers.DoraCaching: what PEFT has in its cache is taken without a proof, as PEFT would; else ours is."""
    runs = []
    monkeypatch.setattr(dora, "dora_decode", lambda *a, **k: runs.append(1) or ops.dora_decode(*a, **k))
    model, x = dora_model(layer=layer), inputs(tokens, K).detach()
    with DoraCaching():
        for _ in range(3):
            with torch.no_grad():
                model(x)
        assert len(norms) == 2 and not runs and not magnitude(layers(model)[0])._dora_cache
        for _ in range(2):
            assert_right(model, x)  # PEFT fills its cache
        assert len(norms) == 4 and len(runs) == (4 if tokens <= 32 else 0)
        assert magnitude(layers(model)[0])._dora_cache
    for _ in range(2):
        assert_right(model, x)
    assert not magnitude(layers(model)[0])._dora_cache and len(norms) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings(dtype, norms):
    """Their norms are those of columns, over all of the table."""
    embedding = functools.partial(adapt, lambda: nn.Sequential(nn.Embedding(40, 24)).to(dtype), ["0"], use_dora=True)
    model, ids = embedding().eval(), torch.tensor([[3, 39], [0, 3]])
    for _ in range(3):
        assert_right(model, ids)
    assert len(norms) == 1
    layer = model.base_model.model[0]
    layer.base_layer.weight.data[7].neg_()
    assert_right(model, ids), assert_right(model, ids)
    layer.lora_embedding_B["default"].data.mul_(2)
    assert_right(model, ids), assert_right(model, ids)
    layer.lora_magnitude_vector["default"].weight.data.mul_(3)
    assert_right(model, ids)
    layer.scaling["default"] = 1.0
    assert_right(model, ids), assert_right(model, ids)
    assert len(norms) == 4
    assert_right(model.train(), ids)


def test_the_way_without_the_compiled_look(monkeypatch, norms):
    monkeypatch.setattr(native, "layer", lambda: None)
    monkeypatch.setattr(decode, "direct", lambda: None)
    model, x = dora_model(), inputs(2, K).detach()
    for _ in range(3):
        assert_right(model, x)
    assert len(norms) == 2
    layers(model)[0].base_layer.weight.data.neg_()
    assert_right(model, x), assert_right(model, x)
    assert len(norms) == 3


def test_without_the_compiled_operators(monkeypatch, norms):
    monkeypatch.setattr(kept_norms, "kernel", lambda: None)
    model, x = dora_model(), inputs(9, K).detach()
    with DoraCaching():
        assert_right(model, x), assert_right(model, x)
    with settings.override(backend="torch"):
        assert_right(model, x), assert_right(model, x)
    assert len(norms) == 2 + 4


def test_other_dtypes(norms):
    for dtype in (torch.float64, torch.float16):
        model = dora_model(dtype)
        for tokens in (2, 50):
            x = inputs(tokens, K, dtype=dtype).detach()
            with DoraCaching():
                assert_right(model, x), assert_right(model, x)
            assert_right(model, x)


def test_a_library_without_the_module_beside_it(monkeypatch):
    """As of another Python, or of older sources."""
    monkeypatch.setattr(native, "_module", lambda: None)
    for found in (native.layer, native.decode, native.adapters, decode.direct):
        found.cache_clear()
    try:
        model, x = dora_model(), inputs(2, K).detach()
        for _ in range(3):
            assert_right(model, x)
        assert native.decode() is None
    finally:
        monkeypatch.undo()
        for found in (native.layer, native.decode, native.adapters, decode.direct):
            found.cache_clear()


@pytest.mark.parametrize("n", [49, 48])
def test_fresh_adapters_under_autocast(n, norms):
    """What proves must not be rounded to what the process computes in."""
    model = adapt(lambda: nn.Sequential(nn.Linear(K, n)), ["0"], use_dora=True, init_lora_weights=True).eval()
    x, weight = inputs(40, K).detach(), layers(model)[0].base_layer.weight
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x), model(x)
        assert len(norms) == 1
        weight.data.copy_(weight.data.bfloat16().float())
        model(x)
        weight.data.mul_(1.0015)
        model(x)
        assert len(norms) == 3


def test_another_default_device():
    probe = ops.dora_decode.__globals__["probe"]
    probe.cache_clear()
    model, x = dora_model(), inputs(2, K).detach()
    with torch.device("meta"):
        assert_right(model, x)
    assert_right(model, x)
    assert probe(K).device.type == "cpu" and not probe(K).is_inference()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [2, 50])
def test_another_default_dtype(tokens, dtype, default):
    model, x = dora_model(dtype), inputs(tokens, K, dtype=dtype).detach()
    before = torch.get_default_dtype()
    ops.dora_decode.__globals__["probe"].cache_clear()
    torch.set_default_dtype(default)
    try:
        for _ in range(3):
            assert_right(model, x)
    finally:
        torch.set_default_dtype(before)


def test_the_probe_tells_a_constant_of_a_row():
    for k in (*range(1, 600), 4096, 7459):
        token = ops.dora_decode.__globals__["probe"](k)
        assert token.sum() and torch.equal(token.bfloat16().float(), token)
        assert token.abs().min() >= 1 and token.abs().max() < 2


@pytest.mark.parametrize("tokens", [2, 50])
def test_a_weight_with_a_nan_has_its_norm_kept_too(tokens, norms):
    model, x = dora_model(), inputs(tokens, K).detach()
    layers(model)[0].base_layer.weight.data[3, 5] = float("nan")
    with torch.no_grad():
        for _ in range(4):
            assert layers(model)[0](x).isnan().any(0).sum() == 1
    assert len(norms) == 1


@pytest.mark.parametrize("tokens", [2, 50])
def test_fake_tensors(tokens):
    """Nothing is asked of values that are not there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, x = dora_model(), inputs(tokens, K).detach()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        assert model(x).shape == (tokens, K)


def test_what_is_traced_has_no_bits_to_compare():
    from torch.fx.experimental.proxy_tensor import make_fx

    for tokens in (2, 50):
        model, x = dora_model(), inputs(tokens, K).detach()
        with torch.no_grad():
            expected = model(x)
            traced = make_fx(model)(x)
            torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-5)
        assert "all_zero" not in traced.code


def test_peft_that_is_not_known(monkeypatch):
    model, x = dora_model(), inputs(1, K).detach()
    monkeypatch.setattr(dora, "known", lambda name: "another PEFT")
    assert assert_right(model, x) == 0
    assert "another PEFT" in peft_fast.report(model).handed_back
    assert decode.run(layers(model)[0], x) is None
