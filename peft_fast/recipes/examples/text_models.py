"""Encoders of text: MiniLM, pretrained, and tiny ones of other classes with random weights and a small tokenizer."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peft_fast.recipes import fetch
from peft_fast.recipes.examples import Example, text
from peft_fast.recipes.tasks import loading

# with the words of example:questions what a tiny tokenizer knows whole; the rest is spelt
WORDS = """the a an and or but not no nor so if then than that this these those it its he she they we you i my your his
her their our of in on at by for from to with without about into over under after before between through during against
is are was were be been being am do does did done have has had having can could will would shall should may might must
what which who whom whose when where why how all any some each every both few more most much many other another such
only own same too very just also even still never always often again once here there now up down out off one two three
first last new old long short big small great little good bad better best worse worst high low right wrong young early
late same different important few public able film movie story plot scene actor acting director script character comedy
drama action music show watch see seen look feel felt think thought know known make made take taken come came go went
get got give given find found tell told say said work play end begin time year day life man woman people child world
house place way thing part hand eye head heart home city country money name word fun funny sad dull boring bland fresh
smart clever stupid silly awful terrible horrible poor weak flat slow fast strong rich warm cold dark bright beautiful
lovely charming touching moving powerful perfect brilliant excellent superb wonderful amazing entertaining enjoyable
engaging compelling predictable pointless mess waste worth love like hate enjoy laugh cry hope fear surprise nothing
something everything anything enough almost really quite rather less least yet too because while though however it's
don't doesn't isn't there's that's he's you're they're account credit amount duration purpose status months own rent
skilled existing paid since employment property age job none yes male female single married viewer student"""
ENDINGS = "s es ed ing ly er est ness ment ful less ion tion able al ic ous ive ish ity en y th re"
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TOKENS = 1500  # of a tiny vocabulary


def _minilm(folder: Path, fetched: fetch.Fetch) -> None:
    for file in sorted(fetched(fetch.MINILM).iterdir()):
        if file.name in fetch.MINILM.files:
            try:
                os.link(file, folder / file.name)
            except OSError:
                shutil.copyfile(file, folder / file.name)


def _tiny(config: str, family: str, **fields: Any) -> Callable[[Path, fetch.Fetch], None]:
    """What makes a masked language model of ``config``'s class: its body serves every other task."""

    def make(folder: Path, fetched: fetch.Fetch) -> None:
        import torch
        import transformers

        tokenizer = _byte_pairs() if family == "roberta" else _word_pieces()
        named = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        chosen = getattr(transformers, config)(vocab_size=len(tokenizer), **fields, **named)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForMaskedLM.from_config(chosen)
        with loading.quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    return make


def _corpus() -> Iterator[str]:
    """Every word of WORDS as often as the texts' own, then the texts of example:questions."""
    for word in WORDS.split():
        yield " ".join([word] * 50)
    with tempfile.TemporaryDirectory(prefix="peft_fast-") as folder:
        text.ENTRIES["questions"].make(Path(folder), None)
        with (Path(folder) / "train.jsonl").open(encoding="utf-8") as lines:
            for line, _ in zip(lines, range(1000), strict=False):
                row = json.loads(line)
                yield f"{row['context']} {row['question']}"


def _word_pieces() -> Any:
    """The corpus' words by their number, endings, and letters for all else; a trainer's ties fall as they like."""
    from transformers import BertTokenizer

    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    counted = Counter(word for line in _corpus() for word in re.findall(r"[a-z0-9]+", line.lower()))
    words = sorted((word for word in counted if len(word) > 1), key=lambda word: (-counted[word], word))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{one}" for one in letters)]
    pieces += [f"##{ending}" for ending in ENDINGS.split()]
    known = list(dict.fromkeys([*pieces, *words]))[:TOKENS]
    vocab = {piece: place for place, piece in enumerate(known)}
    return BertTokenizer(vocab=vocab, model_max_length=512)


def _byte_pairs() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import RobertaTokenizer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(_corpus(), trainer)
    made = json.loads(trained.to_str())["model"]
    return RobertaTokenizer(
        vocab=made["vocab"], merges=[tuple(merge) for merge in made["merges"]], model_max_length=512
    )


TINY = ("sequence-classification", "token-classification", "question-answering", "masked-lm", "regression")
ENTRIES = {
    "minilm": Example(
        what="MiniLM-L6-v2: a pretrained BERT of 6 layers, hidden size 384, 22.7 million parameters (84 MB)",
        make=_minilm,
        tasks=TINY,
    ),
    "tiny-bert": Example(
        what="a BERT of 2 layers, hidden size 64, random weights", make=_tiny("BertConfig", "bert", **SIZES), tasks=TINY
    ),
    "tiny-roberta": Example(
        what="a RoBERTa of 2 layers, hidden size 64, random weights",
        make=_tiny("RobertaConfig", "roberta", max_position_embeddings=514, type_vocab_size=1, **SIZES),
        tasks=TINY,
    ),
    "tiny-distilbert": Example(
        what="a DistilBERT of 2 layers, hidden size 64, random weights",
        make=_tiny("DistilBertConfig", "bert", dim=64, hidden_dim=128, n_layers=2, n_heads=4),
        tasks=TINY,
    ),
    "tiny-electra": Example(
        what="an ELECTRA of 2 layers, hidden size 64, random weights",
        make=_tiny("ElectraConfig", "bert", embedding_size=64, **SIZES),
        tasks=TINY,
    ),
}
