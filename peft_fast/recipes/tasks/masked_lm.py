"""Guess tokens that were hidden: a model goes on learning a language, or a field's way to speak.

loss = mean of -log p(token) over the chosen share of tokens; of these 80 % read [MASK], 10 % another token, 10 % stay
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from peft_fast.errors import DataError, UnsupportedError, fail
from peft_fast.recipes.tasks import Column, classes, text

if TYPE_CHECKING:
    from datasets import Dataset

TEXTS = ("sentence", "content", "document", "review", "body", "article", "source")
SAMPLES, AROUND = 20, 12  # guesses shown, and tokens on each side of one
ANSWERS = 5  # that predict() gives for a mask


class Task(text.TextTask):
    columns = (Column("text", "text", TEXTS),)
    auto = "AutoModelForMaskedLM"
    metric = "loss"
    judged_by = {"loss": False, "perplexity": False, "accuracy": True}

    def too_long(self, rows: Dataset) -> None:
        """Texts are put one after the other and divided into blocks: none is too long."""
        return None

    # ---- model

    def load_processor(self) -> None:
        super().load_processor()
        if self.processor.mask_token_id is None:
            given = f"model: {self.config.model}, whose tokenizer has no mask token"
            fail(UnsupportedError, given, "a model that learnt with masks, such as BERT", "take task: causal-lm")
        self.processor.padding_side = "right"

    def load_model(self, dtype: torch.dtype) -> Any:
        return self.load(dtype)

    def head(self, model: Any) -> list[str]:
        """With method `head` all around the body; else the layers that the checkpoint had nothing for.

        Never what holds the embeddings a second time: an adapter would carry and train a copy of them.
        """
        if self.config.method == "head":
            return super().head(model)
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        owners = sorted({name.rpartition(".")[0] for name in self.fresh})
        table = plain.get_input_embeddings().weight
        return [
            owner
            for owner in owners
            if owner
            and not any(True for _ in plain.get_submodule(owner).children())
            and all(one is not table for one in plain.get_submodule(owner).parameters())
        ]

    # ---- features

    def encode(self, rows: Dataset, split: str) -> Dataset:
        """Blocks of `limit` tokens. Evaluation gets its masks here, once, so that evaluations compare."""
        before, after = self._frame()
        room = self.limit - len(before) - len(after)
        end = self.processor.sep_token_id if self.processor.sep_token_id is not None else self.processor.eos_token_id
        between = [] if end is None else [end]

        import datasets

        stream: list[int] = []
        owners: list[int] = []
        texts = rows["text"][:]
        for start in range(0, len(texts), 1000):
            part = [str(one) for one in texts[start : start + 1000]]
            coded = self.processor(part, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
            for place, ids in enumerate(coded, start):
                if ids:
                    stream += ids + between
                    owners += [place] * (len(ids) + len(between))
        blocks = [slice(start, start + room) for start in range(0, len(stream), room)]
        made: dict[str, list] = {"input_ids": [before + stream[block] + after for block in blocks]}
        made["row"] = [owners[block.start] for block in blocks]
        if split != "train":
            generator = torch.Generator().manual_seed(self.config.seed)
            masked = [self._mask(torch.tensor([ids]), generator) for ids in made["input_ids"]]
            made["input_ids"] = [ids[0].tolist() for ids, _ in masked]
            made["labels"] = [labels[0].tolist() for _, labels in masked]
        return datasets.Dataset.from_dict(made)

    def asked(self) -> str:
        share, seed = self.config.mask_share, self.config.seed
        return f"{share:g} of the tokens of blocks of {self.limit}, drawn by seed {seed}"

    def _frame(self) -> tuple[list[int], list[int]]:
        """The special tokens before and behind a text."""
        inner = self.processor("a", add_special_tokens=False)["input_ids"]
        whole = self.processor("a")["input_ids"]
        for start in range(len(whole) - len(inner) + 1):
            if inner and whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
        return [], []

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = text.pad(self.processor, features)
        if "labels" not in batch:
            batch["input_ids"], batch["labels"] = self._mask(batch["input_ids"], None)
        return batch

    def _mask(self, ids: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, L) -> what the model reads, and the labels: -100 where nothing is asked."""
        special = torch.tensor(sorted(set(self.processor.all_special_ids)))
        able = ~torch.isin(ids, special)
        drawn = torch.rand(ids.shape, generator=generator)
        chosen = able & (drawn < self.config.mask_share)
        # a short row may be spared: then its likeliest token is asked
        spared = able.any(1) & ~chosen.any(1)
        if spared.any():
            lowest = drawn.masked_fill(~able, 2.0).argmin(1)
            chosen[spared.nonzero().flatten(), lowest[spared]] = True
        labels = ids.masked_fill(~chosen, -100)
        kind = torch.rand(ids.shape, generator=generator)
        other = torch.randint(len(self.processor), ids.shape, generator=generator)
        read = torch.where(chosen & (kind < 0.8), torch.full_like(ids, self.processor.mask_token_id), ids)
        return torch.where(chosen & (kind >= 0.9), other, read), labels

    # ---- learning and judging

    def loss(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        return classes.loss(outputs["logits"], batch["labels"], None, classes.smoothing(self.config))

    def keep_logits(self, logits: Any, labels: Any) -> Any:
        """(B, L, V) -> (B, L, 2): the best token, and -log p of the true one."""
        logits = text.first(logits).float()
        asked = labels != -100
        losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return torch.stack([logits.argmax(-1).float().masked_fill(~asked, -1), losses], -1)

    def metrics(self, prediction: Any, features: Dataset) -> dict[str, float]:
        answers, losses, truth = _asked(prediction)
        if not len(truth):
            return {}
        return {
            "perplexity": math.exp(min(float(losses.mean()), 700.0)),  # float64 ends at e^709
            "accuracy": float((answers == truth).mean()),
        }

    def show(self, output: Any, features: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        lines, say = [], self.processor.decode
        step = max(1, len(features) // SAMPLES)
        for place in range(0, len(features), step):
            ids, truth = features[place]["input_ids"], output.label_ids[place]
            asked = [i for i in range(len(ids)) if truth[i] != -100]
            if asked and len(lines) < SAMPLES:
                i = asked[len(asked) // 2]
                answer, loss = output.predictions[place][i]
                around = say([*ids[max(0, i - AROUND) : i], self.processor.mask_token_id, *ids[i + 1 : i + AROUND]])
                cells = [text.shown(around), say([int(truth[i])]), say([int(answer)]), round(math.exp(-float(loss)), 4)]
                lines.append(cells)
        head = ["text", "truth", "answer", "probability of the truth"]
        return [{"kind": "table", "title": "Hidden tokens", "head": head, "rows": lines}]

    # ---- use

    def predict(self, model: Any, rows: Dataset) -> list[dict[str, Any]]:
        """For each mask in a text its likeliest tokens, and the text with the best of them."""
        mask, found = self.processor.mask_token, []
        texts = [str(one) for one in rows["text"][:]]
        if wrong := [place for place, one in enumerate(texts, 1) if mask not in one]:
            given = f"row {wrong[0]}: {text.shown(texts[wrong[0] - 1], 80)!r} without {mask}"
            fail(DataError, given, f"a text with {mask} where a token is to be found", f"write {mask} into the text")

        def coded(columns: dict[str, list], at: list[int]) -> dict[str, list]:
            ids = self.tokenize(columns["text"])["input_ids"]
            # labels: these texts have their masks, the collator draws none
            return {"input_ids": ids, "labels": [[-100] * len(row) for row in ids], "row": at}

        features = text.mapped(rows, coded)
        answers: list[Any] = [None] * len(features)
        for places, batch, output in self.forward(model, features):
            for place, ids, logits in zip(places, batch["input_ids"], output["logits"], strict=True):
                here = (ids == self.processor.mask_token_id).nonzero().flatten()
                answers[place] = logits[here].float().softmax(-1).topk(min(ANSWERS, logits.shape[-1]))
        for one, (shares, ids) in zip(texts, answers, strict=True):
            masks = [
                [
                    {"token": self.processor.decode([token]).strip(), "score": round(share, 6)}
                    for share, token in zip(row, tokens, strict=True)
                ]
                for row, tokens in zip(shares.tolist(), ids.tolist(), strict=True)
            ]
            for row in ids.tolist():
                one = self._filled(one, row[0])
            found.append({"text": one, "masks": masks})
        return found

    def _filled(self, one: str, token: int) -> str:
        """The text with the token at its first mask: a piece of a word is joined to what stands before."""
        before, _, after = one.partition(self.processor.mask_token)
        piece = self.processor.convert_ids_to_tokens(token)
        begins = piece.startswith(("Ġ", "▁")) or not any(mark in self.processor.get_vocab() for mark in ("Ġ", "▁"))
        joins = piece.startswith("##") or not begins
        word = self.processor.decode([token]).strip().removeprefix("##")
        return (before.rstrip(" ") if joins else before) + word + after


def _asked(output: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(answers, losses, truth) of all tokens that were asked."""
    pairs: Iterable[Any] = zip(output.predictions, output.label_ids, strict=True)
    kept = [(row[truth != -100], truth[truth != -100]) for row, truth in pairs]
    guesses = np.concatenate([row for row, _ in kept]) if kept else np.zeros((0, 2))
    truth = np.concatenate([truth for _, truth in kept]) if kept else np.zeros(0)
    return guesses[:, 0].astype(int), guesses[:, 1].astype(np.float64), truth.astype(int)
