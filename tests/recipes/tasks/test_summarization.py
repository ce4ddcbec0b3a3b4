"""ROUGE as rouge_score counts it, in any writing; a run that learns, and what its folder then answers."""

import json
import random

import pytest

from peft_fast.recipes import config, run, use
from peft_fast.recipes.tasks import summarization


def task(truths=("the cat sat on the mat",)):
    made = summarization.Task(config.read(task="summarization", model="m", data="-"))
    made.learn({"train": {"target": list(truths)}})
    return made


def test_scores_are_rouge_scores_own():
    from rouge_score import rouge_scorer

    answers, truths = ["the cats sat. on mats", "nothing"], ["the cat sat on the mat", "all of it"]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    found = task().judge(answers, truths)
    for name in ("rouge1", "rouge2", "rougeL"):
        mean = sum(scorer.score(b, a)[name].fmeasure for a, b in zip(answers, truths, strict=True)) / 2
        assert found[name] == pytest.approx(100 * mean)
    assert set(found) == set(summarization.Task.judged_by) - {"loss"}


def test_the_sum_over_sentences_is_of_sentences():
    """Sentences in another order: one longest common sequence is broken by it, that of each sentence is not."""
    truth, answer = "The cat sat down. A dog ran away.", "A dog ran away. The cat sat down."
    found = task().judge([answer], [truth])
    assert found["rougeLsum"] == pytest.approx(100) and found["rougeL"] < 60


@pytest.mark.parametrize("truth", ["кошка сидит на ковре", "猫はマットの上に座った", "la élève était là où çà"])
def test_every_writing_scores(truth):
    one = task([truth])
    assert one.facts["words"] == "any"
    assert one.judge([truth], [truth])["rougeL"] == pytest.approx(100)
    assert 0 < one.judge([truth[: len(truth) // 2]], [truth])["rouge1"] < 100
    assert one.judge(["nothing of it"], [truth])["rouge1"] == 0


def test_no_rows_of_words_is_no_error():
    assert set(task([""]).judge([""], [""]).values()) == {0.0}


TOPICS = {
    "film": "a story of people", "city": "many houses and streets", "animal": "it lives in the wood",
    "money": "what you pay with", "head": "it is on your neck", "name": "how one is called",
}  # fmt: skip


def test_a_run_learns_to_summarize(tmp_path):
    draw, plain = random.Random(0), "this that these more most some such very just also even still never".split()
    for split, count in (("train", 360), ("validation", 30), ("test", 30)):
        rows = []
        for _ in range(count):
            topic = draw.choice(list(TOPICS))
            words = [*draw.sample(plain, 3), topic]
            draw.shuffle(words)
            rows.append({"article": " ".join(words), "highlights": TOPICS[topic]})
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    done = run.train(
        task="summarization", model="example:tiny-bart", data=str(tmp_path), method="full", learning_rate=3e-3,
        steps=60, batch_size=16, max_new_tokens=12, evaluate_every=10**6, device="cpu", out=tmp_path / "run",
        schedule="constant", group_by_length=False, say=None,
    )  # fmt: skip
    final = done.result["final"]["test"]
    assert final["rougeL"] > 90 and final["rouge2"] > 80
    table, words = done.result["shown"]
    assert table["head"] == ["source", "truth", "the model's"] and len(table["rows"]) == 10
    assert [row[0] for row in words["rows"]] == ["truth", "the model's"]
    (answer,) = use.predict(tmp_path / "run", ["very most film just"])
    assert answer["summary"] == TOPICS["film"]
