"""`compare`: the table, what differs, warnings, and files that are well-formed."""

import json
import re
from xml.etree import ElementTree

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

from peft_fast.cli import compare
from peft_fast.errors import DataError, SettingsError
from peft_fast.pages import compare as page

EVIL = "<script>$x_1$</script>"


def result(name="one", accuracy=0.8, seconds=120.0, **config) -> dict:
    return {
        "name": name,
        "state": "done",
        "task": "sequence-classification",
        "metric": "accuracy",
        "higher": True,
        "config": {"task": "sequence-classification", "data": "rows.csv", "method": "lora", "r": 16, "out": name}
        | config,
        "rows": {"train": 100, "test": 20},
        "sources": {"test": "test.csv"},
        "model": {"parameters": 1000, "trainable": 100},
        "log": [{"step": step, "loss": 1 / step} for step in range(1, 21)],
        "evaluations": [{"step": step, "accuracy": accuracy - 1 / step, "loss": 0.5} for step in (10, 20)],
        "best": {"step": 20, "value": accuracy},
        "final": {"test": {"accuracy": accuracy, "loss": 0.5}},
        "throughput": {"unit": "tokens", "per_second": 50.0, "steps": 20, "train_seconds": seconds},
        "memory": {"peak_bytes": 5 * 2**20, "before_bytes": 3 * 2**20},
        "machine": {"cpu": "a CPU"},
    }


@pytest.fixture
def folders(tmp_path):
    """folders(result, …) -> their folders."""

    def write(*results):
        made = []
        for i, one in enumerate(results):
            made.append(tmp_path / "runs" / f"{i}")
            made[-1].mkdir(parents=True)
            (made[-1] / "metrics.json").write_text(json.dumps(one))
        return [str(path) for path in made]

    return write


def test_the_table_shows_what_came_out_and_what_differs(folders, tmp_path, capsys):
    given = folders(result(), result(EVIL, 0.9, 60.0, method="full", r=8))
    assert compare.app([*given, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for word in ("80.0 %", "90.0 % *", "2 min 00 s", "1 min 00 s", "2.0 MiB", "method", "lora", "full", EVIL):
        assert word in shown, word
    assert "warning" not in shown
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"compare.html", "compare.png", "compare.json"}
    text = (tmp_path / "out" / "compare.html").read_text()
    ElementTree.fromstring(text.partition("\n")[2])
    assert EVIL not in text and "90.0 % *" in text and "Options that differ" in text
    saved = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [run["options"] for run in saved["runs"]] == [{"method": "lora", "r": 16}, {"method": "full", "r": 8}]


def test_it_is_said_of_which_rows_a_value_is(folders, tmp_path, capsys):
    held = result("two", 0.7)
    held["final"] = {"validation": held["final"]["test"]}
    assert page.heading([result()], "accuracy") == "1 runs by accuracy of the test rows"
    assert page.heading([result(), held], "accuracy") == "2 runs by accuracy of the test or validation rows"
    head, body = page.rows([result(), held])
    assert [row[head.index("of rows")] for row in body] == ["test", "validation"]
    assert page.split(result(), "f1") == "validation" and page.score(result(), "f1") is None
    assert compare.app([*folders(result(), held), "--out", str(tmp_path / "out")]) == 0
    assert "of rows" in capsys.readouterr().out
    assert "by accuracy of the test or validation rows" in (tmp_path / "out" / "compare.html").read_text()
    saved = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [run["of rows"] for run in saved["runs"]] == ["test", "validation"]


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "regression"},
        {"config": {"data": "other.csv"}},
        {"rows": {"train": 100, "test": 9}},
        {"final": {"validation": {"accuracy": 0.9}}},
    ],
)
def test_values_of_other_rows_have_no_best(changes):
    stars = [row[1] for row in page.rows([result(), result("two", 0.9)])[1]]
    assert stars == ["80.0 %", "90.0 % *"]
    other = [result(), result("two", 0.9) | changes]
    assert [row[1] for row in page.rows(other)[1]] == ["80.0 %", "90.0 %"] and "*: best" not in page.build(other)


def test_a_runs_name_is_not_rewritten():
    text = page.build([result("reviews"), result("two", task="x") | {"state": "stopped", "metric": "f1"}])
    assert ">two was stopped" in text and ">Not the same metric" in text


def test_a_split_is_one_word_on_a_narrow_screen(folders, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    held = [result(name, 0.7) | {"final": {"validation": {"accuracy": 0.7}}} for name in ("a-long-name-of-a-run", "b")]
    assert compare.app([*folders(*held), "--no-files"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("validation") == 2 and max(map(len, shown.splitlines())) <= 80


def test_the_picture_says_it_too(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    said = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **how: said.append(text))
    page.draw([result(), result("two", 0.7)], tmp_path / "two.png")
    page.draw([result(str(i)) for i in range(6)], tmp_path / "six.png")
    assert said == ["accuracy: one 80.0 % (test), two 70.0 % (test)", "6 runs by accuracy of the test rows"]


def test_runs_with_one_curve_are_all_seen(tmp_path):
    same = [result(name) for name in ("one", "two", "three")]
    text = page.build([*same, result("other", 0.5, 240.0)])
    assert text.count("Runs that lie on one another are dashed in turn.") == 4
    assert text.count('stroke-dashoffset="-9"') == 4 and text.count('stroke-dashoffset="-18"') == 4
    assert "dashed" not in page.build([result("one"), result("two", 0.5, 240.0, r=8) | {"log": []}])
    page.draw(same, tmp_path / "picture.png")
    image = matplotlib.image.imread(tmp_path / "picture.png")[:, :, :3]
    colours = [matplotlib.colors.to_rgb(colour) for colour in page.COLOURS[:3]]
    halves = np.array_split(image, 2)  # the loss, and what they are judged by
    seen = [[int((abs(half - colour).max(-1) < 0.02).sum()) for half in halves] for colour in colours]
    assert np.min(seen) > 0.5 * np.max(seen), seen


def test_a_picture_has_no_half_steps(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    said = []

    def ticks(self, path):
        said.extend([float(at) for at in axes.get_xticks()] for axes in self.axes if axes.get_xlabel() == "step")

    monkeypatch.setattr(Figure, "savefig", ticks)
    few = [{"step": step, "loss": 1.0, "accuracy": 0.5} for step in (0, 1, 2)]
    short = result() | {"log": few, "evaluations": few}
    assert re.findall('<text class="mid".*?>(.*?)<', page.build([short])).count("0.5") == 0
    page.draw([short], tmp_path / "few.png")
    assert len(said) == 2 and all(at.is_integer() for ats in said for at in ats) and {0.0, 1.0, 2.0} <= set(said[0])


def test_where_a_run_lies_is_no_difference():
    assert page.differing([result("a"), result("b")]) == []
    assert page.names([result("a"), result("b"), result("a")]) == ["a (1)", "b", "a (2)"]


def test_lower_is_better_where_it_is():
    runs = [result("a"), result("b", 0.9)]
    for run, loss in zip(runs, (0.5, 0.7), strict=True):
        run["final"]["test"]["loss"] = loss
    assert [row[1] for row in page.rows(runs, "loss")[1]] == ["0.5 *", "0.7"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "regression"}, "not the same task"),
        ({"metric": "f1"}, "not the same metric"),
        ({"config": {"data": "other.csv"}}, "not the same data"),
        ({"rows": {"train": 100, "test": 9}}, "not the same rows they are judged by"),
        ({"rows": {"train": 9, "test": 20}}, "not the same training rows (100; 9): one has seen more"),
        ({"machine": {"cpu": "another"}}, "not the same machine"),
        ({"state": "stopped"}, "two was stopped"),
        ({"best": {"step": 0, "value": 0.8}}, "two kept the weights it began with"),
    ],
)
def test_what_should_not_stand_side_by_side_is_said(changes, said):
    found = page.warnings([result(), result("two") | changes])
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": "stopped", "best": {"step": 0, "value": 0.8}}, "was stopped"),
        ({"config": result()["config"] | {"keep_best": False}, "best": {"step": 0, "value": 0.8}}, ""),
        ({"best": None}, ""),
    ],
)
def test_the_weights_a_run_began_with_are_only_named_where_they_were_kept(changes, said):
    found = page.warnings([result(), result("two") | changes])
    assert len(found) == bool(said) and said in "".join(found)


def drawn(seed, **more):
    """A result with validation rows that are held out of train."""
    how = f"0.1 of train, drawn by seed {seed}"
    found = result(str(seed)) | {"drawn": {"validation": how, "train": f"without {how}"}}
    return found | {"final": {"validation": {"accuracy": 0.8}}, "rows": {"train": 90, "validation": 10}} | more


def test_rows_that_another_seed_held_out_are_other_rows():
    judged, learnt = page.warnings([drawn(0), drawn(1)])
    rows = "validation: 10 (0.1 of train, drawn by seed 0); validation: 10 (0.1 of train, drawn by seed 1)"
    assert judged == f"not the same rows they are judged by ({rows}): a difference may be the rows'"
    assert learnt.startswith("not the same training rows (90 (without") and learnt.endswith("learnt from others")
    assert page.warnings([drawn(0), drawn(0)]) == []
    # test rows of their own judge both
    (learnt,) = page.warnings([drawn(seed, final={"test": {"accuracy": 0.8}}) for seed in (0, 1)])
    assert learnt.startswith("not the same training rows")
    # a result of before does not say
    old = drawn(1)
    del old["drawn"]
    assert page.warnings([drawn(0), old]) == []


def test_numbers_are_as_short_as_they_can_be():
    runs = [result(str(rate), head_learning_rate=rate, r=rank) for rate, rank in ((9.668e-5 * 10, 8), (1e-05, 16))]
    assert page.options(runs)[1] == [["r", "8", "16"], ["head_learning_rate", "0.0009668", "1e-05"]]


def test_a_folder_of_runs(folders, tmp_path, capsys):
    folders(result("a"), result("b"), result("c"))
    assert compare.app([str(tmp_path / "runs"), "--no-files"]) == 0
    shown = capsys.readouterr().out
    assert all(f"│ {name} " in shown for name in "abc") and not (tmp_path / "compare").exists()


def test_runs_with_little_in_them(folders, tmp_path):
    bare = {"name": "bare", "state": "stopped", "log": [{"step": 1, "loss": None}], "evaluations": []}
    assert compare.app([*folders(bare, result()), "--out", str(tmp_path / "out")]) == 0


def test_clear_words(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no folder of a run"):
        compare.app([str(tmp_path / "empty")])
    with pytest.raises(SettingsError, match="(?s)--metric bleu.*accuracy, loss"):
        compare.app([*folders(result()), "--metric", "bleu"])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="a folder that can be written"):
        compare.app([*(str(path) for path in (tmp_path / "runs").iterdir()), "--out", str(tmp_path / "file" / "x")])
