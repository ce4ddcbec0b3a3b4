"""Answers as pieces of a text: places of characters and tokens, windows, no answer, SQuAD's figures."""

import json

import numpy as np
import pytest
import torch

from peft_fast.errors import DataError, SettingsError
from peft_fast.recipes import examples
from peft_fast.recipes.tasks import question_answering as module
from tests.recipes.tasks import texts

NAME = "question-answering"
CONTEXT = "Clara Dahl lives in Elmira. Hugo Faro, a baker, moved to Korsund some years ago; before that to Marlow."
ROWS = {
    "train": [
        {
            "question": "Where does Clara live?",
            "context": CONTEXT,
            "answers": {"text": ["Elmira"], "answer_start": [20]},
        },
        {"question": "What does Hugo do?", "context": CONTEXT, "answers": ["baker"]},
        {"question": "Where was Hugo before?", "context": CONTEXT, "answers": ["Marlow"]},
    ],
    "validation": [
        {"question": "Who lives in Korsund?", "context": CONTEXT, "answers": ["Hugo Faro", "Hugo"]},
        {"question": "Who moved?", "context": CONTEXT, "answers": "Hugo Faro, a baker"},
    ],
}
NONE = {"question": "Where does Ines live?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}}


@pytest.fixture(scope="module")
def spelling():
    return {name: str(examples.path(f"example:{name}")) for name in ("tiny-bert", "tiny-roberta")}


def learns(result):
    assert result["final"]["validation"]["f1"] > 0.85
    assert result["evaluations"][0]["f1"] < 0.6


def test_learns(tiny_bert, tmp_path):
    found = texts.files(tmp_path, texts.question, texts.SIZES | {"train": 320})
    made = texts.trained(NAME, tiny_bert, found, tmp_path / "run", learning_rate=5e-3)
    learns(made.result)
    row = {"question": "the poor end", "context": "the film was lovely and the plot dull"}
    (answer,) = made.task.predict(made.model, texts.data.rows([row], made.task))
    assert answer["answer"] == "dull" and row["context"][answer["start"] : answer["end"]] == "dull"
    assert 0.5 < answer["score"] <= 1 and texts.is_json(answer) and len(answer["others"]) == 4


def test_learns_nothing_without_a_learning_rate(tiny_bert, tmp_path):
    found = texts.files(tmp_path, texts.question)
    made = texts.trained(NAME, tiny_bert, found, tmp_path / "run", learning_rate=1e-12, steps=3)
    with pytest.raises(AssertionError):
        learns(made.result)


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-roberta"])
@pytest.mark.parametrize("limit", [24, 256])
def test_targets_lead_back_to_the_answer(spelling, name, limit):
    made, splits, _ = texts.ready(NAME, spelling[name], ROWS | {"train": [*ROWS["train"], NONE]}, max_length=limit)
    features = made.encode(splits["train"], "train")
    assert (len(features) > 4) == (limit == 24) and all(len(ids) <= limit for ids in features["input_ids"])
    answered = set()
    for feature in features:
        first, last = feature["start_positions"], feature["end_positions"]
        answers = splits["train"][feature["row"]]["answers"]["text"]
        if feature["starts"][first] == module.OUTSIDE:
            assert first == last == 0
            continue
        assert CONTEXT[feature["starts"][first] : feature["ends"][last]] == answers[0]
        answered.add(feature["row"])
    assert answered == {0, 1, 2}
    # of each row every character that a token has is in some window
    seen = set()
    for feature in features:
        seen |= {i for a, b in zip(feature["starts"], feature["ends"], strict=True) if a >= 0 for i in range(a, b)}
    assert all(place in seen for place, sign in enumerate(CONTEXT) if not sign.isspace())


def logits_of(features, spans):
    """Logits that point at the tokens around (first character, one behind the last) of each row."""
    starts, ends = [], []
    for feature in features:
        begin, end = spans[feature["row"]]
        s, e = np.zeros(len(feature["input_ids"])), np.zeros(len(feature["input_ids"]))
        for place, (a, b) in enumerate(zip(feature["starts"], feature["ends"], strict=True)):
            s[place] += 9.0 * (a == begin)
            e[place] += 9.0 * (b == end)
        starts.append(np.pad(s, (0, 3), constant_values=-100))
        ends.append(np.pad(e, (0, 3), constant_values=-100))
    return starts, ends


@pytest.mark.parametrize("limit", [24, 256])
def test_the_best_answer_of_all_windows(spelling, limit):
    made, splits, _ = texts.ready(NAME, spelling["tiny-bert"], ROWS, max_length=limit)
    features = made.encode(splits["validation"], "validation")
    spans = {0: (28, 37), 1: (28, 37)}
    found = made.answers(*logits_of(features, spans), features)
    assert [found[row][0]["answer"] for row in (0, 1)] == ["Hugo Faro", "Hugo Faro"]
    metrics = made.metrics(texts.Output(logits_of(features, spans), None), features)
    # "Hugo Faro" of "Hugo Faro, a baker": both words right, two of three found (the article counts nothing)
    assert metrics == {"exact_match": 0.5, "f1": pytest.approx(0.9)}
    shown = made.show(texts.Output(logits_of(features, spans), None), features, splits["validation"])
    assert texts.is_json(shown) and shown[0]["rows"][0][0] == "Who moved?"


def test_an_answer_never_ends_before_it_begins(spelling):
    made, splits, _ = texts.ready(NAME, spelling["tiny-bert"], ROWS)
    features = made.encode(splits["validation"], "validation")
    starts, ends = logits_of(features, {0: (28, 10), 1: (20, 26)})
    found = made.answers(starts, ends, features)
    assert found[0][0]["end"] > found[0][0]["start"] and found[1][0]["answer"] == "Elmira"


def test_no_answer_wins_only_where_training_had_it(spelling):
    other = NONE | {"question": "Where does Selim live?"}
    rows = ROWS | {"train": [*ROWS["train"], other], "validation": [*ROWS["validation"], NONE]}
    made, splits, _ = texts.ready(NAME, spelling["tiny-bert"], rows)
    features = made.encode(splits["validation"], "validation")
    starts, ends = logits_of(features, {0: (28, 37), 1: (28, 37), 2: (-9, -9)})
    starts[2][0], ends[2][0] = 5.0, 5.0
    assert made.answers(starts, ends, features)[2][0]["answer"] == ""
    metrics = made.metrics(texts.Output((starts, ends), None), features)
    assert metrics["unanswered_exact_match"] == 1.0 and metrics["answered_exact_match"] == 0.5
    made.facts["unanswerable"] = False
    assert made.answers(starts, ends, features)[2][0]["answer"] != ""


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "f1"),
    [
        ("the Eiffel Tower!", ["Eiffel tower"], 1.0, 1.0),
        ("Eiffel", ["Eiffel Tower", "tower"], 0.0, 2 / 3),
        ("", [], 1.0, 1.0),
        ("something", [], 0.0, 0.0),
        ("a b b", ["b b c"], 0.0, 0.8),
        ("the", ["an"], 1.0, 1.0),
    ],
)
def test_figures_are_squad_s(answer, gold, exact, f1):
    found = module.judge([(answer, gold)])
    assert found["exact_match"] == exact and found["f1"] == pytest.approx(f1)


def test_places_that_progressive_resizing_cut_off_count_nothing(spelling):
    made, splits, _ = texts.ready(NAME, spelling["tiny-bert"], ROWS)
    features = made.encode(splits["train"], "train")
    model = made.load_model(torch.float32)
    batch = made.resize(made.collate([features[i] for i in range(3)]), 20)
    assert batch["input_ids"].shape[1] == 20 and int(batch["start_positions"].max()) >= 20
    loss = made.loss(model(**made.inputs(batch)), batch)
    assert torch.isfinite(loss)
    batch = made.resize(made.collate([features[2]]), 10)
    assert float(made.loss(model(**made.inputs(batch)), batch).detach()) == 0.0


def test_squad_s_own_file(spelling, tmp_path):
    answer = {"text": "Elmira", "answer_start": 20}
    asked = [
        {"id": "1", "question": "Where does Clara live?", "answers": [answer, answer], "is_impossible": False},
        {"id": "2", "question": "Where does Ines live?", "answers": [], "is_impossible": True},
    ]
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"version": "2", "data": [{"paragraphs": [{"context": CONTEXT, "qas": asked}]}]}))
    made, splits, _ = texts.ready(NAME, spelling["tiny-bert"], {"train": str(file), "validation": ROWS["validation"]})
    assert made.facts["unanswerable"] and splits["train"]["answers"][1]["text"] == []


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["Paris"], "answer 'Paris' is not in the context"),
        ({"text": ["Elmira"], "answer_start": [3]}, "'ra Dah' stands at 3, not 'Elmira'"),
    ],
)
def test_answers_that_are_not_there_are_named(spelling, answers, said):
    rows = ROWS | {"train": [*ROWS["train"], {"question": "Where?", "context": CONTEXT, "answers": answers}]}
    with pytest.raises(DataError, match=f"row 4, column answers: {said}"):
        texts.ready(NAME, spelling["tiny-bert"], rows)


def test_options_that_these_rows_cannot_have(spelling):
    with pytest.raises(SettingsError, match="doc_stride: 60"):
        texts.ready(NAME, spelling["tiny-bert"], ROWS, max_length=63, doc_stride=60)
    with pytest.raises(SettingsError, match="metric: answered_f1; in validation not both"):
        texts.ready(NAME, spelling["tiny-bert"], ROWS, metric="answered_f1")
