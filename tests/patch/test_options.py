"""PEFT's options beside rank and dropout, on real classes in float64: training, gradients, files as without us."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

import peft_fast
from tests.architectures import training
from tests.architectures.zoo import ARCHITECTURES
from tests.patch.toys import assert_fast, inputs, stock, toy

pytestmark = pytest.mark.filterwarnings("ignore")
F64 = torch.float64
LLAMA = dict(vocab_size=67, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)


def llama(tied=False, layers=2, **options):
    """(a Llama under LoRA, its base) in float64."""
    torch.manual_seed(0)
    sizes = dict(LLAMA, num_hidden_layers=layers, tie_word_embeddings=tied)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).double()
    defaults = dict(r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(copy.deepcopy(base), LoraConfig(**{**defaults, **options})), base


def bert(**options):
    """(BERT for classification under LoRA, its base)."""
    architecture = ARCHITECTURES["BERT"]
    base = architecture.build().double()
    defaults = dict(r=3, lora_alpha=6, target_modules=["query", "key", "value", "dense"], init_lora_weights=False)
    return get_peft_model(copy.deepcopy(base), LoraConfig(**{**defaults, **options})), base


def written(model, folder):
    model.save_pretrained(folder)
    return (folder / "adapter_model.safetensors").read_bytes()


HEAD = ["q_proj", "k_proj", "v_proj", "lm_head"]
OPTIONS = {
    "lora_bias": lambda: bert(lora_bias=True),
    "bias all": lambda: bert(bias="all"),
    "bias lora_only": lambda: bert(bias="lora_only", lora_bias=True),
    "modules_to_save": lambda: bert(target_modules=["query", "key"], modules_to_save=["classifier", "pooler"]),
    "tied head and embedding": lambda: llama(
        tied=True, target_modules=[*HEAD, "embed_tokens"], ensure_weight_tying=True
    ),
    "tied, not kept so": lambda: llama(tied=True, target_modules=[*HEAD, "embed_tokens"]),
    "tied modules_to_save": lambda: llama(tied=True, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "trained tokens": lambda: llama(trainable_token_indices=[1, 5, 66]),
    "trained tokens, tied": lambda: llama(tied=True, trainable_token_indices={"embed_tokens": [1, 5, 66]}),
    "lm_head": lambda: llama(target_modules=HEAD),
    "layers twice": lambda: llama(layer_replication=[[0, 2], [0, 2]], target_modules=[*HEAD, "up_proj", "down_proj"]),
}


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS)
def test_training_gradients_and_files(make, tmp_path):
    model, base = make()
    ours = peft_fast.accelerate(make()[0])  # PEFT's tied adapters are views, which cannot be copied
    assert written(ours, tmp_path / "ours") == written(model, tmp_path / "stock")
    data = training.batches(ARCHITECTURES["BERT" if "Bert" in type(base).__name__ else "Llama"], 4)
    expected, got = training.train(model, data), training.train(ours, data)
    assert expected.first.keys() == got.first.keys()
    for part in ("losses", "first", "last", "moved"):
        assert training.distance(getattr(got, part), getattr(expected, part)) < 1e-9, part
    report = peft_fast.report(ours)
    assert not report.slow and not report.handed_back and got.operations > 0
    assert all(got.moved[name].norm() > 0 for name in got.moved if expected.moved[name].norm() > 0)

    written(ours, tmp_path / "trained")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "trained").double().eval()
    with torch.no_grad(), stock():
        there = training.loss_of(loaded, data[0])
    with torch.no_grad():
        assert torch.allclose(training.loss_of(ours.eval(), data[0]), there, rtol=1e-6)


def cross_entropy(hidden, head, labels):
    return F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten(), ignore_index=-100)


def smoothed(hidden, head, labels):
    return LabelSmoother(epsilon=0.1)({"logits": head(hidden)}, labels)


def chunked(hidden, head, labels):
    """One piece of the vocabulary's logits at a time, computed again in backward."""
    total = 0.0
    for h, piece in zip(hidden.flatten(0, 1).split(5), labels.flatten().split(5), strict=True):
        loss = functools.partial(lambda h, piece: F.cross_entropy(head(h), piece, reduction="sum"), piece=piece)
        total = total + torch.utils.checkpoint.checkpoint(loss, h, use_reentrant=False)
    return total / (labels != -100).sum()


def compute_in_place(hidden, head, labels):
    """Writes into the logits, as fused losses do."""
    logits = head(hidden).flatten(0, 1)
    logits -= logits.detach().amax(-1, keepdim=True)
    return F.cross_entropy(logits, labels.flatten())


def by_the_weight(hidden, head, labels):
    """Liger's way: the head's own weight, past its adapter."""
    return F.cross_entropy((hidden @ head.weight.t()).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("loss", [cross_entropy, smoothed, chunked, compute_in_place, by_the_weight])
def test_an_adapted_head_under_any_loss(loss):
    model, _ = llama(target_modules=HEAD)
    ours = peft_fast.accelerate(copy.deepcopy(model))
    ids = torch.randint(0, 67, (2, 9), generator=torch.Generator().manual_seed(3))
    runs = []
    for each in (model, ours):
        inner = each.base_model.model
        optimizer = torch.optim.SGD((p for p in each.parameters() if p.requires_grad), lr=0.1)
        gradients = {}
        for step in range(3):
            loss(inner.model(ids).last_hidden_state, inner.lm_head, ids).backward()
            gradients |= {f"{step} {n}": p.grad.clone() for n, p in each.named_parameters() if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
        runs.append(gradients)
    assert runs[0].keys() == runs[1].keys()
    assert training.distance(runs[1], runs[0]) < 1e-9
    assert any("lm_head" in name for name in runs[1]) == (loss is not by_the_weight)
    assert not peft_fast.report(ours).handed_back


COMBINATIONS = ["svd", "linear", "cat", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd"]
COMBINATIONS += ["dare_ties_svd", "magnitude_prune", "magnitude_prune_svd"]


@pytest.mark.parametrize("how", COMBINATIONS)
def test_weighted_adapters_of_every_kind(how):
    model = toy(lora_dropout=0.1)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False))
    density = None if how in ("svd", "linear", "cat") else 0.5
    model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "mixed", combination_type=how, density=density)
    model.set_adapter("mixed")
    assert_fast(model.eval(), inputs())


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize("rank, alpha", [(3, 6), (2, 16), (5, 5)], ids=["as it was", "smaller", "larger"])
def test_hotswap_between_training_steps(prepared, rank, alpha, tmp_path):
    """The groups of q, k and v stand already; then other weights, of another rank and scaling, take their places."""
    if not prepared and rank != 3:
        pytest.skip("PEFT refuses another rank unless the model was prepared")
    other, _ = llama(r=rank, lora_alpha=alpha)
    other.save_pretrained(tmp_path)
    model, _ = llama()
    ours = peft_fast.accelerate(copy.deepcopy(model))
    data = training.batches(ARCHITECTURES["Llama"], 6)
    for each in (model, ours):
        if prepared:
            prepare_model_for_compiled_hotswap(each, target_rank=6)
    runs = [[training.train(each, data[:3])] for each in (model, ours)]
    for each in (model, ours):
        hotswap_adapter(each, str(tmp_path), adapter_name="default")
    with torch.no_grad(), stock():
        swapped, alone = (training.loss_of(m.double().eval(), data[0]) for m in (model, other))
        assert torch.allclose(swapped, alone, rtol=1e-9)
    for each, run in zip((model, ours), runs, strict=True):
        run.append(training.train(each.train(), data[3:]))
    for expected, got in zip(*runs, strict=True):
        for part in ("losses", "first", "last", "moved"):
            assert training.distance(getattr(got, part), getattr(expected, part)) < 1e-9, part
    report = peft_fast.report(ours)
    assert report.group_calls and not report.handed_back


def test_hotswap_of_a_compiled_model(tmp_path):
    """prepare_model_for_compiled_hotswap makes scalings 0-d tensors, so that one graph serves every adapter."""
    x = inputs().detach()
    other = toy(seed=5, r=2, lora_alpha=16)
    other.save_pretrained(tmp_path)
    model = toy(r=4, lora_alpha=4).eval()
    model.load_state_dict({n: p for n, p in other.state_dict().items() if "base_layer" in n}, strict=False)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.allclose(compiled(x), model(x), rtol=1e-5, atol=1e-6)
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
        assert torch.allclose(compiled(x), other.eval()(x), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


def test_a_head_and_a_table_that_share_adapters():
    """ensure_weight_tying: the head's A is the table's B read the other way, one gradient for both."""
    model, _ = llama(tied=True, target_modules=[*HEAD, "embed_tokens"], ensure_weight_tying=True)
    peft_fast.accelerate(model)
    head, table = model.base_model.model.lm_head, model.base_model.model.model.embed_tokens
    A, B = table.lora_embedding_A["default"], table.lora_embedding_B["default"]
    assert head.lora_A["default"].weight.data_ptr() == B.data_ptr()
    assert head.lora_B["default"].weight.data_ptr() == A.data_ptr()
    training.train(model, training.batches(ARCHITECTURES["Llama"], 3))
    assert torch.equal(head.lora_A["default"].weight, B.t()) and torch.equal(head.lora_B["default"].weight, A.t())
    assert isinstance(head.base_layer, nn.Linear) and not peft_fast.report(model).handed_back
