"""Checkpoints are whole or not there: damage, leftovers, full disks, rotation, other models."""

import errno
import json
import os
import subprocess
import warnings

import pytest
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from peft_fast import settings
from peft_fast.errors import CheckpointError, UnsupportedError
from peft_fast.recipes import checkpoints, weights
from tests.recipes.small import SHORT, Killer, assert_equal, finish, in_child, killed, trainer_of


@pytest.fixture(autouse=True)
def quiet():
    with settings.override(quiet=True, min_tokens=0):
        yield


@pytest.fixture
def run(tmp_path):
    """Checkpoints 2, 4 and 6 of a short run, the best of which is the first."""
    trainer_of(tmp_path, "head", **SHORT).train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert checkpoints.best_of(tmp_path / "checkpoint-6").name in ("checkpoint-2", "checkpoint-6")
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def newest(folder):
    said = []
    found = checkpoints.latest(folder, said.append)
    return found and found.name, said


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a byte less": lambda path: cut(path / "data"),
    "a bit turned": lambda path: flip(path / "data"),
    "a file gone": lambda path: (path / "trainer_state.json").unlink(),
    "no manifest": lambda path: (path / checkpoints.MANIFEST).unlink(),
    "half a manifest": lambda path: os.truncate(path / checkpoints.MANIFEST, 30),
    "an empty manifest": lambda path: (path / checkpoints.MANIFEST).write_text("[]"),
}


def fake(folder, step, best=None):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "data").write_text(str(step) * 10)
    (path / "trainer_state.json").write_text(
        json.dumps({"best_global_step": best, "best_model_checkpoint": best and "…"})
    )
    checkpoints._seal(path, step)
    return path


def test_the_newest_is_found_whatever_else_lies_there(tmp_path):
    for step in (2, 10, 6):
        fake(tmp_path, step)
    (tmp_path / "checkpoint-99.bak").mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert newest(tmp_path) == ("checkpoint-10", [])
    assert newest(tmp_path / "nothing") == (None, [])


@pytest.mark.parametrize("harm", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_one_is_left_out_and_said(tmp_path, harm):
    paths = [fake(tmp_path, step) for step in (2, 4, 6)]
    harm(paths[2])
    harm(paths[1])
    name, said = newest(tmp_path)
    assert name == "checkpoint-2" and len(said) == 2
    assert said[0].startswith("checkpoint-6 is damaged and left out: ") and "checkpoint-4" in said[1]
    harm(paths[0])
    assert newest(tmp_path)[0] is None
    with pytest.warns(UserWarning, match="damaged"):
        checkpoints.latest(tmp_path)


def test_a_run_goes_on_past_damage_and_replaces_it(tmp_path):
    expected = finish(tmp_path / "whole", "head", **SHORT)
    killed(tmp_path / "cut", "step", 6, "head", **SHORT)
    flip(tmp_path / "cut/checkpoint-4/trainer_state.json")
    with pytest.warns(UserWarning, match="checkpoint-4 is damaged"):
        assert_equal(expected, finish(tmp_path / "cut", "head", **SHORT))
    assert newest(tmp_path / "cut") == ("checkpoint-6", [])
    assert not checkpoints.damage(tmp_path / "cut/checkpoint-4")


def test_what_needs_a_damaged_best_is_second_choice(tmp_path):
    for step, best in ((2, 2), (4, 2), (6, 6), (8, 6)):
        fake(tmp_path, step, best)
    assert newest(tmp_path) == ("checkpoint-8", [])
    cut(tmp_path / "checkpoint-6/data")
    assert newest(tmp_path)[0] == "checkpoint-4"
    cut(tmp_path / "checkpoint-2/data")
    name, said = newest(tmp_path)
    assert name == "checkpoint-8" and any("names checkpoint-6 as the best" in line for line in said)


def test_a_best_that_is_damaged_is_forgotten_and_said(run, tmp_path):
    best = checkpoints.best_of(run / "checkpoint-4")
    assert best.name == "checkpoint-2"
    flip(best / weights.PART)
    trainer = trainer_of(run, "head", **SHORT)
    with pytest.warns(UserWarning, match="checkpoint-2, the best so far, is forgotten"):
        trainer.train(run / "checkpoint-4")
    assert trainer.state.best_global_step == 6


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_rotation_keeps_the_newest_and_their_best(tmp_path, keep):
    bests = {1: None, 2: 2, 3: 2, 4: 2, 5: 5, 6: 5, 7: 5, 8: 5, 9: 5}
    for step, best in bests.items():
        checkpoints.rotate(tmp_path, fake(tmp_path, step, best), keep)
        left = [checkpoints._step(path) for path in checkpoints._all(tmp_path)]
        last = list(range(max(1, step - keep + 1), step + 1))
        assert left == sorted({*last, *(bests[s] for s in last if bests[s])})
        assert newest(tmp_path)[0] == f"checkpoint-{step}"
    assert not list(tmp_path.glob(".*"))


def test_rotation_takes_no_later_step_for_newer(tmp_path):
    """checkpoint-9 was damaged, and the run went on from an older one."""
    for step in (3, 9):
        fake(tmp_path, step)
    checkpoints.rotate(tmp_path, fake(tmp_path, 4), 1)
    assert names(tmp_path) == ["checkpoint-4"]


def test_leftovers_of_killed_saves_go(tmp_path):
    fake(tmp_path, 2)
    (tmp_path / ".checkpoint-4.saving/checkpoint-4").mkdir(parents=True)
    fake(tmp_path, 1).rename(tmp_path / ".checkpoint-1.deleting")
    fake(tmp_path, 6).rename(tmp_path / ".checkpoint-6.replaced")
    (tmp_path / ".checkpoint-2.replaced").mkdir()
    (tmp_path / ".checkpoint-notes").mkdir()
    assert len(checkpoints.clean(tmp_path)) == 4
    assert names(tmp_path) == [".checkpoint-notes", "checkpoint-2", "checkpoint-6"]
    assert newest(tmp_path) == ("checkpoint-6", [])
    assert checkpoints.clean(tmp_path / "nothing") == []


# ---- disks


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device", "somewhere")


def as_torch_says(*args, **kwargs):
    raise RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/3")


def as_safetensors_says(*args, **kwargs):
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


REFUSALS = {
    "weights": ("safetensors.torch.save_file", as_safetensors_says),
    "optimizer": ("torch.save", as_torch_says),
    "manifest": ("peft_fast.recipes.checkpoints._write", full),
    "the disk itself": ("os.fsync", full),
    "the new name": ("pathlib.Path.rename", full),
}


@pytest.mark.parametrize("where", REFUSALS)
def test_a_disk_that_refuses_leaves_the_checkpoint_before(run, where, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    trainer = trainer_of(run, "head", **{**SHORT, "num_train_epochs": 2})
    monkeypatch.setattr(*REFUSALS[where])
    with pytest.raises(CheckpointError) as error:
        trainer.train(checkpoints.latest(run))
    monkeypatch.undo()
    lines = str(error.value).splitlines()
    assert len(lines) == 3 and "step 8" in lines[0] and "MB are free" in lines[1] and "--resume" in lines[2]
    assert where in ("optimizer",) or "the disk is full" in lines[0]
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
    assert newest(run) == ("checkpoint-6", [])


def test_other_errors_in_a_save_stay_what_they_are(run, monkeypatch):
    trainer = trainer_of(run, "head", **{**SHORT, "num_train_epochs": 2})
    trainer.own_state = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train(checkpoints.latest(run))
    assert newest(run) == ("checkpoint-6", []) and not list(run.glob(".*"))


def test_a_write_that_ends_in_the_middle(run):
    """The system refuses bytes beyond a size: what a full disk does to a file that is half written."""
    import resource

    def train():
        limit = (run / "checkpoint-6/optimizer.pt").stat().st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(CheckpointError, match="step 8"):
            trainer_of(run, "head", **{**SHORT, "num_train_epochs": 2}).train(run / "checkpoint-6")

    assert in_child(train) == 0
    assert newest(run) == ("checkpoint-6", []) and not list(run.glob(".*"))


def test_a_disk_that_is_really_full(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", folder]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        options = {**SHORT, "save_steps": 1, "save_total_limit": 2, "eval_steps": 3}
        trainer = trainer_of(folder, "full", **options)
        with pytest.raises(CheckpointError, match="the disk is full"):
            trainer.train()
        found, _ = newest(folder)
        assert found is not None and not list(folder.glob(".*"))
        subprocess.run(["mount", "-o", "remount,size=9m", folder], check=True)
        got = finish(folder, "full", **options)
    finally:
        subprocess.run(["umount", folder], check=True)
    assert_equal(finish(tmp_path / "roomy", "full", **options), got)


# ---- what is not its own


def test_another_base_model_is_refused(run):
    trainer = trainer_of(run, "head", **SHORT)
    with torch.no_grad():
        trainer.model.bert.pooler.dense.weight.mul_(2)
    with pytest.raises(UnsupportedError, match="bert.pooler.dense.weight"):
        trainer.train(checkpoints.latest(run))
    with pytest.raises(UnsupportedError, match="another optimizer"):
        trainer_of(run, "full", **SHORT).train(checkpoints.latest(run))


def test_a_checkpoint_of_somebody_else(run):
    (run / "checkpoint-6" / checkpoints.STATE).unlink()
    with pytest.raises(UnsupportedError, match="peft_fast.json"):
        trainer_of(run, "head", **SHORT).train(run / "checkpoint-6")


def test_last_bits_of_the_base_are_forgiven_and_said(run):
    trainer = trainer_of(run, "head", **{**SHORT, "num_train_epochs": 2})
    with torch.no_grad():
        trainer.model.bert.pooler.dense.weight.mul_(1 + 1e-6)
    with pytest.warns(UserWarning, match="last bits"):
        trainer.train(checkpoints.latest(run))


# ---- callbacks


class Counts(TrainerCallback, ExportableState):
    """One that HF could not make again: of its arguments it tells nothing."""

    def __init__(self, model, by):
        self.by, self.count = by, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += self.by

    def state(self):
        return {"args": {}, "attributes": {"count": self.count}}


class Loads(Counts):
    def load_state(self, attributes):
        self.count = attributes["count"]
        self.loaded = True


def test_callbacks_go_on_as_they_were_made(tmp_path):
    def made():
        return [Counts(None, 1), Counts(None, 10), Loads(None, 100)]

    trainer = trainer_of(tmp_path, "head", made(), **SHORT)
    trainer.train()
    again = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer_of(tmp_path, "head", again, **{**SHORT, "num_train_epochs": 2}).train(tmp_path / "checkpoint-4")
    assert [callback.count for callback in again] == [12, 120, 1200] and again[2].loaded


def test_the_best_is_not_lost_where_trainer_would_delete_the_last(tmp_path):
    """Trainer with save_total_limit=1 removes the last checkpoint at the end: nothing to go on from."""
    trainer_of(tmp_path, "head", **{**SHORT, "save_total_limit": 1}).train()
    assert newest(tmp_path)[0] == "checkpoint-6"


class Passing(TrainerCallback):
    """Thaws a weight after the first step, moves it, and freezes it again after the third."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weight = model.bert.pooler.dense.weight
        if state.global_step in (1, 3):
            weight.requires_grad_(state.global_step == 1)
            weight.grad = None
            with torch.no_grad():
                weight.add_(0.25)


def test_what_trained_for_a_while_is_kept_by_every_later_process(tmp_path):
    """The second has it frozen from its beginning to its end, and still has to hand it on."""
    options = {**SHORT, "num_train_epochs": 2}
    expected = finish(tmp_path / "whole", "head", callbacks=[Passing()], **options)
    for last in (5, 7):

        def go(last=last):
            trainer = trainer_of(tmp_path / "cut", "head", callbacks=[Killer("step", last), Passing()], **options)
            trainer.train(checkpoints.latest(tmp_path / "cut"))

        assert in_child(go)
    assert newest(tmp_path / "cut") == ("checkpoint-6", [])
    assert_equal(expected, finish(tmp_path / "cut", "head", callbacks=[Passing()], **options))
