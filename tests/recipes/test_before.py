"""What a config has wrong comes in one list, whichever stage of a run would find it, before anything is read."""

import pytest

from peft_fast.errors import DeviceError, SettingsError
from peft_fast.recipes import before, config, optimizer, run

LEAST = {"task": "sequence-classification", "model": "/nowhere/m", "data": "/nowhere/d.csv", "device": "cpu"}
# by stage: metric, methods, columns, dtype, reporters, optimizer, training arguments
LATER = {
    "method": "head",
    "layer_decay": 0.9,
    "schedule": "cosine",
    "decay": 0.3,
    "metric": "accurac",
    "columns": {"txt": "a", "lable": "b"},
    "dtype": "fp16",
    "report_to": ["wandbb", "tensorbord"],
    "optimizer": "adamm",
    "training_arguments": {"adam_beta9": 1, "torch_empty_cache_steps": -1},
}
TOLD = (
    "metric: accurac; one of accuracy, ",
    "layer_decay: nothing below the head trains",
    "decay: schedule cosine has no such part",
    "columns: no role lable; label is one",
    "columns: no role txt; text is one",
    "dtype: fp16 on a CPU",
    "report_to: wandbb; wandb is one",
    "report_to: tensorbord; tensorboard is one",
    "optimizer: adamm; adamw_torch is one",
    "training_arguments: adam_beta9; adam_beta2 is one",
    "training_arguments: `torch_empty_cache_steps` must be an integer",
)


def wrong(given) -> str:
    with pytest.raises(SettingsError) as caught:
        run.train(given)
    return str(caught.value)


def test_all_stages_at_once(tmp_path):
    told = wrong(LEAST | LATER | {"out": tmp_path / "run"})
    assert f"with {len(TOLD)} problems:" in told and not (tmp_path / "run").exists()
    for part in TOLD:
        assert f"\n  {part}" in told, part


def test_all_stages_beside_what_the_table_refuses(tmp_path):
    """Its own values, its rules between options, keys that stand twice in the file, flags."""
    path = tmp_path / "a.yaml"
    more = {"epochs": float("inf"), "class_weights": {"fraud": -3.0}, "evaluate_every": 0, "wight_decay": 1}
    text = config.yaml.safe_dump(LEAST | LATER | more)
    path.write_text(text + "seed: 1\nseed: 2\n")
    with pytest.raises(SettingsError) as caught:
        run.train(path, lr=1)
    told = str(caught.value)
    assert f"with {len(TOLD) + 5} problems:" in told and f"beside {path} with 1 problem:\n  lr: no such" in told
    extra = ("epochs: inf; ", "class_weights: {'fraud': -3.0}; ", "evaluate_every: 0; ", "wight_decay: no such option")
    for part in (*TOLD, *extra, "seed: given 2 times"):
        assert f"\n  {part}" in told, part


@pytest.mark.parametrize(
    "bad",
    [
        {"schedule": "wsdd", "decay": 0.3},
        {"method": "gradual", "unfreeze_by": "plateu", "unfreeze_patience": 2},
        {"schedule": "wsd", "warmup": "x", "decay": 0.97},
    ],
    ids=lambda bad: list(bad)[-1],
)
def test_a_bad_option_makes_no_other_one_wrong(bad):
    assert "with 1 problem:" in wrong(LEAST | bad)


def test_one_alone_is_the_error_it_would_be():
    with pytest.raises(DeviceError, match="fp16 on a CPU"):
        before.check(config.read(LEAST | {"dtype": "fp16"}))
    told = wrong(LEAST | {"optimizer": "adamm"})
    assert told.startswith("given: optimizer: adamm; adamw_torch is one\n") and len(told) < 200


@pytest.mark.parametrize(
    "given, meant",
    [("adam", "adamw_torch"), ("AdamW", "adamw_torch"), ("adamw_tor", "adamw_torch"), ("lyon", "lion_"), ("xyz", "")],
)
def test_an_optimizer_that_is_none(given, meant):
    with pytest.raises(SettingsError, match=rf"optimizer: {given}(; {meant}\w* is one)?\n") as caught:
        optimizer.check(config.read(LEAST | {"optimizer": given}))
    assert (f"; {meant}" in str(caught.value)) == bool(meant)


def test_every_optimizer_is_taken():
    from transformers.training_args import OptimizerNames

    for kind in OptimizerNames:
        optimizer.check(config.read(LEAST | {"optimizer": kind.value}))
