"""Rows of text that two layers learn in seconds, and what the tests of text tasks do with a task."""

import json
import random
from types import SimpleNamespace

import torch

from peft_fast.recipes import checks, config, data, run, tasks
from tests.recipes.conftest import BAD, GOOD, REST

SIZES = {"train": 160, "validation": 48}


def files(folder, make, sizes=SIZES):
    """{split: path} of JSON lines; ``make(draw)`` gives a row. No row is there twice."""
    draw, seen, found = random.Random(5), set(), {}
    for split, size in sizes.items():
        rows = []
        while len(rows) < size:
            row = make(draw)
            if (key := json.dumps(row)) not in seen:
                seen.add(key)
                rows.append(row)
        path = folder / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[split] = str(path)
    return found


def words(draw, least=3, most=8):
    return draw.choices(REST, k=draw.randint(least, most))


def classes(draw):
    """The one word of feeling decides."""
    kind = draw.choice((GOOD, BAD))
    said = [*words(draw), draw.choice(kind)]
    draw.shuffle(said)
    return {"text": " ".join(said), "label": "positive" if kind is GOOD else "negative"}


def tagged(draw):
    """A good word is a span; with `very` before it, of two words. A bad word is none."""
    found = [(word, "O") for word in words(draw) if word != "very"]
    span = [(draw.choice(GOOD), "B-GOOD")]
    if draw.random() < 0.5:
        span = [("very", "B-GOOD"), (span[0][0], "I-GOOD")]
    for piece in (span, [(draw.choice(BAD), "O")]):
        at = draw.randint(0, len(found))
        if not (0 < at < len(found) and found[at][1] == "I-GOOD"):
            found[at:at] = piece
    return {"tokens": [word for word, _ in found], "tags": [tag for _, tag in found]}


def question(draw, none=0.0):
    """Which good word is in the text, or which bad one."""
    good, bad = draw.choice(GOOD), draw.choice(BAD)
    said = words(draw)
    for word in (good, bad):
        said.insert(draw.randint(0, len(said)), word)
    asked = draw.random() < 0.5
    answer = good if asked else bad
    if draw.random() < none:
        said = [word for word in said if word != answer]
        return {"question": "the fine end" if asked else "the poor end", "context": " ".join(said), "answers": []}
    return {"question": "the fine end" if asked else "the poor end", "context": " ".join(said), "answers": [answer]}


def echoes(draw):
    """One word again and again, between others: 13 tokens, so that with its end a text is a block of 16."""
    word = draw.choice(GOOD + BAD)
    return {"text": " ".join(draw.choice(REST) if draw.random() < 0.1 else word for _ in range(13))}


def rated(draw):
    """The rating: 10 and 5 more for each good word, 5 less for each bad one."""
    good, bad = draw.randint(0, 3), draw.randint(0, 3)
    said = words(draw) + draw.choices(GOOD, k=good) + draw.choices(BAD, k=bad)
    draw.shuffle(said)
    return {"text": " ".join(said), "rating": 10 + 5 * (good - bad), "good": good, "bad": 100 * bad}


def trained(task, model, found, folder, **options):
    """The Run of a fine-tuning of everything, one evaluation before it and one at its end."""
    given = dict(task=task, model=str(model), data=found, out=str(folder), method="full", dtype="fp32", device="cpu")
    given |= dict(learning_rate=1e-2, batch_size=16, epochs=6, evaluate_every=10_000, max_length=32, overwrite=True)
    return run.train(given | options, say=lambda text: None)


def ready(task, model, rows, **options):
    """(task, splits) checked, as run.py prepares them; ``rows``: {split: rows or path}."""
    given = dict(task=task, model=str(model), data="rows", dtype="fp32") | options
    made = tasks.get(task)(config.read(given))
    splits = splits_of(made, rows)
    made.learn(splits)
    made.load_processor()
    splits, notes = checks.run(splits, made, made.config)
    return made, splits, notes


def splits_of(task, rows):
    """Splits of lists of dicts."""
    splits = data.Splits()
    for split, part in rows.items():
        one = data.rows(part, task, need_truth=True)
        splits.add(split, one, f"{split}.jsonl")
    return splits


def judged(task, model, rows, split="validation"):
    """(prediction, features) over the rows, padded and put together as Trainer does."""
    features = task.encode(rows, split)
    names = task.label_names
    outputs, labels = [], []
    model.eval()
    for start in range(0, len(features), 8):
        batch = task.collate([features[i] for i in range(start, min(start + 8, len(features)))])
        with torch.no_grad():
            output = model(**task.inputs(batch))
        truth = batch[names[0]] if len(names) == 1 else tuple(batch[name] for name in names)
        logits = tuple(value for name, value in output.items() if name != "loss")
        outputs.append(task.keep_logits(logits if len(logits) > 1 else logits[0], truth))
        labels.append(truth)
    return SimpleNamespace(predictions=_joined(outputs), label_ids=_joined(labels)), features


def _joined(parts):
    if isinstance(parts[0], tuple):
        return tuple(_joined(list(column)) for column in zip(*parts, strict=True))
    longest = max(part.shape[1] for part in parts) if parts[0].ndim > 1 else 0
    padded = []
    for part in parts:
        room = longest - part.shape[1] if part.ndim > 1 else 0
        shape = [0, 0] * (part.ndim - 2) + [0, room]
        padded.append(torch.nn.functional.pad(part, shape, value=-100) if room else part)
    return torch.cat(padded).numpy()


def is_json(value):
    """Whether it is strict JSON: what metrics.json and predict's files can hold."""
    json.dumps(value, allow_nan=False)
    return True


class Features(dict):
    """Columns of features, as metrics() reads them."""

    def __init__(self, **columns):
        super().__init__(columns)


class Output(SimpleNamespace):
    """What Trainer hands to metrics()."""

    def __init__(self, predictions, label_ids):
        super().__init__(predictions=predictions, label_ids=label_ids)
