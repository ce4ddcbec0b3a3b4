"""PEFT's other methods beside fast LoRA layers, in one model and one process: theirs stay theirs bit for bit."""

import copy

import peft
import pytest
import torch
from peft import LoraConfig, PeftMixedModel, get_peft_model
from torch import nn

import peft_fast
from peft_fast.patch import plan
from tests.architectures import training
from tests.architectures.zoo import ARCHITECTURES
from tests.patch.toys import K, N, assert_same, both, inputs, step, stock, toy

pytestmark = pytest.mark.filterwarnings("ignore")


class Three(nn.Module):
    """x (..., 32) -> up -> tanh -> down -> last."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.last = nn.Linear(K, N), nn.Linear(N, K), nn.Linear(K, K)

    def forward(self, x):
        return self.last(torch.tanh(self.down(torch.tanh(self.up(x)))))


# every method whose layers lie around nn.Linear; what its configuration needs beside its targets
OTHERS = {
    "IA3Config": {"feedforward_modules": []},
    "VeraConfig": {"r": 4},
    "AdaLoraConfig": {"total_step": 10, "init_r": 4, "target_r": 2},
    "LoHaConfig": {"r": 4},
    "LoKrConfig": {"r": 4},
    "OFTConfig": {"r": 0, "oft_block_size": 4, "use_cayley_neumann": False},
    "BOFTConfig": {"boft_block_size": 4},
    "HRAConfig": {"r": 4},
    "FourierFTConfig": {"n_frequency": 10},
    "VBLoRAConfig": {"num_vectors": 8, "vector_length": 2, "r": 2},
    "RandLoraConfig": {"r": 4},
    "LNTuningConfig": {},
}
MIXABLE = ("LoHaConfig", "LoKrConfig", "AdaLoraConfig", "OFTConfig")


def other_config(name, targets=("up", "down")):
    options = dict(OTHERS[name])
    if name != "IA3Config" and name not in ("VBLoRAConfig", "LNTuningConfig"):
        key = "init_lora_weights" if name == "AdaLoraConfig" else "init_weights"
        options |= {key: False} if name not in ("VeraConfig", "FourierFTConfig", "RandLoraConfig") else {}
    return getattr(peft, name)(target_modules=list(targets), **options)


def made(config, kind=Three, mixed=False):
    torch.manual_seed(0)
    return get_peft_model(kind(), config, mixed=mixed)


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_another_method_are_untouched(name):
    """enable() is for the process, in which LoRA runs fast before, beside and after them."""
    with stock():
        model = made(other_config(name))
        expected = step(model, (inputs(),), {})
        state = {k: v.clone() for k, v in model.state_dict().items()}
    classes = {type(m): type(m).forward for m in model.modules()}
    peft_fast.enable()
    fast = toy()
    before = step(fast, (inputs(),), {})
    again = made(other_config(name))
    assert_same(expected, step(again, (inputs(),), {}))
    assert_same(expected, step(model, (inputs(),), {}))
    assert_same({k: v for k, v in state.items()}, dict(again.state_dict()))
    assert all(kind.forward is forward for kind, forward in classes.items())
    assert not any(isinstance(m, plan.Linear) for m in again.modules())
    assert_same(before, step(fast, (inputs(),), {}))
    assert peft_fast.report(fast).fast_calls == 4 and not peft_fast.report(fast).handed_back


@pytest.mark.parametrize("name", MIXABLE)
def test_one_model_of_two_methods(name):
    """PeftMixedModel: LoRA on one layer, another method on the next, both on the third, in either order of nesting."""
    for first_lora in (True, False):
        lora = LoraConfig(r=4, target_modules=["up", "last"], init_lora_weights=False)
        other = other_config(name, ("down", "last"))
        model = made(lora if first_lora else other, mixed=True)
        torch.manual_seed(1)
        model.add_adapter("more", other if first_lora else lora)
        model.set_adapter(["default", "more"])
        assert isinstance(model, PeftMixedModel)
        peft_fast.accelerate(model)
        expected, got, fast, handed_back = both(model, inputs())
        assert_same(expected, got, 1e-5)
        lone = {n for n, m in model.named_modules() if type(m) is plan.Linear and type(m.base_layer) is nn.Linear}
        assert fast == len(lone) and any(n.endswith("up") for n in lone)
        # where the two lie around one layer, LoRA's base is no linear layer, and PEFT runs it
        assert fast + sum(handed_back.values()) == sum(type(m) is plan.Linear for m in model.modules())

        model.set_adapter("more" if first_lora else "default")
        expected, got, fast, _ = both(model, inputs())
        assert fast == 0
        assert_same(expected, got)
        model.set_adapter("default" if first_lora else "more")
        expected, got, fast, _ = both(model, inputs())
        assert fast > 0
        assert_same(expected, got, 1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_one_model_adapted_twice(name):
    """LoRA on two layers of a model, and any other method around that on the third, both in training."""
    lora = made(LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False))
    torch.manual_seed(1)
    model = get_peft_model(lora.base_model.model, other_config(name, ("last",)))
    others = [n for n, p in model.named_parameters() if p.requires_grad]
    for n, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or "up.lora_" in n or "down.lora_" in n)
    peft_fast.accelerate(model)
    expected, got, fast, handed_back = both(model, inputs())
    assert (fast, handed_back) == (2, {})
    assert_same(expected, got, 1e-5)
    assert len(got) > 5 and any(n in got for n in others)


def test_layers_of_adalora_keep_their_class_and_forward():
    from peft.tuners.adalora.layer import SVDLinear

    forward = SVDLinear.forward
    peft_fast.enable()
    model = made(other_config("AdaLoraConfig"))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for number in range(1, 4):
        model(inputs()).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(number)
        optimizer.zero_grad()
    assert SVDLinear.forward is forward
    assert {type(m) for m in model.modules() if hasattr(m, "ranknum")} == {SVDLinear}
    report = peft_fast.report(model)
    assert report.fast == () and report.fast_calls == 0
    assert len(report.slow) == 2 and all("SVDLinear" in reason for reason in report.slow.values())


PROMPTS = {
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
}


@pytest.mark.parametrize("make", PROMPTS.values(), ids=PROMPTS)
def test_prompts_around_a_model_and_lora_beside_it(make):
    architecture = ARCHITECTURES["Llama"]
    batch = training.batches(architecture, 1)[0]

    def prompted():
        base = architecture.build().eval()
        torch.manual_seed(2)
        return get_peft_model(base, make())

    with stock():
        expected = step(prompted(), (), batch)
    peft_fast.enable()
    adapted = architecture.adapted()
    data = training.batches(architecture, 3)
    moved = training.train(adapted, data).moved
    assert_same(expected, step(prompted(), (), batch))
    with stock():
        assert training.distance(moved, training.train(architecture.adapted(), data).moved) < 1e-3
    assert peft_fast.report(adapted).fast_calls > 0


def test_a_prompt_around_fast_lora_layers():
    """The base of prompt tuning is a model that LoRA adapts already."""
    architecture = ARCHITECTURES["Llama"]
    lora = architecture.adapted().double()
    torch.manual_seed(2)
    inner = lora.base_model.model
    model = get_peft_model(inner, PROMPTS["prompt"]()).double()
    peft_fast.accelerate(model)
    batch = training.batches(architecture, 1)[0]
    expected, got, fast, handed_back = both(model, **batch)
    assert fast > 0 and not handed_back
    assert_same(expected, got, 1e-9)


def test_switching_one_model_between_methods():
    """LoRA, unloaded, IA³, unloaded, LoRA again: each as on a model that knew no other."""
    torch.manual_seed(0)
    base = peft_fast.accelerate(made(LoraConfig(target_modules=["up", "down"], init_lora_weights=False))).unload()
    for name in ("IA3Config", "VeraConfig", "OFTConfig"):
        torch.manual_seed(3)
        model = get_peft_model(base, other_config(name))
        expected, got, fast, handed_back = both_unreported(model)
        assert_same(expected, got)
        base = model.unload()
        torch.manual_seed(3)
        lora = get_peft_model(base, LoraConfig(target_modules=["up", "down"], init_lora_weights=False))
        expected, got, fast, handed_back = both(lora, inputs())
        assert (fast, handed_back) == (2, {})
        assert_same(expected, got, 1e-5)
        base = lora.unload()


def both_unreported(model):
    with stock():
        expected = step(model, (inputs(),), {})
    return expected, step(model, (inputs(),), {}), 0, {}


def test_several_models_in_one_process_train_side_by_side():
    """Fast LoRA, stock LoRA, IA³ and VeRA take turns; each ends where it ends alone."""
    makers = {
        "fast": lambda: made(LoraConfig(target_modules=["up", "down", "last"], init_lora_weights=False)),
        "stock": lambda: made(LoraConfig(target_modules=["up", "down"], init_lora_weights=False)),
        "ia3": lambda: made(other_config("IA3Config")),
        "vera": lambda: made(other_config("VeraConfig")),
    }
    alone = {}
    with stock():
        for name, make in makers.items():
            model = make()
            train({name: model})
            alone[name] = copy.deepcopy(model.state_dict())
    models = {name: make() for name, make in makers.items()}
    peft_fast.accelerate(models["fast"])
    train(models)
    for name, model in models.items():
        assert_same(dict(alone[name]), dict(model.state_dict()), rtol=1e-5 if name == "fast" else None)
    assert peft_fast.report(models["fast"]).fast_calls == 9
    assert peft_fast.report(models["stock"]).fast_calls == 0


def train(models, steps=3):
    optimizers = {
        name: torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        for name, model in models.items()
    }
    for _ in range(steps):
        for name, model in models.items():
            model(inputs().detach()).square().mean().backward()
            optimizers[name].step()
            optimizers[name].zero_grad()


def test_xlora_sets_forwards_of_its_own(tmp_path):
    """Its scalings reach the LoRA layers through a forward on each instance: those calls are not ours."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    paths = {}
    for name in ("0", "1"):  # PEFT gives them these names whatever they were
        torch.manual_seed(len(paths))
        lora = get_peft_model(
            copy.deepcopy(base),
            LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        )
        lora.save_pretrained(tmp_path / name)
        paths[name] = str(tmp_path / name)
    base.config.use_cache = False
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, xlora_depth=1, adapters=paths)
    model = get_peft_model(base, config).eval()
    ids = torch.randint(0, 67, (2, 9))
    with stock(), torch.no_grad():
        expected = model(input_ids=ids).logits
    peft_fast.enable()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
