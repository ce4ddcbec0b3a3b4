"""Numbers of texts: standardised to learn, in their own units to judge and to answer."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics

from peft_fast.errors import DataError
from peft_fast.recipes.tasks import regression as module
from tests.recipes.tasks import texts

NAME = "regression"
ROWS = {
    "train": [{"text": f"{word} film", "score": score} for word, score in zip("abcd", (10, 20, 30, 40), strict=True)],
    "validation": [{"text": "good film", "score": 15.0}, {"text": "film", "score": 35.5}],
}
TWO = {
    split: [{"text": row["text"], "score": [row["score"], 1000 - row["score"]]} for row in part]
    for split, part in ROWS.items()
}


def learns(result):
    assert result["final"]["validation"]["r2"] > 0.6
    assert result["evaluations"][0]["r2"] < 0.2


def test_learns(tiny_bert, tmp_path):
    found = texts.files(tmp_path, texts.rated)
    made = texts.trained(NAME, tiny_bert, found, tmp_path / "run", learning_rate=5e-3, epochs=8)
    learns(made.result)
    assert made.result["final"]["validation"]["spearman"] > 0.8
    few, many = made.task.predict(
        made.model, texts.data.rows(["the dull, cold, awful cast", "a fine, lovely, warm, great end"], made.task)
    )
    assert few["value"] < 7 and many["value"] > 14


def test_learns_nothing_without_a_learning_rate(tiny_bert, tmp_path):
    found = texts.files(tmp_path, texts.rated)
    made = texts.trained(NAME, tiny_bert, found, tmp_path / "run", learning_rate=1e-12, steps=3)
    with pytest.raises(AssertionError):
        learns(made.result)


def test_several_targets_from_columns(tiny_bert, tmp_path):
    found = texts.files(tmp_path, texts.rated, {"train": 24, "validation": 8})
    columns = {"target": "good, bad"}
    made = texts.trained(NAME, tiny_bert, found, tmp_path / "run", steps=2, columns=columns)
    assert made.task.facts["names"] == ["good", "bad"] and made.task.facts["std"][1] > 50
    assert [part["title"] for part in made.result["shown"][:2]] == ["Answer over truth: good", "Answer over truth: bad"]
    (answer,) = made.task.predict(made.model, texts.data.rows(["a film"], made.task))
    assert set(answer["values"]) == {"good", "bad"}


@pytest.mark.parametrize("rows", [ROWS, TWO])
def test_learnt_in_standard_units_and_judged_in_their_own(tiny_bert, rows):
    made, splits, _ = texts.ready(NAME, tiny_bert, rows)
    features = made.encode(splits["train"], "train")
    labels = np.array(features["labels"])
    assert np.allclose(labels.mean(0), 0) and np.allclose(labels.std(0), 1)
    assert np.allclose(made._values(labels)[:, 0], [10, 20, 30, 40])
    batch = made.collate([features[i] for i in range(4)])
    logits = torch.randn(4, labels.shape[1], dtype=torch.bfloat16)
    assert made.loss({"logits": logits}, batch).item() == pytest.approx(
        float(((logits.float() - batch["labels"]) ** 2).mean())
    )
    model = made.load_model(torch.float32)
    prediction, features = texts.judged(made, model, splits["validation"])
    answers = made.predict(model, splits["validation"])
    own = made._values(prediction.predictions)
    for row, answer in zip(own, answers, strict=True):
        said = [answer["value"]] if "value" in answer else list(answer["values"].values())
        assert np.allclose(row, said, rtol=1e-4)
    found = made.metrics(prediction, features)
    assert found["mae"] == pytest.approx(np.abs(own - made._values(prediction.label_ids)).mean())
    assert texts.is_json([made.show(prediction, features, splits["validation"]), found])


def test_figures_are_sklearn_s_and_scipy_s():
    draw = np.random.default_rng(0)
    truth = draw.normal(size=(30, 1))
    answers = truth + draw.normal(size=(30, 1))
    found = module.judge(answers, truth)
    assert found["mse"] == pytest.approx(metrics.mean_squared_error(truth, answers))
    assert found["rmse"] == pytest.approx(metrics.root_mean_squared_error(truth, answers))
    assert found["r2"] == pytest.approx(metrics.r2_score(truth, answers))
    assert found["spearman"] == pytest.approx(stats.spearmanr(answers[:, 0], truth[:, 0]).statistic)
    # what is the same everywhere has no correlation, and nothing that is not a number is said
    same = module.judge(np.zeros((3, 1)), truth[:3])
    assert same["pearson"] == same["spearman"] == 0 and same.keys() == found.keys()
    assert set(module.judge(answers[:3], np.zeros((3, 1)))) == {"mse", "rmse", "mae"}


def test_rows_that_cannot_be_are_named(tiny_bert):
    with pytest.raises(DataError, match="row 5, column score: .*one value"):
        texts.ready(NAME, tiny_bert, TWO | {"train": [*TWO["train"], {"text": "x", "score": 3}]})
    with pytest.raises(DataError, match="row 5, column target: 3 numbers, not 2"):
        texts.ready(NAME, tiny_bert, TWO | {"train": [*TWO["train"], {"text": "x", "score": [1, 2, 3]}]})
    same = {split: [row | {"score": 7} for row in part] for split, part in ROWS.items()}
    with pytest.raises(DataError, match="every value is 7"):
        texts.ready(NAME, tiny_bert, same)
    half = {split: [row | {"score": [row["score"], 7]} for row in part] for split, part in ROWS.items()}
    with pytest.raises(DataError, match="target 2: every value is 7"):
        texts.ready(NAME, tiny_bert, half)
    held = ROWS | {"validation": ROWS["validation"][:1]}
    with pytest.raises(DataError, match="every value of validation is 15.0, which has no r2"):
        texts.ready(NAME, tiny_bert, held)
    texts.ready(NAME, tiny_bert, held, metric="mae")
