"""The report: well-formed, self-contained, right about what it shows, and safe with odd names."""

import copy
import math
import struct
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from peft_fast.pages import charts, digest, picture
from peft_fast.pages import demo as page

GROUPS = {"peft_fast operators": 4.0, "matrix products": 9.0, "the rest": 2.0}


def run(seconds: float, accuracy: float, **more) -> dict:
    return {
        "seconds": seconds,
        "cpu_seconds": seconds,
        "tokens": 5000,
        "tokens_per_second": 5000 / seconds,
        "phases": {"forward": seconds * 0.6, "backward": seconds * 0.3, "optimizer": 0.1, "data": 0.1},
        "losses": [0.7 - 0.03 * i for i in range(10)],
        "turn_steps": [5, 10],
        "turn_seconds": [seconds * 0.6, seconds * 0.4],
        "saved_bytes": 2**28,
        "step_bytes": 2**29,
        "peak_resident_bytes": 2**30,
        "resident_before_bytes": 2**29,
        "ops_ms": GROUPS,
        "profiled_ms": 15.0,
        "accuracy": accuracy,
        "loss": 0.4,
        "fast_calls": 0,
    } | more


@pytest.fixture
def result() -> dict:
    layers = {
        "fast": ["encoder.0.query"],
        "slow": {"encoder.0.<key>": "hooks & such"},
        "handed_back": {"hooks & such": 12},
        "groups": 6,
        "blocks": 3,
    }
    recipe = {"model": "tiny", "dtype": "bf16", "r": 16, "dropout": 0.05, "keep_dropout": False, "batch": 32}
    return {
        "quick": False,
        "machine": {
            "date": "2026-01-02 03:04 UTC",
            "commit": "abc1234",
            "system": "Linux x86_64",
            "python": "3.11.0",
            "cpu": "Some <CPU>",
            "flags": ["avx2"],
            "torch_isa": "AVX2",
            "cores": 2,
            "logical_cpus": 2,
            "load_average": [0.1, 0.2, 0.3],
            "packages": {"torch": "2.13.0", "peft": "0.21.2", "transformers": "5.23.0"},
            "peft_fast": {"extension": "loaded", "isa": "avx2", "avx2": True},
            "device": "cpu",
        },
        "recipe": recipe,
        "data": {"source": "rows <b>&</b> more", "names": ["no", "yes"], "train": 320, "test": 64},
        "model": {"model_class": "BertForX", "parameters": 23_000_000, "trainable": 700_000, "threads": 2},
        "steps": 10,
        "runs": {"stock": run(30.0, 0.85), "peft_fast": run(20.0, 0.845, saved_bytes=2**27, fast_calls=99, **layers)},
        "held_out": {"only_first": 30, "only_last": 25, "p": 0.59},
        "same_batches": True,
        "ratio": 1.5,
        "ratio_by_turns": [1.49, 1.45, 1.52],
        "wall_seconds": 60.0,
    }  # fmt: skip


class Links(HTMLParser):
    """Everything in a page that could load or call something."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [(tag, k, v) for k, v in attributes if k in ("src", "href", "srcset", "action", "data")]
        if tag in ("script", "link", "iframe", "object", "embed", "base"):
            self.found.append((tag, "", ""))


def test_page_is_well_formed_and_loads_nothing(result):
    text = page.build(result)
    head, _, rest = text.partition("\n")
    assert head == "<!DOCTYPE html>"
    ElementTree.fromstring(rest)
    links = Links()
    links.feed(text)
    assert links.found == []
    assert not any(word in text for word in ("http:", "https:", "url(", "@import"))


def test_page_shows_the_figures_and_escapes_names(result):
    text = page.build(result)
    for shown in (
        "1.49× faster",
        "84.5 %",
        "85.0 %",
        "-0.5 points",
        "0.50×",
        "99 fast calls",
        "1 of 2",
        "128 MiB",
    ):
        assert shown in text, shown
    assert "rows &lt;b&gt;&amp;&lt;/b&gt; more" in text and "<b>&</b>" not in text
    assert "encoder.0.&lt;key&gt;" in text and "hooks &amp; such" in text
    assert "6 groups of layers with one input and 3 MLP blocks" in text


def test_the_verdict_says_what_is_true(result):
    assert "equal within 1 point" in digest.verdict(result)
    apart = copy.deepcopy(result)
    apart["runs"]["peft_fast"]["accuracy"] = 0.83
    apart["held_out"] |= {"only_first": 60, "p": 1e-4}
    assert "2.0 points apart" in digest.verdict(apart) and "hardly explains" in digest.verdict(apart)
    assert "(p = 0.59)" in digest.verdict(result) and "card bad" in page.build(apart)
    assert "says nothing" in digest.verdict(apart | {"quick": True})
    assert "give 2.50: the machine was not quiet" in digest.verdict(result | {"ratio": 2.5})
    assert "same batches: do not compare" in digest.verdict(result | {"same_batches": False})
    assert "1.25× slower" in page.build(result | {"ratio_by_turns": [0.8, 0.79, 0.81]})


def test_exactly_one_point_is_within_one_point(result):
    result["runs"]["peft_fast"]["accuracy"] = 0.84
    result["runs"]["stock"]["accuracy"] = 0.85
    assert "equal within 1 point" in digest.verdict(result) and "card bad" not in page.build(result)


def test_runs_that_diverged_still_make_a_page(result, tmp_path):
    result["runs"]["stock"]["losses"][3:] = [float("nan")] * 7
    result["runs"]["peft_fast"]["losses"] = [float("nan")] * 10
    ElementTree.fromstring(page.build(result).partition("\n")[2])
    picture.draw(result, tmp_path / "demo.png")


def test_one_step_one_turn(result):
    for figures in result["runs"].values():
        figures |= {"losses": [0.7], "turn_steps": [1], "turn_seconds": [2.0]}
    ElementTree.fromstring(page.build(result | {"steps": 1}).partition("\n")[2])


def test_picture_is_1600_wide(result, tmp_path):
    picture.draw(result, tmp_path / "demo.png")
    width, height = struct.unpack(">II", (tmp_path / "demo.png").read_bytes()[16:24])
    assert width == 1600 and 600 < height < 1200


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.31, 0.69), (-3, 4000), (5, 5), (0, 0), (1e-7, 2e-7)])
def test_ticks_are_round_and_cover_the_range(low, high):
    found = charts.ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 1 <= len(found) <= 13
    steps = {round(b - a, 15) for a, b in zip(found, found[1:], strict=False)}
    assert len({f"{step:.6g}" for step in steps}) <= 1


def test_smooth_and_turns():
    assert digest.smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert math.isclose(digest.smooth([1.0, 3.0])[1], 2.0, abs_tol=0.1)
    assert digest.step_ms({"turn_steps": [5, 7], "turn_seconds": [1.0, 1.0]}) == [200.0, 500.0]
