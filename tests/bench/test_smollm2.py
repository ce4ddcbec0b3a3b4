"""`bench smollm2` on a toy model: two processes learn, are judged before and after, and end in README's table."""

import pytest
import torch

from peft_fast.benchmarks import harness, smollm2, table
from peft_fast.cli import bench
from peft_fast.demo.data import Task
from peft_fast.demo.finetune import FAST, STOCK, blocks
from peft_fast.errors import DataError, SettingsError, UnsupportedError

WORDS = "the a film plot actor scene is was very not good bad dull bright warm cold long short loud calm".split()


def toy_config():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip


def put(folder, n_test):
    """A toy Llama and texts instead of what is fetched."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", "[END]", *WORDS])}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[END]").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(toy_config()).to(torch.bfloat16).save_pretrained(folder)
    texts = [(" ".join(WORDS[(i * j) % len(WORDS)] for j in range(3, 15)), 0) for i in range(400)]
    return Task("toy texts", [], texts[n_test:], texts[:n_test])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One run for all tests here: (document, path of the picture, what was printed)."""
    import contextlib
    import io

    folder, out = tmp_path_factory.mktemp("smollm2"), io.StringIO()
    args = ["smollm2", "--tiny", "--dropout", "0", "--threads", "1", "--repeats", "4", "--dtype", "fp32"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(smollm2, "prepared", put)
        assert bench.app([*args, "--json", str(folder / "a.json"), "--plot", str(folder / "a.png")]) == 0
    return harness.read(folder / "a.json"), folder / "a.png", out.getvalue()


def test_both_learn_the_same(tiny):
    document, picture, out = tiny
    (row,) = document["rows"]
    stock, fast = row["runs"][STOCK], row["runs"][FAST]
    assert document["bench"] == "smollm2" and row["settings"]["steps"] == 4 and not document["refused"]
    assert len(stock["losses"]) == len(fast["losses"]) == 4
    # float32 without dropout: the same but for rounding
    assert stock["losses"] == pytest.approx(fast["losses"], rel=1e-4)
    assert stock["perplexity"] == pytest.approx(fast["perplexity"], rel=1e-3)
    assert fast["perplexity"][1] < fast["perplexity"][0]
    assert abs(row["perplexity_ratio"] - 1) < 1e-3 and row["apart"] == ""
    assert stock["fast_calls"] == 0 < fast["fast_calls"] and fast["layers"]["fast"] == fast["layers"]["of"] == 14
    assert (fast["layers"]["groups"], fast["layers"]["blocks"]) == (2, 2)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "perplexity" in out and "14 of 14 layers fast, 2 groups and 2 blocks" in out


def test_memory_is_each_ones_own(tiny):
    runs = tiny[0]["rows"][0]["runs"]
    assert runs[FAST]["saved_bytes"] <= runs[STOCK]["saved_bytes"]
    for run in runs.values():
        assert run["peak_resident_bytes"] >= run["resident_before_bytes"] > 50 * 2**20 and run["step_bytes"] > 0


def test_the_table_has_both_side_by_side(tiny):
    document, _, _ = tiny
    text = table.smollm2([document])
    assert text.count("\n| 0 | ") == 2 and "4 steps of 4 × 128 tokens of toy texts" in text
    assert "**peft_fast**" in text and " → " in text and " %)" in text
    assert table.smollm2([]).startswith("_Nothing measured yet")


@pytest.mark.parametrize(
    "ratio, same, calls, scale, words",
    [
        (1.004, True, 7, "full", ""),
        (0.994, True, 7, "full", "-0.60 % from stock"),
        (1.1, True, 7, "quick", ""),
        (1.0, False, 7, "full", "same batches"),
        (1.0, True, 0, "full", "none of the layers"),
    ],
)
def test_what_may_not_be_compared(ratio, same, calls, scale, words):
    why = smollm2._apart(ratio, same, calls, scale)
    assert words in why and bool(why) == bool(words)


def test_texts_become_blocks_of_one_length():
    class Tokenizer:
        eos_token_id = 0

        def __call__(self, texts):
            return {"input_ids": [[len(text)] * len(text) for text in texts]}

    found = blocks(Tokenizer(), [("a" * 3, 0), ("b" * 2, 0), ("c" * 4, 0)], 4)
    assert [row["input_ids"] for row in found] == [[3, 3, 3, 0], [2, 2, 0, 4], [4, 4, 4, 0]]
    assert all(row["labels"] == row["input_ids"] and row["attention_mask"] == [1] * 4 for row in found)


@pytest.mark.parametrize("more", [["--gate-only"], ["--peers"], ["--without", "cuda fused"]])
def test_options_that_are_for_layers(more):
    with pytest.raises(SettingsError, match="whole runs"):
        bench.app(["smollm2", "--tiny", *more])


def test_the_deadline_leaves_a_run_out(monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "prepared", lambda folder, n_test: None)
    assert bench.app(["smollm2", "--tiny", "--minutes", "0.00001"]) == 0
    assert "not measured: smollm2-135m" in capsys.readouterr().out


def write_gguf(path):
    """A toy Llama as llama.cpp keeps one, its matrices in blocks of 4 bits -> name -> what the blocks hold."""
    import gguf
    import numpy as np

    config, draw = toy_config(), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<end>", *(chr(ord("a") + i) for i in range(26)), "ab", "cd", "ef", "gh"])
    writer.add_token_merges(["a b", "c d", "e f", "g h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    kept = {}

    def add(name, *shape):
        value = draw.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, value)
            return
        kind = gguf.GGMLQuantizationType.Q4_1
        packed = gguf.quants.quantize(value, kind)
        kept[name] = gguf.quants.dequantize(packed, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)

    H, I, KV = config.hidden_size, config.intermediate_size, 32
    add("token_embd.weight", config.vocab_size, H)
    add("output_norm.weight", H)
    for i in range(config.num_hidden_layers):
        for name, *shape in (
            ("attn_norm", H), ("ffn_norm", H), ("attn_q", H, H), ("attn_k", KV, H), ("attn_v", KV, H),
            ("attn_output", H, H), ("ffn_gate", I, H), ("ffn_up", I, H), ("ffn_down", H, I),
        ):  # fmt: skip
            add(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def test_a_gguf_becomes_plain_bfloat16_weights(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, folder = tmp_path / "gguf", tmp_path / "plain"
    source.mkdir()
    kept = write_gguf(source / "toy.gguf")
    smollm2.unpack(source, "toy.gguf", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert "quantization_config" not in model.config.to_dict()
    assert {w.dtype for w in model.parameters()} == {torch.bfloat16}
    for i in range(2):
        for ours, theirs in (("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
            w = model.get_submodule(f"model.layers.{i}.{theirs}").weight
            assert torch.equal(w, torch.from_numpy(kept[f"blk.{i}.{ours}.weight"]).bfloat16())
    assert AutoTokenizer.from_pretrained(folder)("abc")["input_ids"][-1:] == [4]  # "c"


def test_a_gguf_that_cannot_be_read(tmp_path):
    (tmp_path / "toy.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(DataError, match="(?s)toy.gguf.*run again"):
        smollm2.unpack(tmp_path, "toy.gguf", tmp_path / "plain")


def test_without_the_package_gguf(monkeypatch, tmp_path):
    import transformers

    monkeypatch.setattr(transformers.utils, "is_gguf_available", lambda: False)
    with pytest.raises(UnsupportedError, match="pip install gguf"):
        smollm2.unpack(tmp_path, "x.gguf", tmp_path / "plain")
