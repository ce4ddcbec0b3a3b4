"""A text in one language → the same in another, judged by chrF and BLEU (sacrebleu)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from peft_fast.errors import UnsupportedError, fail
from peft_fast.recipes.tasks import Column, seq2seq

if TYPE_CHECKING:
    from datasets import Dataset

SOURCES = ("src", "source_text", "input", "text", "en", "english", "sentence", "original")
TARGETS = ("tgt", "target_text", "translation", "output", "translated", "de", "fr", "es", "german", "french", "spanish")
# writing without spaces: BLEU counts characters there
CHINESE = re.compile(r"[\u4e00-\u9fff]")
SPACELESS = re.compile(r"[\u3040-\u30ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
SHARE = 0.2  # of all characters, from which a text counts as written so


class Task(seq2seq.Task):
    columns = (
        Column("source", "text", SOURCES),
        Column("target", "text", TARGETS, truth=True),
    )
    metric = "chrf"
    judged_by = {"loss": False, "chrf": True, "bleu": True}
    answer = "translation"
    hint = "translation"

    def learn(self, splits: dict[str, Dataset]) -> None:
        """How BLEU takes the target language apart."""
        sample = "".join(str(one or "") for one in splits["train"]["target"][:1000])
        size = max(1, len(sample))
        spaceless = len(SPACELESS.findall(sample)) > SHARE * size
        chinese = len(CHINESE.findall(sample)) > SHARE * size
        self.facts["bleu_tokens"] = "char" if spaceless else "zh" if chinese else "13a"

    def judge(self, answers: list[str], truths: list[str]) -> dict[str, float]:
        try:
            import sacrebleu
        except ImportError as error:
            fail(UnsupportedError, "no sacrebleu", "it for BLEU and chrF", "pip install 'peft_fast[train]'", error)
        bleu = sacrebleu.corpus_bleu(answers, [truths], tokenize=self.facts.get("bleu_tokens", "13a"))
        return {"chrf": float(sacrebleu.corpus_chrf(answers, [truths]).score), "bleu": float(bleu.score)}
