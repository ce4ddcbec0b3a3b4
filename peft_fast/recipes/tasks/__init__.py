"""Task: all that differs between kinds of learning. One module a task, named like it, with a class `Task`.

A run asks a task, in this order:

    task = tasks.get(config.task)(config)
    splits = data.read(config, task)          rows whose columns carry the names of `task.columns`
    task.learn(splits)                        task.facts: class names and whatever else comes from the rows
    task.load_processor()                     tokenizer, image processor, feature extractor
    problems = task.check(splits)             everything wrong with the rows, before anything trains
    model = task.load_model(dtype)            the Auto class, with a head of the right size
    encoded = task.encode(rows, "train")      what the collator takes
    ... training ...
    shown = task.show(output, rows)           confusion matrix, samples: what the report shows
    task.predict(model, rows)                 rows in, answers out

`task.facts` is saved with the run as task.json; `Task(config, facts)` needs no training rows again.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from peft_fast.recipes.config import TASKS, Config

if TYPE_CHECKING:
    import torch
    from datasets import Dataset


@dataclasses.dataclass(frozen=True)
class Column:
    """One role of a row's columns: what it holds, and the names it is known by in the field's data sets."""

    role: str
    holds: str  # text, label, number, tokens, tags, messages, image, audio, boxes, series, answers
    aliases: tuple[str, ...] = ()
    required: bool = True
    truth: bool | None = None  # what is to be learnt, so that prediction does without; None: as `holds` says


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is wrong with a row, where, and the fix. `row` counts as the file's reader does (its line, from 1)."""

    file: str
    row: int | None
    column: str | None
    what: str
    fix: str
    stops: bool = True  # False: said, and training goes on
    index: int | None = None  # the row's place in its split, so that bad_rows=skip can leave it out
    split: str = ""

    @property
    def kind(self) -> str:
        """What is wrong without what is particular to this row, to count by."""
        return ", ".join(filter(None, [self.column, re.sub(r"(['\"]).*?\1|[\d,.]*\d", "…", self.what)]))

    @property
    def place(self) -> str:
        parts = [self.file, self.row and f"row {self.row}", self.column and f"column {self.column}"]
        return ", ".join(part for part in parts if part)

    def __str__(self) -> str:
        return f"{self.place}: {self.what}. {self.fix}"


def get(name: str) -> type[Task]:
    """The class of a task."""
    assert name in TASKS
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").Task


class Task:
    """The part that tasks share: override what differs."""

    columns: ClassVar[tuple[Column, ...]] = ()
    auto: ClassVar[str] = ""  # name of the Auto class in transformers
    peft: ClassVar[str | None] = None  # peft.TaskType, None where PEFT has none
    modality: ClassVar[str] = "text"  # text, image, audio, series
    unit: ClassVar[str] = "tokens"  # what throughput counts: tokens, images, seconds, values
    metric: ClassVar[str] = "loss"  # what says which checkpoint is best, unless the config does
    # every name that metrics() may return and `metric` may be -> whether higher is better
    judged_by: ClassVar[dict[str, bool]] = {"loss": False}
    generates: ClassVar[bool] = False  # evaluation needs generate()

    def __init__(self, config: Config, facts: dict[str, Any] | None = None) -> None:
        self.config = config
        self.facts: dict[str, Any] = facts or {}  # JSON: what was learnt from the training rows, e.g. {"labels": [...]}
        self.processor: Any = None

    # ---- rows

    def learn(self, splits: dict[str, Dataset]) -> None:
        """Fill ``facts`` from the training rows."""

    def divide(self, rows: Dataset, share: float) -> tuple[Dataset, Dataset] | None:
        """Training rows and the ``share`` of them held out; None: drawn at random, each class by its share."""
        return None

    def draw(self, rows: Dataset, count: int, split: str) -> Dataset | None:
        """The ``count`` rows of a split that are used, where not all are; None: drawn at random."""
        return None

    def check(self, splits: dict[str, Dataset]) -> Iterator[Problem]:
        """What is wrong with the rows in this task's own terms; checks.py has asked what every task needs."""
        return iter(())

    def too_long(self, rows: Dataset) -> tuple[Sequence[float], float] | dict[str, Any] | None:
        """(size of each row before any cut, the most it may be, both in ``unit``); None: rows of any size are used.

        Where several roles have a most of their own: such a pair by role. Asked after load_processor(), for all rows.
        """
        return None

    def truncates(self, split: str, role: str | None) -> str:
        """What becomes of rows that too_long() finds in ``role``, where long_rows leaves them in: a note says it."""
        return "are cut"

    # ---- model

    def load_processor(self) -> None:
        """Set ``processor``: tokenizer, image processor or feature extractor of ``config.model``."""
        raise NotImplementedError

    def load_model(self, dtype: torch.dtype) -> Any:
        """The base model with a head for ``facts``, in ``dtype``; methods.py then says what trains."""
        raise NotImplementedError

    def head(self, model: Any) -> list[str]:
        """Names of the modules that are new for this task and always train; [] where there are none."""
        return []

    # ---- features

    def encode(self, rows: Dataset, split: str) -> Dataset:
        """Features for ``collate``, in the rows' order; a row may give several. Column `row`: its place in ``rows``."""
        raise NotImplementedError

    def asked(self) -> str:
        """Which part of its rows an evaluation asks, where that is drawn: runs that differ here answered others."""
        return ""

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One batch of tensors. Draws only from torch's generator."""
        raise NotImplementedError

    def length(self, feature: dict[str, Any]) -> int:
        """Size of a feature in ``unit``, for batches of like length and for throughput."""
        return len(feature["input_ids"])

    def count(self, batch: dict[str, Any]) -> int:
        """How much of ``unit`` is in a batch, padding left out."""
        return int(batch["attention_mask"].sum())

    def resize(self, batch: dict[str, Any], size: int) -> dict[str, Any]:
        """The batch cut to ``size`` tokens or scaled to ``size`` pixels, for progressive resizing."""
        raise NotImplementedError

    def ends_small(self, features: Dataset) -> str:
        """What training on these never sees because progressive resizing ends below it, as a note; '' for nothing."""
        return ""

    # ---- learning and judging

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the model is called with: less than the batch where ``loss`` computes what the model would."""
        return batch

    def loss(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor | None:
        """A loss of the task's own (class weights, smoothing); None: what the model computed."""
        return None

    def keep_logits(self, logits: Any, labels: Any) -> Any:
        """What metrics() needs of the logits: less to keep over an evaluation."""
        return logits

    def evaluation_loop(self, trainer: Any, loader: Any, prefix: str) -> Any:
        """A loop of the task's own, as Trainer.evaluation_loop returns it; None: the Trainer's."""
        return None

    def metrics(self, prediction: Any, features: Dataset) -> dict[str, float]:
        """From an EvalPrediction over ``features`` (in their order) to the names of ``judged_by``, without loss."""
        return {}

    def show(self, output: Any, features: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        """What the report shows of a PredictionOutput, as JSON: a list of

        {"kind": "confusion", "names": [...], "counts": [[...]]}     row: the truth, column: the answer
        {"kind": "table", "title": ..., "head": [...], "rows": [[...]]}
        {"kind": "lines", "title": ..., "x": ..., "series": {name: [[x, y], ...]}}
        {"kind": "images", "title": ..., "images": [{"png": base64, "caption": ...}]}
        """
        return []

    # ---- use

    def predict(self, model: Any, rows: Dataset) -> list[dict[str, Any]]:
        """Answers to rows that may lack the columns of the truth; JSON, one dict a row."""
        raise NotImplementedError
