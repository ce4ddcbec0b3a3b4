"""Methods on real classes of every kind: what trains, in which dtype, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from peft_fast.errors import PeftFastError, SettingsError, UnsupportedError
from peft_fast.recipes import adapters, methods, structure
from tests.architectures.zoo import ARCHITECTURES
from tests.recipes.anytask import HEADS, SOME, AnyTask, config, loss_of, prepared, trained

CLASSIFIERS = ("BERT", "RoBERTa", "DistilBERT", "ALBERT", "DeBERTa-v2", "ViT", "DINOv2", "Swin", "HuBERT")


# ---- structure


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_is_in_one_layer_and_blocks_are_in_order(name):
    """By structure alone: blocks between embeddings and head, both towers of two."""
    model = ARCHITECTURES[name].build()
    found = structure.layers(model)
    flat = [name for group in found for name in group]
    assert sorted(flat) == sorted(n for n, _ in model.named_parameters())
    blocks = 1 if name == "ALBERT" else 2
    assert len(found) == blocks + 2
    for number, group in enumerate(found[1:-1]):
        assert group
        assert all(f".{number}." in parameter for parameter in group)
    two = getattr(model.config, "is_encoder_decoder", False) or name in ("CLIP", "SigLIP")
    assert all(len(group.titles) == 1 + two for group in structure.groups(model)[1:-1])
    below = {n for n in flat if "embed" in n and ".probe" not in n}
    assert below <= set(found[0]) | set(sum(found[1:-1], []))


def test_towers_of_unequal_height_meet_at_the_top():
    """Three blocks of an encoder beside one of a decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    small = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=3, num_decoder_layers=1, num_heads=2)
    found = structure.groups(T5ForConditionalGeneration(small))
    assert [g.titles for g in found[1:-1]] == [
        ("encoder.block.0",),
        ("encoder.block.1",),
        ("encoder.block.2", "decoder.block.0"),
    ]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_head_is_the_top_under_an_adapter_too(name):
    model, task = prepared(name, method="lora")
    top = structure.layers(model, task.head(model.get_base_model()))[-1]
    assert any("modules_to_save.default" in parameter for parameter in top)
    assert not any("lora_" in parameter for parameter in structure.layers(model)[0] if ".layer" in parameter)


# ---- what trains


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_head_trains_the_head_alone(name):
    model, task = prepared(name, method="head")
    assert trained(model) == {n for n, _ in model.named_parameters() if n.partition(".")[0] in HEADS}
    loss_of(model, name).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained(model)


def built_with(name: str, p: float) -> nn.Module:
    """The class built anew, after every dropout of its config was set; stochastic depth is none."""
    config = ARCHITECTURES[name].build().config
    for key, value in vars(config).items():
        if "drop" in key and "path" not in key and "layer" not in key and isinstance(value, float):
            setattr(config, key, p)
    torch.manual_seed(0)
    return getattr(transformers, ARCHITECTURES[name].cls)(config)


@pytest.mark.parametrize(
    "name, target", [*((name, "all-linear") for name in ARCHITECTURES), *((name, "attention") for name in SOME)]
)
def test_adapters_are_on_the_layers_asked_for(name, target):
    """Every linear layer that is called, or those of attention; never the head or the output layer."""
    architecture = ARCHITECTURES[name]
    before = architecture.build()
    model, task = prepared(name, method="lora", target_modules=target, r=2)
    inner = model.get_base_model()
    found = {n for n, m in inner.named_modules() if hasattr(m, "lora_A") and m.lora_A}
    output = before.get_output_embeddings() if hasattr(before, "get_output_embeddings") else None
    linear = structure.linear_layers(before) if target == "all-linear" else structure.attention_layers(before)
    # PEFT takes these for parameters of experts, whose adapters know no dropout
    experts = ("gate_proj", "up_proj", "down_proj") if name in ("Qwen3-MoE", "DeepSeek-V3") else ()
    linear = {n: m for n, m in linear.items() if not n.endswith(experts or "-")}
    assert found == {n for n, m in linear.items() if m is not output and n.partition(".")[0] not in HEADS}
    assert found
    loss_of(model, name).backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    # pooled outputs of BERT and the last layers of some towers reach no loss
    assert not {n for n in without if "modules_to_save" in n}
    assert len(without) <= 2 * sum("pooler" in n or "expert" in n for n in found) or name in ("DETR", "SigLIP")


@pytest.mark.parametrize("kind", [None, "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_every_kind_of_peft_task_takes_all_linear(kind):
    """PEFT's own all-linear raises TypeError for TOKEN_CLS on BERT."""
    classes = {"TOKEN_CLS": "BertForTokenClassification", "QUESTION_ANS": "BertForQuestionAnswering"}
    cls = getattr(transformers, classes.get(kind, "BertForSequenceClassification"))

    class Kind(AnyTask):
        peft = kind

    model, _ = prepared(cls(ARCHITECTURES["BERT"].build().config), Kind, method="lora")
    head = "qa_outputs" if kind == "QUESTION_ANS" else "classifier"
    assert f"base_model.model.{head}.modules_to_save.default.weight" in trained(model)
    assert sum("lora_A" in n for n in trained(model)) >= 12


def test_targets_by_regex_and_by_list():
    by_list, _ = prepared("BERT", method="lora", target_modules=["query", "layer.1.output.dense"])
    names = {n.split("base_model.model.")[1].split(".lora_A")[0] for n in trained(by_list) if "lora_A" in n}
    assert names == {
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.output.dense",
    }
    by_regex, _ = prepared("BERT", method="lora", target_modules=r".*\.0\..*\.(query|key)")
    assert sum("lora_A" in n for n in trained(by_regex)) == 2


def test_a_target_of_the_heads_name_stays_below_the_head():
    """`dense` is in RoBERTa's blocks and in its head: the head trains whole, without an adapter inside."""
    model, _ = prepared("RoBERTa", method="lora", target_modules=["dense"])
    assert not any("lora" in n and "classifier" in n for n in trained(model))
    assert "base_model.model.classifier.modules_to_save.default.dense.weight" in trained(model)


def test_names_that_end_alike_are_told_apart():
    """PEFT takes what ends in a name: for `proj`, another `proj` inside; for the head `head`, `lm_head` too."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
            self.inner = nn.Module()
            self.inner.proj = nn.Conv1d(2, 2, 1)
            self.config = {}

        def forward(self, x):
            return self.head(self.proj(x))

    class OddTask(AnyTask):
        def head(self, model):
            return ["head"]

    model, _ = prepared(Odd(), OddTask, method="lora", r=1)
    assert {n.removeprefix("base_model.model.") for n in trained(model)} == {
        *("proj.lora_A.default.weight", "proj.lora_B.default.weight"),
        *("head.modules_to_save.default.weight", "head.modules_to_save.default.bias"),
    }
    odd = Odd()
    odd.lm_head = nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match="also has lm_head"):
        prepared(odd, OddTask, method="lora", r=1)


def test_options_reach_peft():
    model, _ = prepared(
        "BERT",
        method="dora",
        r=4,
        alpha=6,
        rslora=True,
        lora_dropout=0.25,
        lora_bias="lora_only",
        init_lora_weights="gaussian",
        modules_to_save=["LayerNorm"],
    )
    found = model.peft_config["default"]
    assert (found.r, found.lora_alpha, found.use_rslora, found.use_dora) == (4, 6, True, True)
    assert (found.lora_dropout, found.bias, found.init_lora_weights) == (0.25, "lora_only", "gaussian")
    assert any("LayerNorm.modules_to_save" in n for n in trained(model))
    assert any(n.endswith("query.base_layer.bias") for n in trained(model))
    layer = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    assert layer.scaling["default"] == 3.0
    assert layer.lora_magnitude_vector


# ---- going on


def test_going_on_from_a_folder(tmp_path):
    first, _ = prepared("BERT", method="lora", r=3, target_modules=["query", "value"], init_lora_weights=False)
    with torch.no_grad():
        first.get_base_model().classifier.weight.add_(1)
    first.save_pretrained(tmp_path / "adapter")
    second, _ = prepared("BERT", method="lora", adapter=str(tmp_path / "adapter"))
    a, b = first.state_dict(), second.state_dict()
    assert trained(first) == trained(second)
    assert all(torch.equal(a[n], b[n]) for n in trained(first))


def test_an_adapter_without_the_head_gets_a_new_one(tmp_path):
    from peft import LoraConfig, get_peft_model

    plain = get_peft_model(ARCHITECTURES["BERT"].build(), LoraConfig(r=2, target_modules=["query"]))
    plain.save_pretrained(tmp_path)
    model, _ = prepared("BERT", method="lora", adapter=str(tmp_path))
    assert "base_model.model.classifier.modules_to_save.default.weight" in trained(model)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(adapter="nowhere"), "adapter_config.json"),
        (dict(r=5), "r: 5; the adapter has 2"),
        (dict(method="dora"), "the adapter is lora"),
        (dict(target_modules=["key"]), "stand in its own config"),
    ],
)
def test_what_an_adapter_fixes_cannot_be_changed(tmp_path, options, message):
    model, _ = prepared("BERT", method="lora", r=2, target_modules=["query"])
    model.save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match=message):
        prepared("BERT", **{"method": "lora", "adapter": str(tmp_path), **options})


def test_an_adapter_of_another_model(tmp_path):
    model, _ = prepared("GPT-2", method="lora", r=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(PeftFastError, match="given: .*\n.*needed"):
        prepared("BERT", method="lora", adapter=str(tmp_path))


# ---- dtypes


@pytest.mark.parametrize("method", ["head", "lora", "dora"])
@pytest.mark.parametrize("name", ["BERT", "DistilBERT", "ViT", "HuBERT", "DETR", "Whisper"])
def test_what_trains_is_float32_over_a_base_in_bfloat16(name, method):
    """Without autocast: forward and backward run, with gradients in float32, near those of a base in float32."""
    if method == "head" and name == "Whisper":
        pytest.skip("no head of its own")
    model = ARCHITECTURES[name].build().to(torch.bfloat16)
    exact, _ = prepared(copy.deepcopy(model).float(), method=method)
    torch.manual_seed(0)
    model, _ = prepared(model, method=method)
    exact.load_state_dict({n: p.float() for n, p in model.state_dict().items()})
    for p in (p for p in model.parameters() if p.is_floating_point()):
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
    model.eval(), exact.eval()
    loss, near = loss_of(model, name), loss_of(exact, name)
    loss.backward(), near.backward()
    torch.testing.assert_close(loss.float(), near, rtol=0.05, atol=0.05)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    pickled = copy.deepcopy(model)
    assert trained(pickled) == trained(model)


def test_a_whole_module_in_the_midst_gives_the_bases_dtype():
    model = ARCHITECTURES["BERT"].build().to(torch.bfloat16)
    model, _ = prepared(model, method="lora", modules_to_save=["attention.output.LayerNorm", "word_embeddings"])
    loss_of(model, "BERT").backward()
    norm = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.output.LayerNorm")
    assert norm.modules_to_save["default"].weight.grad.dtype == torch.float32
    assert norm(torch.ones(1, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options, dtype, arguments",
    [
        (dict(method="lora", dtype="bf16"), torch.bfloat16, {}),
        (dict(method="head", dtype="fp32"), torch.float32, {}),
        (dict(method="full", dtype="bf16"), torch.float32, {"bf16": True}),
        (dict(method="gradual", dtype="fp32"), torch.float32, {}),
        (dict(method="lora", dtype="bf16", lora_bias="all"), torch.float32, {"bf16": True}),
    ],
)
def test_dtypes(options, dtype, arguments):
    assert methods.dtypes(config(device="cpu", **options)) == (dtype, arguments)


def test_half_precision_needs_a_gpu():
    with pytest.raises(PeftFastError, match="fp16 on a CPU"):
        methods.dtypes(config(dtype="fp16", device="cpu"))


def test_full_leaves_frozen_what_the_model_froze():
    """Sinusoids of Whisper's encoder are no weights."""
    model, _ = prepared("Whisper", method="full")
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"model.encoder.embed_positions.weight"}


# ---- dropout


@pytest.mark.parametrize("name", (*SOME, "ModernBERT", "DeBERTa-v2", "DINOv2", "Swin", "MPT", "BART"))
def test_dropout_reaches_every_place(name):
    """The config's, the modules' and those that a forward reads: as if the model had been built with it."""
    model, expected = ARCHITECTURES[name].build(), built_with(name, 0.25)
    places = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    if not places and not any("dropout" in n or "pdrop" in n for n in vars(model.config)):
        return
    methods.set_dropout(model, 0.25)
    assert all(m.p == 0.25 for m in places)
    if name == "MPT":  # its config cannot hold a fraction
        assert {m.attn_dropout_p for m in model.modules() if hasattr(m, "attn_dropout_p")} == {0.25}
        return
    torch.manual_seed(2)
    a = loss_of(model.train(), name)
    torch.manual_seed(2)
    b = loss_of(expected.train(), name)
    torch.testing.assert_close(a, b)
    kept = {n: v for n, v in vars(model.config).items() if "drop" in n and isinstance(v, float)}
    assert kept == {n: v for n, v in vars(expected.config).items() if "drop" in n and isinstance(v, float)}


def test_a_model_without_dropout_says_so():
    with pytest.raises(SettingsError, match="a model with dropout"):
        prepared(nn.Sequential(nn.Linear(2, 2)), method="full", dropout=0.1)


# ---- refused


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(method="head", layer_decay=0.9), "layer_decay"),
        (dict(method="head", learning_rate=1e-3, head_learning_rate=1e-3), "head_learning_rate"),
        (dict(schedule="cosine", decay=0.3), "decay: schedule cosine"),
        (dict(schedule="wsd", decay=0.95, warmup=0.1), "more than all"),
        (dict(warmup=2.5), "whole number"),
        (dict(method="gradual", unfreeze_patience=2), "unfreeze_patience"),
        (dict(method="gradual", unfreeze_by="plateau", unfreeze_every=2.0), "unfreeze_every"),
        (dict(method="gradual", unfreeze_by="plateau", early_stopping=1), "plateau that unfreezes"),
        (dict(method="lora", init_lora_weights="pissa_niter_4"), "init_lora_weights"),
        (dict(method="lora", init_lora_weights="orthogonal", r=3), "even r"),
        (dict(method="dora", init_lora_weights="pissa"), "magnitudes"),
        (dict(method="lora", target_modules=[]), "empty list"),
    ],
)
def test_options_that_cannot_be_meant(options, message):
    given = config(**options)
    with pytest.raises(SettingsError, match=message):
        methods.check(given, AnyTask(given))


def test_all_contradictions_are_said_at_once():
    given = config(method="head", layer_decay=0.9, warmup=2.5, decay=0.3)
    with pytest.raises(SettingsError, match="3 options.*\n.*layer_decay.*\n.*decay.*\n.*warmup"):
        methods.check(given, AnyTask(given))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("GPT-2", dict(method="head"), "tied to"),
        ("ViT", dict(method="lora", target_modules=["q_porj"]), "did you mean q_proj"),
        ("BERT", dict(method="lora", target_modules="query"), r"give a list: \[query\]"),
        ("BERT", dict(method="lora", target_modules="(query"), "regular expression"),
        ("BERT", dict(method="lora", target_modules=["embeddings"]), "PEFT on Bert"),
        ("BERT", dict(method="lora", modules_to_save=["LayerNrom"]), "did you mean"),
        ("T5", dict(method="lora", head_learning_rate=1e-3), "adds a head"),
    ],
)
def test_what_a_model_cannot_do_is_said(name, options, message):
    with pytest.raises((SettingsError, UnsupportedError), match=message):
        prepared(name, **options)


def test_an_output_layer_of_its_own_is_a_head():
    model, _ = prepared("Llama", method="head")
    assert trained(model) == {"lm_head.weight"}


def test_short_names_mean_the_same_layers():
    model = ARCHITECTURES["Llama"].build()
    assert sorted(adapters.targets(model, "all-linear")) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
