"""Classes of texts: one or several, of one text or two, weighed, smoothed, judged and answered."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from peft_fast.errors import DataError, SettingsError, UnsupportedError
from peft_fast.recipes import config, tasks
from peft_fast.recipes.tasks import classes
from tests.recipes.tasks import texts

NAME = "sequence-classification"
ROWS = {
    "train": [{"text": f"{word} film", "label": label} for word, label in zip("abcdef", "xxxxyz", strict=True)],
    "validation": [{"text": "good film", "label": "x"}, {"text": "film", "label": "y"}, {"text": "e", "label": "z"}],
}
MANY = {
    "train": [
        {"text": t, "label": l} for t, l in (("film", ["p", "q"]), ("plot", ["q"]), ("end", []), ("cast", ["r"]))
    ],
    "validation": [{"text": "fine film", "label": ["q"]}, {"text": "dull film", "label": []}],
}


def learns(result):
    """Clearly above the share of either class, and better than before training."""
    assert result["final"]["validation"]["accuracy"] > 0.9
    assert result["evaluations"][0]["accuracy"] < 0.75


def test_learns(tiny_bert, tmp_path):
    made = texts.trained(NAME, tiny_bert, texts.files(tmp_path, texts.classes), tmp_path / "run")
    learns(made.result)
    assert made.result["final"]["validation"]["f1"] > 0.9
    confusion = made.result["shown"][0]
    assert confusion["kind"] == "confusion" and confusion["names"] == ["negative", "positive"]
    assert sum(map(sum, confusion["counts"])) == 48
    answers = made.task.predict(made.model, texts.data.rows(["a fine film and the end", "a film, awful"], made.task))
    assert [answer["label"] for answer in answers] == ["positive", "negative"]
    assert all(abs(sum(answer["scores"].values()) - 1) < 1e-5 for answer in answers)
    assert made.task.predict(made.model, texts.data.rows(["a film, awful"], made.task)) == answers[1:]


def test_learns_nothing_without_a_learning_rate(tiny_bert, tmp_path):
    found = texts.files(tmp_path, texts.classes)
    made = texts.trained(NAME, tiny_bert, found, tmp_path / "run", learning_rate=1e-12, steps=3)
    with pytest.raises(AssertionError):
        learns(made.result)


def test_class_weights_and_smoothing(tiny_bert):
    made, splits, _ = texts.ready(NAME, tiny_bert, ROWS, class_weights="balanced", label_smoothing=0.1)
    assert made.facts["labels"] == ["x", "y", "z"] and made.facts["counts"] == [4, 1, 1]
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 0])
    weight, logs = torch.tensor([6 / 12, 2.0, 2.0])[labels], logits.log_softmax(-1)
    plain = -logs[range(5), labels]
    loss = made.loss({"logits": logits}, {"labels": labels})
    assert torch.allclose(loss, (weight * (0.9 * plain - 0.1 * logs.mean(-1))).mean())
    with torch.no_grad():  # an evaluation's labels are not smoothed
        loss = made.loss({"logits": logits}, {"labels": labels})
    assert torch.allclose(loss, (weight * plain).mean())
    # a batch is the mean of its parts, whatever classes these have
    parts = [made.loss({"logits": logits[i : i + 1]}, {"labels": labels[i : i + 1]}) for i in range(5)]
    assert torch.allclose(sum(parts) / 5, made.loss({"logits": logits}, {"labels": labels}))


def test_weights_that_are_named(tiny_bert):
    made, _, _ = texts.ready(NAME, tiny_bert, ROWS, class_weights={"y": 3})
    assert classes.weights(made.config, made.facts["labels"], made.facts["counts"]) == [1.0, 3.0, 1.0]
    with pytest.raises(SettingsError, match="no class w"):
        texts.ready(NAME, tiny_bert, ROWS, class_weights={"w": 3})
    with pytest.raises(SettingsError, match="0 or more"):
        texts.ready(NAME, tiny_bert, ROWS, class_weights={"y": -1})


def test_several_labels_a_row(tiny_bert):
    made, splits, _ = texts.ready(NAME, tiny_bert, MANY, class_weights="balanced", label_smoothing=0.2)
    model = made.load_model(torch.float32)
    assert model.config.problem_type == "multi_label_classification"
    features = made.encode(splits["train"], "train")
    assert features["labels"] == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    batch = made.collate([features[i] for i in range(4)])
    logits = torch.randn(4, 3)
    expected = F.binary_cross_entropy_with_logits(
        logits, batch["labels"] * 0.8 + 0.1, pos_weight=torch.tensor([3.0, 1.0, 3.0])
    )
    assert torch.allclose(made.loss({"logits": logits}, batch), expected)
    prediction, features = texts.judged(made, model, splits["validation"])
    prediction.predictions = np.array([[-1.0, 2.0, -1.0], [-1.0, 2.0, -3.0]])
    found = made.metrics(prediction, features)
    assert found["accuracy"] == 0.5 and found["f1_micro"] == pytest.approx(2 / 3)
    assert {"mcc", "balanced_accuracy", "roc_auc", "pr_auc"} <= found.keys() <= made.judged_by.keys()
    assert texts.is_json([made.show(prediction, features, splits["validation"]), found])
    answers = made.predict(model, splits["validation"])
    assert all(set(answer) == {"labels", "scores"} for answer in answers)
    with pytest.raises(DataError, match="one value"):
        texts.ready(NAME, tiny_bert, MANY | {"train": [*MANY["train"], {"text": "a", "label": "p"}]})


def test_pairs_of_texts(tiny_bert):
    rows = {
        split: [{"premise": row["text"], "hypothesis": "the end", "label": row["label"]} for row in part]
        for split, part in ROWS.items()
    }
    made, splits, _ = texts.ready(NAME, tiny_bert, rows)
    features = made.encode(splits["train"], "train")
    assert 1 in features[0]["token_type_ids"] and made.processor.decode(features[0]["input_ids"]).count("[SEP]") == 2
    prediction, features = texts.judged(made, made.load_model(torch.float32), splits["validation"])
    mistakes = made.show(prediction, features, splits["validation"])[-1]["rows"]
    assert all(" ‖ the end" in row[0] for row in mistakes)


def test_metrics_are_sklearn_s():
    shares = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.8, 0.2]])
    found = classes.judge(shares, np.array([0, 0, 1, 1]), positive=1)
    assert {k: round(v, 4) for k, v in found.items()} == {
        "accuracy": 0.5,
        "balanced_accuracy": 0.5,
        "precision": 0.5,
        "recall": 0.5,
        "f1": 0.5,
        "mcc": 0.0,
        "roc_auc": 0.75,
        "pr_auc": 0.8333,
    }
    # three classes of which one never occurs: means over what there is, and nothing that is not a number
    shares = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    found = classes.judge(shares, np.array([0, 1, 1]))
    assert found["accuracy"] == pytest.approx(2 / 3) and found["balanced_accuracy"] == 0.75
    assert texts.is_json(found)
    assert "roc_auc" not in classes.judge(shares, np.array([0, 0, 0]))


@pytest.mark.parametrize(
    ("names", "counts", "expected"),
    [
        (["0", "1"], [10, 90], "1"),
        (["negative", "positive"], [90, 10], "positive"),
        (["bad", "good"], [30, 70], "bad"),
        (["legal", "odd"], [90, 10], "odd"),
        (["odd", "usual"], [10, 90], "odd"),
    ],
)
def test_which_of_two_classes_precision_is_about(names, counts, expected):
    assert names[classes.positive(names, counts)] == expected


def test_classes_are_ordered_by_value_and_named_alike():
    assert classes.ordered(["10", "9", "b", "a"]) == ["9", "10", "a", "b"]
    assert [classes.name_of(one) for one in (1.0, True, " x ", 2, 0.5)] == ["1", "true", "x", "2", "0.5"]


def test_a_model_that_knows_the_classes_keeps_its_order(tiny_bert, tmp_path):
    made, splits, _ = texts.ready(NAME, tiny_bert, ROWS)
    model = made.load_model(torch.float32)
    model.config.id2label, model.config.label2id = {0: "z", 1: "x", 2: "y"}, {"z": 0, "x": 1, "y": 2}
    model.save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    again, _, _ = texts.ready(NAME, tmp_path, ROWS)
    loaded = again.load_model(torch.float32)
    assert again.facts["labels"] == ["z", "x", "y"] and again.facts["counts"] == [1, 4, 1]
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)


def test_another_number_of_classes_gets_a_new_head(tiny_bert, tmp_path):
    made, _, _ = texts.ready(NAME, tiny_bert, ROWS)
    made.load_model(torch.float32).save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    two = {split: [row for row in part if row["label"] != "z"] for split, part in ROWS.items()}
    again, _, _ = texts.ready(NAME, tmp_path, two)
    model = again.load_model(torch.float32)
    assert model.classifier.out_features == 2 and "classifier" in again.head(model)


def test_cut_rows_keep_their_end(tiny_bert):
    made, _, _ = texts.ready(NAME, tiny_bert, ROWS)
    features = [{"input_ids": [2, 7, 8, 9, 10, 3], "labels": 0}, {"input_ids": [2, 7, 3], "labels": 1}]
    batch = made.resize(made.collate(features), 4)
    assert batch["input_ids"].tolist() == [[2, 7, 8, 3], [2, 7, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]] and batch["labels"].tolist() == [0, 1]
    made.processor.padding_side = "left"
    left = made.resize(made.collate(features), 4)
    assert left["input_ids"].tolist() == batch["input_ids"].tolist()
    assert left["attention_mask"].tolist() == batch["attention_mask"].tolist()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("./nowhere", "no such folder"),
        ("example:movie-reviews", "which is data"),
        ("example:minilmm", "did you mean example:minilm"),
        ("adapter", "is an adapter"),
        ("empty", "no config.json there"),
        ("file.bin", "a file"),
        ("torn", "weights"),
        ("other", "missing"),
    ],
)
def test_a_model_that_cannot_be_is_named_with_the_fix(tiny_bert, tmp_path, monkeypatch, model, said):
    monkeypatch.chdir(tmp_path)
    for name in ("adapter", "empty", "torn", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "file.bin").write_text("")
    for name in ("torn", "other"):
        for file in tiny_bert.iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    config_file = tmp_path / "other" / "config.json"
    config_file.write_text(config_file.read_text().replace('"bert"', '"electra"').replace("BertFor", "ElectraFor"))
    with pytest.raises((UnsupportedError, DataError)) as raised:
        made = tasks.get(NAME)(config.read(task=NAME, model=model, data="x"), {"labels": ["a", "b"], "multi": False})
        made.load_processor()
        made.load_model(torch.float32)
    assert said in str(raised.value) and str(raised.value).count("\n") == 2


def test_a_limit_beyond_the_model_s_positions(tiny_bert):
    with pytest.raises(SettingsError, match="has 32 positions"):
        texts.ready(NAME, tiny_bert, ROWS, max_length=33)
    made, _, _ = texts.ready(NAME, tiny_bert, ROWS)
    assert made.limit == 32


def table(folder):
    rows = [f"{20 + i},{'baker' if i % 2 else ''},{i % 2},{int(i % 3 == 0)}" for i in range(40)]
    (folder / "table.csv").write_text("\n".join(["age,job,late,fraud", *rows]) + "\n")
    return str(folder / "table.csv")


def test_a_table_is_a_text_of_its_columns(tiny_bert, tmp_path):
    options = dict(task=NAME, model=str(tiny_bert), data=table(tmp_path), columns={"text": "*", "label": "fraud"})
    made = tasks.get(NAME)(config.read(options))
    splits = texts.data.read(made.config, made)
    said = {row["row"]: row["text"] for rows in splits.values() for row in rows}
    assert said[3] == "age: 21; job: baker; late: 1" and said[4] == "age: 22; late: 0"
    # what is to be found never gets into the question, though the file has it
    assert texts.data.rows(options["data"], made)["text"][1] == "age: 21; job: baker; late: 1"
    assert texts.data.rows([{"age": 5, "job": "x", "late": 0}], made)["text"][0] == "age: 5; job: x; late: 0"


def test_columns_of_yes_and_no_are_labels(tiny_bert, tmp_path):
    options = dict(
        task=NAME, model=str(tiny_bert), data=table(tmp_path), columns={"text": "age, job", "label": "late, fraud"}
    )
    made = tasks.get(NAME)(config.read(options))
    splits = texts.data.read(made.config, made)
    made.learn(splits)
    assert made.facts["multi"] and made.facts["labels"] == ["fraud", "late"]
    labels = dict(zip(splits["train"]["row"], splits["train"]["label"], strict=True))
    assert all(labels[row] == ["late"] * (row % 2) + ["fraud"] * ((row - 2) % 3 == 0) for row in labels)


def test_a_metric_that_these_rows_cannot_have_is_said_first(tiny_bert):
    same = ROWS | {"validation": [row | {"label": "x"} for row in ROWS["validation"]]}
    with pytest.raises(DataError, match="every row of validation has the same class, x: no roc_auc"):
        texts.ready(NAME, tiny_bert, same, metric="roc_auc")
    with pytest.raises(SettingsError, match="f1_micro, of rows with one label each"):
        texts.ready(NAME, tiny_bert, ROWS, metric="f1_micro")


def test_progressive_sizes_beyond_the_limit(tiny_bert):
    with pytest.raises(SettingsError, match="rows have 16 tokens at most"):
        texts.ready(NAME, tiny_bert, ROWS, max_length=16, progressive=[8, 32])
