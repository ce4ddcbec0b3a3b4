"""Everything PEFT does to a model over its life keeps working, and what is vanilla afterwards is fast."""

import copy
import io
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import peft_fast
from peft_fast.patch import plan
from tests.patch.toys import (
    K,
    Toy,
    assert_fast,
    assert_handed_back,
    assert_same,
    both,
    inputs,
    layers,
    step,
    stock,
    toy,
)


def config(**changes):
    return LoraConfig(**{"r": 4, "target_modules": ["up", "down"], "init_lora_weights": False, **changes})


def test_merge_unmerge_then_training():
    model = toy()
    model.merge_adapter()
    model.unmerge_adapter()
    assert_fast(model, inputs())
    model.merge_adapter(safe_merge=True)
    assert_handed_back(model, inputs(), reason="merged")


def test_unload_and_adapt_again():
    model = toy()
    y = model(inputs())
    base = model.merge_and_unload()
    assert torch.allclose(base(inputs()), y, rtol=1e-5, atol=1e-6)
    again = get_peft_model(base, config())
    assert_fast(again, inputs())
    again = get_peft_model(again.unload(), config())
    assert_fast(again, inputs())


def test_adapter_with_new_target_layers():
    model = toy(targets=("up",))
    model.add_adapter("wider", config())
    model.set_adapter("wider")
    assert len(layers(model)) == 2
    assert_fast(model, inputs())


def test_switching_and_deleting_adapters():
    model = toy()
    model.add_adapter("other", config(r=2, use_dora=False))
    model.set_adapter("other")
    assert_fast(model, inputs())
    model.add_adapter("dora", config(use_dora=True))
    model.set_adapter("dora")
    assert_fast(model, inputs())
    model.base_model.set_adapter(["other", "dora"])
    assert_handed_back(model, inputs(), reason="one of them DoRA")
    model.delete_adapter("dora")
    model.set_adapter("other")
    assert_fast(model, inputs())


@pytest.mark.parametrize("how", ["linear", "cat", "svd"])
def test_weighted_adapter(how):
    model = toy()
    model.add_adapter("other", config())
    model.add_weighted_adapter(["default", "other"], [0.7, -0.3], "mixed", combination_type=how)
    model.set_adapter("mixed")
    assert_fast(model, inputs())


def test_hotswap(tmp_path):
    model = toy(lora_alpha=4)
    other = toy(seed=5, r=2, lora_alpha=16)
    expected = both(other, inputs())[0]["y"]
    other.save_pretrained(tmp_path)
    torch.manual_seed(0)
    # the base of the other model, whose adapter is what is swapped in
    model.load_state_dict({n: p for n, p in other.state_dict().items() if "base_layer" in n}, strict=False)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert isinstance(layers(model)[0].scaling["default"], torch.Tensor)
    assert_fast(model, inputs())
    hotswap_adapter(model, str(tmp_path), adapter_name="default")
    assert_fast(model, inputs())
    assert_same({"y": expected}, {"y": model(inputs()).detach()}, rtol=1e-5)


def test_modules_to_save():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, 3))
    model = get_peft_model(base, config(target_modules=["0", "1"], modules_to_save=["2"]))
    peft_fast.accelerate(model)
    assert_fast(model, inputs(), calls=2)
    assert any("modules_to_save" in name and p.grad is not None for name, p in model.named_parameters())


def test_tied_embedding_and_head_with_transposed_adapters():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=True, **sizes))
    tied = config(target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True)
    model = peft_fast.accelerate(get_peft_model(base, tied))
    head = model.base_model.model.lm_head
    assert not head.lora_A["default"].weight.is_contiguous()
    tokens = torch.arange(12).view(2, 6)
    assert_fast(model, tokens, calls=3)
    assert not peft_fast.report(model).slow


def test_deepcopy_is_fast_and_independent():
    model = toy()
    model(inputs())
    twin = copy.deepcopy(model)
    assert_fast(twin, inputs())
    layers(twin)[0].set_scale("default", 0.0)
    assert not torch.equal(twin(inputs()), model(inputs()))
    peft_fast.restore(model)
    assert_fast(twin, inputs())
    assert both(model, inputs())[2] == 0
    peft_fast.restore(twin)
    assert plan.Linear.forward is plan.stock_linear


def test_pickle_round_trip_here():
    model = toy()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert_fast(again, inputs())
    assert torch.equal(again(inputs()), model(inputs()))


def test_pickle_opens_where_peft_fast_is_not_installed(tmp_path):
    model = get_peft_model(nn.Sequential(nn.Linear(K, K)), config(target_modules=["0"]))
    peft_fast.accelerate(model)
    x = inputs().detach()
    torch.save((model, x, both(model, x)[0]["y"]), tmp_path / "model.pt")
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "peft_fast":
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
model, x, y = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
assert torch.equal(model(x), y)
assert not any(name.startswith("peft_fast") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def _files(folder):
    """Name -> bytes, the config as parsed JSON with its unordered set sorted."""
    out = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json":
            out[path.name] = json.loads(path.read_text())
            out[path.name]["target_modules"].sort()
        elif path.is_file():
            out[path.name] = path.read_bytes()
    return out


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "after calls"])
def test_saved_files_and_state_dict_are_pefts(tmp_path, trained):
    torch.manual_seed(0)
    model = get_peft_model(Toy(), config(lora_bias=True, bias="all"))
    keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    text, dicts = repr(model), [set(m.__dict__) for m in model.modules()]
    model.save_pretrained(tmp_path / "stock")
    peft_fast.accelerate(model)
    if trained:
        model(inputs()).sum().backward()
    model.save_pretrained(tmp_path / "fast")
    assert _files(tmp_path / "fast") == _files(tmp_path / "stock")
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names and repr(model) == text
    assert not any("peft_fast" in key for key in get_peft_model_state_dict(model))
    peft_fast.restore(model)
    assert [set(m.__dict__) for m in model.modules()] == dicts


def test_from_pretrained_onto_an_accelerated_base_is_fast(tmp_path):
    model = toy()
    model.save_pretrained(tmp_path)
    y = model(inputs())
    base = model.unload()
    again = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert_fast(again, inputs())
    assert torch.allclose(again(inputs()), y, rtol=1e-5, atol=1e-6)


def test_transformers_add_adapter():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=40, **sizes)).eval()
    model.add_adapter(LoraConfig(target_modules=["query", "dense"], init_lora_weights=False))
    assert peft_fast.accelerate(model) is model
    tokens = torch.arange(12).view(2, 6)
    assert_fast(model, tokens)
    model.add_adapter(LoraConfig(target_modules=["value"], init_lora_weights=False), adapter_name="more")
    model.set_adapter("more")
    with torch.no_grad():
        _, _, fast, handed_back = both(model, tokens)
    assert fast == 1 and set(handed_back) == {"no active adapter in this layer"}
    model.disable_adapters()
    assert_handed_back(model, tokens, reason="disabled")


def test_moving_and_casting_keeps_it_fast():
    model = toy()
    model.to(torch.float64)
    assert_fast(model, inputs(dtype=torch.float64), rtol=1e-12)
    model.half().float()
    assert_fast(model, inputs())


def test_weights_changed_in_place_are_seen():
    """A prepacked copy of the base weight must not outlive the weight."""
    model = toy()
    step(model, (inputs(),), {})
    for change in (
        lambda w: w.data.mul_(2),
        lambda w: w.data.copy_(torch.randn_like(w)),
        lambda w: setattr(w, "data", torch.randn_like(w)),
    ):
        for lora in layers(model):
            change(lora.base_layer.weight)
        assert_fast(model, inputs())
    model.load_state_dict({name: torch.randn_like(p) for name, p in model.state_dict().items()})
    assert_fast(model, inputs())
    with stock():
        expected = step(model, (inputs(),), {})
    assert_same(expected, step(model, (inputs(),), {}), rtol=1e-5)
