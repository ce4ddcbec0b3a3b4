"""Experts adapted by target_parameters: transformers' own classes, against PEFT that builds W + ΔW of all of them."""

import copy
import importlib
import io

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

import peft_fast
from peft_fast.patch import experts
from tests.patch.toys import assert_same, both, step, stock

H, E, K = 32, 5, 2
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
SMALL = {
    "vocab_size": 64,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "num_experts_per_tok": K,
}
MOE = {"num_experts": E, "moe_intermediate_size": 24}
# folder -> (class, what its config has beside SMALL)
MODELS = {
    "mixtral": ("Mixtral", {"num_local_experts": E}),
    "qwen3_moe": ("Qwen3Moe", MOE),
    "olmoe": ("Olmoe", {"num_experts": E}),
    "gpt_oss": ("GptOss", {"num_local_experts": E}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **{"n_routed_experts": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 2},
            **{"topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
            **{"v_head_dim": 8, "num_key_value_heads": 4},
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {**MOE, "shared_expert_intermediate_size": 24, "layer_types": ["full_attention"] * 2},
    ),
}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 53], [58, 9, 7, 9, 3, 2, 38, 4, 6]])


def class_of(name, suffix):
    return getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), MODELS[name][0] + suffix)


def config_of(name, implementation="grouped_mm"):
    kind, more = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SMALL | more)
    config._experts_implementation = implementation
    return config


def model_of(name, implementation="grouped_mm", targets=BOTH, **config):
    torch.manual_seed(0)
    base = class_of(name, "ForCausalLM")(config_of(name, implementation))
    base.generation_config = None
    config = {"r": 4, "init_lora_weights": False, "target_modules": [], "target_parameters": targets, **config}
    return peft_fast.accelerate(get_peft_model(base, LoraConfig(**config)))


class Layer(nn.Module):
    """Tokens -> router -> experts, whose class is one of transformers'."""

    def __init__(self, name="qwen3_moe", implementation="grouped_mm", k=K):
        super().__init__()
        self.experts = class_of(name, "Experts")(config_of(name, implementation))
        for p in self.experts.parameters():
            nn.init.normal_(p, std=H**-0.5)
        self.router = nn.Linear(H, self.experts.num_experts)
        self.k, self.autocast = k, False

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            weights, chosen = self.router(x.float()).softmax(-1).topk(self.k)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.experts(x, chosen, weights)


def layer_of(name="qwen3_moe", implementation="grouped_mm", dtype=torch.float32, targets=BOTH, k=K, **config):
    torch.manual_seed(0)
    base = Layer(name, implementation, k)
    base.experts.to(dtype)
    base.router.requires_grad_(False)
    config = {"r": 4, "init_lora_weights": False, "target_modules": [], "target_parameters": targets, **config}
    model = get_peft_model(base, LoraConfig(**config))
    model.base_model.model.router.requires_grad_(True)  # its gradient is that of the routing weights
    return peft_fast.accelerate(model)


def tokens(T=19, dtype=torch.float32, seed=1):
    return torch.randn(T, H, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def wrappers(model):
    return [m for m in model.modules() if isinstance(m, experts.ParamWrapper)]


def base_of(model):
    return next(m for m in model.modules() if type(m).__name__.endswith("Experts"))


def assert_fast(model, *args, rtol=2e-5, **kwargs):
    expected, got, fast, handed_back = both(model, *args, **kwargs)
    assert (fast, handed_back) == (len(wrappers(model)), {})
    assert_same(expected, got, rtol)
    return got


def assert_pefts(model, reason, *args):
    expected, got, fast, handed_back = both(model, *args)
    assert fast == 0 and reason in handed_back, handed_back
    assert_same(expected, got)


@pytest.mark.parametrize("name", MODELS)
def test_a_models_logits_and_gradients_are_pefts(name):
    model = model_of(name)
    report = peft_fast.report(model)
    assert report.slow == {} and len(report.fast) == len(wrappers(model)) in (2, 4)
    got = assert_fast(model, TOKENS)
    assert len(got) == 1 + 2 * len(wrappers(model))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_every_implementation_of_transformers(name, implementation):
    got = assert_fast(layer_of(name, implementation), tokens())
    assert got["base_model.model.router.weight"].abs().max() > 0


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("target", BOTH)
def test_one_stack_alone(name, target):
    assert_fast(layer_of(name, targets=[target]), tokens())


def test_bfloat16_is_no_further_from_float64_than_peft():
    """PEFT rounds W + ΔW, ours what it multiplies: neither is the other's, both are held against float64."""
    model = layer_of(dtype=torch.bfloat16)
    assert wrappers(model)[0].lora_A["default"].weight.dtype == torch.float32
    x = tokens(300, torch.bfloat16)
    expected, got, fast, handed_back = both(model, x)
    assert (fast, handed_back) == (2, {})
    with stock():
        exact = copy.deepcopy(model)
        base_of(exact).config._experts_implementation = "eager"
        for wrapper in wrappers(exact):
            wrapper.double()
        truth = step(exact, [x.double().requires_grad_()], {})
    for name, t in truth.items():
        ours, theirs = ((one[name].double() - t).square().mean().sqrt() for one in (got, expected))
        assert got[name].dtype == expected[name].dtype
        assert ours <= 1.05 * theirs + 1e-3 * t.square().mean().sqrt(), name


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(base, implementation):
    """grouped_mm computes in the weights' dtype, the others in autocast's: float32 weights they have to round."""
    model = layer_of(implementation=implementation, dtype=base)
    model.base_model.model.autocast = True
    if base == torch.float32 and implementation == "eager":
        return assert_pefts(model, "input and base weight have different dtypes", tokens(64))
    assert_fast(model, tokens(64), rtol=2e-5 if base == torch.float32 else 5e-2)


def test_float64_and_rounding_adapters():
    assert_fast(layer_of(implementation="eager", dtype=torch.float64), tokens(dtype=torch.float64), rtol=1e-12)
    assert_fast(layer_of(dtype=torch.float16), tokens(dtype=torch.float16), rtol=1e-2)


def test_experts_without_tokens_have_zeros_as_pefts():
    model = layer_of(k=1)
    got = assert_fast(model, tokens(2))
    grads = [g for name, g in got.items() if "lora_A" in name]
    assert grads and all((g.view(E, -1) == 0).all(1).sum() >= E - 2 for g in grads)
    assert_fast(model, tokens(0))


def test_several_adapters_scalings_and_inactive_ones():
    model = layer_of()
    second = {"r": 3, "lora_alpha": 2, "init_lora_weights": False, "target_modules": []}
    model.add_adapter("other", LoraConfig(target_parameters=BOTH, use_rslora=True, **second))
    model.base_model.set_adapter(["default", "other"])
    assert_fast(model, tokens())
    wrappers(model)[1].scaling["other"] = torch.tensor(0.7)
    assert_fast(model, tokens())
    model.set_adapter("other")
    assert_fast(model, tokens())
    model.delete_adapter("other")
    model.set_adapter("default")
    wrappers(model)[0].scale_layer(0.5)
    assert_fast(model, tokens())


def test_merge_unmerge_and_disable():
    model = layer_of()
    x = tokens()
    y = model(x)
    merged = "the adapter is merged into the base weight"
    model.merge_adapter()
    assert_pefts(model, merged, x)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    outer, inner = wrappers(model)
    inner.merge()  # one of the two
    assert_fast(model, x)
    inner.unmerge()
    with model.disable_adapter():
        assert_pefts(model, "the adapters are disabled", x)
    with peft_fast.disabled():
        assert_pefts(model, "inside `with peft_fast.disabled()`", x)
    bare = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(bare(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = model_of("mixtral")
    plain = step(model, [TOKENS], {})
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    again = step(model, [TOKENS], {})
    assert peft_fast.report(model).handed_back == {}
    assert_same(plain, {name: again[name] for name in plain}, 1e-6)


def test_files_and_state_dict_are_pefts(tmp_path):
    model = layer_of()
    step(model, [tokens()], {})
    model.save_pretrained(tmp_path / "ours")
    keys, shapes = list(model.state_dict()), {n: p.shape for n, p in model.named_parameters()}
    peft_fast.restore(model)
    model.save_pretrained(tmp_path / "pefts")
    name = "adapter_model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "pefts" / name).read_bytes()
    assert keys == list(model.state_dict())
    loaded = PeftModel.from_pretrained(model_of_base(), tmp_path / "ours", is_trainable=True)
    assert shapes == {n: p.shape for n, p in loaded.named_parameters()}
    assert torch.equal(model(tokens()), loaded(tokens()))
    assert_fast(peft_fast.accelerate(loaded), tokens())


def model_of_base():
    torch.manual_seed(0)
    return Layer()


def test_copies_and_pickles():
    model = layer_of()
    assert_fast(copy.deepcopy(model), tokens())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_fast(torch.load(file, weights_only=False), tokens())


def test_compiled_code_is_right():
    model = layer_of()
    torch._dynamo.reset()
    with stock():
        expected = step(model, [tokens()], {})
    got = step(torch.compile(model, backend="eager"), [tokens()], {})
    assert_same(expected, {name.replace("_orig_mod.", ""): t for name, t in got.items()}, 2e-5)


def test_gradients_of_gradients():
    model = layer_of(implementation="eager", dtype=torch.float64)
    x = tokens(4, torch.float64)
    A = wrappers(model)[0].lora_A["default"].weight

    def second():
        (dA,) = torch.autograd.grad(model(x).sin().sum(), A, create_graph=True)
        return torch.autograd.grad(dA.square().sum(), x)[0]

    with stock():
        expected = second()
    torch.testing.assert_close(second(), expected, rtol=1e-9, atol=1e-9)


def test_trained_biases_have_their_gradient():
    model = layer_of("gpt_oss")
    base_of(model).down_proj_bias.requires_grad_()
    base_of(model).gate_up_proj_bias.requires_grad_()
    got = assert_fast(model, tokens())
    assert sum("proj_bias" in name for name in got) == 2


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]])
def test_nothing_stays_on_the_experts_and_nothing_of_their_size_is_made(monkeypatch, targets):
    model = layer_of(targets=targets, dtype=torch.bfloat16)
    W = base_of(model).gate_up_proj
    monkeypatch.setattr(torch, "baddbmm", None)
    monkeypatch.setattr(parametrize, "register_parametrization", None)
    assert_sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: assert_sizes.append(t) or t, lambda t: t):
        y = model(tokens(7, torch.bfloat16))
    y.sum().backward()
    assert base_of(model).gate_up_proj is W and W.grad is None
    stacks = W, base_of(model).down_proj
    own = {t.data_ptr() for t in stacks}
    # a view of a copy keeps all of it
    storages = [t.untyped_storage() for t in assert_sizes if t.untyped_storage().data_ptr() not in own]
    assert max(s.nbytes() for s in storages) < min(t.nbytes for t in stacks)


def test_switches():
    model = layer_of()
    peft_fast.restore(model)
    assert experts.ParamWrapper.forward is experts.stock
    assert both(model, tokens())[2] == 0
    peft_fast.enable()
    assert_fast(model, tokens())
    peft_fast.disable()
    assert experts.ParamWrapper.forward is experts.stock


def test_adapters_added_after_accelerate():
    torch.manual_seed(0)
    base = Layer()
    model = peft_fast.accelerate(get_peft_model(base, LoraConfig(target_modules=["router"])))
    config = {"r": 2, "init_lora_weights": False, "target_modules": [], "target_parameters": BOTH}
    model.add_adapter("late", LoraConfig(**config))
    model.set_adapter("late")
    report = peft_fast.report(model)
    assert len(wrappers(model)) == 2 and not any("experts" in name for name in report.slow)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_generating_is_pefts(name):
    """Few rows and no gradients are a way of their own."""
    model = model_of(name).eval()
    with torch.no_grad():
        with stock():
            expected = model(TOKENS[:, :1]).logits
        got = model(TOKENS[:, :1]).logits
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)
    assert not peft_fast.report(model).handed_back
