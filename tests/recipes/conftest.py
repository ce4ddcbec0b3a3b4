"""A model of two layers and sentences that it can learn in seconds, as files: what a user brings."""

import csv
import random
import signal

import pytest

GOOD, BAD = ("fine", "lovely", "great", "warm"), ("poor", "dull", "awful", "cold")
REST = ("the", "a", "film", "plot", "cast", "was", "is", "and", "very", "quite", "end", "music", "scene", "long", "it")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, label): the one word of feeling among others decides. No two alike."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        label = ("negative", "positive")[len(found) % 2]
        words = draw.choices(REST, k=draw.randint(3, 12)) + [draw.choice(GOOD if label == "positive" else BAD)]
        draw.shuffle(words)
        found.setdefault(" ".join(words), label)
    return list(found.items())


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A folder with a BERT of random weights, hidden size 32, and its tokenizer."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    words = [*SPECIAL, *GOOD, *BAD, *REST]
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        config = BertConfig(vocab_size=len(words), max_position_embeddings=32, initializer_range=0.2, **sizes)
        model = BertForMaskedLM(config)
        # what a pretrained model knows: words of one kind have something in common
        table, kind = model.get_input_embeddings().weight.data, torch.randn(32)
        for sign, kin in ((1, GOOD), (-1, BAD)):
            table[[words.index(word) for word in kin]] += sign * kind
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory):
    """{split: csv} of sentences with labels."""
    folder, rows = tmp_path_factory.mktemp("rows"), sentences(160, seed=3)
    parts = {"train": rows[:96], "validation": rows[96:128], "test": rows[128:]}
    for name, part in parts.items():
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *part])
    return {name: str(folder / f"{name}.csv") for name in parts}


def usual(model, data, out) -> dict:
    """Options of a run that takes a second or two and learns."""
    return dict(
        task="sequence-classification",
        model=str(model),
        data=data,
        out=str(out),
        dtype="fp32",
        epochs=2,
        batch_size=16,
        learning_rate=1e-2,
        r=4,
        log_every=2,
        device="cpu",
    )


@pytest.fixture
def options(tiny_bert, reviews, tmp_path):
    """The usual ones, in a folder of the test's own."""
    return usual(tiny_bert, reviews, tmp_path / "run")


@pytest.fixture(scope="session")
def whole(tiny_bert, reviews, tmp_path_factory):
    """A run of the usual options that nobody disturbed."""
    from peft_fast.recipes import run

    out = tmp_path_factory.mktemp("runs") / "whole"
    return run.train(usual(tiny_bert, reviews, out), say=lambda line: None)


@pytest.fixture
def learn(options, monkeypatch):
    """learn(callbacks=..., **more options) -> Run, its .said the lines. No forecast: that is a third of the time."""
    from peft_fast.recipes import run

    monkeypatch.setattr(run, "forecast_of", lambda prepared: {})

    def go(callbacks=(), **more):
        said = []
        made = run.train(options | more, callbacks=callbacks, say=said.append)
        made.said = said
        return made

    return go


@pytest.fixture
def at_step():
    """at_step(n, what) -> a callback that calls ``what`` at the end of step n."""
    from transformers import TrainerCallback

    class At(TrainerCallback):
        def __init__(self, step, what):
            self.step, self.what = step, what

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                self.what(kwargs["model"])

    return At


@pytest.fixture
def signalled(at_step):
    """signalled(n, signum) -> a callback by which this process gets a signal in step n."""
    return lambda step, signum=signal.SIGINT: at_step(step, lambda model: signal.raise_signal(signum))


@pytest.fixture
def best_at(monkeypatch):
    """best_at(step): that evaluation is the best, whatever it found."""
    from peft_fast.recipes.trainer import RecipeTrainer

    inner = RecipeTrainer.evaluate

    def at(step):
        def evaluate(self, *args, **kwargs):
            found = inner(self, *args, **kwargs)
            return found | {"eval_accuracy": 1.0 - abs(self.state.global_step - step) / 1000}

        monkeypatch.setattr(RecipeTrainer, "evaluate", evaluate)

    return at
