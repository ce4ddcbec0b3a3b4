"""What tasks with classes share: their names from the rows, their weights in the loss, and how answers are judged.

loss = mean over rows of weight[class] · ((1 - s) · -log p[class] + s · mean over classes of -log p)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from peft_fast.errors import DataError, SettingsError, fail
from peft_fast.recipes.config import Config

# of two classes named like this the second is what is looked for
POSITIVE = {"1", "1.0", "true", "yes", "positive", "pos", "t", "y", "fraud", "spam", "bad", "toxic", "anomaly"}
JUDGED = {
    "accuracy": True,
    "balanced_accuracy": True,
    "precision": True,
    "recall": True,
    "f1": True,
    "mcc": True,
    "roc_auc": True,
    "pr_auc": True,
}


def name_of(value: Any) -> str:
    """A class's name: 1.0 and True are written as 1 and true, so that CSV, JSON and parquet agree."""
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def ordered(names: Iterable[str]) -> list[str]:
    """Numbers by value, then words by the alphabet."""

    def key(name: str) -> tuple[int, float, str]:
        try:
            return (0, float(name), name)
        except ValueError:
            return (1, 0.0, name)

    return sorted(set(names), key=key)


def positive(names: Sequence[str], counts: Sequence[int]) -> int:
    """Of two classes the one that precision and recall are about: by its name, else the rarer one."""
    marked = [i for i, name in enumerate(names) if name.lower() in POSITIVE]
    if len(marked) == 1:
        return marked[0]
    return 0 if counts[0] < counts[1] else 1


def weights(config: Config, names: Sequence[str], counts: Sequence[int]) -> list[float] | None:
    """Weight of each class in the loss, None where all are 1."""
    chosen = config.class_weights
    if chosen == "none":
        return None
    if chosen == "balanced":
        return [sum(counts) / (len(names) * count) if count else 0.0 for count in counts]
    if strange := sorted(set(chosen) - set(names)):
        given, do = f"class_weights: no class {', '.join(strange)}", "name classes of the data; others weigh 1"
        fail(SettingsError, given, "classes among " + ", ".join(names), do)
    if not any(chosen.get(name, 1.0) for name in names):
        fail(SettingsError, f"class_weights: {chosen}", "one weight above 0", "correct class_weights")
    return [float(chosen.get(name, 1.0)) for name in names]


def counts_of(labels: Iterable[str], names: Sequence[str]) -> list[int]:
    """Rows of each class."""
    counted = Counter(labels)
    return [counted[name] for name in names]


def each(cell: Any) -> list[str]:
    """The labels of a row that has one or several."""
    return list(cell) if isinstance(cell, list | tuple) else [cell]


def index(name: str, places: dict[str, int], column: str) -> int:
    """The class's number; DataError for one that training never saw."""
    if name not in places:
        given = f"column {column}: class {name!r}, which no training row has"
        fail(DataError, given, "one of " + ", ".join(places), "correct the label, or train on rows of that class")
    return places[name]


def smoothing(config: Config) -> float:
    """Of labels in training only: an evaluation's loss says how well the labels themselves are met."""
    return config.label_smoothing if torch.is_grad_enabled() else 0.0


def loss(logits: torch.Tensor, labels: torch.Tensor, weight: list[float] | None, smoothing: float) -> torch.Tensor:
    """(…, C), (…) -> () mean cross-entropy in fp32; labels of -100 count nothing, and none at all gives 0."""
    logits, labels = logits.flatten(0, -2), labels.flatten()
    kept = labels != -100
    if not kept.any():
        return logits.float().sum() * 0.0
    labels = labels[kept]
    each = F.cross_entropy(logits[kept].float(), labels, label_smoothing=smoothing, reduction="none")
    if weight is not None:
        # torch's own weights would divide by those of the batch, and a batch of one class have none
        each = each * torch.tensor(weight, device=each.device)[labels]
    return each.mean()


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, C) -> (N, C) probabilities in float64."""
    logits = np.asarray(logits, dtype=np.float64)
    grown = np.exp(logits - logits.max(-1, keepdims=True))
    return grown / grown.sum(-1, keepdims=True)


def judge(shares: np.ndarray, truth: np.ndarray, positive: int = 1) -> dict[str, float]:
    """(N, C) probabilities and (N,) classes -> JUDGED; of two classes about ``positive``, of more the mean over them.

    An area under a curve needs rows both of a class and of others: classes without are left out of its mean.
    """
    from sklearn import metrics

    classes = shares.shape[1]
    answers = shares.argmax(1)
    chosen = {"average": "binary", "pos_label": positive} if classes == 2 else {"average": "macro"}
    labels = None if classes == 2 else sorted(set(truth.tolist()) | set(answers.tolist()))
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        truth, answers, labels=labels, zero_division=0, **chosen
    )
    found = {
        "accuracy": float((answers == truth).mean()),
        "balanced_accuracy": mean_recall(truth, answers),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "mcc": correlation(truth, answers),
    }
    return found | areas(shares, np.eye(classes, dtype=bool)[truth], [positive] if classes == 2 else range(classes))


def mean_recall(truth: np.ndarray, answers: np.ndarray) -> float:
    """Mean over the classes that occur of the share of their rows that is found."""
    return float(np.mean([(answers[truth == label] == label).mean() for label in np.unique(truth)]))


def correlation(truth: np.ndarray, answers: np.ndarray) -> float:
    """Matthews' coefficient; 0 where one class is all there is."""
    from sklearn import metrics

    return float(metrics.matthews_corrcoef(truth, answers)) if len(np.unique(truth)) > 1 else 0.0


def areas(shares: np.ndarray, truth: np.ndarray, columns: Iterable[int]) -> dict[str, float]:
    """Areas under the ROC and the precision-recall curve, the mean over ``columns`` of (N, C) that have both kinds."""
    from sklearn import metrics

    both = [c for c in columns if 0 < truth[:, c].sum() < len(truth)]
    if not both:
        return {}
    return {
        "roc_auc": float(np.mean([metrics.roc_auc_score(truth[:, c], shares[:, c]) for c in both])),
        "pr_auc": float(np.mean([metrics.average_precision_score(truth[:, c], shares[:, c]) for c in both])),
    }


def confusion(truth: Sequence[int], answers: Sequence[int], names: Sequence[str]) -> dict[str, Any]:
    """What the report draws as a confusion matrix."""
    counts = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(counts, (np.asarray(truth, dtype=int), np.asarray(answers, dtype=int)), 1)
    return {"kind": "confusion", "names": list(names), "counts": counts.tolist()}


def per_class(truth: np.ndarray, answers: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """A table of precision, recall, F1 and rows of each class; (N,) classes or (N, C) of yes and no."""
    from sklearn import metrics

    labels = None if truth.ndim == 2 else list(range(len(names)))
    columns = metrics.precision_recall_fscore_support(truth, answers, labels=labels, average=None, zero_division=0)
    rows = [
        [name, *(round(float(value), 4) for value in (p, r, f)), int(n)]
        for name, p, r, f, n in zip(names, *columns, strict=True)
    ]
    return {"kind": "table", "title": "By class", "head": ["class", "precision", "recall", "F1", "rows"], "rows": rows}
