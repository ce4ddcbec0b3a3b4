"""Two processes in turns: the whole quick demo on a tiny model, an A/A pair, and workers that fail."""

import json
import os
import signal
import subprocess
import sys

import pytest

from peft_fast.cli import demo
from peft_fast.demo import compare, data
from peft_fast.demo.finetune import Recipe, load_model
from peft_fast.errors import DataError, SettingsError, UnsupportedError


def quick(model: str, rows: str, out, *more: str) -> list[str]:
    return [
        "--quick",
        "--model",
        model,
        "--data",
        rows,
        "--out",
        str(out),
        "--no-network",
        "--device",
        "cpu",
        *more,
    ]


def test_quick_demo_end_to_end(tiny_bert, sentences_csv, tmp_path, root):
    out = tmp_path / "report"
    command = [
        sys.executable,
        "-m",
        "peft_fast",
        "demo",
        *quick(tiny_bert, sentences_csv, out, "--dtype", "fp32"),
    ]
    done = subprocess.run(command, cwd=root, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "LoRA layers fast" in done.stdout and "accuracy" in done.stdout
    assert done.stderr == ""
    assert {p.name for p in out.iterdir()} == {
        "report.html",
        "demo.png",
        "demo.json",
        "stock.log",
        "peft_fast.log",
    }
    result = json.loads((out / "demo.json").read_text())
    stock, fast = result["runs"]["stock"], result["runs"]["peft_fast"]
    assert stock["fast_calls"] == 0 < fast["fast_calls"]
    assert fast["slow"] == {} and len(fast["fast"]) == 13
    assert result["same_batches"] and stock["tokens"] == fast["tokens"] > 0
    assert len(stock["losses"]) == len(fast["losses"]) == result["steps"] == demo.QUICK["steps"]
    assert fast["saved_bytes"] < stock["saved_bytes"]
    assert sum(stock["phases"].values()) == pytest.approx(stock["seconds"])
    # the first losses differ by dropout masks only
    assert stock["losses"][0] == pytest.approx(fast["losses"][0], abs=0.05)
    for private in (str(tmp_path), str(root), os.path.expanduser("~")):
        assert private not in (out / "demo.json").read_text() + (out / "report.html").read_text()


def test_the_same_contender_twice_gives_the_same_losses(tiny_bert, sentences_csv, tmp_path):
    """The A/A pair: two processes of one seed run bit-equal, so only who computes makes a difference."""
    recipe = Recipe(tiny_bert, dtype="fp32", max_steps=6, device="cpu", threads=1, network=False)
    task = data.load(sentences_csv, n_test=16)
    heard = []
    result = compare.compare(
        recipe,
        task,
        tmp_path,
        lambda event, facts: heard.append((event, facts.get("name"), facts.get("step"))),
        block=4,
        contenders={"a": "peft_fast", "b": "peft_fast"},
    )
    a, b = result["runs"]["a"], result["runs"]["b"]
    assert a["losses"] == b["losses"] and a["accuracy"] == b["accuracy"]
    assert [x for x in heard if x[0] == "turn"] == [
        ("turn", "a", 4),
        ("turn", "b", 4),
        ("turn", "b", 6),
        ("turn", "a", 6),
    ]


FAILURES = {
    "model": (DataError, "--model nowhere/at-all"),
    "lr": (UnsupportedError, "the run stock: ValueError"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_worker_that_fails_says_why(what, tiny_bert, sentences_csv, tmp_path):
    error, said = FAILURES[what]
    wrong = {"model": "nowhere/at-all", "lr": float("nan")}[what]
    fields = {"model": tiny_bert, "max_steps": 2, "device": "cpu", "threads": 1, "network": False} | {what: wrong}
    with pytest.raises(error) as raised:
        compare.compare(Recipe(**fields), data.load(sentences_csv, n_test=16), tmp_path)
    assert said in str(raised.value) and len(str(raised.value).splitlines()) == 3


def test_a_worker_that_is_killed(tiny_bert, sentences_csv, tmp_path, monkeypatch):
    recipe = Recipe(tiny_bert, max_steps=2, device="cpu", threads=1, network=False)
    started = []
    popen = subprocess.Popen

    def start(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(compare.subprocess, "Popen", start)

    def watch(event, facts):
        started[-1].send_signal(signal.SIGKILL)

    with pytest.raises(UnsupportedError, match="(?s)exit status -9.*peft_fast.log"):
        compare.compare(recipe, data.load(sentences_csv, n_test=16), tmp_path, watch)
    assert all(process.poll() is not None for process in started)


def test_held_out_rows_are_compared_pair_by_pair():
    a, b = [True] * 8 + [False] * 2, [True] * 4 + [False] * 5 + [True]
    assert compare.held_out(a, b) == {"only_first": 4, "only_last": 1, "p": 2 * 6 / 32}
    assert compare.held_out(a, a)["p"] == 1.0
    assert compare.held_out([True] * 10, [False] * 10)["p"] == pytest.approx(2 / 2**10)


def test_wrong_options_are_named_together(tmp_path):
    with pytest.raises(SettingsError) as raised:
        demo.app(["--epochs", "0", "--dropout", "1.5", "--batch", "0", "--out", str(tmp_path)])
    message = str(raised.value)
    assert all(part in message for part in ("--epochs 0.0", "--dropout 1.5", "--batch 0"))


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="--out"):
        demo.app(["--out", str(tmp_path / "file")])


def test_no_network_and_empty_cache(tmp_path, capsys):
    with pytest.raises(DataError, match="(?s)--no-network.*--data"):
        demo.app(["--no-network", "--out", str(tmp_path)])


@pytest.mark.parametrize("keep", [False, True])
def test_the_models_own_dropout(keep, tiny_bert):
    import torch

    model, _ = load_model(Recipe(tiny_bert, dtype="fp32", keep_dropout=keep, network=False), 2)
    of_lora, own = [], []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            (of_lora if "lora" in name else own).append(module.p)
    assert set(of_lora) == {0.05} and set(own) == {0.1 if keep else 0.0}
