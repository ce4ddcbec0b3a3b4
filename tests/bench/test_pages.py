"""`bench pages`: each page's first command in a process of its own, and the part of the page that is made of it."""

import json
import math
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from peft_fast.benchmarks import harness, pages, table
from peft_fast.cli import bench
from peft_fast.errors import DataError, SettingsError, UnsupportedError
from peft_fast.recipes.config import TASKS

RESULT = Path(pages.__file__).parent / "results" / "pages.json"


def metrics(better=0.8):
    """What a run leaves, as far as a row needs it."""
    return {
        "model": {"name": "toy", "class": "Toy", "dtype": "bfloat16", "parameters": 1000, "trainable": 20},
        "method": "lora",
        "metric": "f1",
        "higher": True,
        "rows": {"train": 3200, "validation": 16, "test": 40},
        "sources": {"train": "toy.csv", "validation": "toy.csv", "test": "toy.csv"},
        "final": {"validation": {"f1": better, "loss": 0.5}, "test": {"f1": 0.7512, "loss": 0.625}},
        "evaluations": [{"step": 0, "epoch": 0.0, "f1": 0.25, "loss": 1.0}, {"step": 4, "epoch": 1.0, "f1": better}],
        "best": {"step": 4, "value": better},
        "throughput": {"unit": "tokens", "per_second": 1234.5, "train_seconds": 90.0, "steps": 8},
        "seconds": 100.0,
        "memory": {"peak_bytes": 300 * 2**20, "before_bytes": 100 * 2**20},
        "fast": {"on": True, "fast": ["a", "b"], "slow": {"c": "why"}, "blocks": 1},
    }


@pytest.fixture
def trained(monkeypatch):
    """The commands of runs that did not happen, and what they leave."""
    made = SimpleNamespace(lines=[], found=metrics(), code=0)

    def run(line, **how):
        made.lines.append(line)
        out = pages.Path(line[line.index("--out", line.index("--out") + 1) + 1])
        out.mkdir(parents=True)
        if not made.code:
            (out / "metrics.json").write_text(json.dumps(made.found))
        return SimpleNamespace(returncode=made.code, stdout="", stderr="given: no such thing")

    monkeypatch.setattr(pages.whole, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(pages.examples, "path", lambda source, say=print: source)
    return made


def test_every_page_runs_its_own_command_into_another_folder(trained, tmp_path):
    where = tmp_path / "pages.json"
    assert bench.app(["pages", "--json", str(where), "--device", "cpu"]) == 0
    assert [row["title"] for row in harness.read(where)["rows"]] == list(TASKS)
    for task, line in zip(TASKS, trained.lines, strict=True):
        own = shlex.split(pages.command(task))[1:]
        assert line[3 : 3 + len(own)] == own and own[own.index("--task") + 1] == task
        assert line[3 + len(own)] == "--out" and line[-2:] == ["--device", "cpu"]  # the last one counts


def test_a_page_run_again_keeps_the_others(trained, tmp_path):
    where = tmp_path / "pages.json"
    bench.app(["pages", "--json", str(where), "--model", "regression,causal-lm", "--device", "cpu"])
    trained.found = metrics(0.9)
    bench.app(["pages", "--json", str(where), "--model", "regression", "--device", "cpu"])
    rows = harness.read(where)["rows"]
    assert [(row["title"], row["validation"]["f1"]) for row in rows] == [("causal-lm", 0.8), ("regression", 0.9)]
    assert len(trained.lines) == 3 and all(row["machine"]["packages"]["torch"] for row in rows)


def test_a_result_of_another_kind_is_not_written_over(trained, tmp_path):
    where = tmp_path / "pages.json"
    bench.app(["pages", "--json", str(where), "--model", "regression", "--tiny", "--device", "cpu"])
    with pytest.raises(SettingsError, match="pages, tiny"):
        bench.app(["pages", "--json", str(where), "--model", "regression", "--device", "cpu"])
    assert trained.lines[0][-2:] == ["--steps", "2"] and len(trained.lines) == 1


@pytest.mark.parametrize(
    ("better", "changes", "why"),
    [
        (0.8, {}, ""),
        (0.0, {"higher": False, "rows": {"train": 3200, "validation": 40}}, ""),
        (0.5, {}, "is 50.0 %, and was 25.0 % before training: chance alone may make 35.4 % of 16 rows"),
        (0.5, {"rows": {"train": 3200, "validation": 160}}, ""),
        (0.2, {"higher": False}, "chance alone may make 30.6 % of 16 rows"),
        (0.2, {}, "f1 of the validation rows is 20.0 %, and was 25.0 % before training"),
        (0.8, {"higher": False}, "is 80.0 %, and was 25.0 %"),
        (0.25, {}, "is 25.0 %, and was 25.0 %"),
        (0.8, {"best": {"step": 0, "value": 0.25}}, "no evaluation was better than the one before training"),
        (0.8, {"evaluations": metrics()["evaluations"][1:]}, "no f1 of the validation rows before training"),
        (0.8, {"evaluations": []}, "no f1 of the validation rows before training"),
        (0.8, {"metric": "wer"}, "no wer of the validation rows before training"),
        (0.8, {"final": {"test": {"f1": 0.9}}}, "no f1 of the validation rows after training"),
    ],
)
def test_what_learnt_nothing_is_refused(trained, capsys, better, changes, why):
    trained.found = metrics(better) | changes
    found = pages.unlearnt(trained.found)
    assert why in found and bool(why) == bool(found)
    assert bench.app(["pages", "--model", "regression", "--device", "cpu"]) == bool(why)
    assert why in capsys.readouterr().out


def learnt(metric, before, after, rows, higher=True):
    found = metrics() | {"metric": metric, "higher": higher, "rows": {"validation": rows}}
    found |= {"evaluations": [{"step": 0, metric: before}], "final": {"validation": {metric: after}}}
    return not pages.unlearnt(found)


@pytest.mark.parametrize("page", harness.read(RESULT)["rows"], ids=lambda row: row["title"])
def test_what_a_page_shows_was_learnt(page):
    if page["command"] != pages.command(page["title"]):
        pytest.skip("measured with another command than the page has now")
    name = page["metric"]
    values = page["before"][name], page["validation"][name]
    assert learnt(name, *values, page["rows"]["validation"], page["higher"])
    assert not learnt(name, *values, 2, page["higher"])  # the same of two rows would be chance


def _shares(draw, rows):
    return (draw.random(rows) < 0.3).mean()


def _errors(draw, rows):
    return draw.exponential(1.7, rows).mean()


def _explained(draw, rows):
    truth = draw.normal(size=rows)
    answers = 0.2 * truth + 0.4 * draw.normal(size=rows)  # the best guess of truth, if 0.2 of its variance is known
    return 1 - ((truth - answers) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()


def _told(draw, rows):
    return np.corrcoef(draw.multivariate_normal([0, 0], [[1, 0.4], [0.4, 1]], rows).T)[0, 1]


@pytest.mark.parametrize(
    ("name", "value", "higher"),
    [
        ("accuracy", _shares, True),
        ("wer", _shares, False),
        ("chrf", lambda draw, rows: 100 * _shares(draw, rows), True),
        ("mase", _errors, False),
        ("perplexity", lambda draw, rows: math.exp(_errors(draw, rows)), False),
        ("r2", _explained, True),
        ("pearson", _told, True),
    ],
)
def test_chance_alone_is_seldom_taken_for_learning(name, value, higher):
    """A model that stays as it is, judged by rows that are drawn anew, seems to learn about once in 40 times."""
    draw = np.random.default_rng(0)
    for rows in (40, 300):
        values = [value(draw, rows) for _ in range(1200)]
        pairs = zip(values[::2], values[1::2], strict=True)
        found = [learnt(name, before, after, rows, higher) for before, after in pairs]
        assert 0 < np.mean(found) < 0.05, rows


def test_a_few_steps_need_not_have_learnt(trained):
    trained.found = metrics(0.2)
    assert bench.app(["pages", "--model", "regression", "--tiny", "--device", "cpu"]) == 0


def test_a_run_that_fails_says_why(trained):
    trained.code = 1
    with pytest.raises(UnsupportedError, match="no such thing"):
        bench.app(["pages", "--model", "regression", "--device", "cpu"])


@pytest.mark.parametrize("more", [["--gate-only"], ["--threads", "1"], ["--dtype", "bf16"], ["--plot", "x.png"]])
def test_options_that_would_change_the_command(trained, more):
    with pytest.raises(SettingsError, match=f"given: {more[0]}"):
        bench.app(["pages", *more])
    assert not trained.lines


def test_the_page_has_the_figures_of_its_command_alone(trained, tmp_path, monkeypatch):
    where = tmp_path / "pages.json"
    bench.app(["pages", "--json", str(where), "--model", "regression", "--device", "cpu"])
    document = harness.read(where)
    text = pages.section("regression", [document])
    assert "|  | before training | after | test rows |" in text
    assert "| `f1` | 25.0 % | 80.0 % | 75.1 % |\n| `loss` | 1 | 0.5 | 0.625 |" in text
    assert "3,200 train, 16 validation, 40 test of toy.csv" in text and "2 of 3 adapted layers fast, 1 MLP" in text
    assert "8 steps in 1 min 30 s of training, 1,234 tokens/s, 200.0 MiB of memory at the peak (the process's" in text
    assert "with the weights of step 4" in text and "torch 2" in text
    assert pages.section("causal-lm", [document]) == pages.NONE.format(task="causal-lm", file=pages.FILE)
    document["rows"][0]["command"] += " --epochs 9"
    assert pages.section("regression", [document]).startswith("_Nothing measured with this command yet")


def test_each_page_has_its_marks_and_is_written_by_bench_table(trained, tmp_path, monkeypatch):
    where = tmp_path / "results" / "pages.json"
    bench.app(["pages", "--json", str(where), "--device", "cpu"])
    for page, sections in pages.sections().items():
        text = table.render(page.read_text(encoding="utf-8"), table.documents(where.parent), sections)
        assert "| `f1` | 25.0 % | 80.0 % | 75.1 % |" in text, page.name
        assert "MiB of memory at the peak" in text.partition("\n## ")[0], f"{page.name}: the marks are too far down"


def test_a_page_without_a_command_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "DOCS", tmp_path)
    (tmp_path / "regression.md").write_text("# Regression\n\n```sh\npip install x\n```\n")
    with pytest.raises(DataError, match=r"regression\.md"):
        pages.command("regression")


@pytest.mark.slow
def test_a_real_run(tmp_path, download_cache):
    from peft_fast import settings

    where = tmp_path / "pages.json"
    with settings.override(cache_dir=download_cache):
        assert bench.app(["pages", "--tiny", "--model", "time-series", "--json", str(where), "--device", "cpu"]) == 0
    (row,) = harness.read(where)["rows"]
    assert row["peak_bytes"] > 0 and row["steps"] == 2 and row["before"] and row["validation"] and row["test"]
