"""A run that was killed with -9 and goes on ends bit for bit where one ends that was never stopped."""

import importlib
import json
import os
import pkgutil
import random
import signal
import time

import pytest
import yaml

from peft_fast import recipes, settings
from peft_fast.__main__ import main as command_line
from tests.recipes import small
from tests.recipes.conftest import usual
from tests.recipes.small import assert_equal, finish, in_child, killed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

# what is trained how -> the moments at which it is killed
CASES = {
    "lora": (["lora"], {}, [("step", 7), ("step", 1), ("step", 18), ("save", 40)]),
    "lora, best and saves apart": (
        ["lora"],
        {"save_steps": 3, "eval_steps": 5, "greater_is_better": True},
        [("evaluation", 5), ("save", 75)],
    ),
    "dora, all best": (["dora"], {"greater_is_better": True, "save_total_limit": 1}, [("save", 60), ("step", 10)]),
    "head, accumulated": (["head"], {"gradient_accumulation_steps": 3}, [("substep", 1), ("step", 5)]),
    "full": (["full"], {"save_steps": 5, "num_train_epochs": 1.5}, [("step", 6), ("evaluation", 9)]),
    "lora, recomputed, stops early": (
        ["lora"],
        {"patience": 2, "save_steps": 5, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        [("step", 4), ("step", 6)],
    ),
    "lora, ends within an epoch": (
        ["lora"],
        {"max_steps": 9, "save_steps": 2, "logging_steps": 4, "weight_decay": 0.1},
        [("save", 120), ("step", 8)],
    ),
}


@pytest.fixture(autouse=True)
def quiet():
    with settings.override(quiet=True, min_tokens=0):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a case ends with if nobody stops it."""
    known = {}

    def result(name):
        if name not in known:
            args, options, _ = CASES[name]
            known[name] = finish(tmp_path_factory.mktemp("whole"), *args, **options)
        return known[name]

    return result


@pytest.mark.parametrize(
    "name, moment",
    [
        pytest.param(name, moment, id=f"{name}, {moment[0]} {moment[1]}", marks=[pytest.mark.slow] * (i > 0))
        for name, (_, _, moments) in CASES.items()
        for i, moment in enumerate(moments)
    ],
)
def test_a_killed_run_ends_like_the_whole_one(name, moment, whole, tmp_path):
    args, options, _ = CASES[name]
    expected = whole(name)
    killed(tmp_path, *moment, *args, **options)
    assert_equal(expected, finish(tmp_path, *args, **options))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_groups_ran_before_the_kill_and_from_the_first_step_after(whole, tmp_path, monkeypatch):
    """The test above would not notice a model without groups."""
    expected = whole("lora")
    assert expected["groups"] > 50
    killed(tmp_path, "step", 7, "lora")
    monkeypatch.setattr("peft_fast.patch.resume.restore_state", lambda *args: False)
    with pytest.raises(AssertionError, match="off by"):
        assert_equal(expected, finish(tmp_path, "lora"))


def test_a_run_that_was_over_does_no_step_more(tmp_path):
    """Killed after its last checkpoint, in what comes after training."""
    options = {"max_steps": 9, "save_steps": 3, "eval_steps": 3}
    expected = finish(tmp_path, "lora", **options)
    trainer = small.trainer_of(tmp_path, "lora", **options)
    trainer.training_step = None
    trainer.train(small.checkpoints.latest(tmp_path))
    assert trainer.state.global_step == 9
    assert_equal(expected, finish(tmp_path, "lora", **options))


def test_more_patience_goes_on_where_less_had_stopped(tmp_path):
    options = {"save_steps": 2, "num_train_epochs": 2}
    first = finish(tmp_path, "lora", patience=1, **options)
    assert max(entry["step"] for entry in first["log"]) == 4
    # and with as much, none
    assert_equal(first, finish(tmp_path, "lora", patience=1, **options))
    second = finish(tmp_path, "lora", patience=3, **options)
    assert max(entry["step"] for entry in second["log"]) == 8


def test_a_moved_folder_finds_its_best(tmp_path, whole):
    killed(tmp_path / "here", "step", 7, "lora")
    (tmp_path / "here").rename(tmp_path / "there")
    assert_equal(whole("lora"), finish(tmp_path / "there", "lora"))


# ---- peft-fast train


def main(arguments):
    """The command, as far as an exit code of 0."""
    assert not command_line(arguments)


SMALL_STEPS = {"epochs": 2, "batch_size": 8, "log_every": 2, "train_rows": 44, "max_length": 16}
REAL = {
    "lora, saves and evaluations apart": {
        **{"save_every": 3, "evaluate_every": 5, "gradient_accumulation": 2, "epochs": 4, "early_stopping": 3},
        "target_modules": "attention",
    },
    "masked words, growing": {"task": "masked-lm", "progressive": [8, 16], "evaluate_every": 4, "dropout": 0.1},
    "gradual": {"method": "gradual", "unfreeze_every": 0.5, "save_every": 2, "layer_decay": 0.8},
    "gradual by plateau": {"method": "gradual", "unfreeze_by": "plateau", "evaluate_every": 2, "save_every": 5},
    "head": {"method": "head", "schedule": "cosine", "evaluate_every": 3},
    "full": {"method": "full", "neftune": 5.0, "evaluate_every": 4, "save_every": 3, "learning_rate": 1e-3, "keep": 1},
    "dora": {"method": "dora", "lora_dropout": 0.2, "class_weights": "balanced", "gradient_checkpointing": True},
}
# of a clock, or of this machine
TIMED = {"seconds", "started", "finished", "per_second", "memory_bytes", "memory", "throughput", "machine", "phases"}
TIMED |= {"resumed_at", "forecast"}


def plain(value):
    """Without what no two runs have alike."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in TIMED and not k.endswith(("_time", "_per_second"))}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def left(folder):
    """What a run left, as far as it must be the same."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    result = plain(json.loads((folder / "metrics.json").read_text()))
    result["config"] = {**result["config"], "out": None, "resume": None}
    tensors = {path.name: path.read_bytes() for path in folder.glob("*/*.safetensors")}
    assert tensors and result["state"] == "done"
    return (
        {k: v for k, v in result.items() if k != "title"}
        | {"log.jsonl": [plain(json.loads(x)) for x in lines]}
        | tensors
    )


def steps_in(folder):
    """The newest step that the run's log tells of."""
    try:
        lines = (folder / "log.jsonl").read_text().splitlines()
        return max((json.loads(line).get("step", 0) for line in lines if line.endswith("}")), default=-1)
    except OSError:
        return -1


@pytest.fixture(scope="module")
def command(tiny_bert, reviews):
    """command(name, folder) -> the arguments of peft-fast for a case, from its begin or from where it stopped."""
    # once for all processes that are forked
    for found in pkgutil.walk_packages(recipes.__path__, "peft_fast.recipes."):
        importlib.import_module(found.name)

    def arguments(name, folder):
        if (folder / "config.yaml").exists():
            return ["train", "--resume", "--out", str(folder)]
        options = usual(tiny_bert, None, folder) | SMALL_STEPS | REAL[name]
        if options.get("method", "lora") not in ("lora", "dora"):
            del options["r"]
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = folder.parent / f"{folder.name}.yaml"
        path.write_text(yaml.safe_dump({**options, "data": {"train": reviews["train"], "validation": reviews["test"]}}))
        return ["train", str(path)]

    return arguments


@pytest.fixture(scope="module")
def ended(command, tmp_path_factory):
    """What a case leaves if nobody stops it."""
    known = {}

    def result(name):
        if name not in known:
            folder = tmp_path_factory.mktemp("ended") / "same"
            assert in_child(lambda: main(command(name, folder))) == 0
            known[name] = left(folder)
        return known[name]

    return result


@pytest.mark.parametrize("name", ["lora, saves and evaluations apart", "gradual"])
def test_the_command_goes_on_where_it_was_killed(name, command, ended, tmp_path):
    expected = ended(name)
    folder = tmp_path / "same"
    assert in_child(lambda: main(command(name, folder)), until=lambda: steps_in(folder) >= 6) == signal.SIGKILL
    assert in_child(lambda: main(command(name, folder))) == 0
    assert left(folder) == expected


# ---- any moment


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_any_moment(name, whole, tmp_path):
    """Killed again and again at random moments until it is through."""
    args, options, _ = CASES[name]
    expected = whole(name)
    draw = drawing()
    for i in range(8):
        folder = tmp_path / str(i)
        for _ in range(12):
            where = draw.choice(["step", "substep", "evaluation", "save", "save"])
            most = {"step": 18, "substep": 8, "evaluation": 24, "save": 200}[where]
            if not killed(folder, where, draw.randint(1, most), *args, **options):
                break
        assert_equal(expected, finish(folder, *args, **options))


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_command_at_any_moment(name, command, ended, tmp_path):
    """Killed by the clock: while it loads, trains, saves, evaluates or writes its results."""
    expected = ended(name)
    draw = drawing()

    def run(folder, seconds=float("inf")):
        end = time.monotonic() + seconds
        return in_child(lambda: main(command(name, folder)), until=lambda: time.monotonic() > end)

    began = time.monotonic()
    assert run(tmp_path / "timed") == 0
    took = time.monotonic() - began
    for i in range(5):
        folder = tmp_path / str(i) / "same"
        signals = 0
        for _ in range(6):
            if not run(folder, draw.uniform(0.2, 1.1) * took):
                break
            signals += 1
        assert run(folder) == 0
        print(name, i, "killed", signals, "times")
        assert left(folder) == expected
        assert not list(folder.glob(".*.part")) and not list((folder / "checkpoints").glob(".*"))


def drawing():
    """A generator whose seed is printed."""
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    return random.Random(seed)
