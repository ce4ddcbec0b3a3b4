"""The next token of a text or of what an assistant says: −Σ log p(xₜ | x₍<ₜ₎) over the tokens to learn.

Labels stand under their own tokens, the model shifts them; the first token of a sequence is nobody's next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from peft_fast.errors import DataError, SettingsError, UnsupportedError, fail
from peft_fast.recipes.tasks import Column, Problem, chat, generation, packing, text

if TYPE_CHECKING:
    from datasets import Dataset

TEXTS = ("content", "sentence", "document", "body", "story", "article", "review", "code")
SAMPLES = 8
SCORED = 4096  # tokens whose logits are float32 at once in evaluation


class Task(text.TextTask):
    columns = (
        Column("text", "text", TEXTS, False),
        Column("messages", "messages", ("conversations", "conversation", "dialog", "dialogue", "chat", "turns"), False),
        Column("prompt", "text", ("instruction", "question", "query"), False),
        Column("input", "text", ("context",), False),
        Column("completion", "text", ("output", "response", "answer"), False, truth=True),
        Column("system", "text", ("system_prompt",), False),
    )
    auto = "AutoModelForCausalLM"
    peft = "CAUSAL_LM"
    metric = "perplexity"
    judged_by = {"loss": False, "perplexity": False, "token_accuracy": True}

    def __init__(self, config: Any, facts: dict[str, Any] | None = None) -> None:
        super().__init__(config, facts)
        self.model: Any = None  # for the report's samples, once an evaluation has begun
        self.balance = 0.0  # weight in the loss of how evenly a mixture of experts is used
        self._made: dict[str, list[Any]] = {}  # by the rows' fingerprint, from the checks to encode
        self._ends: list[int] = []

    # ---- rows

    def learn(self, splits: dict[str, Dataset]) -> None:
        for split, rows in splits.items():
            found = chat.form(rows.column_names)
            if found is None or found != self.facts.setdefault("form", found):
                given = (
                    f"{split}: columns {', '.join(name for name in rows.column_names if name != 'row') or 'of no use'}"
                )
                need = chat.FORMS if found is None else f"{self.facts['form']}, as in the training rows"
                do = "name the columns: columns: {text: …}, {messages: …} or {prompt: …, completion: …}"
                fail(DataError, given, need, do)

    def check(self, splits: dict[str, Dataset]) -> Iterator[Problem]:
        for split, rows in splits.items():
            marked: list[tuple[int, str]] = []
            for place, made in enumerate(self._tokenized(rows)):
                if isinstance(made, chat.Bad):
                    yield self._problem(splits, split, place, made.column, made.what, made.fix)
                elif made[2]:
                    marked.append((place, made[2]))
            if marked:
                place, what = marked[0][0], f"{marked[0][1]!r}, which the model reads as a control token"
                what += f"; so do {len(marked) - 1:,} more rows" if len(marked) > 1 else ""
                yield self._problem(
                    splits, split, place, self._column, what, "Take it out, unless it is meant", stops=False
                )

    def _problem(self, splits: Any, split: str, place: int, role: str | None, what: str, fix: str, **more: Any) -> Any:
        column = splits.names.get(role, role)
        row = splits[split]["row"][place]
        return Problem(splits.file(split, place), row, column, what, fix, index=place, split=split, **more)

    def too_long(self, rows: Dataset) -> tuple[list[int], int]:
        made = self._tokenized(rows)
        return [0 if isinstance(one, chat.Bad) else len(one[0]) for one in made], self.limit

    # ---- model

    def load_processor(self) -> None:
        super().load_processor()
        tokenizer = self.processor
        if tokenizer.eos_token_id is None:
            given = f"model: {self.config.model}, whose tokenizer has no end token"
            fail(UnsupportedError, given, "an eos_token, which ends what the model writes", "set one and save it")
        if self.facts.get("chat_template"):
            tokenizer.chat_template = self.facts["chat_template"]
        elif self.facts["form"] != "text":
            self._template(tokenizer)
        elif self.config.chat_template not in ("auto", "none"):
            given = f"chat_template: {self.config.chat_template}, and rows of plain text"
            fail(SettingsError, given, "rows of messages, or of prompt and completion", "leave it out")

    def _template(self, tokenizer: Any) -> None:
        """Sets the template that the config asks for; one that is not the tokenizer's own goes into the facts."""
        asked = self.config.chat_template
        if asked == "none":
            if self.facts["form"] != "prompt":
                need = "rows of prompt and completion: messages need a template"
                fail(SettingsError, "chat_template: none", need, "leave it out, or pass a file")
            return
        if asked != "auto":
            try:
                tokenizer.chat_template = Path(asked).expanduser().read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                fail(SettingsError, f"chat_template: {asked}: {error}", "a Jinja file", "check the path", error)
            try:
                chat.render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
            except chat.Bad as error:
                given = f"chat_template: {asked}: {error.what}"
                fail(SettingsError, given, "a template that takes a question and an answer", "correct it", error)
        elif not tokenizer.chat_template:
            tokenizer.chat_template = chat.plain_template(tokenizer)
        else:
            return
        self.facts["chat_template"] = tokenizer.chat_template

    def load_model(self, dtype: torch.dtype) -> Any:
        model = self.load(dtype)
        if getattr(model.config, "output_router_logits", False):
            self.balance = float(getattr(model.config, "router_aux_loss_coef", 0.0))
        model.generation_config = generation.settings(self.config, self.processor, model, self._stops())
        if self.config.packing and not next(model.parameters()).is_meta and (why := packing.refusal(model)):
            given = f"packing: true with {type(model).__name__}: {why}"
            need = "a model in which sequences of one row do not see each other"
            fail(UnsupportedError, given, need, "packing: false, or attn_implementation: sdpa in model_options")
        return model

    def head(self, model: Any) -> list[str]:
        return generation.head(model) if self.config.method == "head" else []

    # ---- features

    @property
    def _plain(self) -> bool:
        """Whether rows are texts as they are, without roles."""
        return self.facts["form"] == "text" or (self.config.chat_template == "none" and self.facts["form"] == "prompt")

    def _stops(self) -> list[int]:
        """The tokens at which the model has said all."""
        if not self._ends:
            self._ends = [self.processor.eos_token_id] if self._plain else chat.stops(self.processor)
        return self._ends

    def _written(self, row: dict[str, Any]) -> tuple[str, list[tuple[int, int]], str | None]:
        """A row's text, the places in it that are learnt, and a control token that its words hold."""
        if self.facts["form"] == "text":
            whole = str(row.get("text") or "")
            learnt, said = [(0, len(whole))], [whole]
        elif self._plain:
            prompt, answer = self._halves(row)
            whole, said = prompt + answer, [prompt, answer]
            learnt = [(len(prompt), len(whole))]
        else:
            messages = chat.messages(row, self.facts["form"])
            whole, learnt = (
                chat.spans(self.processor, messages)
                if self.config.loss_on == "answers"
                else (chat.render(self.processor, messages), [])
            )
            said = [one["content"] for one in messages if isinstance(one.get("content"), str)]
        if self.config.loss_on == "all":
            learnt = [(0, len(whole))]
        if not learnt:
            raise chat.Bad(self._column, "the assistant says nothing", "Add an answer, or learn with loss_on: all")
        found = next((match for one in said if (match := chat.control(self.processor).search(one))), None)
        return whole, learnt, found and found[0]

    def _halves(self, row: dict[str, Any], answered: bool = True) -> tuple[str, str]:
        asked = [str(row[name]) for name in ("system", "prompt", "input") if str(row.get(name) or "").strip()]
        answer = str(row.get("completion") or "") if answered else ""
        if not asked or (answered and not answer.strip()):
            raise chat.Bad("completion" if asked else "prompt", "empty", "Fill it, or remove the row")
        return "\n\n".join(asked), answer

    @property
    def _column(self) -> str:
        return {"prompt": "completion"}.get(self.facts["form"], self.facts["form"])

    def _tokenized(self, rows: Dataset) -> list[Any]:
        """Of each row (ids, learnt, control token), uncut, or chat.Bad; kept until other rows come."""
        if rows._fingerprint in self._made:
            return self._made[rows._fingerprint]
        made: list[Any] = []
        for start in range(0, len(rows), 1000):
            made += self._batch([rows[i] for i in range(start, min(start + 1000, len(rows)))])
        self._made[rows._fingerprint] = made
        return made

    def _batch(self, rows: Sequence[dict[str, Any]]) -> list[Any]:
        written: list[Any] = []
        for row in rows:
            try:
                written.append(self._written(row))
            except chat.Bad as error:
                written.append(error)
        good = [one for one in written if not isinstance(one, chat.Bad)]
        encoded = iter(chat.tokens(self.processor, [o[0] for o in good], [o[1] for o in good], special=self._plain))
        return [one if isinstance(one, chat.Bad) else self._row(*next(encoded), one[2]) for one in written]

    def _row(self, ids: list[int], learnt: list[bool], control: str | None) -> Any:
        end = self.processor.eos_token_id
        if self._plain:
            learnt = [is_learnt or self.config.loss_on == "all" or self.facts["form"] == "text" for is_learnt in learnt]
            if ids and ids[-1] == end:
                learnt[-1] = True
        # a template that has nothing to end a turn with leaves that to the end of text
        if not ids or (ids[-1] != end and (self._plain or (learnt[-1] and ids[-1] not in self._stops()))):
            ids, learnt = [*ids, end], [*learnt, True]
        if not any(learnt[1 : self.limit]):
            what = f"its first {self.limit} tokens hold nothing to learn" if any(learnt[1:]) else "nothing to learn"
            fix = "Raise max_length, or shorten what stands before the answer"
            return chat.Bad(self._column, what, fix)
        return np.asarray(ids, np.int32), np.asarray(learnt, bool), control

    def encode(self, rows: Dataset, split: str) -> Dataset:
        import datasets

        features = []
        for place, made in enumerate(self._tokenized(rows)):
            if isinstance(made, chat.Bad):
                row = rows[place].get("row") or place + 1
                fail(DataError, f"{split}, row {row}, column {made.column}: {made.what}", "rows to learn", made.fix)
            ids, learnt = (part[: self.limit] for part in made[:2])
            labels = np.where(learnt, ids, -100)
            labels[0] = -100
            features.append({"input_ids": ids.tolist(), "labels": labels.tolist(), "row": place})
        del self._made[rows._fingerprint]
        if self.config.packing and split == "train":
            rows_of = packing.bins([len(one["input_ids"]) for one in features], self.limit)
            features = [packing.join([features[i] for i in places]) for places in rows_of]
        names = list(features[0]) if features else ["input_ids", "labels", "row"]
        return datasets.Dataset.from_dict({name: [one[name] for one in features] for name in names})

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(one["input_ids"]) for one in features)
        packed = "position_ids" in features[0]

        def filled(name: str, value: int) -> torch.Tensor:
            return torch.tensor([[*one[name], *[value] * (longest - len(one[name]))] for one in features])

        batch = {"input_ids": filled("input_ids", self.processor.pad_token_id), "labels": filled("labels", -100)}
        if packed:  # a padding token is a sequence of its own; an attention_mask would make one mask of all
            return batch | {"position_ids": filled("position_ids", 0)}
        lengths = torch.tensor([len(one["input_ids"]) for one in features])
        return batch | {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in batch.items() if name != "labels"}
        # with a cache transformers does not look for packed rows, and lets their sequences see each other
        return given | ({"use_cache": False} if "position_ids" in batch else {})

    def count(self, batch: dict[str, Any]) -> int:
        if "position_ids" not in batch:
            return super().count(batch)
        places = batch["position_ids"]
        follows = F.pad(places[:, 1:], (0, 1)) == places + 1
        return int(((places > 0) | follows).sum())  # a sequence has two tokens or more, padding is a row of zeros

    def resize(self, batch: dict[str, Any], size: int) -> dict[str, Any]:
        """The first ``size`` tokens; where these hold nothing to learn, the ``size`` up to the last that is learnt."""
        labels = batch["labels"]
        if labels.shape[1] <= size:
            return batch
        learnt = labels != -100
        last = labels.shape[1] - 1 - learnt.flip(1).int().argmax(1)
        start = torch.where(learnt[:, 1:size].any(1) | ~learnt.any(1), 0, (last - size + 1).clamp(min=0))
        places = start[:, None] + torch.arange(size, device=labels.device)
        cut = {name: value.gather(1, places) for name, value in batch.items()}
        cut["labels"][:, 0] = -100
        return cut

    # ---- learning and judging

    def loss(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Mean over the learnt tokens, which alone are turned to float32; smoothed in training only."""
        learnt = batch["labels"][:, 1:] != -100
        logits, labels = generation.wide(outputs["logits"][:, :-1][learnt]), batch["labels"][:, 1:][learnt]
        smoothing = self.config.label_smoothing if torch.is_grad_enabled() else 0.0
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing) / max(1, len(labels))
        uneven = outputs.get("aux_loss") if self.balance else None
        return loss if uneven is None else loss + self.balance * uneven

    def keep_logits(self, logits: Any, labels: Any) -> torch.Tensor:
        """(B, 3) of each row: Σ −log p, tokens that are the likeliest, tokens."""
        logits = text.first(logits)
        learnt = labels[:, 1:] != -100
        row, at = learnt.nonzero(as_tuple=True)
        found = torch.zeros(len(labels), 3, dtype=torch.float64, device=logits.device)
        for start in range(0, len(row), SCORED):
            part = slice(start, start + SCORED)
            scores, truth = logits[row[part], at[part]].float(), labels[row[part], at[part] + 1]
            right = scores.argmax(1) == truth
            values = torch.stack([F.cross_entropy(scores, truth, reduction="none"), right, torch.ones_like(right)], 1)
            found.index_add_(0, row[part], values.double())
        return found

    def evaluation_loop(self, trainer: Any, loader: Any, prefix: str) -> None:
        self.model = trainer.model

    def metrics(self, prediction: Any, features: Dataset) -> dict[str, float]:
        nats, right, tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(0)
        return {"perplexity": math.exp(min(nats / tokens, 700.0)), "token_accuracy": float(right / tokens)}

    def show(self, output: Any, features: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        """Beginnings of held-out rows, how they go on and how the model goes on."""
        if self.model is None or not len(features):
            return []
        chosen = [rows[features[i]["row"]] for i in range(min(SAMPLES, len(features)))]
        asked, prompts, truths = [], [], []
        for row in chosen:
            before, ids, truth = self._sample(row)
            asked, prompts, truths = [*asked, before], [*prompts, ids], [*truths, truth]
        answers = self._answers(self.model, prompts)
        head = ["text", "goes on", "the model goes on"] if self._plain else ["asked", "answer", "the model's answer"]
        lines = [[text.shown(one) for one in line] for line in zip(asked, truths, answers, strict=True)]
        return [{"kind": "table", "title": "Written by the model", "head": head, "rows": lines}]

    def _sample(self, row: dict[str, Any]) -> tuple[str, list[int], str]:
        """What the model is shown of a held-out row, its tokens, and what follows in truth."""
        if self.facts["form"] == "text":
            ids = self._open(str(row["text"]))
            kept = max(1, min(len(ids) // 3, self.limit // 2))
            return *(self.processor.decode(ids[:kept], skip_special_tokens=True), ids[:kept]), self.processor.decode(
                ids[kept : kept + self.config.max_new_tokens], skip_special_tokens=True
            )
        if self._plain:
            prompt, answer = self._halves(row)
            return prompt, self._open(prompt), answer
        said = chat.messages(row, self.facts["form"])
        asked = chat.question(said)
        last = next((one["content"] for one in said[len(asked) :] if isinstance(one.get("content"), str)), "")
        return str(asked[-1].get("content", "")), self._prompt(asked), last

    # ---- use

    def _open(self, words: str) -> list[int]:
        """A text that goes on: its tokens with the tokenizer's frame, without an end."""
        ids = list(self.processor(words)["input_ids"])
        while len(ids) > 1 and ids[-1] == self.processor.eos_token_id:
            ids.pop()
        return ids

    def _prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        written = chat.render(self.processor, messages, prompt=True)
        return list(self.processor(written, add_special_tokens=False)["input_ids"])

    def _asked(self, row: dict[str, Any]) -> list[int]:
        """The tokens that the model goes on from; a bare text is what the user says."""
        form = chat.form({name for name, value in row.items() if value is not None} | {"completion"})
        if self._plain and form == "messages":
            raise chat.Bad("messages", "this model has learnt texts without roles", "Give text, or prompt")
        if self._plain:
            return self._open(str(row.get("text") or "") if form == "text" else self._halves(row, answered=False)[0])
        if form == "text":
            return self._prompt([{"role": "user", "content": str(row["text"])}])
        return self._prompt(chat.question(chat.messages(row, form)))

    def _answers(self, model: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
        how = generation.settings(self.config, self.processor, model, self._stops())
        size = self.config.eval_batch_size or 2 * self.config.batch_size
        room = self._room(model)
        written = generation.continued(model, self.processor, [one[-room:] for one in prompts], size, how)
        return [self.processor.decode(ids, skip_special_tokens=True).strip() for ids in written]

    def _room(self, model: Any) -> int:
        """Tokens of a prompt at most, so that the answer has its place behind it."""
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return max(1, positions - self.config.max_new_tokens) if positions else 2**31

    def predict(self, model: Any, rows: Dataset) -> list[dict[str, Any]]:
        prompts = []
        for place, row in enumerate(rows):
            try:
                prompts.append(self._asked(row))
            except chat.Bad as error:
                given = f"row {row.get('row') or place + 1}, column {error.column}: {error.what}"
                fail(DataError, given, "a text, a prompt or messages to answer", error.fix)
        room, answers = self._room(model), self._answers(model, prompts)
        return [
            {"answer": answer} | ({"cut": len(prompt) - room} if len(prompt) > room else {})
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
