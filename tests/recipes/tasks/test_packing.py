"""Packed rows: filled well, exact in loss and gradients, refused where a model lets their sequences see each other."""

import itertools
import random

import pytest
import torch
import transformers as tf

from peft_fast.errors import UnsupportedError
from peft_fast.recipes.tasks import packing
from tests.recipes.tasks.talks import rows_of, task_for


def test_rows_are_filled_first_fit_decreasing():
    draw = random.Random(0)
    for _ in range(30):
        lengths = [draw.randint(1, 20) for _ in range(draw.randint(1, 40))]
        rows = packing.bins(lengths, 20)
        assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
        naive: list[list[int]] = []
        for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            fits = [row for row in naive if sum(lengths[i] for i in row) + lengths[place] <= 20]
            if fits:
                fits[0].append(place)
            else:
                naive.append([place])
        assert rows == naive


LLAMA = {
    "vocab_size": 1900, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 128,
}  # fmt: skip
GPT2 = {"vocab_size": 1900, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0}
GPT2 |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0}
PACKED = {
    "llama": tf.LlamaConfig(**LLAMA),
    "gpt2": tf.GPT2Config(**GPT2),
    "window": tf.MistralConfig(sliding_window=5, **LLAMA),
    "neox": tf.GPTNeoXConfig(**LLAMA),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PACKED)
def test_a_packed_step_is_the_same_step(name, attention):
    """Loss and gradients of packed rows are those of the rows one by one, in float64."""
    model = tf.AutoModelForCausalLM.from_config(PACKED[name], attn_implementation=attention).double()
    assert packing.refusal(model) is None
    texts = [{"text": " ".join(["the film is good"] * n)} for n in (1, 5, 2, 7, 3, 1)]
    found = []
    for packed in (True, False):
        task = task_for(form="text", packing=packed, max_length=40)
        features = task.encode(rows_of(*texts), "train")
        assert len(features) < 6 if packed else len(features) == 6
        model.zero_grad()
        batches = [task.collate(list(features))] if packed else [task.collate([one]) for one in features]
        tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        assert sum(task.count(batch) for batch in batches) == tokens + 6  # each sequence has a first token
        total = 0.0
        for batch in batches:
            assert ("attention_mask" in batch) != packed
            share = int((batch["labels"] != -100).sum()) / tokens
            loss = share * task.loss(model(**task.inputs(batch)), batch)
            loss.backward()
            total += loss.item()
        found.append((total, [w.grad.clone() for w in model.parameters() if w.grad is not None]))
    (packed, ours), (alone, theirs) = found
    # eager attention of some models has its softmax in float32
    close = 1e-11 if attention == "sdpa" else 1e-7
    assert packed == pytest.approx(alone, abs=close)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=100 * close, atol=close)


def test_adapters_pass_the_positions_on():
    """The packed loss of a PEFT model, made fast, is that of its rows one by one."""
    from peft import LoraConfig, get_peft_model

    import peft_fast

    model = tf.AutoModelForCausalLM.from_config(PACKED["gpt2"]).double()
    lora = LoraConfig(
        target_modules=["c_attn", "c_fc"], init_lora_weights=False, task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    model = peft_fast.accelerate(get_peft_model(model, lora, autocast_adapter_dtype=False))
    task = task_for(form="text", packing=True, max_length=40)
    (one,) = task.encode(rows_of({"text": "the film is good"}, {"text": "bad"}, {"text": "a story"}), "train")
    starts = [place for place, position in enumerate(one["position_ids"]) if position == 0]
    assert len(starts) == 3
    batch = task.collate([one])
    logits = model(**task.inputs(batch)).logits
    for start, end in itertools.pairwise([*starts, len(one["input_ids"])]):
        alone = model(input_ids=batch["input_ids"][:, start:end]).logits
        torch.testing.assert_close(logits[:, start:end], alone, rtol=1e-9, atol=1e-11)


OTHERS = {
    "opt": tf.OPTConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    ),  # fmt: skip
    "bloom": tf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4),
    "rwkv": tf.RwkvConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_packing_is_refused_where_it_is_not_exact(name):
    model = tf.AutoModelForCausalLM.from_config(OTHERS[name])
    assert "sees what lies before it" in packing.refusal(model) or "packed rows" in packing.refusal(model)


def test_the_probe_leaves_a_model_as_it_was():
    model = tf.AutoModelForCausalLM.from_config(PACKED["gpt2"]).bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert packing.refusal(model) is None and model.training
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name])


def test_a_run_with_packing_asks_the_model(tmp_path):
    model = tf.OPTForCausalLM(OTHERS["opt"].__class__(**{**OTHERS["opt"].to_dict(), "vocab_size": 1900}))
    model.save_pretrained(tmp_path)
    task_for().processor.save_pretrained(tmp_path)
    task = task_for(model=str(tmp_path), form="text", packing=True, max_length=32)
    with pytest.raises(UnsupportedError, match="(?s)packing.*OPTForCausalLM.*packing: false"):
        task.load_model(torch.float32)
