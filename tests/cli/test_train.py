"""`train` as a command: its help, its flags, what it says of wrong ones, and the status it ends with."""

import json
import signal
import sys

import pytest

from peft_fast.cli import app, options, train
from peft_fast.errors import PeftFastError
from peft_fast.recipes import run
from peft_fast.recipes.config import METHODS, TASKS, Config

LEAST = ["--task", "sequence-classification", "--model", "m", "--data", "d.csv"]


def text_of_help(capsys, width=100, *more) -> str:
    assert train.app(["--help", *more]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_the_help_has_every_option_and_fits(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    text = text_of_help(capsys)
    options_shown = text.partition("examples:")[0]
    assert max(map(len, options_shown.splitlines())) <= min(width, 120)
    for name, field in Config.model_fields.items():
        flag = name.replace("_", "-")
        assert f"--{flag} " in text or f"--[no-]{flag}" in text
        assert field.description.split()[0] in text
    for word in (*TASKS, *METHODS, "default 16", "--dry-run", "--schema", "--examples"):
        assert word in " ".join(text.split())


def test_the_help_of_a_task_has_what_applies(capsys):
    text = text_of_help(capsys, 100, "--task", "image-classification", "--method", "gradual")
    assert "--image-size" in text and "--unfreeze-every" in text and "--epochs" in text
    for other in ("--max-length", "--packing", "--lora-dropout", "--horizon"):
        assert other not in text


@pytest.mark.parametrize(
    "words, name, value",
    [
        (["--epochs", "2"], "epochs", "2"),
        (["--data", "a.csv"], "data", "a.csv"),
        (["--data", "train=a.csv", "test=b.csv"], "data", {"train": "a.csv", "test": "b.csv"}),
        (["--data", "rows/lang=fr/a.csv"], "data", "rows/lang=fr/a.csv"),
        (["--columns", "text=headline", "--columns", "label=topic"], "columns", {"text": "headline", "label": "topic"}),
        (["--target-modules", "attention"], "target_modules", "attention"),
        (["--target-modules", "q_proj", "v_proj"], "target_modules", ["q_proj", "v_proj"]),
        (["--progressive", "64"], "progressive", ["64"]),
        (["--progressive", "64", "128"], "progressive", ["64", "128"]),
        (["--class-weights", "balanced"], "class_weights", "balanced"),
        (["--class-weights", "yes=3", "no=1"], "class_weights", {"yes": "3", "no": "1"}),
        (["--training-arguments", "adam_beta2=0.9", "adam_epsilon=1e-9"], "training_arguments", None),
        (["--search", "r=[4, 8]", "learning_rate={low: 1e-5, high: 1e-3, log: true}"], "search", None),
        (["--no-fast"], "fast", False),
        (["--rslora"], "rslora", True),
        (["--init-lora-weights", "false"], "init_lora_weights", False),
        (["--init-lora-weights", "pissa"], "init_lora_weights", "pissa"),
        (["--evaluate-every", "50"], "evaluate_every", "50"),
        (["--report-to", "tensorboard", "wandb"], "report_to", ["tensorboard", "wandb"]),
    ],
)
def test_flags(words, name, value):
    made, rest = train.parser("x").parse_known_args(words)
    given = options.given(made)
    assert not rest and list(given) == [name]
    expected = {
        "training_arguments": {"adam_beta2": 0.9, "adam_epsilon": 1e-9},
        "search": {"r": [4, 8], "learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}},
    }
    assert given[name] == (expected[name] if value is None else value)


def test_words_become_what_the_table_says():
    made, _ = train.parser("x").parse_known_args(
        [
            *LEAST,
            "--progressive",
            "64",
            "128",
            "--evaluate-every",
            "50",
            "--class-weights",
            "a=2",
            "--learning-rate",
            "1e-4",
        ]
    )
    config = run.resolve(None, options.given(made))
    assert (config.progressive, config.evaluate_every, config.class_weights) == ([64, 128], 50, {"a": 2.0})
    assert config.learning_rate == 1e-4


def test_everything_wrong_is_said_at_once(capsys):
    words = ["--task", "regresion", "--data", "d.csv", "--epochs", "many", "--leraning-rate", "1", "--r", "0"]
    assert app.main(["train", *words]) == 2
    told = capsys.readouterr().err
    for part in (
        "task: 'regresion'",
        "model: missing",
        "epochs: 'many'",
        "leraning_rate: no such option; learning_rate",
    ):
        assert part in told
    assert "r: '0'" in told and told.count("do: ") == 1


def test_flags_win_over_the_file(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    path.write_text("task: regression\nmodel: m\ndata: d.csv\nepochs: 7\nr: 2\n")
    seen = []
    monkeypatch.setattr(run, "train", lambda config, **more: seen.append(run.resolve(config, more)) or Done())
    assert train.app([str(path), "--epochs", "1", "--no-keep-best"]) == 130
    assert (seen[0].epochs, seen[0].r, seen[0].keep_best, seen[0].task) == (1, 2, False, "regression")


@pytest.mark.parametrize(
    "words", [["a.yaml", "b.yaml"], ["a.yaml", "b.yaml", "--epochs", "1"], ["--target-modules", "q", "b.yaml"]]
)
def test_words_that_belong_to_nothing(words, capsys):
    assert app.main(["train", *words]) == 2
    assert "'b.yaml' beside the config" in capsys.readouterr().err


def test_the_value_of_an_unknown_flag_is_no_config(capsys):
    assert app.main(["train", "--wight-decay", "0.1"]) == 2
    assert "wight_decay: no such option; weight_decay is one" in capsys.readouterr().err


def test_nothing_given(capsys):
    assert train.app([]) == 2
    assert "--help" in capsys.readouterr().err


def test_the_schema(capsys):
    assert train.app(["--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(Config.model_fields) and "task" in schema["required"]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_examples(capsys, monkeypatch, width):
    """Names of examples and of tasks can be copied at any width."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert train.app(["--examples"]) == 0
    text = capsys.readouterr().out
    from peft_fast.recipes import examples

    found = examples.entries()
    assert {f"example:{name}" for name in found} | set(TASKS) <= set(text.split()) and "…" not in text
    assert max(map(len, text.splitlines())) <= max(width, 80)
    at = text.splitlines()[0].index("for")
    listed = [line[at:].strip() for line in text.splitlines()[1:] if line[at:].strip()]
    assert listed == [
        task for has in (True, False) for e in found.values() if (e.splits is not None) == has for task in e.tasks
    ]


class Done:
    signum = signal.SIGINT


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_was_stopped(monkeypatch, signum, status):
    monkeypatch.setattr(run, "train", lambda config, **more: type("Run", (), {"signum": signum}))
    assert train.app(LEAST) == status


def test_a_missing_package(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pydantic", None)
    for name in [name for name in sys.modules if name.startswith(("peft_fast.recipes", "peft_fast.cli.train"))]:
        monkeypatch.delitem(sys.modules, name)
    assert app.main(["train", *LEAST]) == 1
    told = capsys.readouterr().err
    assert "`train` without pydantic" in told and "pip install 'peft_fast[train]'" in told


def test_a_plan_on_the_screen():
    import io

    from rich.console import Console

    from peft_fast.cli import plan

    out = io.StringIO()
    shown = {
        "title": "bert [x], regression by lora",
        "unit": "tokens",
        "method": "lora",
        "rows": {"train": 8070, "validation": 1000},
        "sources": {"train": "reviews.csv"},
        "notes": ["3 rows [cut]"],
        "model": {"class": "BertModel", "name": "bert", "parameters": 2000, "trainable": 20, "dtype": "bfloat16"},
        "config": {"batch_size": 8, "gradient_accumulation": 4, "learning_rate": 5e-4, "schedule": "wsd", "warmup": 0.1}
        | {"out": "runs/a", "data": "reviews.csv"},
        "forecast": {
            "steps": 757,
            "steps_per_epoch": 253,
            "units_per_step": 1234,
            "layers": {"head": 20},
            "memory": {"weights": 2**30, "activations": 2**29, "total": 3 * 2**29},
            "notes": ["a remark"],
        },
        "fast": {"on": True, "fast": ["a", "b"], "slow": {"c": "DoRA", "d": "DoRA"}, "groups": 0, "blocks": 1},
        "machine": {"cpu": "a processor", "cores": 2},
    }
    plan.show(shown, Console(file=out, width=100))
    text = " ".join(out.getvalue().split())
    for part in (
        "bert [x], regression by lora",
        "8,070 train, 1,000 validation",
        "20 parameters (1.00%)",
        "757, 253 an epoch, about 1.2 k tokens each",
        "32 rows a step (8 × 4)",
        "0.0005, wsd, warm-up 0.1",
        "1.50 GiB = weights 1.00 GiB + activations 512.0 MiB",
        "2 of 4 adapted layers, 1 MLP block",
        "2 with PEFT: DoRA (c, d)",
        "3 rows [cut]",
        "a remark",
        "a processor, 2 cores",
        "nothing was trained",
    ):
        assert part in text, part


def test_a_run_from_the_command_line_and_the_command_to_go_on(
    tiny_bert, reviews, tmp_path, capsys, signalled, monkeypatch
):
    """Stopped by Ctrl-C, then the very line that it printed."""
    import shlex

    data = [f"{name}={path}" for name, path in reviews.items()]
    out = tmp_path / "a run"  # a name that a shell would part
    words = ["--task", "sequence-classification", "--model", str(tiny_bert), "--data", *data, "--out", str(out)]
    words += ["--dtype", "fp32", "--epochs", "2", "--learning-rate", "1e-2", "--log-every", "4", "--device", "cpu"]
    usual = run.train
    monkeypatch.setattr(run, "train", lambda config, **more: usual(config, callbacks=[signalled(3)], **more))
    monkeypatch.setattr("sys.argv", ["/usr/bin/peft-fast"])
    assert app.main(["train", *words]) == 130
    told = capsys.readouterr().out
    line = next(line for line in told.splitlines() if "--resume" in line)
    monkeypatch.setattr(run, "train", usual)
    program, *rest = shlex.split(line)
    assert program == "peft-fast" and app.main(rest) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "going on at step 3" in told and "12 of 12 adapted layers" in told and "report" in told
    assert json.loads((out / "metrics.json").read_text())["state"] == "done"
    with pytest.raises(PeftFastError):
        usual(None, resume=True, out=str(out), r=3)
