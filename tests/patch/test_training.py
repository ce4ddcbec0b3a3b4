"""Whole training situations: losses like stock's, checkpointing with dropout, generation, data parallel."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import peft_fast
from tests.patch.toys import assert_fast, inputs, layers, stock, toy

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert(**config):
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig(vocab_size=50, **SIZES))
    config = {"target_modules": "all-linear", "task_type": "SEQ_CLS", "lora_dropout": 0.0, **config}
    return peft_fast.accelerate(get_peft_model(base, LoraConfig(**config)))


def llama(**config):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, **SIZES))
    config = {"target_modules": "all-linear", "init_lora_weights": False, **config}
    return peft_fast.accelerate(get_peft_model(base, LoraConfig(**config)))


def gpt2():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2))
    config = LoraConfig(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    return peft_fast.accelerate(get_peft_model(base, config))


TOKENS = torch.arange(24).view(2, 12) % 50


@pytest.mark.parametrize("make", [lambda: bert(init_lora_weights=False), llama, gpt2], ids=["bert", "llama", "gpt2"])
def test_models_are_stocks_in_output_and_gradients(make):
    model = make().eval()
    for lora in layers(model):
        lora.train()
    assert_fast(model, TOKENS)


def losses(model, steps=20):
    """Losses of a short training run: AdamW, one random batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(4)  # hidden dropout: the same draws in both runs
    tokens = torch.randint(50, (8, 16), generator=generator)
    out = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=(tokens[:, 0] > 25).long()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        out.append(loss.item())
    return out


def test_twenty_steps_of_bert_follow_stock():
    with stock():
        expected = losses(bert())
    model = bert()
    got = losses(model)
    assert got == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]
    report = peft_fast.report(model)
    assert report.fast_calls == 20 * len(report.fast) == 20 * len(layers(model)) and not report.handed_back


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_with_dropout_gives_the_gradients_without(reentrant):
    """The recomputed forward must draw the masks of the first one."""

    def gradients(checkpointed):
        model = llama(lora_dropout=0.3).train()
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(11)
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        assert not peft_fast.report(model).handed_back
        # the non-reentrant kind stops its second forward at the last tensor that backward asks for
        calls = peft_fast.report(model).fast_calls / len(layers(model))
        assert (1.5 if checkpointed else 1) <= calls <= (2 if checkpointed else 1)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, got = gradients(False), gradients(True)
    assert expected.keys() == got.keys() and len(expected) == 2 * len(layers(llama()))
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_checkpointing_of_one_layer_draws_once():
    model = toy(lora_dropout=0.5)
    x = inputs()
    torch.manual_seed(0)
    model(x).sum().backward()
    first = x.grad.clone()
    after = torch.rand(1)
    x.grad = None
    torch.manual_seed(0)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, first) and torch.equal(torch.rand(1), after)


def test_accumulation_and_retain_graph():
    model = toy()
    x = inputs()
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    weight = layers(model)[0].lora_A["default"].weight
    once = weight.grad.clone()
    loss.backward()
    assert torch.equal(weight.grad, 2 * once)


def test_generate_gives_stocks_tokens():
    model = llama().eval()
    arguments = {"input_ids": TOKENS[:, :4], "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with stock():
        expected = model.generate(**arguments)
    assert torch.equal(model.generate(**arguments), expected)
    assert peft_fast.report(model).fast_calls >= 8 * len(layers(model))


DDP = """
import os, sys, torch, torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
import peft_fast
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
torch.manual_seed(0)
base = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
model = get_peft_model(base, LoraConfig(target_modules=["0", "2"], init_lora_weights=False))
x = torch.randn(2, 3, 8)
def gradients(m, x):
    m.zero_grad(set_to_none=True)
    m(x).square().mean().backward()
    return [p.grad.clone() for p in m.parameters() if p.grad is not None]
expected = gradients(model, x.view(6, 8))
peft_fast.accelerate(model)
parallel = nn.parallel.DistributedDataParallel(model)
got = gradients(parallel, x[dist.get_rank()])
assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(expected, got, strict=True))
report = peft_fast.report(model)
assert (report.fast_calls, report.handed_back) == (2, {})

from torch.distributed.fsdp import fully_shard
peft_fast.restore(model)
peft_fast.accelerate(model)
fully_shard(model.base_model.model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
got = [g.full_tensor() for g in gradients(model, x[dist.get_rank()])]
assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(expected, got, strict=True))
assert peft_fast.report(model).fast_calls == 2 and not peft_fast.report(model).handed_back
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_data_parallel_and_fully_sharded(tmp_path, root):
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DDP, str(tmp_path / "store")]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert [out for out, _ in outputs] == [2 * "peft_fast: 2 of 2 LoRA layers are fast\n", ""]
