"""What save_pretrained writes after a life with peft_fast: byte for byte the files of stock PEFT on equal weights.

Every test lives the same life twice, accelerated and on a model that never knew the package. The files of both have the
same names, keys, dtypes and shapes, and values that only rounding tells apart; once the second model has the weights of
the first, all bytes are the same: of what is written accelerated, switched off, restored and by stock.
"""

import contextlib
import copy
import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors import torch as safetensors

import peft_fast
from peft_fast.ops import lora_linear as lora_linear_op
from tests.patch.saving import (
    F32,
    F64,
    KINDS,
    LINEAR,
    LLAMA,
    UP_DOWN,
    assert_files_are_pefts,
    assert_loads,
    assert_same_files,
    both_ways,
    in_dtype,
    steps,
    written,
)
from tests.patch.test_together import MIXABLE, OTHERS, Three, made, other_config
from tests.patch.toys import stock, tensor_of

pytestmark = pytest.mark.filterwarnings("ignore")
# float64 tells wrong values from rounding; the compiled kernels, and what they keep of weights, are of float32
FLOATS = pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
BOTH_WIDE = {f"{name}, float32": in_dtype(kind, F32) for name, kind in KINDS.items() if kind.dtype is F64}
kinds = pytest.mark.parametrize("kind", [*KINDS.values(), *BOTH_WIDE.values()], ids=[*KINDS, *BOTH_WIDE])


@kinds
def test_after_steps(kind, tmp_path):
    ours, twin = both_ways(kind.make, steps, kind.x)
    before = kind.make()
    assert sum(not torch.equal(p, q) for p, q in zip(ours.parameters(), before.parameters(), strict=True)) > 1
    y = tensor_of(ours.eval()(kind.x)).detach()
    assert_files_are_pefts(ours, twin, tmp_path, kind.rtol)
    assert_loads(ours, kind, tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(tensor_of(ours(kind.x)), y, rtol=0, atol=2 * kind.rtol * y.abs().max().item())


@kinds
def test_inside_merged(kind, tmp_path):
    """Where the weights of the base are not their own, and after."""

    def life(model, x):
        steps(model, x)
        model.eval()

    ours, twin = both_ways(kind.make, life, kind.x)
    with stock():
        expected = written(twin, tmp_path / "twin")
    with peft_fast.merged(ours), torch.no_grad():
        ours(kind.x)
        inside = written(ours, tmp_path / "inside")
    assert_same_files(inside, expected, kind.rtol)
    assert_files_are_pefts(ours, twin, tmp_path, kind.rtol)
    assert_same_files(written(ours, tmp_path / "after"), inside)


def other(model, **config):
    """An adapter beside the default one."""
    torch.manual_seed(1)
    targets = model.peft_config["default"].target_modules
    model.add_adapter("other", LoraConfig(**{"r": 4, "target_modules": targets, "init_lora_weights": False, **config}))


def weighted(model, x, how):
    other(model)
    steps(model, x)
    model.set_adapter("other")
    steps(model, x)
    model.add_weighted_adapter(["default", "other"], [0.7, -0.3], "mixed", combination_type=how)
    model.set_adapter("mixed")
    steps(model, x)


def several(model, x):
    """Three adapters, of other ranks, of DoRA and on other layers, trained in turn; one more that no step reaches."""
    other(model, r=2, use_rslora=True, lora_alpha=3)
    for name, config in {"dora": {"use_dora": True}, "some": {"target_modules": ["up"]}, "idle": {}}.items():
        config = {"target_modules": UP_DOWN, "init_lora_weights": False, **config}
        model.add_adapter(name, LoraConfig(r=3, **config))
    for name in ("default", "other", "dora", "default"):
        model.set_adapter(name)
        steps(model, x, 2)
    model.base_model.set_adapter(["default", "other"])
    steps(model, x)
    model.delete_adapter("some")


def swapped(model, x, folder, rank, prepared):
    """Another adapter in the place of the first, between steps; its files are stock's."""
    if not (folder / "other").exists():
        with stock():
            torch.manual_seed(5)
            # PEFT keeps the config of before, which another scaling would not fit
            config = LoraConfig(
                r=rank, lora_alpha=16 if prepared else 8, target_modules=UP_DOWN, init_lora_weights=False
            )
            get_peft_model(LINEAR.bare(), config).save_pretrained(folder / "other")
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    steps(model, x)
    hotswap_adapter(model, str(folder / "other"), adapter_name="default")
    steps(model, x)


def merged_and_back(model, x):
    steps(model, x)
    model.merge_adapter()
    model.unmerge_adapter()
    steps(model, x)


def copied(model, x):
    steps(model, x)
    again = copy.deepcopy(model)
    steps(again, x)
    return again


LIVES = {
    **{f"weighted, {how}": functools.partial(weighted, how=how) for how in ("linear", "cat", "svd")},
    "several adapters": several,
    "hotswap": functools.partial(swapped, rank=4, prepared=False),
    "prepared hotswap": functools.partial(swapped, rank=2, prepared=True),
    "merged and unmerged": merged_and_back,
    "copied": copied,
}


@FLOATS
@pytest.mark.parametrize("life", LIVES)
def test_after_a_life(life, dtype, tmp_path):
    run = functools.partial(LIVES[life], folder=tmp_path) if "hotswap" in life else LIVES[life]
    kind = in_dtype(LINEAR, dtype)
    ours, twin = both_ways(kind.make, run, kind.x)
    assert_files_are_pefts(ours, twin, tmp_path, kind.rtol)
    if life != "prepared hotswap":  # whose padded weights do not fit the rank in their own file
        if life.startswith("merged"):  # and came back, which is the base of no other model
            kind = kind._replace(base=lambda: copy.deepcopy(ours).unload())
        assert_loads(ours, kind, tmp_path / "ours")


def served(model, x):
    """Generation and mixed batches of two trained adapters."""
    other(model, modules_to_save=["lm_head"])
    for name in ("other", "default"):
        model.set_adapter(name)
        steps(model, x)
    model.eval()
    with torch.no_grad():
        for options in ({}, {"adapter_names": ["other", "default", "__base__", "other"]}):
            model.generate(input_ids=x, max_new_tokens=4, do_sample=False, pad_token_id=0, **options)
        model(x, adapter_names=["default", "__base__", "other", "default"])
    steps(model.train(), x)


@FLOATS
def test_after_generation_and_mixed_batches(dtype, tmp_path):
    kind = in_dtype(LLAMA, dtype)
    ours, twin = both_ways(kind.make, served, kind.x)
    report = peft_fast.report(ours)
    assert report.group_calls and report.block_calls
    assert_files_are_pefts(ours, twin, tmp_path, kind.rtol)
    assert_loads(ours, kind, tmp_path / "ours")


@pytest.mark.parametrize("name", OTHERS)
def test_beside_another_method(name, tmp_path):
    """LoRA on two layers and the other method on the third, all in training: the files of both."""

    def make():
        lora = made(LoraConfig(r=4, target_modules=UP_DOWN, init_lora_weights=False), lambda: Three().double())
        torch.manual_seed(1)
        del lora.base_model.model.peft_config  # else PEFT keeps both configs in one dict
        model = get_peft_model(lora.base_model.model, other_config(name, ("last",))).double()
        for n, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or "up.lora_" in n or "down.lora_" in n)
        model.__dict__["lora"] = lora  # no part of the model
        return model

    def save(model, folder):
        parts = {"lora": model.__dict__["lora"], "other": model}
        files = {
            f"{part}/{path}": data for part, m in parts.items() for path, data in written(m, folder / part).items()
        }
        assert all(safetensors.load(files[f"{part}/adapter_model.safetensors"]) for part in parts)
        return files

    ours, twin = both_ways(make, steps, LINEAR.x)
    assert_files_are_pefts(ours, twin, tmp_path, LINEAR.rtol, save)


@pytest.mark.parametrize("name", MIXABLE)
def test_mixed_with_another_method(name, tmp_path):
    """PeftMixedModel, which has no save_pretrained: what it would write."""

    def make():
        config = LoraConfig(r=4, target_modules=UP_DOWN, init_lora_weights=False)
        model = made(config, lambda: Three().double(), mixed=True)
        torch.manual_seed(1)
        model.add_adapter("more", other_config(name, ("last",)))
        model.set_adapter(["default", "more"])
        return model.double()

    def save(model, folder):
        states = {name: get_peft_model_state_dict(model, adapter_name=name) for name in ("default", "more")}
        assert all(states.values())
        return {f"{name}.safetensors": safetensors.save(state) for name, state in states.items()}

    ours, twin = both_ways(make, steps, LINEAR.x)
    assert_files_are_pefts(ours, twin, tmp_path, LINEAR.rtol, save)


def _one_more_key(model, monkeypatch):
    model.base_model.model.up.lora_A.register_buffer("default_packed", torch.zeros(3))


def _another_dtype(model, monkeypatch):
    model.base_model.model.up.lora_A.float()


def _another_shape(model, monkeypatch):
    """As of a rank that a kernel padded."""
    A = model.base_model.model.up.lora_A["default"]
    A.weight.data = torch.cat([A.weight.data, torch.zeros_like(A.weight.data)])


def _another_setting(model, monkeypatch):
    model.peft_config["default"].use_rslora = True


def _a_bit_while_it_is_on(model, monkeypatch):
    """Weights that are written back when acceleration ends."""
    weight, back = model.base_model.model.down.lora_B["default"].weight, peft_fast.restore

    def restore(model):
        weight.data[3, 1] = torch.nextafter(weight.data[3, 1], weight.data.new_tensor(9.0))
        return back(model)

    monkeypatch.setattr(peft_fast, "restore", restore)


def _another_state_dict(model, monkeypatch):
    """Of other values than the parameters have, as merged weights would be."""
    up = model.base_model.model.up
    A = "lora_A.default.weight"
    up._register_state_dict_hook(lambda module, state, prefix, meta: state.update({prefix + A: 2 * state[prefix + A]}))


FAULTS = [_one_more_key, _another_dtype, _another_shape, _another_setting, _a_bit_while_it_is_on, _another_state_dict]


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_noticed(fault, tmp_path, monkeypatch):
    ours, twin = both_ways(LINEAR.make, steps, LINEAR.x)
    if fault:
        fault(ours, monkeypatch)
    with pytest.raises(AssertionError) if fault else contextlib.nullcontext():
        assert_files_are_pefts(ours, twin, tmp_path, LINEAR.rtol)


def test_a_gradient_a_millionth_off_is_noticed(tmp_path, monkeypatch):
    function = lora_linear_op.__globals__["LoraLinear"]
    backward = function.backward

    def off(ctx, g):
        dx, dW, dbias, dA, dB, *rest = backward(ctx, g)
        return dx, dW, dbias, dA, dB * (1 + 1e-6), *rest

    monkeypatch.setattr(function, "backward", staticmethod(off))
    ours, twin = both_ways(LINEAR.make, steps, LINEAR.x)
    with pytest.raises(AssertionError, match="is off by"):
        assert_files_are_pefts(ours, twin, tmp_path, LINEAR.rtol)


def test_a_file_with_other_weights_is_noticed(tmp_path):
    ours, twin = both_ways(LINEAR.make, steps, LINEAR.x)
    assert_files_are_pefts(ours, twin, tmp_path, LINEAR.rtol)
    file = tmp_path / "ours" / "adapter_model.safetensors"
    tensors = safetensors.load(file.read_bytes())
    safetensors.save_file({k: t * (1 + 1e-12) for k, t in tensors.items()}, file)
    with pytest.raises(AssertionError):
        assert_loads(ours, LINEAR, tmp_path / "ours")
