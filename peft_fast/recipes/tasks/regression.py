"""One number or several of a text, a pair of texts or a row of a table: prices, scores, ratings of films.

ŷ = σ (W h + b) + μ, with the training rows' mean μ and spread σ of each target; loss = mean of ((ŷ - y) / σ)²
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from peft_fast.recipes.tasks import Column, Problem, text
from peft_fast.recipes.tasks.sequence_classification import PAIRS, TEXTS

if TYPE_CHECKING:
    from datasets import Dataset

TARGETS = ("label", "labels", "score", "rating", "stars", "value", "price", "y", "number", "similarity")
MISTAKES = 20
POINTS = 1000  # of the scatter plot


class Task(text.TextTask):
    columns = (
        Column("text", "text", TEXTS),
        Column("text_pair", "text", PAIRS, required=False),
        Column("target", "number", TARGETS),
    )
    auto = "AutoModelForSequenceClassification"
    peft = "SEQ_CLS"
    metric = "r2"
    judged_by = {"loss": False, "mse": False, "rmse": False, "mae": False}
    judged_by |= {"r2": True, "pearson": True, "spearman": True}

    # ---- rows

    def learn(self, splits: dict[str, Dataset]) -> None:
        given = splits["train"]["target"][:]
        widths = Counter(map(_width, given))
        width = max(widths, key=widths.get)
        values = _table([value for value in given if _width(value) == width])  # check() names the others
        spread = values.std(0)
        self.facts |= {
            "names": self._names(values.shape[1]),
            "mean": values.mean(0).tolist(),
            "std": np.where(spread > 0, spread, 1.0).tolist(),
            "constant": (spread == 0).tolist(),
            "pair": "text_pair" in splits["train"].column_names,
        }

    def _names(self, number: int) -> list[str]:
        """The targets' columns, where the config names them."""
        named = [name.strip() for name in self.config.columns.get("target", "target").split(",")]
        return named if len(named) == number else [f"target {i}" for i in range(1, number + 1)]

    def check(self, splits: dict[str, Dataset]) -> Iterator[Problem]:
        """As many targets in each row; of several, none that is the same everywhere."""
        column = splits.names.get("target", "target")
        for split, rows in splits.items():
            for place, (value, row) in enumerate(zip(rows["target"], rows["row"], strict=True)):
                number = _width(value)
                if number != len(self.facts["mean"]):
                    what, fix = f"{number} numbers, not {len(self.facts['mean'])}", "Give each row as many targets"
                    yield Problem(splits.file(split, place), row, column, what, fix, index=place, split=split)
        for name, constant, mean in zip(self.facts["names"], self.facts["constant"], self.facts["mean"], strict=True):
            if constant and len(self.facts["mean"]) > 1:
                what, fix = f"every value is {mean:g}", "Leave this target out, or pass more rows"
                yield Problem(splits.sources["train"], None, name, what, fix)
        metric = self.config.metric or self.metric
        if metric in ("r2", "pearson", "spearman") and "validation" in splits:
            held = {str(value) for value in splits["validation"]["target"][:]}
            if len(held) < 2:
                what = f"every value of validation is {next(iter(held), 'missing')}, which has no {metric}"
                fix = "Pass other validation rows, or take metric: mse"
                yield Problem(splits.sources["validation"], None, column, what, fix)

    # ---- model

    def load_model(self, dtype: torch.dtype) -> Any:
        names = self.facts["names"]
        return self.load(
            dtype,
            id2label=dict(enumerate(names)),
            label2id={name: place for place, name in enumerate(names)},
            problem_type="regression",
        )

    # ---- features

    def encode(self, rows: Dataset, split: str) -> Dataset:
        def features(columns: dict[str, list], at: list[int]) -> dict[str, list]:
            pairs = [str(value or "") for value in columns["text_pair"]] if self.facts["pair"] else None
            made = dict(self.tokenize([str(value) for value in columns["text"]], pairs))
            if "target" in columns:
                values = _table(columns["target"])
                made["labels"] = ((values - self.facts["mean"]) / self.facts["std"]).tolist()
            return made | {"row": at}

        return text.mapped(rows, features)

    # ---- learning and judging

    def loss(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        return F.mse_loss(outputs["logits"].float(), batch["labels"].float())

    def keep_logits(self, logits: Any, labels: Any) -> Any:
        return text.first(logits).float()

    def _values(self, standard: Any) -> np.ndarray:
        """(N, T) in the targets' own units."""
        standard = np.asarray(text.first(standard), dtype=np.float64)
        return standard.reshape(len(standard), -1) * self.facts["std"] + self.facts["mean"]

    def metrics(self, prediction: Any, features: Dataset) -> dict[str, float]:
        return judge(self._values(prediction.predictions), self._values(prediction.label_ids))

    def show(self, output: Any, features: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        answers, truth = self._values(output.predictions), self._values(output.label_ids)
        found: list[dict[str, Any]] = []
        for column, name in enumerate(self.facts["names"]):
            some = np.linspace(0, len(truth) - 1, min(len(truth), POINTS)).astype(int)
            points = [[_short(truth[i, column]), _short(answers[i, column])] for i in some]
            ends = sorted({min(p[0] for p in points), max(p[0] for p in points)})
            series = {"answer": sorted(points), "truth": [[end, end] for end in ends]}
            title = f"Answer over truth: {name}"
            found.append({"kind": "lines", "title": title, "x": "truth", "series": series, "dots": ["answer"]})
        off = np.abs((answers - truth) / self.facts["std"]).max(1)
        lines = []
        for i in np.argsort(-off, kind="stable")[:MISTAKES].tolist():
            row = rows[features[i]["row"]]
            said = text.shown(" ‖ ".join(str(row[role]) for role in ("text", "text_pair") if row.get(role) is not None))
            lines.append([said, _listed(truth[i]), _listed(answers[i])])
        head = ["text", "truth", "answer"]
        return [*found, {"kind": "table", "title": "Farthest off", "head": head, "rows": lines}]

    # ---- use

    def predict(self, model: Any, rows: Dataset) -> list[dict[str, Any]]:
        """{"value": 3.4}, or of several targets {"values": {name: value}}."""
        features = self.encode(self.questions(rows), "predict")
        answers: list[Any] = [None] * len(features)
        for places, _, output in self.forward(model, features):
            values = self._values(output["logits"].float().cpu().numpy())
            for place, row in zip(places, values, strict=True):
                named = {name: _short(value) for name, value in zip(self.facts["names"], row, strict=True)}
                answers[place] = {"value": next(iter(named.values()))} if len(named) == 1 else {"values": named}
        return answers


def judge(answers: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """(N, T), (N, T) -> errors in the targets' own units and correlations, means over the targets.

    Where the truth is the same everywhere, there is no such thing as r2 or a correlation, and none is told.
    """
    from scipy import stats

    mse = ((answers - truth) ** 2).mean(0)
    found = {
        "mse": float(mse.mean()),
        "rmse": float(np.sqrt(mse).mean()),
        "mae": float(np.abs(answers - truth).mean()),
    }
    varies = np.flatnonzero((truth.std(0) > 0) & (len(truth) > 1))
    if len(varies):
        found["r2"] = float((1 - mse[varies] / truth[:, varies].var(0)).mean())
        for name, measure in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
            # answers that are all the same go along with nothing
            told = [measure(answers[:, c], truth[:, c]).statistic for c in varies if answers[:, c].std() > 0]
            found[name] = float(sum(told) / len(varies))
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _width(value: Any) -> int:
    return len(value) if isinstance(value, list | tuple) else 1


def _table(values: Any) -> np.ndarray:
    """Numbers, or lists of them, to (N, T)."""
    table = np.array([value if isinstance(value, list | tuple) else [value] for value in values], dtype=np.float64)
    return table.reshape(len(table), -1)


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _listed(values: np.ndarray) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
