"""A whole run: what it leaves, how it stops and goes on, and that the process is as it was."""

import functools
import json
import random
import signal
import threading

import numpy
import pytest
import torch

from peft_fast import settings
from peft_fast.errors import DataError, SettingsError, UnsupportedError
from peft_fast.recipes import record, run, tasks
from tests.recipes.runs import course, same, tree

KEYS = """name state task method title started finished seconds config facts rows sources notes model forecast log
evaluations metric higher best final shown throughput memory fast early_stopped resumed_at unfrozen sizes machine"""


def test_a_run_learns_and_leaves_what_it_should(options, tmp_path):
    said = []
    made = run.train(options, epochs=4, say=said.append)
    result, folder = made.result, tmp_path / "run"
    assert set(KEYS.split()) <= set(result)
    assert result["state"] == "done" and result["metric"] == "accuracy" and result["higher"]
    first, *_, last = result["evaluations"]
    assert first["step"] == 0 and first["accuracy"] < 0.8
    assert result["final"]["validation"]["accuracy"] > 0.9 and result["final"]["test"]["accuracy"] > 0.9
    assert result["best"]["value"] == max(entry["accuracy"] for entry in result["evaluations"][1:])
    assert last["step"] == result["throughput"]["steps"] == 24
    assert [entry["step"] for entry in result["log"]] == [1, *range(2, 25, 2)]
    assert all(entry["per_second"] > 0 and entry["memory_bytes"] > 2**20 for entry in result["log"])
    assert result["rows"] == {"train": 96, "validation": 32, "test": 32}
    assert result["fast"]["on"] and len(result["fast"]["fast"]) >= 12 and result["fast"]["fast_calls"] > 0
    assert result["shown"][0]["kind"] == "confusion"
    assert result["forecast"]["steps"] == 24
    for name in ("config.yaml", "task.json", "log.jsonl", "metrics.json", "report.html"):
        assert (folder / name).stat().st_size > 50
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert (folder / "adapter" / "tokenizer.json").exists() and not (folder / "model").exists()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in lines} == {"train", "evaluation", "checkpoint"}
    assert record.read(folder) == result
    # where the files lie is nobody's business
    for name in ("metrics.json", "report.html"):
        assert str(tmp_path.parent) not in (folder / name).read_text()
    assert any("accuracy" in line for line in said)


def test_units_are_the_tokens_of_the_batches(whole):
    tokens = sum(len(row["input_ids"]) for row in whole.trainer.train_dataset)
    assert whole.result["throughput"]["units"] == 2 * tokens
    assert whole.result["throughput"]["unit"] == "tokens"


def test_again_in_one_process_is_the_same_again_and_nothing_else_has_changed(learn, whole):
    import datasets
    import transformers

    torch.manual_seed(5), numpy.random.seed(5), random.seed(5)
    state = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
    handler = signal.getsignal(signal.SIGINT)
    transformers.logging.set_verbosity_info()
    torch.set_num_threads(2)
    try:
        again = learn(threads=1)
        assert same(again, whole) and course(again) == course(whole)
        assert torch.equal(state[0], torch.get_rng_state())
        assert (numpy.random.get_state()[1].tolist(), random.getstate()) == state[1:]
        assert torch.get_num_threads() == 2 and signal.getsignal(signal.SIGINT) is handler
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
        assert not datasets.are_progress_bars_disabled()
    finally:
        transformers.logging.set_verbosity_warning()
        torch.set_num_threads(1)


def test_another_seed_is_another_run(learn, whole):
    assert learn(epochs=1, seed=1).result["log"][0]["loss"] != whole.result["log"][0]["loss"]


@pytest.mark.parametrize("step", [4, 6, 12])
def test_ctrl_c_saves_and_resume_ends_where_an_undisturbed_run_does(learn, whole, signalled, tmp_path, step):
    """In an epoch, at its last step, at the last of all."""
    cut = learn([signalled(step)])
    assert cut.result["state"] == "stopped" and cut.signum == signal.SIGINT
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{step}").is_dir()
    told = "\n".join(cut.said)
    assert f"stopped at step {step}" in told and f"python -m peft_fast train --resume --out {tmp_path / 'run'}" in told
    went_on = run.train(resume=True, out=str(tmp_path / "run"), say=lambda line: None)
    assert went_on.result["state"] == "done" and went_on.result["resumed_at"] == [step]
    assert same(whole, went_on) and course(whole) == course(went_on)
    assert whole.result["throughput"]["units"] == went_on.result["throughput"]["units"]


def test_another_number_of_threads_is_said_when_a_run_goes_on(learn, signalled, tmp_path):
    cut = learn([signalled(2)], threads=1)
    assert cut.result["machine"]["threads"] == 1
    said = []
    went_on = run.train(resume=True, out=str(tmp_path / "run"), threads=2, say=said.append)
    assert went_on.result["machine"]["threads"] == 2
    assert [line for line in said if "threads" in line] == [
        "note: CPU threads are 2, and were 1: it goes on, not bit for bit"
    ]


def test_sigterm_counts_as_ctrl_c(learn, signalled):
    made = learn([signalled(3, signal.SIGTERM)])
    assert made.result["state"] == "stopped" and made.signum == signal.SIGTERM
    assert (made.folder / "report.html").exists()


def test_a_second_ctrl_c_stops_at_once(options, at_step, best_at, tmp_path):
    def twice(model):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    best_at(6)
    said = []
    with pytest.raises(KeyboardInterrupt):
        run.train(options, callbacks=[at_step(9, twice)], say=said.append)
    assert record.read(tmp_path / "run")["state"] == "stopped"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-6"]
    assert "checkpoint-6 is the last that was saved" in said[-1] and f"--resume --out {tmp_path / 'run'}" in said[-1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def stopped_while(monkeypatch, options):
    """stopped_while(where, **more) -> what is said when Ctrl-C comes while rows or model are loaded, or in the plan."""

    def stopped(where, **more):
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        said = []
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run if where == "forecast_of" else tasks.get("sequence-classification"), where, interrupted)
            run.train(options | more, say=said.append)
        return said[-1]

    return stopped


@pytest.mark.parametrize("where", ["learn", "load_model", "forecast_of"])
def test_ctrl_c_before_the_first_step_says_what_stands(learn, stopped_while, signalled, tmp_path, where):
    nothing = "stopped before the first step: nothing was trained, and there is nothing to resume"
    assert stopped_while(where) == nothing and not (tmp_path / "run").exists()
    learn([signalled(4)])
    (tmp_path / "run" / record.LOCK).unlink()
    before = tree(tmp_path)
    assert stopped_while(where, overwrite=True) == f"{nothing}; the run in {tmp_path / 'run'} is as it was"
    assert tree(tmp_path) == before
    stands = stopped_while(where, resume=True)
    assert "checkpoint-4 is the last that was saved" in stands and f"train --resume --out {tmp_path / 'run'}" in stands


def test_ctrl_c_in_the_first_evaluation_saves_the_beginning(learn, whole, tmp_path):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            if not state.global_step and not list((tmp_path / "run" / "checkpoints").iterdir()):
                signal.raise_signal(signal.SIGINT)
                Stop.on_prediction_step = lambda *args, **kwargs: None

    made = learn([Stop()])
    assert made.result["state"] == "stopped" and made.result["throughput"]["steps"] == 0
    went_on = run.train(resume=True, out=str(tmp_path / "run"), say=lambda line: None)
    assert same(whole, went_on) and course(whole) == course(went_on)


def test_outside_the_main_thread_no_signal_is_asked_for(learn):
    made = []
    thread = threading.Thread(target=lambda: made.append(learn(steps=1)))
    thread.start()
    thread.join()
    assert made[0].result["state"] == "done"


def test_an_error_in_a_callback_comes_out_and_the_folder_says_how_far_it_came(learn, at_step, tmp_path):
    def pruned(model):
        raise ZeroDivisionError("pruned")

    with pytest.raises(ZeroDivisionError, match="pruned"):
        learn([at_step(8, pruned)])
    result = record.read(tmp_path / "run")
    assert result["state"] == "stopped" and result["evaluations"][-1]["step"] == 6
    # and lets go of it
    assert learn(steps=1, overwrite=True).result["state"] == "done"


def test_the_best_checkpoint_is_what_comes_out(learn, at_step):
    def spoil(model):
        for p in model.parameters():
            if p.requires_grad:
                p.data.mul_(-3)

    learn = functools.partial(learn, head_learning_rate=1e-2)
    made = learn([at_step(11, spoil)], evaluate_every=5)
    by_step = {entry["step"]: entry for entry in made.result["evaluations"]}
    assert by_step[12]["accuracy"] < by_step[10]["accuracy"] == made.result["best"]["value"]
    assert made.result["best"]["step"] == 10
    for name, value in made.result["final"]["validation"].items():
        assert value == by_step[10][name], name
    last = learn([at_step(11, spoil)], evaluate_every=5, keep_best=False, overwrite=True)
    assert last.result["final"]["validation"]["accuracy"] == by_step[12]["accuracy"]


@pytest.mark.parametrize("delta, evaluations", [(0.0, None), (2.0, 2)])
def test_early_stopping_by_what_counts_as_progress(learn, delta, evaluations):
    """No loss is two lower than that before training: neither the first nor the second evaluation is progress."""
    made = learn(epochs=3, early_stopping=2, min_delta=delta, evaluate_every=2, metric="loss")
    if evaluations:
        assert made.result["early_stopped"] and len(made.result["evaluations"]) == 1 + evaluations
        assert made.result["throughput"]["steps"] == 2 * evaluations
    else:
        assert len(made.result["evaluations"]) > 4


def test_a_loss_that_is_no_number_ends_the_run(learn, at_step, tmp_path):
    def poison(model):
        next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    with pytest.raises(DataError, match="a loss of nan at step 4\n.*\n.*learning_rate"):
        learn([at_step(3, poison)])
    # strict JSON, which knows no NaN
    text = (tmp_path / "run" / "metrics.json").read_text()
    assert "NaN" not in text and json.loads(text)["log"][-1]["loss"] is None


# ---- what else watches


def test_the_trainers_own_callbacks_are_told(learn, tmp_path):
    """Of W&B, TensorBoard and the like: one of ours, and TensorBoard."""
    from transformers import TrainerCallback

    told = {"log": [], "evaluate": []}

    class Board(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            told["log"].append(dict(logs))

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            told["evaluate"].append(dict(metrics))

    learn([Board()], epochs=1, report_to=["tensorboard"])
    assert any({"loss", "per_second", "memory_bytes"} <= set(logs) for logs in told["log"])
    assert [("eval_accuracy" in metrics) for metrics in told["evaluate"]] == [True, True]
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes() and b"eval/accuracy" in events.read_bytes()


def test_the_line_says_memory_beyond_what_was_held_before(learn):
    from peft_fast.pages import words

    made = learn(steps=2)
    line = next(line for line in made.said if "step 2/2" in line)
    held = made.result["memory"]["before_bytes"]
    assert held > 2**20 and words.size(max(0, made.result["log"][-1]["memory_bytes"] - held)) in line


def test_an_unknown_reporter_is_said_before_training(learn):
    with pytest.raises(SettingsError, match="report_to"):
        learn(report_to=["nowhere"])


def test_quiet(options, capfd):
    with settings.override(quiet=True):
        run.train(options | {"steps": 1})
    assert capfd.readouterr() == ("", "")


def test_what_is_missing_is_named(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("peft", "datasets") else found(name))
    with pytest.raises(UnsupportedError, match=r"(?s)without peft, datasets.*peft_fast\[train\]"):
        run.train(task="causal-lm", model="x", data="y")


@pytest.mark.parametrize("method", ["head", "full"])
def test_a_whole_model_comes_out(options, method, tmp_path):
    from transformers import AutoModelForSequenceClassification

    options = {name: value for name, value in options.items() if name != "r"}
    made = run.train(options, method=method, steps=2, say=lambda line: None)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in made.model.state_dict().items())
    assert made.result["fast"] == {
        "on": False,
        "why": f"method {method} has no adapters, which is what peft_fast makes fast",
    }
