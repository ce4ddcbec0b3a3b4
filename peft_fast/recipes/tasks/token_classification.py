"""A tag for each word: named entities as BIO spans, parts of speech.

p = softmax(W h + b) at each word's first sub-token; the others have no label
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peft_fast.errors import DataError, UnsupportedError, fail
from peft_fast.recipes.tasks import Column, Problem, classes, loading, text

if TYPE_CHECKING:
    from datasets import Dataset

WORD = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")  # of a text that nobody has divided into words
PREFIX = re.compile(r"[BIESLU]-.")
SAMPLES = 20
Span = tuple[str, int, int]  # type, first word, last word


class Task(text.TextTask):
    columns = (
        Column("tokens", "tokens", ("words", "sentence_tokens")),
        Column("tags", "tags", ("ner_tags", "pos_tags", "labels", "ner", "pos", "tag")),
    )
    auto = "AutoModelForTokenClassification"
    peft = "TOKEN_CLS"
    metric = "f1"
    judged_by = {"loss": False, "precision": True, "recall": True, "f1": True, "accuracy": True}

    # ---- rows

    def learn(self, splits: dict[str, Dataset]) -> None:
        """The tags of all splits: rare ones may be in the test rows alone; counted in the training rows."""
        counted = Counter(tag for tags in splits["train"]["tags"] for tag in tags)
        everywhere = {tag for rows in splits.values() for tags in rows["tags"] for tag in tags}
        names = sorted(everywhere, key=lambda name: (name != "O", name[2:] if PREFIX.match(name) else name, name))
        spans = any(PREFIX.match(name) for name in names)
        self.facts |= {"labels": names, "counts": [counted[name] for name in names], "spans": spans}
        classes.weights(self.config, names, self.facts["counts"])

    def check(self, splits: dict[str, Dataset]) -> Iterator[Problem]:
        """As many tags as words, tags of one scheme, and tags that can be learnt."""
        column = splits.names.get("tags", "tags")
        unseen = [name for name, count in zip(self.facts["labels"], self.facts["counts"], strict=True) if not count]
        if unseen:
            what, fix = f"no row has the tag {', '.join(unseen)}", "It cannot be learnt: add rows that have it"
            yield Problem(splits.sources["train"], None, column, what, fix, stops=False)
        for split, rows in splits.items():
            columns = (rows[name] for name in ("tokens", "tags", "row"))
            for place, (words, tags, row) in enumerate(zip(*columns, strict=True)):
                if wrong := self._wrong(words, tags):
                    yield Problem(splits.file(split, place), row, column, *wrong, index=place, split=split)

    def _wrong(self, words: list[str], tags: list[str]) -> tuple[str, str] | None:
        if len(words) != len(tags):
            return f"{len(words)} words and {len(tags)} tags", "Give each word one tag"
        if self.facts["spans"]:
            for tag in tags:
                if tag != "O" and not PREFIX.match(tag):
                    return f"the tag {tag!r} has no B- or I- before it, as others have", "Write B-, I- and O"
        return None

    def too_long(self, rows: Dataset) -> tuple[Sequence[float], float] | None:
        found: list[int] = []
        words = list(rows["tokens"])
        for start in range(0, len(words), 1000):
            part = [[str(word) for word in row] for row in words[start : start + 1000]]
            ids = self.processor(part, is_split_into_words=True, truncation=False, verbose=False)["input_ids"]
            found += [len(row) for row in ids]
        return found, self.limit

    # ---- model

    def load_processor(self) -> None:
        super().load_processor()
        if not self.processor.is_fast:
            given = f"model: {self.config.model}, whose tokenizer does not say which token is of which word"
            fail(UnsupportedError, given, "a fast tokenizer (tokenizer.json)", "take another model for tags")
        if "ByteLevel" in _pre_tokenizer(self.processor):
            # words come one by one: without a space before each, they would all look like one long word
            self.processor = loading.load_processor(self.config, "AutoTokenizer", add_prefix_space=True)
            text.able_to_pad(self.processor, self.config)
        self.processor.padding_side = "right"

    def load_model(self, dtype: torch.dtype) -> Any:
        names = self.facts["labels"]
        return self.load(
            dtype, id2label=dict(enumerate(names)), label2id={name: place for place, name in enumerate(names)}
        )

    # ---- features

    def truncates(self, split: str, role: str | None) -> str:
        if split == "train":
            return "are cut in training; evaluation and prediction read rows whole"
        return "are read whole, in windows that overlap"

    def encode(self, rows: Dataset, split: str) -> Dataset:
        """Training cuts a row at the limit; elsewhere windows go over all of it, and each word counts once."""
        places = {name: place for place, name in enumerate(self.facts["labels"])}
        more = {} if split == "train" else {"return_overflowing_tokens": True, "stride": self.limit // 4}

        def features(columns: dict[str, list], at: list[int]) -> dict[str, list]:
            words = [[str(word) for word in row] for row in columns["tokens"]]
            coded = self.processor(
                words, is_split_into_words=True, truncation=True, max_length=self.limit, verbose=False, **more
            )
            owners = coded.get("overflow_to_sample_mapping") or list(range(len(words)))
            chosen = _firsts([coded.word_ids(i) for i in range(len(owners))], owners)
            made = {"input_ids": coded["input_ids"], "words": [list(one) for one in chosen]}
            made["firsts"] = [list(one.values()) for one in chosen]
            if "tags" in columns:
                made["labels"] = []
                for ids, firsts, owner in zip(coded["input_ids"], chosen, owners, strict=True):
                    labels = [-100] * len(ids)
                    for word, place in firsts.items():
                        tag = classes.name_of(columns["tags"][owner][word])
                        labels[place] = classes.index(tag, places, "tags")
                    made["labels"].append(labels)
            return made | {"row": [at[owner] for owner in owners]}

        return text.mapped(rows, features)

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return text.pad(self.processor, features, leave=("row", "words", "firsts"))

    # ---- learning and judging

    def loss(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        weight = classes.weights(self.config, self.facts["labels"], self.facts["counts"])
        return classes.loss(outputs["logits"], batch["labels"], weight, classes.smoothing(self.config))

    def keep_logits(self, logits: Any, labels: Any) -> Any:
        """(B, L, C) -> (B, L): the best tag is all that is judged."""
        return text.first(logits).argmax(-1)

    def _tagged(self, output: Any, features: Dataset) -> dict[int, tuple[list[str], list[str]]]:
        """Row -> (true tags, answered tags) of its words, put together from its windows."""
        names = self.facts["labels"]
        found: dict[int, dict[int, tuple[str, str]]] = {}
        for answers, truth, words, row in zip(
            output.predictions, output.label_ids, features["words"], features["row"], strict=True
        ):
            kept = truth != -100
            pairs = zip(words, truth[kept], answers[kept], strict=True)
            found.setdefault(row, {}).update({word: (names[t], names[a]) for word, t, a in pairs})
        return {
            row: tuple(list(column) for column in zip(*(pairs[word] for word in sorted(pairs)), strict=True))
            for row, pairs in found.items()
            if pairs
        }

    def metrics(self, prediction: Any, features: Dataset) -> dict[str, float]:
        tagged = list(self._tagged(prediction, features).values())
        truth, answers = [t for t, _ in tagged], [a for _, a in tagged]
        flat = [(t, a) for pair in tagged for t, a in zip(*pair, strict=True)]
        accuracy = sum(t == a for t, a in flat) / max(1, len(flat))
        if self.facts["spans"]:
            from seqeval import metrics

            truth, answers = [_bioes(t) for t in truth], [_bioes(a) for a in answers]
            names = ("precision", "recall", "f1")
            found = {name: getattr(metrics, f"{name}_score")(truth, answers, zero_division=0) for name in names}
        else:
            from sklearn import metrics

            scores = metrics.precision_recall_fscore_support(*zip(*flat, strict=True), average="macro", zero_division=0)
            found = dict(zip(("precision", "recall", "f1"), scores, strict=False))
        return {name: float(value) for name, value in found.items()} | {"accuracy": accuracy}

    def show(self, output: Any, features: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        tagged = self._tagged(output, features)
        flat = [(t, a) for pair in tagged.values() for t, a in zip(*pair, strict=True)]
        kinds = sorted({_kind(tag) for pair in flat for tag in pair}, key=lambda kind: (kind != "O", kind))
        places = {kind: place for place, kind in enumerate(kinds)}
        truth, answers = ([places[_kind(pair[side])] for pair in flat] for side in (0, 1))
        found = [classes.confusion(truth, answers, kinds), self._by_kind(tagged, truth, answers, kinds)]
        wrong = sorted(tagged, key=lambda row: tagged[row][0] == tagged[row][1])[:SAMPLES]
        lines = [[marked(rows[row]["tokens"], tags) for tags in tagged[row]] for row in wrong]
        found.append({"kind": "table", "title": "Samples, mistakes first", "head": ["truth", "answer"], "rows": lines})
        return found

    def _by_kind(self, tagged: dict, truth: list[int], answers: list[int], kinds: list[str]) -> dict[str, Any]:
        if not self.facts["spans"]:
            return classes.per_class(np.asarray(truth), np.asarray(answers), kinds)
        from seqeval.metrics import classification_report

        pairs = ([_bioes(pair[side]) for pair in tagged.values()] for side in (0, 1))
        report = classification_report(*pairs, output_dict=True, zero_division=0)
        rows = [
            [
                kind,
                *(round(float(values[key]), 4) for key in ("precision", "recall", "f1-score")),
                int(values["support"]),
            ]
            for kind, values in report.items()
            if not kind.endswith(" avg")
        ]
        return {
            "kind": "table",
            "title": "By type",
            "head": ["type", "precision", "recall", "F1", "spans"],
            "rows": rows,
        }

    # ---- use

    def predict(self, model: Any, rows: Dataset) -> list[dict[str, Any]]:
        """Each row's words with their tags, and the spans these make; places are characters of the words' text."""
        features, names = self.encode(self.questions(rows), "predict"), self.facts["labels"]
        found: list[dict[int, tuple[str, float]]] = [{} for _ in range(len(rows))]
        for places, _, output in self.forward(model, features):
            shares = output["logits"].float().softmax(-1).cpu()
            for place, row in zip(places, shares, strict=True):
                feature = features[place]
                for word, first in zip(feature["words"], feature["firsts"], strict=True):
                    best = int(row[first].argmax())
                    found[feature["row"]][word] = names[best], float(row[first, best])
        return [self._answer(row["tokens"], tags) for row, tags in zip(rows, found, strict=True)]

    def _answer(self, words: list[str], tags: dict[int, tuple[str, float]]) -> dict[str, Any]:
        # a word that the tokenizer makes nothing of, such as a lone control character, has no answer
        none = "O" if "O" in self.facts["labels"] else self.facts["labels"][0]
        tags = {place: tags.get(place, (none, 0.0)) for place in range(len(words))}
        answer: dict[str, Any] = {"tokens": list(words), "tags": [tag for tag, _ in tags.values()]}
        if self.facts["spans"]:
            ends = np.cumsum([len(word) + 1 for word in words]).tolist()
            answer["entities"] = [
                {
                    "type": kind,
                    "text": " ".join(words[first : last + 1]),
                    "start": ends[first] - len(words[first]) - 1,
                    "end": ends[last] - 1,
                    "score": round(sum(tags[word][1] for word in range(first, last + 1)) / (last - first + 1), 6),
                }
                for kind, first, last in spans(answer["tags"])
            ]
        return answer


def divide(sentence: str) -> list[str]:
    """Words and signs of a text."""
    words = WORD.findall(sentence)
    if not words:
        fail(DataError, f"the text {sentence!r}", "a text with a word in it", "correct the row")
    return words


def spans(tags: Sequence[str]) -> list[Span]:
    """BIO, IOB1, BIOES or BILOU tags to spans, as conlleval reads them."""
    from seqeval.metrics.sequence_labeling import get_entities

    return [tuple(entry) for entry in get_entities(_bioes(tags))]


def marked(words: Sequence[str], tags: Sequence[str]) -> str:
    """The words with their spans in brackets: `in [New York]LOC today`."""
    if any(tag != "O" and not PREFIX.match(tag) for tag in tags):
        return text.shown(" ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=False)))
    pieces = [str(word) for word in words]
    for kind, first, last in spans(tags):
        pieces[first] = f"[{pieces[first]}"
        pieces[last] = f"{pieces[last]}]{kind}"
    return text.shown(" ".join(pieces))


def _kind(tag: str) -> str:
    return tag[2:] if PREFIX.match(tag) else tag


def _bioes(tags: Sequence[str]) -> list[str]:
    """BILOU's L- and U- are BIOES' E- and S-."""
    return [{"L": "E", "U": "S"}.get(tag[0], tag[0]) + tag[1:] if PREFIX.match(tag) else tag for tag in tags]


def _firsts(word_ids: list[list[int | None]], owners: list[int]) -> list[dict[int, int]]:
    """Of each window the words it answers for: word -> place of its first token; of several windows the deepest."""
    best: dict[tuple[int, int], tuple[int, int, int]] = {}
    for window, (words, owner) in enumerate(zip(word_ids, owners, strict=True)):
        for place, word in enumerate(words):
            if word is None or (place and words[place - 1] == word):
                continue
            begins = place == 0 or words[place - 1] is None
            depth = min(place, len(words) - place)
            known = best.get((owner, word))
            # a window's first token may be the middle of a word that began in the window before
            if known is None or (depth > known[0] and not begins):
                best[owner, word] = depth, window, place
    found: list[dict[int, int]] = [{} for _ in owners]
    for (_, word), (_, window, place) in sorted(best.items(), key=lambda entry: (entry[1][1], entry[1][2])):
        found[window][word] = place
    return found


def _pre_tokenizer(tokenizer: Any) -> str:
    return json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"])
