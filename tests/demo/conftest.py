"""A tiny random BERT with a tokenizer, as a folder, and sentences that go with it."""

import random

import pytest

WORDS = "the a film plot actor scene is was very not good bad dull bright warm cold long short loud calm".split()
GOOD = {"good", "bright", "warm", "calm"}


def sentences(n: int) -> list[tuple[str, str]]:
    """n different texts; the label says whether a word of praise is in it."""
    draw = random.Random(0)
    texts: set[str] = set()
    while len(texts) < n:
        texts.add(" ".join(draw.choices(WORDS, k=draw.randint(3, 12))))
    return [(text, "positive" if GOOD & set(text.split()) else "negative") for text in sorted(texts)]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> str:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def sentences_csv(tmp_path_factory) -> str:
    import csv

    path = tmp_path_factory.mktemp("sentences") / "sentences.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *sentences(200)])
    return str(path)
