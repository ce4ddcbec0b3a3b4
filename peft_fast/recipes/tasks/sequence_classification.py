"""A class, or several, of a text or a pair of texts: sentiment, topic, entailment, fraud from a row of a table.

p = softmax(W h + b), h what the model makes of the whole text; with several labels a row: p = sigmoid(W h + b)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from peft_fast.errors import SettingsError, fail
from peft_fast.recipes.tasks import Column, Problem, classes, text

if TYPE_CHECKING:
    from datasets import Dataset

TEXTS = ("sentence", "sentence1", "premise", "question1", "question", "text1", "text_a", "review", "review_body")
TEXTS += ("content", "document", "comment", "comment_text", "tweet", "message", "body", "title")
PAIRS = ("sentence2", "hypothesis", "question2", "text2", "text_b", "second")
LABELS = ("labels", "target", "class", "category", "sentiment", "topic", "intent", "stars", "rating")
MISTAKES = 20


class Task(text.TextTask):
    columns = (
        Column("text", "text", TEXTS),
        Column("text_pair", "text", PAIRS, required=False),
        Column("label", "label", LABELS),
    )
    auto = "AutoModelForSequenceClassification"
    peft = "SEQ_CLS"
    metric = "accuracy"
    judged_by = {"loss": False, **classes.JUDGED, "f1_micro": True}

    # ---- rows

    def learn(self, splits: dict[str, Dataset]) -> None:
        given = splits["train"]["label"][:]
        multi = any(isinstance(value, list | tuple) for value in given)
        named = [[classes.name_of(one) for one in (value if multi else [value])] for value in given]
        names = classes.ordered(name for row in named for name in row)
        counts = classes.counts_of((name for row in named for name in set(row)), names)
        self.facts |= {"labels": names, "counts": counts, "multi": multi, "rows": len(given)}
        self.facts["pair"] = "text_pair" in splits["train"].column_names
        if len(names) == 2 and not multi:
            self.facts["positive"] = names[classes.positive(names, counts)]
        self._weights()  # class_weights that name no class are said before a model is loaded
        if self.config.metric == "f1_micro" and not multi:
            given = "metric: f1_micro, of rows with one label each"
            fail(SettingsError, given, "rows with several labels", "take metric: accuracy, which is the same there")

    def check(self, splits: dict[str, Dataset]) -> Iterator[Problem]:
        """An area under a curve needs rows of a class, and of others."""
        metric = self.config.metric
        if metric in ("roc_auc", "pr_auc") and "validation" in splits:
            cells = [tuple(classes.each(cell)) for cell in splits["validation"]["label"][:]]
            if all(len({name in cell for cell in cells}) < 2 for name in self.facts["labels"]):
                what = f"every row of validation has the same class, {', '.join(cells[0]) or 'none'}: no {metric}"
                fix = "Pass validation rows of several classes, or take another metric"
                yield Problem(splits.sources["validation"], None, splits.names.get("label", "label"), what, fix)

    def _weights(self) -> list[float] | None:
        """Of the loss: a weight for each class; of several labels a row, of its yes against its no."""
        names, counts = self.facts["labels"], self.facts["counts"]
        if self.facts["multi"] and self.config.class_weights == "balanced":
            return [(self.facts["rows"] - count) / max(1, count) for count in counts]
        return classes.weights(self.config, names, counts)

    # ---- model

    def load_model(self, dtype: torch.dtype) -> Any:
        known = text.loading.load_config(self.config)
        mine = {classes.name_of(name): int(place) for name, place in (known.label2id or {}).items()}
        if set(mine) == set(self.facts["labels"]) and sorted(mine.values()) == list(range(len(mine))):
            # a model that has learnt these very classes goes on with its own order
            order = sorted(mine, key=mine.get)
            self.facts["counts"] = [self.facts["counts"][self.facts["labels"].index(name)] for name in order]
            self.facts["labels"] = order
        names = self.facts["labels"]
        return self.load(
            dtype,
            id2label=dict(enumerate(names)),
            label2id={name: place for place, name in enumerate(names)},
            problem_type="multi_label_classification" if self.facts["multi"] else "single_label_classification",
        )

    # ---- features

    def encode(self, rows: Dataset, split: str) -> Dataset:
        places = {name: place for place, name in enumerate(self.facts["labels"])}

        def features(columns: dict[str, list], at: list[int]) -> dict[str, list]:
            pairs = [str(value or "") for value in columns["text_pair"]] if self.facts["pair"] else None
            made = dict(self.tokenize([str(value) for value in columns["text"]], pairs))
            if "label" in columns:
                made["labels"] = [self._target(value, places) for value in columns["label"]]
            return made | {"row": at}

        return text.mapped(rows, features)

    def _target(self, value: Any, places: dict[str, int]) -> int | list[float]:
        if not self.facts["multi"]:
            return classes.index(classes.name_of(value), places, "label")
        target = [0.0] * len(places)
        for one in value:
            target[classes.index(classes.name_of(one), places, "label")] = 1.0
        return target

    # ---- learning and judging

    def loss(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        logits, labels, weight = outputs["logits"].float(), batch["labels"], self._weights()
        smoothing = classes.smoothing(self.config)
        if not self.facts["multi"]:
            return classes.loss(logits, labels, weight, smoothing)
        labels = labels * (1 - smoothing) + smoothing / 2
        weighed = None if weight is None else torch.tensor(weight, device=logits.device)
        return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weighed)

    def keep_logits(self, logits: Any, labels: Any) -> Any:
        return text.first(logits).float()

    def _shares(self, logits: Any) -> np.ndarray:
        """(N, C) probabilities."""
        logits = np.asarray(text.first(logits), dtype=np.float64)
        return 1 / (1 + np.exp(-logits)) if self.facts["multi"] else classes.softmax(logits)

    def metrics(self, prediction: Any, features: Dataset) -> dict[str, float]:
        shares, truth = self._shares(prediction.predictions), np.asarray(prediction.label_ids)
        if not self.facts["multi"]:
            return classes.judge(shares, truth, self._positive())
        from sklearn import metrics

        answers, truth = shares > 0.5, truth > 0.5
        found = {"accuracy": float((answers == truth).all(1).mean())}
        for name in ("precision", "recall", "f1"):
            score = getattr(metrics, f"{name}_score")
            found[name] = float(score(truth, answers, average="macro", zero_division=0))
        pairs = list(zip(truth.T, answers.T, strict=True))
        found["balanced_accuracy"] = float(np.mean([classes.mean_recall(one, other) for one, other in pairs]))
        found["mcc"] = float(np.mean([classes.correlation(one, other) for one, other in pairs]))
        found["f1_micro"] = float(metrics.f1_score(truth, answers, average="micro", zero_division=0))
        return found | classes.areas(shares, truth, range(truth.shape[1]))

    def _positive(self) -> int:
        names = self.facts["labels"]
        return names.index(self.facts["positive"]) if "positive" in self.facts else 1

    def show(self, output: Any, features: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        shares, truth = self._shares(output.predictions), np.asarray(output.label_ids)
        names, found = self.facts["labels"], []
        if self.facts["multi"]:
            answers, truth = (shares > 0.5).astype(int), (truth > 0.5).astype(int)
            wrong, certain = (answers != truth).any(1), np.abs((shares - truth) * (answers != truth)).max(1)
            say = lambda row: ", ".join(name for name, yes in zip(names, row, strict=True) if yes) or "none"  # noqa: E731
        else:
            answers = shares.argmax(1)
            wrong, certain = answers != truth, shares.max(1)
            say = lambda label: names[label]  # noqa: E731
            found.append(classes.confusion(truth, answers, names))
        found.append(classes.per_class(truth, answers, names))
        if not self.facts["multi"] and len(names) == 2 and len(set(truth.tolist())) == 2:
            found.append(self._curve(shares[:, self._positive()], truth == self._positive()))
        order = [int(i) for i in np.argsort(-certain, kind="stable") if wrong[i]][:MISTAKES]
        lines = [
            [self._text(rows[features[i]["row"]]), say(truth[i]), say(answers[i]), round(float(certain[i]), 4)]
            for i in order
        ]
        head = ["text", "truth", "answer", "probability"]
        found.append({"kind": "table", "title": "Most confident mistakes", "head": head, "rows": lines})
        return found

    def _text(self, row: dict[str, Any]) -> str:
        return text.shown(" ‖ ".join(str(row[role]) for role in ("text", "text_pair") if row.get(role) is not None))

    def _curve(self, shares: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
        """Precision over recall as the threshold falls."""
        from sklearn import metrics

        precision, recall, _ = metrics.precision_recall_curve(truth, shares)
        keep = sorted(set(np.linspace(0, len(recall) - 1, min(len(recall), 200)).astype(int).tolist()))
        points = [[round(float(recall[i]), 4), round(float(precision[i]), 4)] for i in reversed(keep)]
        title = f"Precision over recall of {self.facts['positive']}"
        return {"kind": "lines", "title": title, "x": "recall", "series": {"precision": points}}

    # ---- use

    def predict(self, model: Any, rows: Dataset) -> list[dict[str, Any]]:
        features = self.encode(
            rows.remove_columns([name for name in ("label",) if name in rows.column_names]), "predict"
        )
        names, answers = self.facts["labels"], [{}] * len(features)
        for places, _, output in self.forward(model, features):
            shares = self._shares(output["logits"].float().cpu().numpy())
            for place, row in zip(places, shares, strict=True):
                scores = {name: round(float(share), 6) for name, share in zip(names, row, strict=True)}
                if self.facts["multi"]:
                    answers[place] = {"labels": [name for name in names if scores[name] > 0.5], "scores": scores}
                else:
                    best = names[int(row.argmax())]
                    answers[place] = {"label": best, "score": scores[best], "scores": scores}
        return answers
