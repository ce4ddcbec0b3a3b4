"""A run's folder: what is not written over, what an error leaves as it was, and disks that refuse."""

import functools
import json

import pytest

from peft_fast.errors import DataError, SettingsError
from peft_fast.recipes import record, run
from tests.recipes.runs import same, tree


def test_a_folder_with_a_run_is_not_written_over(learn, tmp_path):
    learn(steps=1)
    (tmp_path / "run" / "mine.txt").write_text("not yours")
    before = record.read(tmp_path / "run")
    with pytest.raises(SettingsError, match="(?s)has a run in it.*--resume.*--overwrite.*--out"):
        learn()
    assert record.read(tmp_path / "run") == before
    made = learn(steps=1, overwrite=True, seed=4)
    assert made.result["config"]["seed"] == 4 and (tmp_path / "run" / "mine.txt").read_text() == "not yours"


def test_bad_options_and_bad_data_leave_no_folder(learn, tmp_path):
    (tmp_path / "bad.csv").write_text("text,label\n")
    for more, error in (({"metric": "f7"}, SettingsError), ({"data": str(tmp_path / "bad.csv")}, DataError)):
        with pytest.raises(error):
            learn(**more)
        assert not (tmp_path / "run").exists()


def test_resume_needs_a_run_and_the_same_one(learn, options, reviews, tmp_path):
    with pytest.raises(SettingsError, match="no config.yaml.*\n.*\n.*first seconds.*start it again with its own"):
        run.train(resume=True, out=str(tmp_path / "run"))
    # a job that is always started with --resume
    first = learn(steps=1, resume=True)
    assert first.result["resumed_at"] == [] and any("starting from the beginning" in line for line in first.said)
    with pytest.raises(SettingsError) as caught:
        learn(resume=True, r=8, batch_size=8)
    assert "r: 8" in str(caught.value) and "batch_size: 8" in str(caught.value)
    with pytest.raises(SettingsError, match=r"learning_rate: 0.5, the run in .* has 0.01\n.*\n.*\n") as caught:
        learn(resume=True, learning_rate=0.5, head_learning_rate=0.25, dropout=0.5, metric="f1", train_rows=0)
    for text in ("0.25, ", " has 0.1\n", "dropout: 0.5, ", "has None (its own)", "metric: 'f1', ", "has 'accuracy'"):
        assert text in str(caught.value), text
    # what is in force is the same
    assert learn(resume=True, head_learning_rate=0.1, metric="accuracy").result["state"] == "done"
    with open(reviews["train"]) as file:
        lines = file.read().splitlines()
    (tmp_path / "less.csv").write_text("\n".join(lines[:60]) + "\n")
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text.replace(reviews["train"], str(tmp_path / "less.csv")))
    with pytest.raises(DataError, match="other rows"):
        run.train(resume=True, out=str(tmp_path / "run"), say=lambda line: None)


def test_a_finished_run_may_be_trained_longer(learn, tmp_path):
    learn(epochs=1)
    made = run.train(resume=True, out=str(tmp_path / "run"), epochs=2, say=lambda line: None)
    assert made.result["resumed_at"] == [6] and made.result["throughput"]["steps"] == 12
    assert [entry["step"] for entry in made.result["evaluations"]] == [0, 6, 12]
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [0, 6, 12]


@pytest.mark.parametrize("place", ["a-file", "a-file/run", "/proc/run"])
def test_a_place_that_cannot_be_written_is_said_at_once(options, tmp_path, place):
    (tmp_path / "a-file").write_text("x")
    with pytest.raises(SettingsError, match="(?s)out: .*another --out"):
        record.Record(run.resolve(options, {"out": str(tmp_path / place)})).look()


def test_two_runs_do_not_share_a_folder(options, monkeypatch):
    monkeypatch.setattr(run, "prepare", None)  # it is asked before rows and model are read
    with pytest.raises(SettingsError, match="another process"):
        config = run.resolve(options, {})
        holder = record.Record(config)
        holder.open({}, {})
        try:
            with pytest.raises(SettingsError, match="another process"):
                run.train(options, overwrite=True)
            record.Record(config.model_copy(update={"overwrite": True})).open({}, {})
        finally:
            holder.close()
    record.Record(config.model_copy(update={"overwrite": True})).open({}, {})


@pytest.fixture
def no_accuracy(monkeypatch):
    """A task whose validation rows do not have its metric, as one class has no roc_auc."""
    from peft_fast.recipes.tasks.sequence_classification import Task

    inner = Task.metrics
    monkeypatch.setattr(
        Task, "metrics", lambda *args: {name: v for name, v in inner(*args).items() if name != "accuracy"}
    )


# what prepare does not see: the optimizer is made, and the metric missed, when the folder is taken
@pytest.mark.parametrize("more", [dict(optimizer="galore_adamw"), dict(metric="accuracy")], ids=["optimizer", "metric"])
@pytest.mark.parametrize("before", ["nothing", "a note", "a run"])
def test_an_error_before_the_first_step_leaves_the_folder_as_it_was(learn, no_accuracy, tmp_path, before, more):
    out = tmp_path / "deep" / "run"
    learn = functools.partial(learn, out=str(out), overwrite=before == "a run")
    if before == "a note":
        out.mkdir(parents=True)
        (out / "note.txt").write_text("mine")
    if before == "a run":
        learn(steps=2, metric="loss")
        (out / record.LOCK).unlink()
    found = tree(tmp_path)
    with pytest.raises((SettingsError, DataError)):
        learn(**more)
    assert tree(tmp_path) == found
    made = learn(steps=1, metric="loss")
    assert made.result["throughput"]["steps"] == 1 and not (out / record.BEFORE).exists()


def test_a_run_that_goes_on_and_fails_at_once_is_still_there(learn, whole, signalled, at_step, tmp_path):
    from transformers import TrainerCallback

    class Broken(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            raise ValueError("at once")

    learn([signalled(4)])
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    with pytest.raises(ValueError, match="at once"):
        run.train(resume=True, out=str(tmp_path / "run"), callbacks=[Broken()], say=lambda line: None)
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    went_on = run.train(resume=True, out=str(tmp_path / "run"), say=lambda line: None)
    assert same(whole, went_on)


def test_a_warm_up_longer_than_training_is_said_before_anything_is_written(options, tmp_path):
    for go in (run.plan, run.train):
        with pytest.raises(SettingsError, match="warmup: 10 of 5 steps"):
            go(options | {"steps": 5, "warmup": 10}, say=lambda line: None)
    assert not (tmp_path / "run").exists()


def test_a_metric_that_the_validation_rows_do_not_have_is_said_before_the_first_step(learn, no_accuracy, tmp_path):
    with pytest.raises(DataError, match=r"(?s)metric: accuracy, which 32 validation rows .*metric: .*f1 or loss"):
        learn()
    assert not (tmp_path / "run").exists()
    assert learn(metric="loss", steps=1).result["state"] == "done"


@pytest.mark.parametrize("where", ["log", "write", "save_pretrained"])
def test_a_disk_that_is_full_is_said(learn, monkeypatch, tmp_path, where):
    import errno

    from safetensors import SafetensorError

    from peft_fast.errors import CheckpointError

    def full(*args, **kwargs):
        if where == "save_pretrained":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run" / "log.jsonl"))

    if where == "save_pretrained":
        monkeypatch.setattr(run, "save", full)
    else:
        monkeypatch.setattr(record.Record if where == "log" else record, where, full)
    with pytest.raises(CheckpointError, match="(?s)disk is full.*room for the run.*--resume"):
        learn(steps=1)


def test_a_file_that_cannot_be_flushed_hides_no_error(learn, monkeypatch):
    """What is left in a buffer cannot be written either when the file is closed."""

    class Lines:
        def write(self, text=""):
            raise OSError(28, "No space left on device")

        close = flush = write

    inner = record.Record.open

    def opened(self, *args):
        inner(self, *args)
        self.lines.close()
        self.lines = Lines()

    monkeypatch.setattr(record.Record, "open", opened)
    from peft_fast.errors import CheckpointError

    with pytest.raises(CheckpointError, match="disk is full"):
        learn(steps=1)


@pytest.mark.parametrize("step", [-1, 0, 4, 8])
def test_the_log_goes_back_to_a_checkpoint_that_was_not_written_down(tmp_path, step):
    """Killed between a checkpoint and the log's entry of it, or in the middle of a line."""
    entries = [{"kind": "train", "step": n} for n in (1, 2)]
    entries += [{"kind": "checkpoint", "step": 4}, {"kind": "train", "step": 8}]
    first = [{"kind": "evaluation", "step": 0}]
    (tmp_path / record.LOG).write_text("".join(json.dumps(entry) + "\n" for entry in first + entries) + '{"kind": "tr')
    config = run.resolve({"task": "masked-lm", "model": "m", "data": "d", "out": tmp_path}, {})
    log = record.Record(config)
    log.back_to(step)
    log.log({"kind": "train", "step": 9})
    log.close()
    found = [json.loads(line) for line in (tmp_path / record.LOG).read_text().splitlines()]
    kept = [entry for entry in first + entries if entry["step"] <= step]
    added = [{"kind": "checkpoint", "step": step}] if step in (0, 8) else []
    assert found == [*kept, *added, {"kind": "train", "step": 9}]


def test_a_plan_writes_nothing(options, tmp_path):
    plan = run.plan(options)
    assert not (tmp_path / "run").exists()
    assert plan["forecast"]["steps"] == 12 and plan["rows"]["train"] == 96 and plan["fast"]["on"]
