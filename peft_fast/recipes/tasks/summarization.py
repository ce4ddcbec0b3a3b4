"""A long text → what it comes to, judged by ROUGE: words, pairs of words and the longest common sequence of words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from peft_fast.errors import UnsupportedError, fail
from peft_fast.recipes.tasks import Column, seq2seq

if TYPE_CHECKING:
    from datasets import Dataset

SOURCES = ("text", "document", "article", "dialogue", "body", "content", "maintext", "report", "input")
TARGETS = ("summary", "highlights", "abstract", "synopsis", "headline", "title", "tldr", "output")
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
WORD = re.compile(r"[^\W_]+")
# of writing without spaces between words each character counts as one
CHARACTER = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
FOREIGN = 0.05  # share of letters outside ASCII from which English words and stems are no measure


class Task(seq2seq.Task):
    columns = (
        Column("source", "text", SOURCES),
        Column("target", "text", TARGETS, truth=True),
    )
    metric = "rougeL"
    judged_by = {"loss": False, **dict.fromkeys(ROUGE, True)}
    answer = "summary"
    hint = "summarization"

    def learn(self, splits: dict[str, Dataset]) -> None:
        letters = [c for one in splits["train"]["target"][:1000] for c in str(one or "") if c.isalpha()]
        foreign = sum(not c.isascii() for c in letters) > FOREIGN * max(1, len(letters))
        self.facts["words"] = "any" if foreign else "english"

    def judge(self, answers: list[str], truths: list[str]) -> dict[str, float]:
        try:
            from rouge_score import rouge_scorer
        except ImportError as error:
            fail(UnsupportedError, "no rouge_score", "it for ROUGE", "pip install 'peft_fast[train]'", error)
        # the scorer's own words are a-z and 0-9: any other writing would score nothing
        own = {"use_stemmer": True} if self.facts.get("words", "english") == "english" else {"tokenizer": _Words()}
        scorer = rouge_scorer.RougeScorer(ROUGE, **own)
        scores = [scorer.score(_lines(truth), _lines(answer)) for truth, answer in zip(truths, answers, strict=True)]
        return {name: 100 * sum(one[name].fmeasure for one in scores) / max(1, len(scores)) for name in ROUGE}


class _Words:
    """Words of any language."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(CHARACTER.sub(r" \g<0> ", text.lower()))


def _lines(text: str) -> str:
    """Sentences one a line, which is what rougeLsum compares."""
    return re.sub(r"(?<=[.!?。！？])\s+", "\n", text.strip())
