"""Tags of words: which token answers for a word, windows over long rows, spans and their scores."""

import numpy as np
import pytest
import torch

from peft_fast.errors import DataError
from peft_fast.recipes import examples
from peft_fast.recipes.tasks import token_classification as module
from tests.recipes.tasks import texts

NAME = "token-classification"
ROWS = {
    "train": [
        {"tokens": ["the", "film", "was", "fine"], "tags": ["O", "B-WORK", "O", "O"]},
        {"tokens": ["a", "long", "scene"], "tags": ["O", "B-WORK", "I-WORK"]},
    ],
    "validation": [{"tokens": ["the", "plot"] * 30, "tags": ["O", "B-WORK"] * 30}],
}


def learns(result):
    assert result["final"]["validation"]["f1"] > 0.85
    assert result["evaluations"][0]["f1"] < 0.5


def test_learns(tiny_bert, tmp_path):
    made = texts.trained(NAME, tiny_bert, texts.files(tmp_path, texts.tagged), tmp_path / "run", epochs=10)
    learns(made.result)
    assert made.result["shown"][0]["names"] == ["O", "GOOD"]
    assert made.result["shown"][1]["rows"][0][0] == "GOOD" and "]GOOD" in made.result["shown"][2]["rows"][0][0]
    rows = texts.data.rows([{"tokens": ["the", "film", "was", "very", "lovely", "and", "dull"]}], made.task)
    (answer,) = made.task.predict(made.model, rows)
    assert answer["tags"] == ["O", "O", "O", "B-GOOD", "I-GOOD", "O", "O"]
    (entity,) = answer["entities"]
    assert entity["type"] == "GOOD" and entity["text"] == "very lovely" and entity["score"] > 0.5
    assert " ".join(answer["tokens"])[entity["start"] : entity["end"]] == "very lovely"


def test_learns_nothing_without_a_learning_rate(tiny_bert, tmp_path):
    found = texts.files(tmp_path, texts.tagged)
    made = texts.trained(NAME, tiny_bert, found, tmp_path / "run", learning_rate=1e-12, steps=3)
    with pytest.raises(AssertionError):
        learns(made.result)


@pytest.fixture(scope="module")
def spelling():
    """Two tokenizers that spell words they do not know."""
    return {name: str(examples.path(f"example:{name}")) for name in ("tiny-bert", "tiny-roberta")}


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-roberta"])
def test_the_first_token_of_a_word_has_its_tag(spelling, name):
    rows = ROWS | {"train": [{"tokens": ["Quixotic", "film", "x"], "tags": ["B-A", "O", "B-B"]}]}
    made, splits, _ = texts.ready(NAME, spelling[name], rows)
    feature = made.encode(splits["train"], "train")[0]
    assert feature["words"] == [0, 1, 2] and len(feature["input_ids"]) > 6
    names = {place: made.facts["labels"][label] for place, label in enumerate(feature["labels"]) if label != -100}
    assert list(names.values()) == ["B-A", "O", "B-B"]
    pieces = made.processor.convert_ids_to_tokens(feature["input_ids"])
    starts = [pieces[place].strip("Ġ").lower()[:1] for place in names]
    # a byte-level tokenizer may put the space before a word in a token of its own
    assert all(start in ("", letter) for start, letter in zip(starts, "qfx", strict=True))


@pytest.mark.parametrize("limit", [8, 11, 64])
def test_windows_answer_for_each_word_once(spelling, limit):
    words = ["the", "unfathomable", "plot", "x9", "—", "was", "zzzzzz"] * 4
    long = {"tokens": words, "tags": ["O", "B-A", *["O"] * 5] * 4}
    more = {"tokens": ["a", *words], "tags": ["O", *long["tags"]]}
    rows = {"train": [more, ROWS["train"][0]], "validation": [long, {"tokens": ["film"], "tags": ["O"]}]}
    made, splits, notes = texts.ready(NAME, spelling["tiny-roberta"], rows, max_length=limit)
    of = {split: [note for note in notes if f"of {split} are longer than {limit} tokens" in note] for split in rows}
    for split, said in (("train", "are cut in training; evaluation"), ("validation", "are read whole, in windows")):
        assert len(of[split]) == 1 and said in of[split][0]
    model = made.load_model(torch.float32)
    prediction, features = texts.judged(made, model, splits["validation"])
    found = [(row, word) for row, words_ in zip(features["row"], features["words"], strict=True) for word in words_]
    assert sorted(found) == [(0, place) for place in range(28)] + [(1, 0)]
    assert all(len(ids) <= limit for ids in features["input_ids"])
    assert [len(truth) for truth, _ in made._tagged(prediction, features).values()] == [28, 1]
    assert made._tagged(prediction, features)[0][0] == splits["validation"][0]["tags"]
    # predict divides rows alike, so its tags are the evaluation's
    answers = made.predict(model, splits["validation"])
    assert [answer["tags"] for answer in answers] == [pair[1] for pair in made._tagged(prediction, features).values()]
    train = made.encode(splits["train"], "train")
    assert len(train) == 2 and max(map(len, train["input_ids"])) <= limit


def test_of_two_windows_the_one_where_a_word_stands_deeper():
    windows = [[None, 0, 1, 2, 3, None], [None, 1, 2, 3, 4, 5, None]]
    assert module._firsts(windows, [0, 0]) == [{0: 1, 1: 2, 2: 3}, {3: 3, 4: 4, 5: 5}]
    assert module._firsts(windows, [0, 1]) == [{0: 1, 1: 2, 2: 3, 3: 4}, {1: 1, 2: 2, 3: 3, 4: 4, 5: 5}]
    # a window that begins inside a word does not answer for it
    assert module._firsts([[None, 0, 1, 1, None], [None, 1, 1, 2, None]], [0, 0]) == [{0: 1, 1: 2}, {2: 3}]


def test_spans_of_every_scheme():
    assert module.spans(["B-A", "I-A", "O", "B-B", "I-B", "B-B"]) == [("A", 0, 1), ("B", 3, 4), ("B", 5, 5)]
    assert module.spans(["I-A", "I-A", "I-B"]) == [("A", 0, 1), ("B", 2, 2)]
    assert module.spans(["B-A", "E-A", "S-B"]) == module.spans(["B-A", "L-A", "U-B"]) == [("A", 0, 1), ("B", 2, 2)]
    assert module.marked(["in", "New", "York"], ["O", "B-LOC", "I-LOC"]) == "in [New York]LOC"


def test_metrics_are_of_spans_or_of_plain_tags(tiny_bert):
    made, _, _ = texts.ready(NAME, tiny_bert, ROWS)
    assert made.facts["labels"] == ["O", "B-WORK", "I-WORK"]
    features = texts.Features(words=[[0, 1, 2], [0, 1]], row=[0, 1])
    truth = np.array([[-100, 1, 2, 0], [-100, 1, -100, 0]])
    answers = np.array([[0, 1, 2, 0], [2, 1, 0, 1]])
    found = made.metrics(texts.Output(answers, truth), features)
    assert found["accuracy"] == 0.8 and found["recall"] == 1.0 and found["precision"] == pytest.approx(2 / 3)
    made.facts |= {"labels": ["DET", "NOUN", "VERB"], "spans": False}
    assert made.metrics(texts.Output(answers, truth), features)["accuracy"] == 0.8


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tokens": ["a", "film"], "tags": ["O"]}, "2 words and 1 tags"),
        ({"tokens": ["a", "film"], "tags": ["O", "WORK"]}, "'WORK' has no B- or I- before it"),
    ],
)
def test_rows_that_cannot_be_are_named(tiny_bert, row, said):
    with pytest.raises(DataError, match=f"train.jsonl, row 3, column tags: .*{said}"):
        texts.ready(NAME, tiny_bert, ROWS | {"train": [*ROWS["train"], row]})


def test_a_tag_that_only_the_test_has_is_said(tiny_bert):
    rows = ROWS | {"test": [{"tokens": ["cast"], "tags": ["B-TEAM"]}]}
    made, _, notes = texts.ready(NAME, tiny_bert, rows)
    assert "B-TEAM" in made.facts["labels"] and any("no row has the tag B-TEAM" in note for note in notes)


def test_a_text_nobody_divided(tiny_bert):
    assert module.divide("John's in New-York, 3.5 km.") == ["John's", "in", "New-York", ",", "3", ".", "5", "km", "."]
    made, _, _ = texts.ready(NAME, tiny_bert, ROWS)
    assert texts.data.rows(["a film, fine."], made)["tokens"][0] == ["a", "film", ",", "fine", "."]
    assert texts.data.rows([{"tokens": ["U.S.", "film"]}], made)["tokens"][0] == ["U.S.", "film"]
    with pytest.raises(DataError, match="a word in it"):
        module.divide("  ")
