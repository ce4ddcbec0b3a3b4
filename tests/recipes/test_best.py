"""What a run keeps: the best of its evaluations, the one before training among them."""

import pytest
import torch

from peft_fast.recipes import run
from peft_fast.recipes.trainer import RecipeTrainer
from tests.recipes.runs import course, same, weights


@pytest.mark.parametrize("best", [0, 3])
@pytest.mark.parametrize("method", ["head", "lora", "dora", "full", "gradual"])
def test_what_is_kept_is_what_the_best_evaluation_saw(options, best_at, tmp_path, method, best):
    """Everything that trained or was thawed after the best evaluation is undone, be it the one before training."""
    options = {name: value for name, value in options.items() if name != "r" or method in ("lora", "dora")}
    best_at(best)
    more = dict(evaluate_every=3, unfreeze_every=0.75) if method == "gradual" else dict(evaluate_every=3)
    result = run.train(options, method=method, steps=12, log_every=1, say=lambda line: None, **more).result
    assert result["best"] == {"step": best, "value": 1.0}
    if method == "gradual":
        assert result["unfrozen"][-1]["step"] > 3
    seen = next(entry for entry in result["evaluations"] if entry["step"] == best)
    for name, value in result["final"]["validation"].items():
        assert name == "accuracy" or value == seen[name], name
    assert result["evaluations"][-1]["loss"] != seen["loss"]
    said = "No evaluation was better than the one before training: the weights that the run began with"
    assert (said in (tmp_path / "run" / "report.html").read_text()) == (best == 0)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("stop", [1, 8])
def test_a_run_that_got_worse_leaves_what_it_began_with_also_when_it_was_stopped(
    options, best_at, signalled, tmp_path, method, stop
):
    options = {name: value for name, value in options.items() if name != "r" or method == "lora"}
    best_at(0)
    more = dict(method=method, evaluate_every=3, early_stopping=3, keep=1, say=lambda line: None)
    undisturbed = run.train(options, **more)
    assert undisturbed.result["early_stopped"] and undisturbed.result["throughput"]["steps"] == 9
    run.train(options, callbacks=[signalled(stop)], overwrite=True, **more)
    checkpoints = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert checkpoints == {"checkpoint-0", f"checkpoint-{stop}"}
    went_on = run.train(resume=True, out=str(tmp_path / "run"), say=lambda line: None)
    assert same(undisturbed, went_on) and course(undisturbed) == course(went_on)
    begun = run.prepare(run.resolve(options | {"method": method, "out": str(tmp_path / "other")}, {}))
    begin = {name: p for name, p in begun.model.named_parameters() if p.requires_grad}
    assert all(torch.equal(value, begin[name]) for name, value in weights(went_on).items())


@pytest.mark.parametrize("stop", [1, 8])
def test_a_best_that_is_not_kept_is_known_when_the_run_goes_on(options, best_at, signalled, tmp_path, recwarn, stop):
    best_at(0)
    more = dict(evaluate_every=3, early_stopping=3, keep_best=False)
    undisturbed = run.train(options, say=lambda line: None, **more)
    assert undisturbed.result["early_stopped"] and undisturbed.result["throughput"]["steps"] == 9
    said = []
    run.train(options, callbacks=[signalled(stop)], overwrite=True, say=said.append, **more)
    went_on = run.train(resume=True, out=str(tmp_path / "run"), say=said.append)
    assert same(undisturbed, went_on) and course(undisturbed) == course(went_on)
    assert went_on.result["best"] == undisturbed.result["best"] == {"step": 0, "value": 1.0}
    assert not [line for line in said if "damaged" in line]
    assert not [warning for warning in recwarn if "forgotten" in str(warning.message)]


@pytest.mark.parametrize("values, best", [([0.5, 0.5, 0.5], 6), ([0.5, 0.4, 0.5], 12), ([0.5, 0.5, 0.6], 12)])
def test_of_equals_what_has_learnt_is_kept(learn, monkeypatch, tmp_path, values, best):
    inner = RecipeTrainer.evaluate

    def evaluate(self, *args, **kwargs):
        return inner(self, *args, **kwargs) | {"eval_accuracy": values[self.state.global_step // 6]}

    monkeypatch.setattr(RecipeTrainer, "evaluate", evaluate)
    made = learn(keep=1)
    assert made.result["best"] == {"step": best, "value": max(values)}
    seen = next(entry["loss"] for entry in made.result["evaluations"] if entry["step"] == best)
    assert made.result["final"]["validation"]["loss"] == seen
    assert not (tmp_path / "run" / "checkpoints" / "checkpoint-0").exists()


def test_the_beginning_is_kept_no_longer_than_it_is_the_best(learn, best_at, tmp_path):
    best_at(12)
    learn(keep=3)
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"checkpoint-6", "checkpoint-12"}


def test_without_keep_best_the_beginning_is_named_and_not_saved(learn, best_at, tmp_path):
    best_at(0)
    made = learn(keep_best=False, keep=9)
    assert made.result["best"]["step"] == 0
    assert made.result["final"]["validation"]["loss"] == made.result["evaluations"][-1]["loss"]
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"checkpoint-6", "checkpoint-12"}
    assert "since keep_best is off" in (tmp_path / "run" / "report.html").read_text()
