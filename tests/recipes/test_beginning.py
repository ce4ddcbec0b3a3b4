"""Judged before training: every task, also where judging means writing, so that the beginning may be the best."""

import json

import pytest
import torch

from peft_fast.recipes import config as configs
from peft_fast.recipes import run, tasks
from peft_fast.recipes.process import device_of
from peft_fast.recipes.trainer import RecipeTrainer, arguments
from tests.recipes.runs import course, same

WRITING = ("translation", "summarization")


@pytest.mark.parametrize("name", configs.TASKS)
def test_every_task_is_judged_before_training_and_not_again_when_it_goes_on(name, tmp_path):
    config = configs.read(task=name, model="m", data="d", device="cpu")
    task = tasks.get(name)(config)
    made = [arguments(config, task, tmp_path, 8, device_of(config), resuming, {}) for resuming in (False, True)]
    assert [one.eval_on_start for one in made] == [True, False]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """written(task, **more) -> a Run of two steps whose metric needs what the model writes."""
    monkeypatch.setattr(run, "forecast_of", lambda prepared: {})  # half of the time
    lines = [json.dumps({"source": f"the number {i}", "target": f"le nombre {i}"}) for i in range(24)]

    def train(name, callbacks=(), **more):
        for split, part in (("train", lines[:16]), ("validation", lines[16:])):
            (tmp_path / f"{split}.jsonl").write_text("\n".join(part))
        given = dict(task=name, model="example:tiny-t5", data=str(tmp_path), method="full", learning_rate=1e-3, steps=2)
        given |= dict(max_new_tokens=3, batch_size=8, device="cpu", out=str(tmp_path / "run"), log_every=1)
        given |= dict(columns={"source": "source", "target": "target"})
        return run.train(given | more, callbacks=callbacks, say=lambda line: None)

    return train


@pytest.mark.parametrize("name", WRITING)
def test_what_it_writes_before_training_is_judged_and_kept_if_nothing_is_better(written, monkeypatch, name, tmp_path):
    inner, metric = RecipeTrainer.evaluate, f"eval_{tasks.get(name).metric}"

    def evaluate(self, *args, **kwargs):
        found = inner(self, *args, **kwargs)
        assert metric in found  # it was asked to write
        return found | {metric: 50.0 - self.state.global_step}

    monkeypatch.setattr(RecipeTrainer, "evaluate", evaluate)
    made = written(name)
    assert [entry["step"] for entry in made.result["evaluations"]] == [0, 2]
    assert made.result["best"] == {"step": 0, "value": 50.0}
    begun = run.prepare(run.resolve(made.trainer.config, {})).model.state_dict()
    ended = made.model.state_dict()
    assert all(torch.equal(value, ended[key]) for key, value in begun.items())
    report = (tmp_path / "run" / "report.html").read_text()
    assert "No evaluation was better than the one before training: the weights that the run began with" in report


def test_a_run_that_writes_goes_on_without_judging_the_beginning_again(written, signalled, tmp_path):
    whole = written("translation", evaluate_every=2, steps=4)
    cut = written("translation", [signalled(1)], evaluate_every=2, steps=4, overwrite=True)
    assert [entry["step"] for entry in cut.result["evaluations"]] == [0] and cut.result["state"] == "stopped"
    went_on = run.train(resume=True, out=str(tmp_path / "run"), say=lambda line: None)
    assert went_on.result["resumed_at"] == [1] and same(whole, went_on) and course(whole) == course(went_on)
    assert [entry["step"] for entry in went_on.result["evaluations"]] == [0, 2, 4]
