"""What translation and summarization share: a source is read, a target is written, −Σ log p(yₜ | x, y₍<ₜ₎).

Judged by what the model writes by itself, with the texts of the rows as truth, not what the tokenizer made of them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from peft_fast.errors import SettingsError, UnsupportedError, fail
from peft_fast.recipes.tasks import Problem, generation, loading, text

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLES = 10
# float16 ends at 65504, which the residual stream of models pretrained in bfloat16 exceeds: NaN after some layers
NOT_HALF = {"t5", "mt5", "umt5", "longt5", "switch_transformers", "t5gemma", "t5gemma2", "pegasus", "pegasus_x"}
LANGUAGE = re.compile(r"[a-z]{2,3}(_[A-Za-z]{2,4})?|__[a-z]{2,3}(_[A-Z]{2})?__")


class Task(text.TextTask):
    auto = "AutoModelForSeq2SeqLM"
    peft = "SEQ_2_SEQ_LM"
    generates = True
    answer: ClassVar[str] = ""  # what predict calls its answer
    hint: ClassVar[str] = ""  # how task_specific_params of a model call this task

    def __init__(self, config: Any, facts: dict[str, Any] | None = None) -> None:
        super().__init__(config, facts)
        self._shifted: Any = None

    # ---- rows

    def check(self, splits: dict[str, Dataset]) -> Iterator[Problem]:
        written, column = self.config.max_new_tokens, splits.names.get("target", "target")
        most = self.config.max_target_length if self.config.long_rows == "skip" else 2**31
        for split in [name for name in splits if name != "train"]:
            sizes = [size for size in self._target_sizes(splits[split]) if size <= most]
            if over := sum(size > written for size in sizes):
                what = f"{over:,} of {len(sizes):,} are longer than max_new_tokens: {written:,} tokens"
                fix = "Raise max_new_tokens: answers that end early score lower than they should"
                yield Problem(splits.sources[split], None, column, what, fix, stops=False)
        if prefix := self._usual_prefix():
            what = f"this model was pretrained for the task with the prefix {prefix!r} before each source"
            yield Problem(self.config.model, None, None, what, f"Consider prefix: {prefix!r}", stops=False)

    def _target_sizes(self, rows: Dataset) -> list[int]:
        texts, found = [str(one or "") for one in rows["target"][:]], []
        for start in range(0, len(texts), 1000):
            found += [len(ids) for ids in self.processor(text_target=texts[start : start + 1000])["input_ids"]]
        return found

    def _usual_prefix(self) -> str:
        """What the model's config says to put before a source, where the user says nothing."""
        known = getattr(loading.load_config(self.config), "task_specific_params", None) or {}
        named = [part["prefix"] for name, part in known.items() if self.hint in name and part.get("prefix")]
        return named[0] if named and not self.config.prefix else ""

    def lengths(self, rows: Dataset) -> list[int]:
        texts, found = [self.config.prefix + str(one or "") for one in rows["source"][:]], []
        for start in range(0, len(texts), 1000):
            ids = self.processor(texts[start : start + 1000], truncation=False, verbose=False)["input_ids"]
            found += [len(row) for row in ids]
        return found

    def too_long(self, rows: Dataset) -> dict[str, Any]:
        sizes = self._target_sizes(rows), self.config.max_target_length
        return {"source": (self.lengths(rows), self.limit), "target": sizes}

    # ---- model

    def load_processor(self) -> None:
        super().load_processor()
        asked = self.config.source_language, self.config.target_language
        if not hasattr(self.processor, "src_lang"):
            if any(asked):
                given = f"source_language {asked[0]}, target_language {asked[1]}: {self.config.model} has no languages"
                do = "leave them out; a Marian model for several targets takes prefix: '>>fra<< '"
                fail(SettingsError, given, "a multilingual tokenizer, as mBART's, M2M100's and NLLB's", do)
            return
        for name, code in zip(("source_language", "target_language"), asked, strict=True):
            if code is None or language(self.processor, code) is None:
                known = languages(self.processor)
                begins = [name for name in known if code and name.strip("_").startswith(code)]
                near = begins or difflib.get_close_matches(code or "", known, n=1)
                given = f"{name}: {'missing' if code is None else code}; {self.config.model} is multilingual"
                need = f"one of {', '.join(known[:12])}{', …' if len(known) > 12 else ''}"
                fail(SettingsError, given, need, f"{name}: {near[0]}?" if near else f"add {name}")
        self.processor.src_lang, self.processor.tgt_lang = asked

    def load_model(self, dtype: torch.dtype) -> Any:
        model_config = loading.load_config(self.config)
        if model_config.model_type in NOT_HALF and (self.config.dtype == "fp16" or dtype == torch.float16):
            given = f"dtype: fp16 with {model_config.model_type}"
            fail(UnsupportedError, given, "a type with the range of float32: its activations overflow", "dtype: bf16")
        positions = getattr(model_config, "max_position_embeddings", None) or 0
        for name in ("max_target_length", "max_new_tokens") if model_config.model_type not in text.RELATIVE else ():
            if 0 < positions < (size := getattr(self.config, name)):
                given = f"{name}: {size}; {self.config.model} has {positions} positions"
                fail(SettingsError, given, f"{positions} tokens at most", f"lower {name}")
        model = self.load(dtype)
        model.config.use_cache = False  # in training; generation says itself that it wants one
        self._shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None) or self._shift(model.config)
        model.generation_config = generation.settings(self.config, self.processor, model)
        self._begin(model.generation_config)
        return model

    def _shift(self, model_config: Any) -> Any:
        """For models that shift labels in their forward only."""
        start = model_config.decoder_start_token_id

        def shifted(labels: torch.Tensor) -> torch.Tensor:
            return F.pad(labels[:, :-1], (1, 0), value=start).masked_fill(labels == -100, self.processor.pad_token_id)

        return shifted

    def _begin(self, how: Any) -> None:
        """Generation begins as in training: the same start token, and the target's language where labels have it."""
        labels = self.processor(text_target=["a"])["input_ids"][0]
        how.decoder_start_token_id = int(self._shifted(labels=torch.tensor([labels]))[0, 0])
        if self.config.target_language:
            code = language(self.processor, self.config.target_language)
            how.forced_bos_token_id = code if labels[0] == code else None

    def head(self, model: Any) -> list[str]:
        return generation.head(model) if self.config.method == "head" else []

    # ---- features

    def truncates(self, split: str, role: str | None) -> str:
        if role == "target" and split != "train":
            return "are cut for the loss; scores compare with the whole text"
        return "are cut"

    def encode(self, rows: Dataset, split: str) -> Dataset:
        def features(columns: dict[str, list], at: list[int]) -> dict[str, list]:
            made = dict(self.tokenize([self.config.prefix + str(one or "") for one in columns["source"]]))
            made = {"input_ids": made["input_ids"], "row": at}
            if "target" in columns:
                texts = [str(one or "") for one in columns["target"]]
                most = self.config.max_target_length
                made["labels"] = self.processor(text_target=texts, truncation=True, max_length=most)["input_ids"]
                if split != "train":
                    made["target"] = texts
            return made

        return text.mapped(rows, features)

    def length(self, feature: dict[str, Any]) -> int:
        return len(feature["input_ids"]) + len(feature.get("labels") or ())

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = text.pad(self.processor, [{"input_ids": one["input_ids"]} for one in features])
        if "labels" in features[0]:
            longest = max(len(one["labels"]) for one in features)
            filled = [[*one["labels"], *[-100] * (longest - len(one["labels"]))] for one in features]
            batch["labels"] = torch.tensor(filled)
            batch["decoder_input_ids"] = self._shifted(labels=batch["labels"])
        return batch

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in batch.items() if name != "labels"}

    def count(self, batch: dict[str, Any]) -> int:
        return int(batch["attention_mask"].sum() + (batch["labels"] != -100).sum())

    def resize(self, batch: dict[str, Any], size: int) -> dict[str, Any]:
        """The first ``size`` tokens of sources and of targets."""
        read = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return text.cut(read, size, self.processor) | {
            name: value[:, :size] for name, value in batch.items() if name not in read
        }

    # ---- learning and judging

    def loss(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Mean over the targets' tokens; smoothed in training only."""
        learnt = batch["labels"] != -100
        logits, labels = generation.wide(outputs["logits"][learnt]), batch["labels"][learnt]
        smoothing = self.config.label_smoothing if torch.is_grad_enabled() else 0.0
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing) / max(1, len(labels))

    def written(self, ids: Any) -> list[str]:
        """Texts of token ids that may be padded with -100."""
        ids = np.where(np.asarray(ids) < 0, self.processor.pad_token_id, np.asarray(ids))
        return [one.strip() for one in self.processor.batch_decode(ids, skip_special_tokens=True)]

    def metrics(self, prediction: Any, features: Dataset) -> dict[str, float]:
        return self.judge(self.written(text.first(prediction.predictions)), list(features["target"]))

    def judge(self, answers: list[str], truths: list[str]) -> dict[str, float]:
        """The scores of answers."""
        raise NotImplementedError

    def show(self, output: Any, features: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        answers, truths = self.written(text.first(output.predictions)), list(features["target"])
        lines = [
            [text.shown(rows[features[i]["row"]]["source"]), text.shown(truths[i]), text.shown(answers[i])]
            for i in range(min(SAMPLES, len(answers)))
        ]
        head = ["source", "truth", "the model's"]
        found = [{"kind": "table", "title": "Written by the model", "head": head, "rows": lines}]
        words = [[len(one.split()) for one in texts] for texts in (truths, answers)]
        sizes = [[name, *_spread(sizes)] for name, sizes in zip(head[1:], words, strict=True)]
        head = ["", "shortest", "median", "longest", "empty"]
        return [*found, {"kind": "table", "title": "Words of an answer", "head": head, "rows": sizes}]

    # ---- use

    def predict(self, model: Any, rows: Dataset) -> list[dict[str, Any]]:
        features = self.encode(rows.select_columns(["source"]), "predict")
        size = self.config.eval_batch_size or 2 * self.config.batch_size
        device = next(model.parameters()).device
        answers = [""] * len(features)
        with text.evaluating(model), torch.no_grad():
            for places in generation.batches([len(ids) for ids in features["input_ids"]], size):
                batch = {name: value.to(device) for name, value in self.collate([features[i] for i in places]).items()}
                out = model.generate(**batch, generation_config=model.generation_config)
                for place, answer in zip(places, self.written(out.cpu()), strict=True):
                    answers[place] = answer
        return [{self.answer: one} for one in answers]


def languages(tokenizer: Any) -> list[str]:
    """The language codes of a multilingual tokenizer."""
    if codes := getattr(tokenizer, "lang_code_to_id", None):
        return sorted(codes)
    return sorted(name for name in tokenizer.all_special_tokens if LANGUAGE.fullmatch(name))


def language(tokenizer: Any, code: str) -> int | None:
    """The token of a language; None where the tokenizer does not know it."""
    known = getattr(tokenizer, "lang_code_to_id", None) or {}
    if code in known or hasattr(tokenizer, "get_lang_id"):
        return known.get(code)
    found = tokenizer.convert_tokens_to_ids(code)
    return None if found is None or found == tokenizer.unk_token_id or code not in languages(tokenizer) else found


def _spread(sizes: Sequence[int]) -> list[Any]:
    return [min(sizes), int(np.median(sizes)), max(sizes), sum(size == 0 for size in sizes)] if sizes else [""] * 4
