"""Small random models and adapters in the layout of the Hugging Face cache, under the names that PEFT asks it for."""

from __future__ import annotations

import hashlib
from pathlib import Path

VOCAB = 1024

DECODER = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)
EXPERTS = dict(DECODER, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8)
# tests take k_proj and v_proj of these for square
LLAMA = dict(DECODER, num_key_value_heads=4)
ENCODER = dict(DECODER, num_hidden_layers=5)
OPT = dict(
    vocab_size=VOCAB, hidden_size=16, ffn_dim=32, num_hidden_layers=5, num_attention_heads=4, word_embed_proj_dim=16
)
OPT_125M = dict(OPT, hidden_size=64, ffn_dim=128, num_hidden_layers=12, word_embed_proj_dim=64)
GPT = dict(vocab_size=VOCAB, n_embd=32, n_layer=5, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=1)
T5 = dict(vocab_size=VOCAB, d_model=32, d_ff=37, d_kv=8, num_layers=5, num_heads=4, decoder_start_token_id=0)
BART = dict(
    vocab_size=VOCAB,
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=4,
    decoder_ffn_dim=4,
    max_position_embeddings=100,
)
RESNET = dict(embedding_size=10, hidden_sizes=[10, 20, 30, 40], depths=[1, 1, 2, 1], layer_type="basic", num_labels=3)

OWN, HF, TRL = "peft-internal-testing", "hf-internal-testing", "trl-internal-testing"
CAUSAL, SEQ2SEQ, BARE = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel"
CLASSIFIER = "AutoModelForSequenceClassification"
# name on the hub -> (auto class, model type, config)
MODELS = {
    **dict.fromkeys((f"{OWN}/opt-125m", "facebook/opt-125m"), (CAUSAL, "opt", OPT_125M)),
    "facebook/opt-350m": (CAUSAL, "opt", dict(OPT_125M, word_embed_proj_dim=32, do_layer_norm_before=False)),
    f"{OWN}/tiny-random-OPTForCausalLM": (CAUSAL, "opt", OPT),
    f"{OWN}/tiny-random-OPTForCausalLM-extended-vocab": (CAUSAL, "opt", dict(OPT, vocab_size=VOCAB + 10)),
    **dict.fromkeys(
        (
            f"{OWN}/tiny-random-gpt2",
            f"{OWN}/tiny-random-GPT2LMHeadModel",
            f"{HF}/tiny-random-gpt2",
            "gpt2",
            "openai-community/gpt2",
        ),
        (CAUSAL, "gpt2", GPT),
    ),
    f"{OWN}/tiny-random-GPTJForCausalLM": (CAUSAL, "gptj", dict(GPT, rotary_dim=4)),
    f"{OWN}/tiny-random-GPTNeoXForCausalLM": (CAUSAL, "gpt_neox", DECODER),
    **dict.fromkeys(
        (f"{OWN}/tiny-random-BloomForCausalLM", "bigscience/bloomz-560m"),
        (CAUSAL, "bloom", dict(vocab_size=VOCAB, hidden_size=32, n_layer=5, n_head=4)),
    ),
    **dict.fromkeys((f"{name}/tiny-random-LlamaForCausalLM" for name in (OWN, HF, TRL)), (CAUSAL, "llama", LLAMA)),
    f"{TRL}/tiny-LlamaForSequenceClassification-3.2": (CLASSIFIER, "llama", dict(DECODER, pad_token_id=0)),
    f"{HF}/tiny-random-MistralForCausalLM": (CAUSAL, "mistral", DECODER),
    **dict.fromkeys(
        (f"{OWN}/tiny-dummy-qwen2", f"{TRL}/tiny-Qwen2ForCausalLM-2.5", "Qwen/Qwen2-0.5B"), (CAUSAL, "qwen2", DECODER)
    ),
    f"{TRL}/tiny-Qwen3ForCausalLM": (CAUSAL, "qwen3", dict(DECODER, head_dim=8)),
    f"{HF}/tiny-random-Gemma3ForCausalLM": (CAUSAL, "gemma3_text", dict(DECODER, head_dim=8, sliding_window=128)),
    f"{HF}/Mixtral-tiny": (CAUSAL, "mixtral", dict(DECODER, num_local_experts=4)),
    **dict.fromkeys(
        (f"{TRL}/tiny-Qwen3MoeForCausalLM", f"{HF}/tiny-qwen3-moe"),
        (CAUSAL, "qwen3_moe", EXPERTS),
    ),
    f"{TRL}/tiny-GptOssForCausalLM": (CAUSAL, "gpt_oss", dict(EXPERTS, num_local_experts=4)),
    f"{TRL}/tiny-Llama4ForCausalLM": (CAUSAL, "llama4_text", dict(EXPERTS, num_local_experts=4, head_dim=8)),
    **dict.fromkeys(
        (*(f"{name}/tiny-random-BertModel" for name in (OWN, HF)), "bert-base-uncased"), (BARE, "bert", ENCODER)
    ),
    f"{OWN}/tiny-random-BertForSequenceClassification": (CLASSIFIER, "bert", ENCODER),
    f"{OWN}/tiny-random-RobertaModel": (BARE, "roberta", ENCODER),
    f"{OWN}/tiny-random-RobertaForSequenceClassification": (CLASSIFIER, "roberta", ENCODER),
    f"{OWN}/tiny-random-DebertaModel": (BARE, "deberta", ENCODER),
    f"{OWN}/tiny-random-DebertaV2Model": (BARE, "deberta-v2", ENCODER),
    **dict.fromkeys(
        (
            f"{OWN}/tiny-random-t5",
            f"{OWN}/tiny-random-T5ForConditionalGeneration",
            f"{OWN}/tiny-random-T5ForConditionalGeneration-calibrated",
            "google/flan-t5-base",
            "google/flan-t5-small",
        ),
        (SEQ2SEQ, "t5", T5),
    ),
    f"{OWN}/tiny-random-BartForConditionalGeneration": (SEQ2SEQ, "bart", BART),
    **dict.fromkeys(
        ("microsoft/resnet-18", f"{OWN}/tiny-random-ResNetForImageClassification"),
        ("AutoModelForImageClassification", "resnet", RESNET),
    ),
}
# name of an adapter on the hub -> that of its model
ADAPTERS = {
    f"{OWN}/opt-125m-dummy-lora": f"{OWN}/opt-125m",
    f"{OWN}/tiny-OPTForCausalLM-lora": f"{OWN}/tiny-random-OPTForCausalLM",
    f"{OWN}/gpt2-lora-random": "gpt2",
}


def write(home: Path) -> list[str]:
    """Writes models and adapters into HF_HOME ``home``, those that are not there as they are here -> what failed."""
    import torch

    failed = []
    for name in (*MODELS, *ADAPTERS):
        folder = home / "hub" / f"models--{name.replace('/', '--')}"
        head = folder / "refs" / "main"
        if head.exists() and head.read_text() == _commit(name):
            continue
        torch.manual_seed(0)
        try:
            _model(name, _snapshot(home, name)) if name in MODELS else _adapter(ADAPTERS[name], name, home)
        except Exception as error:  # another transformers may not have all of them
            failed.append(f"{name}: {type(error).__name__}: {error}")
            continue
        head.parent.mkdir(exist_ok=True)
        head.write_text(_commit(name))
    return failed


def _commit(name: str) -> str:
    """What stands in for a revision: one that was made of another description is made anew."""
    return hashlib.sha1(repr(MODELS.get(name) or (name, _commit(ADAPTERS[name]))).encode()).hexdigest()


def _snapshot(home: Path, name: str) -> Path:
    return home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / _commit(name)


def _model(name: str, place: Path) -> None:
    import transformers

    auto, kind, config = MODELS[name]
    model = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(kind, **config))
    model.save_pretrained(place)
    if "Image" in auto:
        transformers.ConvNextImageProcessor(size={"shortest_edge": 64}).save_pretrained(place)
    else:
        _tokenizer().save_pretrained(place)


def _adapter(base: str, name: str, home: Path) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    model = getattr(transformers, MODELS[base][0]).from_pretrained(_snapshot(home, base))
    model = get_peft_model(model, LoraConfig(r=8, init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(_snapshot(home, name))


def _tokenizer():
    """Bytes, and special tokens where most models have them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
