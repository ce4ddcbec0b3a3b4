"""The answer to a question as a piece of a given text, or that the text has none.

score(i, j) = start_i + end_j over places i <= j of the text; the whole text goes through in overlapping windows
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from peft_fast.errors import SettingsError, UnsupportedError, fail
from peft_fast.recipes.tasks import Column, Problem, text

if TYPE_CHECKING:
    from datasets import Dataset

CANDIDATES = 20  # best starts and ends of a window that are combined
WORDS = 30  # tokens of an answer at most, as in SQuAD's own baselines
KEPT = 5  # answers that predict() gives
SAMPLES = 20
OUTSIDE = -1  # offset of a token that is not of the context
ARTICLES = {"a", "an", "the"}


class Task(text.TextTask):
    columns = (
        Column("question", "text", ("query", "prompt")),
        Column("context", "text", ("passage", "paragraph", "document", "text")),
        Column("answers", "answers", ("answer",)),
    )
    auto = "AutoModelForQuestionAnswering"
    peft = None  # PEFT's QUESTION_ANS model drops token_type_ids: which text is the question would never be learnt
    label_names = ("start_positions", "end_positions")
    metric = "f1"
    judged_by = {"loss": False, "f1": True, "exact_match": True}
    judged_by |= {"answered_f1": True, "answered_exact_match": True, "unanswered_exact_match": True}

    # ---- rows

    def learn(self, splits: dict[str, Dataset]) -> None:
        """Whether a text may have no answer, as in SQuAD 2."""
        self.facts["unanswerable"] = any(not answers["text"] for answers in splits["train"]["answers"][:])
        apart = self.config.metric if "answered" in (self.config.metric or "") else None
        judging = "validation" if "validation" in splits else "train"
        if apart and len({bool(answers["text"]) for answers in splits[judging]["answers"][:]}) < 2:
            given = f"metric: {apart}; in {judging} not both rows with an answer and rows without"
            fail(SettingsError, given, "rows of both kinds", "take metric: f1 or exact_match")

    def check(self, splits: dict[str, Dataset]) -> Iterator[Problem]:
        """Every answer stands where it is said to stand."""
        for split, rows in splits.items():
            columns = (rows[name] for name in ("context", "answers", "row"))
            for place, (context, answers, row) in enumerate(zip(*columns, strict=True)):
                for what, fix in self._wrong(context, answers):
                    column = splits.names.get("answers", "answers")
                    yield Problem(splits.file(split, place), row, column, what, fix, index=place, split=split)

    def _wrong(self, context: str, answers: dict[str, Any]) -> Iterator[tuple[str, str]]:
        if not answers["text"] and not self.facts["unanswerable"]:
            yield "no answer, though every training row has one", "Give the answer, or remove the row"
        for answer, start in _placed(answers):
            if not answer.strip():
                yield "an empty answer", "Leave the list of answers empty where there is none"
            elif context[start : start + len(answer)] != answer:
                there = context[start : start + len(answer)]
                what = f"{text.shown(there, 60)!r} stands at {start}, not {text.shown(answer, 60)!r}"
                yield what, "answer_start counts characters from 0; leave it out to have the answer looked for"

    def too_long(self, rows: Dataset) -> None:
        """Windows go over all of a long context."""
        return None

    # ---- model

    def load_processor(self) -> None:
        super().load_processor()
        if not self.processor.is_fast:
            given = f"model: {self.config.model}, whose tokenizer does not say where its tokens stand in the text"
            fail(UnsupportedError, given, "a fast tokenizer (tokenizer.json)", "take another model for answers")
        self.processor.padding_side = "right"
        room = self.limit - self.processor.num_special_tokens_to_add(pair=True)
        stride = self._stride()
        if room - stride < 2:
            given = f"doc_stride: {stride}, of windows of max_length {self.limit}"
            fail(SettingsError, given, f"doc_stride below {room - 1}", "lower doc_stride or raise max_length")

    def _stride(self) -> int:
        given = "doc_stride" in self.config.model_fields_set
        return self.config.doc_stride if given else min(self.config.doc_stride, self.limit // 4)

    def load_model(self, dtype: torch.dtype) -> Any:
        return self.load(dtype)

    # ---- features

    def encode(self, rows: Dataset, split: str) -> Dataset:
        truth, stride = "answers" in rows.column_names, self._stride()
        room = self.limit - self.processor.num_special_tokens_to_add(pair=True)

        def features(columns: dict[str, list], at: list[int]) -> dict[str, list]:
            # a window needs room for the context: a question is cut to what leaves twice the stride
            questions = self._cut_questions(columns["question"], max(1, room - max(2 * stride, stride + 2)))
            coded = self.processor(
                questions,
                [str(context) for context in columns["context"]],
                truncation="only_second",
                max_length=self.limit,
                stride=stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            owners = coded["overflow_to_sample_mapping"]
            made: dict[str, list] = {"input_ids": coded["input_ids"]}
            if "token_type_ids" in coded:
                made["token_type_ids"] = coded["token_type_ids"]
            made["starts"], made["ends"] = [], []
            for window, offsets in enumerate(coded["offset_mapping"]):
                inside = [part == 1 for part in coded.sequence_ids(window)]
                made["starts"].append([a if here else OUTSIDE for (a, _), here in zip(offsets, inside, strict=True)])
                made["ends"].append([b if here else OUTSIDE for (_, b), here in zip(offsets, inside, strict=True)])
            first = [window == 0 or owners[window - 1] != owner for window, owner in enumerate(owners)]
            made["context"] = [columns["context"][o] if new else "" for o, new in zip(owners, first, strict=True)]
            if truth:
                targets = [self._target(columns["answers"][o]) for o in owners]
                windows = zip(coded["input_ids"], made["starts"], made["ends"], targets, strict=True)
                places = [self._places(*window) for window in windows]
                made["start_positions"], made["end_positions"] = ([place[i] for place in places] for i in (0, 1))
                made["gold"] = [
                    list(columns["answers"][o]["text"]) if new else [] for o, new in zip(owners, first, strict=True)
                ]
            return made | {"row": [at[owner] for owner in owners]}

        return text.mapped(rows, features)

    def _cut_questions(self, questions: Sequence[str], most: int) -> list[str]:
        coded = self.processor(
            [str(question).strip() for question in questions],
            add_special_tokens=False,
            truncation=True,
            max_length=most,
            return_offsets_mapping=True,
        )
        ends = [offsets[-1][1] if offsets else 0 for offsets in coded["offset_mapping"]]
        return [str(question).strip()[:end] for question, end in zip(questions, ends, strict=True)]

    def _target(self, answers: dict[str, Any]) -> tuple[int, int] | None:
        """(first character, one behind the last) of the first answer; None where there is none."""
        for answer, start in _placed(answers):
            return start, start + len(answer)
        return None

    def _places(self, ids: list[int], starts: list[int], ends: list[int], target: Any) -> tuple[int, int]:
        """First and last token of the answer; the window's empty answer where it is not wholly in here."""
        none = _none(self.processor, ids)
        if target is None:
            return none, none
        begin, end = target
        here = [i for i in range(len(ids)) if starts[i] != OUTSIDE and starts[i] < ends[i]]
        if not here or starts[here[0]] > begin or ends[here[-1]] < end:
            return none, none
        inside = [i for i in here if ends[i] > begin and starts[i] < end]
        return (inside[0], inside[-1]) if inside else (none, none)

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return text.pad(self.processor, features, leave=("row", "starts", "ends", "context", "gold"))

    # ---- learning and judging

    def loss(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Mean over rows of the two cross-entropies; a place that progressive resizing cut off counts nothing."""
        parts = []
        for name in ("start", "end"):
            logits = outputs[f"{name}_logits"].float().masked_fill(batch["attention_mask"] == 0, -1e4)
            places = batch[f"{name}_positions"]
            kept = places < logits.shape[1]
            parts.append(F.cross_entropy(logits[kept], places[kept]) if kept.any() else logits.sum() * 0.0)
        return (parts[0] + parts[1]) / 2

    def keep_logits(self, logits: Any, labels: Any) -> Any:
        return logits[0].float(), logits[1].float()

    def metrics(self, prediction: Any, features: Dataset) -> dict[str, float]:
        best = self.answers(*prediction.predictions[:2], features)
        return judge([(best[row][0]["answer"], gold) for row, gold in _gold(features).items()])

    def answers(self, starts: Any, ends: Any, features: Dataset) -> dict[int, list[dict[str, Any]]]:
        """Row -> its best answers, {"answer", "start", "end", "score"}, from the logits of its windows."""
        columns = (features[name] for name in ("row", "input_ids", "starts", "ends", "context"))
        found: dict[int, list[tuple[float, int, int]]] = {}
        nothing: dict[int, float] = {}
        contexts: dict[int, str] = {}
        for s, e, (row, ids, begin, end, context) in zip(starts, ends, zip(*columns, strict=True), strict=True):
            s, e = np.asarray(s, dtype=np.float64)[: len(ids)], np.asarray(e, dtype=np.float64)[: len(ids)]
            contexts[row] = contexts.get(row) or context
            none = _none(self.processor, ids)
            nothing[row] = min(nothing.get(row, np.inf), float(s[none] + e[none]))
            found.setdefault(row, []).extend(_candidates(s, e, np.asarray(begin), np.asarray(end)))
        return {row: self._ranked(found[row], nothing[row], contexts[row]) for row in found}

    def _ranked(self, found: list[tuple[float, int, int]], nothing: float, context: str) -> list[dict[str, Any]]:
        best: dict[tuple[int, int], float] = {}
        for score, begin, end in found:  # windows overlap: one answer may come from two
            best[begin, end] = max(score, best.get((begin, end), -np.inf))
        if self.facts["unanswerable"] or not best:
            best[0, 0] = nothing
        ranked = sorted(best.items(), key=lambda entry: (-entry[1], entry[0]))[:CANDIDATES]
        shares = np.exp(np.array([score for _, score in ranked]) - ranked[0][1])
        return [
            {"answer": context[begin:end], "start": begin, "end": end, "score": round(float(share), 6)}
            for ((begin, end), _), share in zip(ranked, shares / shares.sum(), strict=True)
        ]

    def show(self, output: Any, features: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        best, gold = self.answers(*output.predictions[:2], features), _gold(features)
        judged = {row: _best_f1(best[row][0]["answer"], gold[row]) for row in gold}
        lines = []
        for row in sorted(judged, key=lambda row: judged[row])[:SAMPLES]:
            truth, answer = " | ".join(dict.fromkeys(gold[row])) or "(none)", best[row][0]
            start = gold[row] and rows[row]["context"].find(gold[row][0]) or 0
            around = text.shown(rows[row]["context"][max(0, start - 80) : start + 160])
            cells = [text.shown(rows[row]["question"]), around, truth, answer["answer"] or "(none)", answer["score"]]
            lines.append([*cells, round(judged[row], 4)])
        head = ["question", "context", "truth", "answer", "score", "F1"]
        return [{"kind": "table", "title": "Answers, worst first", "head": head, "rows": lines}]

    # ---- use

    def predict(self, model: Any, rows: Dataset) -> list[dict[str, Any]]:
        """Per row the best answer with its place and score, and others; "" where the text has none."""
        features = self.encode(self.questions(rows), "predict")
        starts: list[Any] = [None] * len(features)
        ends: list[Any] = [None] * len(features)
        for places, _, output in self.forward(model, features):
            pairs = zip(output["start_logits"].float().cpu(), output["end_logits"].float().cpu(), strict=True)
            for place, (s, e) in zip(places, pairs, strict=True):
                starts[place], ends[place] = s.numpy(), e.numpy()
        found = self.answers(starts, ends, features)
        return [found[row][0] | {"others": found[row][1:KEPT]} for row in range(len(rows))]


def judge(pairs: Sequence[tuple[str, list[str]]]) -> dict[str, float]:
    """(answer, true answers) of each row -> SQuAD's exact match and F1, in shares of 1.

    Where some rows have no answer, also of rows that have one (answered_) and of those that have none (unanswered_).
    """
    exact = [any(_plain(answer) == one for one in _plain_gold(gold)) for answer, gold in pairs]
    f1 = [_best_f1(answer, gold) for answer, gold in pairs]
    found = {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}
    some, none = [[i for i, (_, gold) in enumerate(pairs) if bool(gold) == wanted] for wanted in (True, False)]
    if none and some:
        found["answered_exact_match"] = float(np.mean([exact[i] for i in some]))
        found["answered_f1"] = float(np.mean([f1[i] for i in some]))
        found["unanswered_exact_match"] = float(np.mean([exact[i] for i in none]))
    return found


def _best_f1(answer: str, gold: list[str]) -> float:
    return max(_f1(_plain(answer).split(), one.split()) for one in _plain_gold(gold))


def _plain_gold(gold: list[str]) -> list[str]:
    return [plain for one in gold if (plain := _plain(one))] or [""]


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    common = sum((Counter(answer) & Counter(gold)).values())
    return 2 * common / (len(answer) + len(gold))


def _plain(answer: str) -> str:
    """As SQuAD compares: lower case, no punctuation, no articles, single spaces."""
    kept = "".join(sign for sign in answer.lower() if sign not in string.punctuation)
    return " ".join(word for word in kept.split() if word not in ARTICLES)


def _placed(answers: dict[str, Any]) -> list[tuple[str, int]]:
    """(answer, place of its first character)."""
    return list(zip(answers["text"], answers["answer_start"], strict=True))


def _gold(features: Dataset) -> dict[int, list[str]]:
    """Row -> its true answers: they are with the row's first window."""
    found: dict[int, list[str]] = {}
    for row, gold in zip(features["row"], features["gold"], strict=True):
        found.setdefault(row, gold)
    return found


def _none(tokenizer: Any, ids: list[int]) -> int:
    """The place that means "no answer here": the class token, else the first."""
    return ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0


def _candidates(s: np.ndarray, e: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Iterator[tuple[float, int, int]]:
    """(score, first character, one behind the last) of a window's best pairs."""
    here = np.flatnonzero((begin != OUTSIDE) & (begin < end))
    firsts = here[np.argsort(-s[here], kind="stable")[:CANDIDATES]]
    lasts = here[np.argsort(-e[here], kind="stable")[:CANDIDATES]]
    for i in firsts.tolist():
        for j in lasts.tolist():
            if i <= j < i + WORDS:
                yield float(s[i] + e[j]), int(begin[i]), int(end[j])
