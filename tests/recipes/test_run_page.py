"""report.html of a run: well-formed, self-contained, right about what it shows, and safe with odd results."""

import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from peft_fast.pages import charts, run, shown, words

EVIL = "<script>alert('1')</script>"


def build(**more) -> str:
    log = [
        {
            "step": step,
            "epoch": step / 40,
            "loss": 1 / step,
            "learning_rate": 1e-3 / step,
            "grad_norm": 1.0,
            "per_second": 900.0 + step,
            "memory_bytes": 2**30,
        }
        for step in range(1, 41)
    ]
    result = {
        "name": EVIL,
        "state": "done",
        "task": "sequence-classification",
        "method": "gradual",
        "title": "a run",
        "started": "2026-01-02T03:04:05",
        "seconds": 200.0,
        "config": {"task": "sequence-classification", "model": EVIL, "data": "d.csv", "r": 16, "epochs": 7.0},
        "facts": {"labels": ["no", EVIL]},
        "rows": {"train": 8000, "test": 90},
        "sources": {"train": "d.csv", "test": EVIL},
        "notes": [f"12 rows were cut {EVIL}"],
        "model": {"name": "m", "class": "BertFor", "parameters": 22_700_000, "trainable": 227_000, "dtype": "bfloat16"},
        "forecast": {"memory": {"weights": 2**26, "activations": 2**27, "total": 2**26 + 2**27}},
        "log": log,
        "evaluations": [
            {"step": 0, "epoch": 0.0, "loss": 0.7, "accuracy": 0.501},
            {"step": 20, "epoch": 0.5, "loss": 0.5, "accuracy": 0.857},
            {"step": 40, "epoch": 1.0, "loss": 0.6, "accuracy": 0.801},
        ],
        "metric": "accuracy",
        "higher": True,
        "best": {"step": 20, "value": 0.857},
        "final": {"validation": {"loss": 0.5, "accuracy": 0.857}, "test": {"loss": 0.4, "accuracy": 0.846}},
        "shown": [{"kind": "confusion", "names": ["no", EVIL], "counts": [[30, 10], [5, 45]]}],
        "throughput": {"unit": "tokens", "per_second": 9123.0, "units": 9, "steps": 40, "train_seconds": 185.0},
        "memory": {"peak_bytes": 2**30, "before_bytes": 2**30 - 2**28},
        "fast": {
            "on": True,
            "fast": ["layer.0.query"],
            "slow": {"layer.0.<key>": "hooks & such"},
            "fast_calls": 3456,
            "handed_back": {"hooks & such": 12},
            "groups": 6,
            "blocks": 3,
        },
        "early_stopped": True,
        "resumed_at": [7],
        "unfrozen": [{"step": 0, "layers": ["head"]}, {"step": 11, "layers": ["a", "b"]}],
        "sizes": [{"step": 0, "size": 64}, {"step": 23, "size": 128}],
        "machine": {
            "cpu": "Some <CPU>",
            "cores": 2,
            "flags": ["avx2"],
            "torch_isa": "AVX2",
            "date": "2026-01-02 03:04 UTC",
            "packages": {"torch": "2.13.0", "peft": "0.21.2", "transformers": "5.23.0"},
            "peft_fast": {"extension": "loaded"},
        },
    }
    return run.build(result | more)


class Links(HTMLParser):
    """Everything in a page that could load or call something."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        names = ("src", "href", "srcset", "action", "data", "background")
        self.found += [(tag, k, v) for k, v in attributes if k in names and not (v or "").startswith("data:image/png")]
        self.found += [(tag, k, v) for k, v in attributes if k.startswith("on")]
        if tag in ("script", "link", "iframe", "object", "embed", "base"):
            self.found.append((tag, "", ""))


def sound(text: str) -> str:
    """The page, after asking that it is well-formed and loads nothing."""
    ElementTree.fromstring(text.partition("\n")[2])
    links = Links()
    links.feed(text)
    assert links.found == []
    assert not any(word in text for word in ("http:", "https:", "url(", "@import"))
    return text


def test_the_page_shows_what_the_result_says():
    text = sound(build())
    for word in (
        *("Sequence classification: accuracy 84.6 %", "3 min 05 s", "9.1 k", "1.00 GiB", "227.0 k of 22.7 M (1 %)"),
        *("before training 50.1 %", "best 85.7 %", "best at step 20", "8,000 training rows", "avx2", "2.13.0"),
        *("+2 layers", "size 128", "resumed", "early stop", "1 of 2", "3,456 calls", "layer.0.&lt;key&gt;"),
        *("6 groups of layers with one input and 3 MLP blocks", "<b>256.0 MiB</b>of memory at the"),
        *(
            "768.0 MiB before the model was there, 1.00 GiB at the peak: measured is what lies between, the process",
            "The forecast counts the tensors of a step alone: 0.75 times what was measured.",
        ),
        *(
            "12 rows were cut",
            "Learning rate",
            "Gradient norm",
            "validation loss",
            "epochs",
            "7.0",
            "all 3 evaluations",
        ),
    ):
        assert word in text, word
    assert "+1 layer<" not in text  # what trains from the start is no unfreezing
    assert EVIL not in text and text.count("&lt;script&gt;") >= 8


def cards(**more) -> list[str]:
    return re.findall('<div class="card">(.*?)</div>', build(**more))


def test_a_figure_from_before_training_stands_beside_its_own_rows():
    test, validation, *_ = cards()
    assert test == "<b>84.6 %</b>accuracy, test rows"
    assert validation == "<b>85.7 %</b>accuracy, validation rows, best at step 20; before training 50.1 %"
    alone = cards(final={"validation": {"accuracy": 0.857}})[0]
    assert alone == "<b>85.7 %</b>accuracy, validation rows; before training 50.1 %"
    none = cards(best={"step": 0, "value": 0.501})[1]
    assert none == "<b>50.1 %</b>accuracy, validation rows, best before training"


def test_memory_has_one_meaning_on_the_page():
    """The curve ends where the card's figure is: 256 MiB beyond what was held before."""
    drawing = re.search("<figure>((?!</figure>).)*Memory while it trained.*?</figure>", build(), re.S).group(0)
    points = re.search('points="(.*?)"', drawing).group(1).split()
    grid = {float(y): n for y, n in re.findall('class="grid"[^>]*y1="(.*?)"[^>]*/><text[^>]*>(.*?)<', drawing)}
    low, high = max(grid), min(grid)
    at = float(points[-1].partition(",")[2])
    found = (low - at) / (low - high) * float(grid[high].replace(",", ""))
    assert found == pytest.approx(256, abs=1) and "beyond what was held before the model" in drawing
    log = [{"step": i, "epoch": 0.1, "loss": 0.5, "memory_bytes": None if i == 3 else 2**30} for i in range(1, 6)]
    gap = re.search("<figure>((?!</figure>).)*Memory while it trained.*?</figure>", build(log=log), re.S).group(0)
    assert gap.count("<polyline") == 2  # what was not measured is no zero


def test_options_at_their_defaults_are_kept_apart():
    given, rest = run._changed({"task": "regression", "model": "m", "data": "d", "r": 16, "epochs": 7.0, "out": "x"})
    assert set(given) == {"task", "model", "data", "epochs", "out"} and rest == {"r": 16}


def test_the_confusion_matrix_has_counts_shares_recall_and_precision():
    text = shown.build([{"kind": "confusion", "names": ["a", "b"], "counts": [[30, 10], [5, 45]]}])[0]
    assert '--v:0.250" title="a answered as b: 10 of 40 (25.0 %)">10<small>25 %</small>' in text
    assert [f">{share} %</td>" in text for share in (75, 90, 86, 82)] == [True] * 4


@pytest.mark.parametrize("classes", [1, 13, 30, 31, 200])
def test_any_number_of_classes(classes):
    names = [f"{EVIL}{i}" for i in range(classes)]
    counts = [[100 * (i == j) + (i + 1 == j) * 7 for j in range(classes)] for i in range(classes)]
    text = sound(build(shown=[{"kind": "confusion", "names": names, "counts": counts}]))
    assert len(text) < 2_000_000 and EVIL not in text
    assert ("every class" in text) == (classes > shown.ROOM)


def test_a_class_without_rows():
    text = sound(build(shown=[{"kind": "confusion", "names": ["a", "b"], "counts": [[3, 0], [0, 0]]}]))
    assert "–</td>" in text


def test_samples_of_every_kind_are_escaped():
    image = {"png": 'QUJD"onload="x', "caption": EVIL}
    parts = [
        {"kind": "table", "title": EVIL, "head": [EVIL, "p"], "rows": [[EVIL, 0.25], [None, 1.0]]},
        {"kind": "lines", "title": "t", "x": EVIL, "series": {EVIL: [[0, 1.0], [1, None], [2, 2.0]], "none": []}},
        {"kind": "images", "title": "p", "images": [image]},
        {"kind": "a new one", "what": EVIL},
    ]
    text = sound(build(shown=parts))
    assert EVIL not in text and 'src="data:image/png;base64,QUJDonload=x"' in text


@pytest.mark.parametrize("name", ["nan", "inf", "none"])
def test_losses_that_are_no_numbers(name):
    bad = {"nan": math.nan, "inf": math.inf, "none": None}[name]
    log = [{"step": s, "epoch": 0.1, "loss": 0.5 if s < 3 else bad, "grad_norm": bad} for s in range(1, 6)]
    evaluations = [{"step": 5, "epoch": 1.0, "loss": bad, "accuracy": bad}]
    final = {"validation": {"accuracy": bad}}
    text = sound(build(log=log, evaluations=evaluations, best=None, final=final))
    assert "The loss was no number from step 3 on" in text
    assert all(f'"{word}' not in text and f",{word} " not in text for word in ("nan", "inf"))


@pytest.mark.parametrize(
    "more",
    [
        {"log": [], "evaluations": [], "best": None, "final": {}, "shown": [], "state": "stopped"},
        {"log": [{"step": 1, "epoch": 1.0, "loss": 0.5, "learning_rate": 1e-3}], "evaluations": [], "best": None},
        {"fast": {"on": False, "why": "method full has no adapters"}, "forecast": {}, "memory": {}},
        {"machine": {}, "facts": {}, "rows": {}, "sources": {}, "notes": [], "config": {}, "throughput": {}},
        {"unfrozen": [], "sizes": [], "resumed_at": [], "early_stopped": False},
    ],
)
def test_results_with_little_in_them(more):
    sound(build(**more))


def test_an_empty_result_and_a_stopped_run():
    sound(run.build({}))
    assert "--resume" in sound(build(state="stopped")) and "--resume" not in build()


def test_the_file_is_written_whole(tmp_path):
    assert run.write({"task": "regression"}, tmp_path).name == "report.html"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_gaps_break_a_curve_and_lone_points_are_dots():
    text = charts.lines([("a", [1, 2, 3, 4], [1.0, 2.0, math.nan, 1.0])], "x", "y", "l")
    assert text.count("<polyline") == 2 and text.count("<circle") == 1


def _drawn(text):
    """(class, dashes, their offset) of each curve."""
    return re.findall(r'<polyline class="curve (.*?)"(?: stroke-dasharray="(.*?)" stroke-dashoffset="(.*?)")? p', text)


def test_curves_that_lie_on_one_another_are_dashed_in_turn():
    xs, one, two = [0, 10, 20, 30], [4.0, 2.0, 1.0, 0.5], [3.0, 3.0, 3.5, 2.0]
    given = [("line0", xs, one), ("line1", xs, two), ("line2", xs, one), ("line3", xs[:3], one[:3])]
    dashes = "9 18"
    every = [("line0", dashes, "0"), ("line1", "", ""), ("line2", dashes, "-9"), ("line3", dashes, "-18")]
    assert _drawn(charts.lines(given, "x", "y", "l")) == every
    # what is drawn faint is below its own mean, and takes no turn
    assert _drawn(charts.lines([("line0 raw", xs, one), ("line0", xs, one)], "x", "y", "l"))[1][1] == ""
    # lone points lie within one another
    lone = charts.lines([("line0", [1], [2.0]), ("line1", [1], [2.0])], "x", "y", "l")
    assert re.findall('<circle class="dot (line.)".*? r="(.*?)"', lone) == [("line0", "6"), ("line1", "3")]


@pytest.mark.parametrize(
    ("one", "two", "hidden"),
    [
        (([0, 2, 4], [5.0, 3.0, 1.0]), ([0, 1, 2, 3, 4], [5.0, 4.0, 3.0, 2.0, 1.0]), True),  # of other steps
        (([0, 1, 2, 3], [5.0, 4.0, 3.0, 2.0]), ([0, 1, 2, 3], [5.01, 4.01, 3.01, 2.01]), True),  # within a line's width
        (([0, 1, 2, 3], [5.0, 4.0, 3.0, 2.0]), ([0, 1, 2, 3], [5.1, 4.1, 3.1, 2.1]), False),
        (([0, 1, 2, 3], [5.0, 4.0, 3.0, 2.0]), ([0, 1, 2, 3], [5.0, 4.0, 2.5, 1.0]), True),  # half of the way
        (([0, 1, 2, 3], [5.0, 4.0, 3.0, 2.0]), ([0, 1, 2, 3], [5.0, 3.5, 2.5, 1.0]), False),
        (([0, 1], [5.0, 4.0]), ([2, 3], [5.0, 4.0]), False),  # beside one another
        (([1], [4.0]), ([0, 1, 2], [5.0, 4.0, 3.0]), False),  # a point is seen on a line
        (([], []), ([0, 1], [5.0, 4.0]), False),
        (([0, 1, 2], [math.nan] * 3), ([0, 1, 2], [math.nan] * 3), False),
        (([0, 1, 2], [5.0, math.nan, 3.0]), ([0, 1, 2], [5.0, math.nan, 3.0]), True),
        (([0, 0, 1], [0.0, 1.0, 1.0]), ([0, 0, 1], [0.0, 1.0, 1.0]), True),  # upright
        (([0, 2, 1], [0.0, 1.0, 2.0]), ([0, 2, 1], [0.0, 1.0, 2.0]), True),  # back and forth
        (([0, 1, 2], [3.0, 3.0, 3.0]), ([0, 1, 2], [3.0, 3.0, 3.0]), True),
    ],
)
def test_which_curves_hide_one_another(one, two, hidden):
    assert charts.turns([one, two]) == ([(0, 2), (1, 2)] if hidden else [(0, 1), (0, 1)])
    assert charts.turns([two, one]) == charts.turns([one, two])


@pytest.mark.parametrize(("last", "shown"), [(2, "0 1 2"), (5, "0 1 2 3 4 5"), (30, "0 5 10 15 20 25 30")])
def test_what_is_counted_has_ticks_at_whole_numbers(last, shown):
    def across(**how):
        text = charts.lines([("a", list(range(last + 1)), [1.0] * (last + 1))], "trial", "y", "l", **how)
        return re.findall('<text class="mid".*?>(.*?)<', text)

    assert " ".join(across(whole=True)) == shown
    assert last > 2 or "0.5" in across()


def test_there_is_no_half_a_step():
    log = [{"step": step, "loss": 1.0, "learning_rate": 1e-3, "per_second": 9.0} for step in (1, 2, 3)]
    judged = [{"step": step, "epoch": 1.0, "loss": 0.5, "accuracy": 0.5} for step in (0, 1, 2)]
    text = build(log=log, evaluations=judged, best={"step": 1, "value": 0.5}, unfrozen=[], sizes=[], resumed_at=[])
    ticks = re.findall('<text class="mid".*?>(.*?)<', text)
    assert " ".join(ticks) == "0 1 2 3 0 1 2 3 1 2 3 1 2 3", ticks


@pytest.mark.parametrize("ys", [(5, 4, 1), (1, 4, 5), (1, 5, 2), (5, 1, 4), (4, 1, 5), (3, 3, 3), (5, 5, 1)])
@pytest.mark.parametrize("better", [max, min])
def test_the_word_beside_the_best_point_is_on_no_curve(ys, better):
    best = ys.index(better(ys))
    dots = [("line0", float(best), float(ys[best]), "best 49.0 %")]
    text = charts.lines([("line0", (0.0, 1.0, 2.0), ys)], "step", "accuracy", "l", 280, dots=dots)
    (points,) = re.findall('points="(.*?)"', text)
    curve = [tuple(map(float, point.split(","))) for point in points.split()]
    css, x, y = re.search('<text class="(strong.*?)" x="(.*?)" y="(.*?)">best', text).groups()
    x, y = float(x) - 81 * ("end" in css), float(y)
    # many points of the curve, none of them within the word
    for (xa, ya), (xb, yb) in zip(curve, curve[1:], strict=False):
        for i in range(1001):
            at = xa + (xb - xa) * i / 1000, ya + (yb - ya) * i / 1000
            assert not (x < at[0] < x + 81 and y - 11 < at[1] < y + 3)
    assert 12 + 3 <= y - 11 and y + 3 <= 280 - 38 + 18 - 11  # between the words above and the numbers below


@pytest.mark.parametrize("value", [0.45, 0.4516, 0.0, -3.0, 1234.5])
def test_values_that_are_all_alike_are_drawn_in_the_middle(value):
    text = charts.lines([("a", [1, 2, 3], [value, value, value])], "x", "y", "l", 300)
    (points,) = re.findall('points="(.*?)"', text)
    heights = [float(point.partition(",")[2]) for point in points.split()]
    grid = sorted(float(y) for y in re.findall('class="grid".*? y1="(.*?)"', text))
    assert heights == pytest.approx([(grid[0] + grid[-1]) / 2] * 3, abs=0.11)
    assert len(grid) == 3 and f">{charts.number(value)}<" in text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("accuracy", 0.9126), "91.3 %"),
        (("loss", 0.51236), "0.5124"),
        (("perplexity", 12345.6), "12,346"),
        (("wer", 0.08), "8.0 %"),
        (("r2", 0.8), "0.8"),
        (("bleu", 31.25), "31.25"),
        (("rmse", 1e-7), "1e-07"),
        (("loss", None), "–"),
        (("loss", math.nan), "not a number"),
    ],
)
def test_metrics_in_words(given, said):
    assert words.metric(*given) == said


def test_words():
    assert [words.seconds(s) for s in (8.21, 59.6, 61, 3599.7, 7500)] == [
        *("8.2 s", "60 s", "1 min 01 s", "1 h 00 min", "2 h 05 min")
    ]
    shares = [words.share({"model": {"trainable": part, "parameters": 1000}}) for part in (2, 450, 1000)]
    assert [text.partition("(")[2] for text in shares] == ["0.2 %)", "45 %)", "100 %)"]
    assert words.title("causal-lm") == "Causal LM" and words.title("time-series") == "Time series"
    assert words.size(2**20 * 1.5) == "1.5 MiB" and words.count(22_700_000) == "22.7 M"
    assert words.final({"metric": "f1", "final": {"validation": {"f1": 0.5}, "test": {"f1": 0.4}}}) == (
        "test",
        "f1",
        0.4,
    )
