"""A small Trainer with atomic checkpoints, and runs of it that are killed and go on."""

import os
import random
import signal
import sys
import time
import traceback

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import peft_fast
from peft_fast.recipes import checkpoints
from peft_fast.recipes.checkpoints import AtomicCheckpoints

ROWS, LENGTH, WORDS = 22, 12, 50
# options of a run of six steps
SHORT = {"num_train_epochs": 1, "save_steps": 2, "eval_steps": 2, "save_total_limit": 9}


class Rows(torch.utils.data.Dataset):
    def __init__(self, n, seed):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(5, WORDS, (n, LENGTH), generator=generator)
        self.labels = (self.ids[:, 0] > WORDS // 2).long()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


class Small(AtomicCheckpoints, Trainer):
    """Trainer that keeps the best, whatever is saved when, and counts its batches."""

    seen = 0

    def training_step(self, *args, **kwargs):
        self.seen += 1
        # the other two generators have a part in the result as well
        scale = 1 + 1e-3 * (random.random() + np.random.rand())
        return super().training_step(*args, **kwargs) * scale

    def own_state(self):
        return {"seen": self.seen}

    def load_own_state(self, state):
        self.seen = state["seen"]

    def _determine_best_metric(self, metrics, trial):
        best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= best
        return best


def model_of(method):
    """Another process makes the same one."""
    set_seed(3)
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.1,
    )
    model = BertForSequenceClassification(config)
    if method in ("lora", "dora"):
        options = LoraConfig(
            r=4,
            lora_dropout=0.1,
            target_modules=["query", "key", "value", "dense"],
            exclude_modules=[".*pooler.*"],
            modules_to_save=["classifier"],
            use_dora=method == "dora",
        )
        model = get_peft_model(model, options)
        peft_fast.accelerate(model)
    elif method == "head":
        model.bert.requires_grad_(False)
    return model


def trainer_of(folder, method="lora", callbacks=(), patience=0, **options):
    """A Small over ``folder``; ``options`` are TrainingArguments."""
    given = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": 2,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "seed": 3,
        "data_seed": 3,
        **options,
    }
    more = [EarlyStoppingCallback(patience)] if patience else []
    trainer = Small(
        model=model_of(method),
        args=TrainingArguments(
            output_dir=str(folder), use_cpu=True, report_to="none", disable_tqdm=True, log_level="error", **given
        ),
        train_dataset=Rows(ROWS, 0),
        eval_dataset=Rows(9, 1),
        callbacks=[*more, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def finish(folder, *args, **kwargs):
    """Trains to the end, from the newest checkpoint if there is one -> all that must be the same."""
    checkpoints.clean(folder)
    trainer = trainer_of(folder, *args, **kwargs)
    output = trainer.train(checkpoints.latest(folder))
    result = {name: p.detach().clone() for name, p in trainer.model.state_dict().items()}
    if trainer.state.best_model_checkpoint:
        trainer._load_best_model()
        result |= {f"best {name}": p.detach().clone() for name, p in trainer.model.state_dict().items()}
    timed = ("runtime", "per_second")
    result["log"] = [{k: v for k, v in e.items() if not k.endswith(timed)} for e in trainer.state.log_history]
    result["loss"], result["seen"] = output.training_loss, trainer.seen
    result["best"] = trainer.state.best_metric, trainer.state.best_global_step
    result["groups"] = peft_fast.report(trainer.model).group_calls if hasattr(trainer.model, "peft_config") else 0
    result["generators"] = random.random(), float(np.random.rand()), float(torch.rand(()))
    return result


class Killer(TrainerCallback):
    """kill -9 of this process: at the end of a step, in an evaluation, or at the n-th file operation of its saves."""

    def __init__(self, where, when):
        self.where, self.when, self.count = where, when, 0

    def on_step_end(self, args, state, control, **kwargs):
        if self.where == "step" and state.global_step == self.when:
            die()

    def on_substep_end(self, args, state, control, **kwargs):
        if self.where == "substep" and state.global_step == self.when:
            die()

    def on_prediction_step(self, args, state, control, **kwargs):
        self.count += 1
        if self.where == "evaluation" and self.count == self.when:
            die()

    def in_saves(self):
        """Counts what the process asks of the file system between the begin of a save and its end."""
        if self.where != "save":
            return
        inside = checkpoints.AtomicCheckpoints._save_checkpoint
        depth = []

        def save(trainer, *args):
            depth.append(1)
            try:
                return inside(trainer, *args)
            finally:
                depth.pop()

        def hook(event, args):
            if depth and event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
                self.count += 1
                if self.count == self.when:
                    die()

        checkpoints.AtomicCheckpoints._save_checkpoint = save
        sys.addaudithook(hook)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed(folder, where, when, *args, **kwargs):
    """Trains in a child process that is killed -> was it, or did it come to its end before?"""

    def train():
        checkpoints.clean(folder)
        killer = Killer(where, when)
        killer.in_saves()
        trainer_of(folder, *args, callbacks=[killer], **kwargs).train(checkpoints.latest(folder))

    return in_child(train) != 0


def in_child(do, until=None):
    """Calls ``do`` in a forked process -> the number of the signal that ended it, 0 if none did.

    It is killed as soon as ``until()`` is true.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            do()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    done, status = os.waitpid(child, os.WNOHANG if until else 0)
    while not done:
        if until():
            os.kill(child, signal.SIGKILL)
            until = None
        time.sleep(0.002)
        done, status = os.waitpid(child, 0 if until is None else os.WNOHANG)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "it failed by itself"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def assert_equal(expected, got):
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, got[name]), f"{name}: off by {(value - got[name]).abs().max():.3g}"
        else:
            assert value == got[name], name
