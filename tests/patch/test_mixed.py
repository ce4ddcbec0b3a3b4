"""Mixed batches through PEFT's own entry points: stock's results, its errors, and everything that goes back to it."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import peft_fast
from peft_fast.patch import plan
from tests.patch.toys import K, assert_fast, assert_handed_back, both, conv1d, inputs, layers, stock, toy

NAMES = ["default", "other", "__base__", "third", "other"]
IDS = torch.randint(1, 60, (5, 7), generator=torch.Generator().manual_seed(0))
TINY = {"vocab_size": 60, "pad_token_id": 0, "eos_token_id": 59}


def crowd(layer=nn.Linear, **config):
    """Three adapters of different rank and scaling, the last on one of two layers."""
    model = toy(layer, **config)
    config.pop("base_dtype", None)
    fp32 = {"autocast_adapter_dtype": config.pop("autocast_adapter_dtype", True)}
    turned = {"fan_in_fan_out": layer is conv1d, "init_lora_weights": False, **config}
    model.add_adapter("other", LoraConfig(r=7, lora_alpha=3, target_modules=["up", "down"], **turned), **fp32)
    model.add_adapter("third", LoraConfig(r=1, use_rslora=True, target_modules=["up"], **turned), **fp32)
    return model.eval()


def refuse(model, x, names, reason):
    assert_handed_back(model, x, adapter_names=names, reason=reason)


@pytest.mark.parametrize("layer", [nn.Linear, conv1d], ids=["linear", "conv1d"])
@pytest.mark.parametrize("shape", [(K,), (1, K), (9, K), (2, 3, K), (0, K)], ids=str)
def test_shapes(layer, shape):
    model, x = crowd(layer), inputs(5, *shape)
    assert_fast(model, x, adapter_names=NAMES)
    with torch.no_grad():
        assert_fast(model, x, adapter_names=NAMES)
    with torch.inference_mode():
        assert_fast(model, x.detach(), adapter_names=tuple(NAMES))


@pytest.mark.parametrize(
    "names",
    [["default"] * 5, ["__base__"] * 5, ["third"] * 5, ["third", "third", "other", "default", "__base__"]],
    ids=["one", "base", "one that a layer lacks", "sorted"],
)
def test_names(names):
    model, x = crowd(), inputs(5, 3, K)
    assert_fast(model, x, adapter_names=names)


def test_rows_without_an_adapter_keep_the_base_s_bits():
    model, x = crowd(), inputs(5, 30, K)
    up = layers(model)[0]
    with torch.no_grad():
        y, base = up(x, adapter_names=NAMES), up.base_layer(x)
    assert torch.equal(y[2], base[2]) and not torch.equal(y[0], base[0])


def test_a_batch_of_one_adapter_is_set_adapter():
    model, x = crowd(), inputs(5, 3, K)
    for name in ("default", "other"):
        mixed = model(x, adapter_names=[name] * 5)
        model.set_adapter(name)
        torch.testing.assert_close(mixed, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "base, fp32, rtol",
    [
        (torch.bfloat16, True, 0.01),
        (torch.bfloat16, False, 0.02),
        (torch.float16, True, 2e-3),
        (torch.float64, False, 1e-12),
    ],
)
def test_dtypes(base, fp32, rtol):
    model = crowd(base_dtype=base, autocast_adapter_dtype=fp32)
    with torch.no_grad():
        assert_fast(model, inputs(5, 3, K, dtype=base), adapter_names=NAMES, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    model = crowd(base_dtype=dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_fast(model, inputs(5, 3, K, dtype=dtype), adapter_names=NAMES, rtol=0.02)


def test_biases_scales_and_new_weights_are_read_at_every_call():
    model, x, seen = crowd(lora_bias=True), inputs(5, 3, K), set()
    up = layers(model)[0]
    for change in (
        lambda: None,
        lambda: nn.init.normal_(up.lora_B["other"].bias),
        lambda: up.set_scale("default", 3.0),
        lambda: up.scaling.update(third=torch.tensor(0.3)),
        lambda: up.lora_A["other"].weight.data.mul_(2),
        lambda: setattr(up.lora_B["third"], "weight", nn.Parameter(up.lora_B["third"].weight * 3)),
    ):
        change()
        assert_fast(model, x, adapter_names=NAMES)
        seen.add(model(x, adapter_names=NAMES).sum().item())
    model.delete_adapter("third")
    assert_fast(model, x, adapter_names=NAMES[:3] + ["default"] * 2)
    assert len(seen) == 6


def test_sixty_four_adapters():
    model = toy(r=2)
    for i in range(63):
        ranks = {"r": 1 + i % 16, "lora_alpha": i, "target_modules": ["up", "down"][: 1 + i % 2]}
        model.add_adapter(f"a{i}", LoraConfig(init_lora_weights=False, **ranks))
    names = ["default", "__base__", *(f"a{i}" for i in range(63))]
    with torch.no_grad():
        assert_fast(model.eval(), inputs(65, 2, K), adapter_names=names)


def test_copies_and_pickles():
    model, x = crowd(), inputs(5, 3, K)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_fast(other, x, adapter_names=NAMES)
        assert torch.equal(other(x, adapter_names=NAMES), model(x, adapter_names=NAMES))


def test_state_that_goes_back_to_peft():
    model, x = crowd(lora_dropout=0.5), inputs(5, 3, K)
    with model.disable_adapter():
        refuse(model.base_model.model, x, NAMES, "the adapters are disabled")
    with peft_fast.disabled():
        refuse(model, x, NAMES, "inside `with peft_fast.disabled()`")
    up, down = layers(model)
    hook = up.lora_A["other"].register_forward_hook(lambda *_: None)
    assert_handed_back(model, x, adapter_names=NAMES, reason="hooks or a replaced forward", mixed=True)
    refuse(up, x, NAMES, "hooks or a replaced forward")
    hook.remove()
    with pytest.raises(RuntimeError):
        model(inputs(5, 3, K, dtype=torch.bfloat16), adapter_names=NAMES)
    down.train()  # one layer alone: PEFT's check above it does not see that
    assert_handed_back(model, x.detach(), adapter_names=["default"] * 5, reason="dropout in a mixed batch", mixed=True)
    model.eval()
    assert_fast(model, x, adapter_names=NAMES)


@pytest.mark.parametrize("config", [{"use_dora": True}, {"alora_invocation_tokens": [1]}], ids=["dora", "alora"])
def test_a_variant_among_the_names_goes_back_to_peft(config):
    model, x = toy(), inputs(5, 3, K)
    model.add_adapter("other", LoraConfig(r=7, target_modules=["up", "down"], init_lora_weights=False, **config))
    model.eval()
    names = ["default", "other"] + ["__base__"] * 3
    if "use_dora" in config:
        errors = []
        for around in (stock, lambda: torch.no_grad()):
            with around(), pytest.raises(ValueError, match="Cannot pass `adapter_names` when DoRA") as error:
                model(x, adapter_names=names)
            errors.append(str(error.value))
        assert len(set(errors)) == 1
    else:
        refuse(model, x, names, "ALoraLinearVariant keeps PEFT's forward")
    assert_fast(model, x, adapter_names=["default"] * 3 + ["__base__"] * 2)  # the variant is not in this batch


@pytest.mark.parametrize(
    "names, change",
    [
        (NAMES[:4], lambda model: None),
        (["default", "nobody", "__base__", "third", "other"], lambda model: None),
        (NAMES, lambda model: model.train()),
        (NAMES, lambda model: model.merge_adapter(["default"])),
    ],
    ids=["too few", "unknown", "training", "merged"],
)
def test_errors_are_peft_s(names, change):
    model, x, errors = crowd(), inputs(5, 3, K), []
    change(model)
    for around in (stock, lambda: torch.no_grad()):
        with around(), pytest.raises(ValueError) as error:
            model(x, adapter_names=names)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_compiled_calls_are_peft_s():
    model, x = crowd(), inputs(5, 3, K).detach()
    up = layers(model)[0]
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(lambda x: up(x, adapter_names=NAMES), backend="eager")(x), up(x, adapter_names=NAMES)
        )


class Words(nn.Module):
    def __init__(self, dtype, **options):
        super().__init__()
        self.embed, self.head = nn.Embedding(60, 24, **options).to(dtype), nn.Linear(24, 8).to(dtype)

    def forward(self, ids, **kwargs):
        return self.head(self.embed(ids, **kwargs))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings(dtype, options):
    torch.manual_seed(0)
    made = {"target_modules": ["embed"], "init_lora_weights": False}
    model = get_peft_model(Words(dtype, **options), LoraConfig(r=4, **made))
    model.add_adapter("other", LoraConfig(r=9, lora_alpha=5, **made))
    model = peft_fast.accelerate(model).eval()
    names = ["default", "other", "__base__", "other", "default"]
    for ids in (IDS, IDS[:, :1], IDS.int()):
        assert_fast(model, ids, adapter_names=names, calls=1, rtol=1e-5 if dtype == torch.float32 else 0.02)
        with torch.no_grad():
            assert_fast(model, ids, adapter_names=names, calls=1, rtol=1e-5 if dtype == torch.float32 else 0.02)
    with stock(), torch.no_grad():
        expected = model.base_model.model.embed.base_layer(IDS)[2]
    assert torch.equal(model.base_model.model.embed(IDS, adapter_names=names)[2], expected)


def llama():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, **TINY
    )
    return LlamaForCausalLM(config), ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def gpt2():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=58, **TINY)
    return GPT2LMHeadModel(config), ["c_attn", "c_proj", "c_fc", "wte"]


def t5():
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0, **TINY)
    return T5ForConditionalGeneration(config), ["q", "k", "v", "o", "wi", "wo"]


@pytest.fixture(scope="module", params=[llama, gpt2, t5], ids=["llama", "gpt2", "t5"])
def text_model(request):
    torch.manual_seed(0)
    base, targets = request.param()
    config = {"target_modules": targets, "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, **config))
    model.add_adapter("other", LoraConfig(r=7, **config))
    model.add_adapter("third", LoraConfig(r=2, **{**config, "target_modules": targets[:2]}))
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampled"])
def test_generate(text_model, options):
    model, ran = peft_fast.accelerate(text_model), []
    for around in (stock, lambda: torch.no_grad()):
        with around():
            torch.manual_seed(0)
            ran.append(model.generate(input_ids=IDS, adapter_names=NAMES, max_new_tokens=6, **options))
    assert torch.equal(*ran)
    calls = peft_fast.report(model)
    assert calls.fast_calls > 50 and calls.handed_back == {}
    peft_fast.restore(model)


def test_a_model_whose_blocks_and_groups_run(text_model):
    model = peft_fast.accelerate(text_model)
    more = {"decoder_input_ids": IDS} if isinstance(model.base_model.model, T5ForConditionalGeneration) else {}
    many = IDS.repeat(4, 5)
    expected, got, fast, handed_back = both(model, input_ids=IDS, adapter_names=NAMES, **more)
    for _ in range(2):
        model(input_ids=many, **({"decoder_input_ids": many} if more else {}))
    again = both(model, input_ids=IDS, adapter_names=NAMES, **more)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-3, atol=1e-4 * expected[name].abs().max().item())
        assert torch.equal(again[1][name], got[name]), name
    assert handed_back == {} and fast == again[2] == sum(
        isinstance(m, (plan.Linear, plan.Embedding)) for m in model.modules()
    )
    peft_fast.restore(model)
