"""Gradual unfreezing under the Trainer: what trains when, and that a resumed run goes the same way bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Trainer, TrainerState, TrainingArguments

from peft_fast.recipes import optimizer
from peft_fast.recipes.unfreeze import Unfreezing, history
from tests.recipes.anytask import AnyTask, config, prepared, trained

ROWS = [
    {"input_ids": torch.tensor([5 + i % 7, 9, 11, 6 + i % 3]), "labels": torch.tensor(i % 2)} for i in range(16)
]  # fmt: skip


class Watching(Trainer):
    """Notes what trains at each step; evaluation answers what it is told."""

    def __init__(self, *args, recipe=None, answers=(), **kwargs):
        super().__init__(*args, **kwargs)
        self.recipe, self.answers, self.seen = recipe, list(answers), []

    def create_optimizer(self, model=None):
        self.optimizer = optimizer.build(self.model, *self.recipe)
        return self.optimizer

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.seen.append({n for n, p in self.model.named_parameters() if p.grad is not None})
        return loss

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": 1.0, "eval_accuracy": self.answers.pop(0)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def trainer(folder, answers=(), epochs=4, model="BERT", **options) -> Watching:
    given = config(method="gradual", learning_rate=1e-2, **options)
    net, task = prepared(model, **{"method": "gradual", "learning_rate": 1e-2, **options})
    net.train()
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        save_strategy="epoch",
        eval_strategy="epoch" if answers else "no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        restore_callback_states_from_checkpoint=True,
    )
    callback = Unfreezing(given, net, task)
    return Watching(
        net, args, train_dataset=ROWS, eval_dataset=ROWS, callbacks=[callback], recipe=(task, given), answers=answers
    )


def parts(names: set[str]) -> set[str]:
    """Which blocks, embeddings, head."""
    return {
        "head" if n.startswith(("classifier", "bert.pooler")) else n.split(".")[1 if "emb" in n else 3] for n in names
    }


def test_by_epoch_from_the_top(tmp_path):
    run = trainer(tmp_path)
    run.train()
    seen = [parts(names) for names in run.seen]
    assert seen[:4] == [{"head"}] * 4
    assert seen[4:8] == [{"head", "1"}] * 4
    assert seen[8:12] == [{"head", "1", "0"}] * 4
    assert seen[12:] == [{"head", "1", "0", "embeddings"}] * 4
    assert history(run) == [
        {"step": 0, "layers": ["head"]},
        {"step": 4, "layers": ["bert.encoder.layer.1"]},
        {"step": 8, "layers": ["bert.encoder.layer.0"]},
        {"step": 12, "layers": ["embeddings"]},
    ]


def test_what_is_frozen_has_no_state_and_does_not_move(tmp_path):
    run = trainer(tmp_path, epochs=1)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.train()
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained(run.model)
    assert parts(moved) == {"head"}
    states = {id(p) for p in run.optimizer.state}
    assert {n for n, p in run.model.named_parameters() if id(p) in states} == moved


@pytest.mark.parametrize("every, count, due", [(0.5, 1, [1, 2, 3, 4]), (1.0, 2, [1, 1, 3, 3]), (2.0, 1, [1, 1, 1, 1])])
def test_how_often_and_how_many(tmp_path, every, count, due):
    run = trainer(tmp_path, epochs=2, unfreeze_every=every, unfreeze_layers=count)
    run.train()
    assert [len(parts(names)) for names in run.seen[::2]] == due


def test_by_plateau(tmp_path):
    """After two evaluations without progress the next layers; the best value stays the mark."""
    answers = [0.5, 0.7, 0.6, 0.7, 0.8, 0.8]
    run = trainer(tmp_path, answers, 6, unfreeze_by="plateau", unfreeze_patience=2)
    run.train()
    assert [len(parts(names)) for names in run.seen[::4]] == [1, 1, 1, 1, 2, 2]
    assert [entry["step"] for entry in history(run)] == [0, 16]


def test_without_a_head_the_first_blocks_train_from_the_start(tmp_path):
    class Bare(AnyTask):
        def head(self, model):
            return []

    given = config(method="gradual")
    model, _ = prepared("OPT", method="gradual")
    callback = Unfreezing(given, model, Bare(given))
    callback.on_train_begin(None, TrainerState(), None, model=model)
    assert trained(model)
    assert any(".layers.1." in n for n in trained(model))
    assert not any("embed" in n for n in trained(model))


@pytest.mark.parametrize("stop", [6, 8, 13])
def test_a_resumed_run_goes_the_same_way(tmp_path, stop):
    """Killed after a checkpoint within an epoch or between two: weights, optimizer and layers as if it never was."""
    whole = trainer(tmp_path / "whole")
    whole.train()
    first = trainer(tmp_path / "cut")
    first.args.save_strategy = "steps"
    first.args.save_steps = stop
    first.args.max_steps = -1

    class Killed(Exception):
        pass

    original = first.training_step

    def step(*args, **kwargs):
        if first.state.global_step == stop:
            raise Killed
        return original(*args, **kwargs)

    first.training_step = step
    first.state.save_steps = stop
    with pytest.raises(Killed):
        first.train()
    second = trainer(tmp_path / "cut")
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert second.seen == whole.seen[stop:]
    assert history(second) == history(whole)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_state_is_json(tmp_path):
    run = trainer(tmp_path, epochs=2)
    run.train()
    found = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    kept = found["stateful_callbacks"]["Unfreezing"]["attributes"]
    assert kept["open"] == 2
    again = Unfreezing()
    vars(again).update(kept)
    assert again.history == history(run)
