"""DoRA, few tokens without gradients: the norm is kept as long as the probe finds W + s·B·A as it was."""

import copy
import functools
import gc
import threading
import weakref

import pytest
import torch
from peft import LoraConfig
from peft.helpers import DoraCaching
from torch import nn

import peft_fast
from peft_fast import native, ops, settings
from peft_fast.ops import dora_norm
from peft_fast.patch import decode, dora
from peft_fast.patch import norms as kept_norms
from tests.patch.decoding import decoded
from tests.patch.test_decode_changes import BROKEN, CHANGES
from tests.patch.toys import K, N, adapt, conv1d, inputs, layers, stock, toy

pytestmark = pytest.mark.skipif(not native.load(), reason=f"the compiled operators: {native.reason()}")


@pytest.fixture(autouse=True)
def as_shipped(untouched_peft):
    """The number of tokens that users have."""
    assert native.decode() is not None and native.few_tokens() is not None
    with settings.override(min_tokens=128):
        yield


@pytest.fixture
def norms(monkeypatch):
    """The norms that were computed: one entry each."""
    found = []

    def counted(*args, **kwargs):
        found.append(args)
        return dora_norm(*args, **kwargs)

    monkeypatch.setattr(dora, "dora_norm", counted)
    monkeypatch.setattr(kept_norms, "dora_norm", counted)
    return found


def model_of(dtype=torch.float32, layer=nn.Linear, **config):
    """Two DoRA layers whose magnitudes are not the norms."""
    model = toy(layer, base_dtype=dtype, use_dora=True, **config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.2 * torch.rand(p.shape, generator=torch.Generator().manual_seed(0)))
    return model


def assert_right(model, x):
    """PEFT's y within what the dtype leaves -> how many layers decoded."""
    with torch.no_grad():
        with stock():
            expected = model(x)
        y, taken = decoded(model, x)
    rtol = 1e-5 if y.dtype == torch.float32 else 2e-2
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(y, expected, rtol=rtol, atol=rtol * expected.abs().max().item())
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [{}, {"autocast_adapter_dtype": False}, {"lora_dropout": 0.1, "use_rslora": True}])
@pytest.mark.parametrize("shape", [(1, K), (1, 1, K), (2, 3, K), (8, K)])
def test_the_norm_is_computed_once(dtype, config, shape, norms):
    model, x = model_of(dtype, **config), inputs(*shape, dtype=dtype).detach()
    before = native.decoded()
    assert assert_right(model, x) == 2 and len(norms) == 2 and native.decoded() == before
    for _ in range(3):
        assert assert_right(model, x) == 2
    assert len(norms) == 2 and native.decoded() == before + 6
    report = peft_fast.report(model)
    assert (report.fast_calls, report.handed_back) == (8, {})


def test_a_vector_becomes_a_row():
    model, x = model_of(), inputs(K).detach()
    assert assert_right(model, x) == 1  # the one behind it
    with torch.no_grad():
        assert model(x).shape == (1, K)


def test_calls_are_counted_as_any():
    model, x = model_of(), inputs(1, K).detach()
    before = ops.fast_calls()
    with torch.no_grad():
        model(x), model(x)
    assert ops.fast_calls() == before + 4


@pytest.mark.parametrize("layer", [nn.Linear, conv1d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_tokens(layer, dtype, norms):
    """The order of its sums may be another, the norm is the same."""
    model = model_of(dtype, layer=layer)
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


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "train"])  # whose masks are others
def test_every_change_is_seen_by_the_next_call(change):
    """And by the one after it, which is the compiled one's if the layer decodes at all."""
    model, x = model_of(lora_dropout=0.2), inputs(3, K).detach()
    if change in ("base_replaced", "base_of_another_class"):
        peft_fast.enable()  # a base that nobody marked
    assert_right(model, x), assert_right(model, x)
    CHANGES[change][0](model)
    for _ in range(3):
        torch.manual_seed(3)
        with torch.no_grad():
            with stock():
                torch.manual_seed(3)
                expected = model(x)
            torch.manual_seed(3)
            torch.testing.assert_close(model(x), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("change", BROKEN)
def test_what_peft_cannot_run(change):
    model = model_of()
    assert_right(model, inputs(3, K).detach())
    BROKEN[change](model)
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)) if "rank_above" not in change else stock():
        model(inputs(3, K).detach())


def magnitude(layer):
    return layer.lora_magnitude_vector["default"]


def _hook(module):
    module.register_forward_hook(lambda m, args, y: y * 2)


def _flip(tensor, dim):
    tensor.copy_(tensor.flip(dim))


def _second_dora(model, on):
    model.add_adapter("second", LoraConfig(r=5, target_modules=["up", "down"], init_lora_weights=False, use_dora=True))
    model.base_model.set_adapter(on)
    model.eval()


# what only DoRA has -> how many layers decode afterwards
OWN = {
    "m_in_place": (lambda m: magnitude(layers(m)[0]).weight.data.mul_(1.5), 2),
    "m_data": (lambda m: setattr(magnitude(layers(m)[0]).weight, "data", torch.rand(N)), 2),
    "m_replaced": (lambda m: setattr(magnitude(layers(m)[0]), "weight", nn.Parameter(torch.rand(N))), 2),
    "m_in_bfloat16": (lambda m: magnitude(layers(m)[0]).bfloat16(), 2),
    "m_every_other": (lambda m: setattr(magnitude(layers(m)[0]).weight, "data", torch.rand(2 * N)[::2]), 2),
    "hook_on_m": (lambda m: _hook(magnitude(layers(m)[0])), 1),
    "signs_of_W": (lambda m: layers(m)[0].base_layer.weight.data.neg_(), 2),
    "columns_of_W": (
        lambda m: layers(m)[0].base_layer.weight.data.copy_(layers(m)[0].base_layer.weight.data.flip(1)),
        2,
    ),
    "rows_of_W": (lambda m: layers(m)[0].base_layer.weight.data.copy_(layers(m)[0].base_layer.weight.data.flip(0)), 2),
    "signs_of_B": (lambda m: layers(m)[0].lora_B["default"].weight.data.neg_(), 2),
    "one_element_of_W": (lambda m: layers(m)[0].base_layer.weight.data[3, 5].add_(0.5), 2),
    "W_and_B": (lambda m: [p.data.mul_(2) for p in layers(m)[0].parameters()], 2),
    "another_adapter": (lambda m: _second_dora(m, "second"), 2),
    "two_adapters": (lambda m: _second_dora(m, ["default", "second"]), 0),
    "variant_of_another_class": (lambda m: layers(m)[0].lora_variant.update({"default": _Other()}), 1),
    "variant_with_its_own": (lambda m: _instance(layers(m)[0].lora_variant["default"]), 1),
    "no_variant": (lambda m: layers(m)[0].lora_variant.clear(), 2),
    "fresh": (lambda m: layers(m)[0].lora_B["default"].weight.data.zero_(), 1),
}


def _instance(variant):
    variant.forward = _Other.forward


class _Other:
    @staticmethod
    def forward(layer, active_adapter, x, result, **kwargs):
        return result * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", OWN)
def test_changes_of_what_only_dora_has(change, dtype):
    apply, taken = OWN[change]
    model, x = model_of(dtype), inputs(2, K, dtype=dtype).detach()
    assert_right(model, x), assert_right(model, x)
    if change in ("m_data", "m_replaced", "m_every_other", "m_in_bfloat16") and dtype is torch.bfloat16:
        model.float(), model.bfloat16()
    apply(model)
    for _ in range(3):
        assert assert_right(model, x) == taken


def test_a_square_weight_whose_norm_is_that_of_columns():
    model = adapt(lambda: nn.Sequential(nn.Linear(K, K)), ["0"], use_dora=True).eval()
    layer = layers(model)[0]
    for turned, fast in ((False, 1), (True, 0)):
        magnitude(layer).fan_in_fan_out = turned
        for tokens in (2, 2, 200):
            assert assert_right(model, inputs(tokens, K).detach()) == (fast if tokens == 2 else 0)


def test_merging_and_back_is_seen(norms):
    """In bfloat16 PEFT's way back leaves other weights, which no version counts."""
    model, x = model_of(torch.bfloat16), inputs(1, K, dtype=torch.bfloat16).detach()
    assert_right(model, x)
    weight = layers(model)[0].base_layer.weight
    before = weight.detach().clone()
    model.merge_adapter(), model.unmerge_adapter()
    assert not torch.equal(weight, before)
    assert_right(model, x), assert_right(model, x)
    assert len(norms) == 4
    with peft_fast.merged(model):
        assert_right(model, x)
    assert_right(model, x)
    assert len(norms) == 4  # every bit is back


def test_training_between_two_calls(norms):
    model, x = model_of(), inputs(4, K).detach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        assert assert_right(model, x) == 2
        model.train()(inputs()).square().mean().backward()
        optimizer.step()
        model.eval()
    assert len(norms) > 6


def test_who_watches_or_cannot_is_right_too():
    model, x = model_of(), inputs(2, K).detach()
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
    model, x = model_of(layer=layer), inputs(tokens, K).detach()
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


def test_a_layer_takes_its_norm_with_it():
    """Copies find their own, and nothing keeps a layer or its tensors alive."""
    model, x = model_of(), inputs(1, K).detach()
    assert_right(model, x), assert_right(model, x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.base_model.model.up.base_layer.weight.mul_(2)
    assert_right(other, x), assert_right(other, x), assert_right(model, x)
    gone = weakref.ref(layers(model)[0]), weakref.ref(layers(model)[0].base_layer.weight)
    del model
    gc.collect()
    assert gone[0]() is None and gone[1]() is None


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
    model, x = model_of(), inputs(2, K).detach()
    for _ in range(3):
        assert_right(model, x)
    assert len(norms) == 2
    layers(model)[0].base_layer.weight.data.neg_()
    assert_right(model, x), assert_right(model, x)
    assert len(norms) == 3


def test_without_the_compiled_operators(monkeypatch, norms):
    monkeypatch.setattr(kept_norms, "kernel", lambda: None)
    model, x = model_of(), inputs(9, K).detach()
    with DoraCaching():
        assert_right(model, x), assert_right(model, x)
    with settings.override(backend="torch"):
        assert_right(model, x), assert_right(model, x)
    assert len(norms) == 2 + 4


def test_other_dtypes(norms):
    for dtype in (torch.float64, torch.float16):
        model = model_of(dtype)
        for tokens in (2, 50):
            x = inputs(tokens, K, dtype=dtype).detach()
            with DoraCaching():
                assert_right(model, x), assert_right(model, x)
            assert_right(model, x)


def test_threads():
    """Several at once, while another gives them norms that the probe does not bear out: none of these is taken."""
    model, x = model_of(), inputs(1, K).detach()
    layer = layers(model)[0]
    with torch.no_grad():
        expected = layer(x)
        wrong = []

        def run():
            with torch.no_grad():
                wrong.extend(1 for _ in range(300) if not torch.allclose(layer(x), expected, atol=1e-5))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(50):
            native.keep(layer, 1, False, torch.ones(N), torch.ones(K), torch.ones(N))
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("tokens", [2, 50])
def test_a_weight_that_is_written_while_its_norm_is_computed(tokens, monkeypatch):
    """As by a hot swap in another thread: the call may give either, the next ones are right."""
    model, x = model_of(), inputs(tokens, K).detach()
    assert_right(model, x)

    def torn(W, adapter, **kwargs):
        norm = dora_norm(W, adapter, **kwargs)
        with torch.no_grad():
            adapter.B.mul_(5)
        return norm

    for layer in layers(model):
        layer.lora_A["default"].weight.data.neg_()
    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(kept_norms, "dora_norm", torn)
        model(x)
    for _ in range(3):
        assert_right(model, x)


def test_a_norm_that_is_kept_for_nobody():
    native.keep(nn.Linear(2, 2), 1, False, torch.ones(2), torch.ones(2), torch.ones(2))


def test_a_library_without_the_module_beside_it(monkeypatch):
    """As of another Python, or of older sources."""
    monkeypatch.setattr(native, "_module", lambda: None)
    for found in (native.layer, native.decode, native.adapters, decode.direct):
        found.cache_clear()
    try:
        model, x = model_of(), inputs(2, K).detach()
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
    model, x = model_of(), inputs(2, K).detach()
    with torch.device("meta"):
        assert_right(model, x)
    assert_right(model, x)
    assert probe(K).device.type == "cpu" and not probe(K).is_inference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 50])
def test_adapters_of_another_dtype_with_the_same_values(dtype, tokens):
    """Below float32 the norm is rounded as the adapter is."""
    model = model_of(dtype, autocast_adapter_dtype=False)
    for layer in layers(model):
        for part in (layer.lora_A, layer.lora_B):
            part.bfloat16()
    x = inputs(tokens, K, dtype=dtype).detach()

    def call():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32 and tokens > 2):
            return model(x)

    call(), call(), call()
    for layer in layers(model):
        for part in (layer.lora_A, layer.lora_B):
            part.float()
    found = call()
    kept_norms._alone.clear(), kept_norms._beside.clear()
    fresh = copy.deepcopy(model)  # of which nothing is kept
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32 and tokens > 2):
        expected = fresh(x)
    assert torch.equal(found, expected)


def test_what_is_traced_has_no_bits_to_compare():
    from torch.fx.experimental.proxy_tensor import make_fx

    for tokens in (2, 50):
        model, x = model_of(), inputs(tokens, K).detach()
        with torch.no_grad():
            expected = model(x)
            traced = make_fx(model)(x)
            torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-5)


def test_peft_that_is_not_known(monkeypatch):
    model, x = model_of(), inputs(1, K).detach()
    monkeypatch.setattr(dora, "known", lambda name: "another PEFT")
    assert assert_right(model, x) == 0
    assert "another PEFT" in peft_fast.report(model).handed_back
    assert decode.run(layers(model)[0], x) is None
