"""Models that write, and what to teach them: SmolLM2, tiny ones with random weights, conversations and summaries."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peft_fast.errors import DataError, UnsupportedError, fail
from peft_fast.recipes import fetch
from peft_fast.recipes.examples import Example, text, text_models
from peft_fast.recipes.tasks import loading

SPLITS = ("train", "validation", "test")
JSONL = {split: f"{split}.jsonl" for split in SPLITS}
ASK = "Is this sentence about a film positive or negative?"

# with text_models' words what the tiny tokenizer knows whole; anything else is spelt in bytes
ENGLISH = """package library file program tool interface support user system data server command line documentation
development header static shared runtime module plugin version based provide allow contain include implementation
binding format network graphical desktop environment manager simple common source code test debug symbol language
translation positive negative sentence Is This about or Ask Answer User Assistant System"""
FRENCH = """le la les un une des du de et ou mais pas ne que qui dont où ce cette ces son sa ses leur leurs il elle ils
elles on nous vous je tu est sont être été fait avec sans sous sur dans par pour vers chez entre après avant plus moins
très aussi comme tout tous toute toutes autre autres même peut peuvent doit permet fournit contient comprend utilise
paquet bibliothèque fichier fichiers programme outil outils interface prise en charge utilisateur système données
serveur commande ligne documentation développement en-têtes statique partagée exécution module greffon version basé
fournir permettre contenir implémentation liaison format réseau graphique bureau environnement gestionnaire simple
commun source code test débogage symboles langage traduction nécessaire grâce depuis ainsi afin lorsque"""
TOKENS = 1900
SPECIAL = ["<pad>", "</s>", "<s>", "<unk>", "<extra>"]
SHAPE = {"layers": 2, "width": 128, "heads": 4, "inner": 256, "positions": 512}


def _smollm2(folder: Path, fetched: fetch.Fetch) -> None:
    unpack(fetched(fetch.SMOLLM2), next(iter(fetch.SMOLLM2.files)), folder)


def unpack(source: Path, name: str, folder: Path) -> None:
    """The 4-bit GGUF `source`/`name` -> `folder`, as transformers saves any model in bfloat16."""
    import torch
    import transformers

    if not transformers.utils.is_gguf_available():
        need = "the Python package gguf, which reads the model"
        fail(UnsupportedError, "SmolLM2 without gguf", need, "run `pip install gguf`")
    try:
        # transformers shows the reading of a GGUF by bars of its own kind, which its settings do not turn off
        with loading.quiet(), contextlib.redirect_stderr(io.StringIO()):
            plain = {"gguf_file": name, "quantization_config": transformers.GgufConfig(dequantize=True)}
            load = transformers.AutoModelForCausalLM.from_pretrained
            load(source, dtype=torch.bfloat16, **plain).save_pretrained(folder)
            transformers.AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    except Exception as error:  # what a damaged file comes to has no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        fail(DataError, f"{name}: {reason}", "a GGUF that transformers reads", f"delete {source}, run again", error)


def _tiny(config: str, auto: str, **fields: Any) -> Callable[[Path, fetch.Fetch], None]:
    """What makes a model of ``config``'s class with the tiny tokenizer."""

    def make(folder: Path, fetched: fetch.Fetch) -> None:
        import torch
        import transformers

        tokenizer = _tokenizer(closes=auto == "AutoModelForSeq2SeqLM")
        named = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
        chosen = getattr(transformers, config)(vocab_size=len(tokenizer), **named, **fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, auto).from_config(chosen)
        with loading.quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    return make


def _tokenizer(closes: bool) -> Any:
    """Byte pairs; ``closes``: an end token after every text, as encoder-decoders have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False
    )
    trained.train_from_iterator(_corpus(), trainer)
    if closes:
        trained.post_processor = processors.TemplateProcessing("$A </s>", "$A $B </s>", [("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=trained, model_max_length=SHAPE["positions"], **names)


def _corpus() -> Iterator[str]:
    for words, times in ((text_models.WORDS, 1), (ENGLISH, 2), (FRENCH, 2)):
        for word in words.split():
            yield f"{word} {word} {word}" * times


def _write(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> None:
    for split, rows in splits.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / JSONL[split]).write_text(lines, encoding="utf-8")


def _conversations(folder: Path, fetched: fetch.Fetch) -> None:
    """Every sentence of example:movie-reviews as a question and its answer, in the same splits."""
    with tempfile.TemporaryDirectory(prefix="peft_fast-") as temporary:
        entry = text.ENTRIES["movie-reviews"]
        entry.make(Path(temporary), fetched)
        splits = {}
        for split in SPLITS:
            with (Path(temporary) / entry.splits[split]).open(newline="", encoding="utf-8") as file:
                splits[split] = [{"messages": _talk(row["text"], row["label"])} for row in csv.DictReader(file)]
    _write(folder, splits)


def _talk(sentence: str, label: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{ASK}\n{sentence}"}, {"role": "assistant", "content": label}]


def _summaries(folder: Path, fetched: fetch.Fetch) -> None:
    """Long description -> synopsis, of packages that share their long description with no other."""
    found: dict[str, set[str]] = {}
    for entry in fetched.descriptions("en")["en"].split("\n\n"):
        title, _, body = entry.partition("\nDescription-en: ")[2].partition("\n")
        long = " ".join(line.strip() for line in body.split("\n") if line.strip() != ".")
        long = " ".join(long.split())
        if 120 <= len(long) <= 900 and 12 <= len(title) <= 80:
            found.setdefault(long, set()).add(title.strip())
    pairs = [(long, *titles) for long, titles in found.items() if len(titles) == 1]
    pairs.sort(key=lambda pair: hashlib.sha256(pair[0].lower().encode()).digest())
    if len(pairs) < 5000:
        given = f"{len(pairs)} packages with a description of their own"
        fail(DataError, given, "5,000 or more, as Debian 12 has", "run it on Debian, or pass data of your own")
    rows = [{"text": long, "summary": title} for long, title in pairs]
    _write(folder, {"test": rows[:1000], "validation": rows[1000:2000], "train": rows[2000:]})


GPT = {"n_layer": SHAPE["layers"], "n_embd": SHAPE["width"], "n_head": SHAPE["heads"], "n_inner": SHAPE["inner"]}
LLAMA = {"num_hidden_layers": SHAPE["layers"], "hidden_size": SHAPE["width"], "num_attention_heads": SHAPE["heads"]}
LLAMA |= {"num_key_value_heads": 2, "intermediate_size": SHAPE["inner"]}
T5 = {"num_layers": SHAPE["layers"], "d_model": SHAPE["width"], "num_heads": SHAPE["heads"], "d_ff": SHAPE["inner"]}
BART = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (
    ("layers", SHAPE["layers"]), ("attention_heads", SHAPE["heads"]), ("ffn_dim", SHAPE["inner"]))}  # fmt: skip
SEQ2SEQ = ("translation", "summarization")
ENTRIES = {
    "smollm2": Example(
        what="SmolLM2-135M-Instruct: a pretrained Llama of 30 layers, hidden size 576, with a chat template (270 MB)",
        make=_smollm2,
        tasks=("causal-lm",),
    ),
    "tiny-gpt2": Example(
        what="a GPT-2 of 2 layers, hidden size 128, random weights",
        make=_tiny("GPT2Config", "AutoModelForCausalLM", n_positions=SHAPE["positions"], **GPT),
        tasks=("causal-lm",),
    ),
    "tiny-llama": Example(
        what="a Llama of 2 layers, hidden size 128, random weights",
        make=_tiny("LlamaConfig", "AutoModelForCausalLM", max_position_embeddings=SHAPE["positions"], **LLAMA),
        tasks=("causal-lm",),
    ),
    "tiny-t5": Example(
        what="a T5 of 2 + 2 layers, hidden size 128, random weights",
        make=_tiny("T5Config", "AutoModelForSeq2SeqLM", d_kv=32, dropout_rate=0.0, decoder_start_token_id=0, **T5),
        tasks=SEQ2SEQ,
    ),
    "tiny-bart": Example(
        what="a BART of 2 + 2 layers, hidden size 128, random weights",
        make=_tiny(
            "BartConfig",
            "AutoModelForSeq2SeqLM",
            d_model=SHAPE["width"],
            max_position_embeddings=SHAPE["positions"],
            decoder_start_token_id=1,
            forced_eos_token_id=1,
            dropout=0.0,
            **BART,
        ),
        tasks=SEQ2SEQ,
    ),
    "conversations": Example(
        what="10,000 sentences of movie reviews: the user asks whether it is positive or negative, the assistant says",
        make=_conversations,
        tasks=("causal-lm",),
        splits=JSONL,
    ),
    "summaries": Example(
        what="Debian's package descriptions and their one-line summaries, as many as the distribution has",
        make=_summaries,
        tasks=("summarization",),
        splits=JSONL,
    ),
}
