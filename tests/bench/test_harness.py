"""The harness: what it refuses to time, when it calls a row noisy, and the document it writes."""

import json
import math
import random
import time

import pytest
import torch

from peft_fast.benchmarks import harness, show
from peft_fast.benchmarks.criterion import Verdict
from peft_fast.errors import DataError, PeftFastError

TINY = harness.Options(scale="tiny")
FULL = harness.Options(repeats=20)


class Silent(show.Plain):
    def header(self, document): ...
    def case(self, title): ...
    def row(self, row): ...
    def refused(self, title, reason): ...


def provider(name, **more):
    w = torch.randn(16, 16, requires_grad=True)
    state = {}
    phases = {
        "forward": lambda: state.update(y=(torch.randn(4, 16) @ w).sum()),
        "backward": lambda: state.pop("y").backward(),
    }
    return harness.Provider(name, phases, [w], **more)


def case(*providers, title="case"):
    return harness.Case(title, {"model": "toy"}, lambda: list(providers), threads=1)


def right():
    return {"y": Verdict(True, "", rms=1.0, rms_allowed=2.0)}


def wrong():
    return {"y": Verdict(False, "rms error 2 is above 1"), "dx": right()["y"]}


def measured(monkeypatch, speeds, drift=0.0, seed=3):
    """measure() with drawn times instead of a clock; speeds: provider name -> seconds."""
    draw = random.Random(seed)
    clock = iter(range(10**9))

    def sample(p, inner, device, samples):
        seconds = speeds[p.name] * (1 + drift * next(clock)) * draw.lognormvariate(0.0, 0.02)
        for phase in ("forward", "total"):
            kept = samples.setdefault(phase, {"wall": [], "cpu": []})
            kept["wall"].append(seconds)
            kept["cpu"].append(seconds)

    monkeypatch.setattr(harness, "_sample", sample)
    monkeypatch.setattr(harness, "_bytes", lambda p, device: {"saved": 0, "peak": 0})
    monkeypatch.setattr(harness.gc, "collect", lambda: None)
    names = [n for n in speeds if not n.endswith(harness.AGAIN)]
    return harness.measure(case(*(provider(n) for n in names)), FULL, Silent())


def test_a_row_has_every_figure():
    row = harness.measure(case(provider("frozen"), provider("stock", gate=right)), TINY, Silent())
    assert row["match"] == {"stock": 0.5}
    assert set(row["providers"]) == set(row["bytes"]) == {"frozen", "stock"}
    for phases in row["providers"].values():
        assert list(phases) == ["forward", "backward", "total"]
        for figures in phases.values():
            assert figures["q1_ms"] <= figures["ms"] <= figures["q3_ms"]
            assert figures["ratio"][1] <= figures["ratio"][0] <= figures["ratio"][2]
    assert row["providers"]["stock"]["total"]["speedup"] == [1.0, 1.0, 1.0]
    assert row["bytes"]["frozen"]["saved"] == 4 * 16 * 4
    assert row["settings"] == {"model": "toy", "threads": 1}


def test_ratios_survive_a_machine_that_slows_down(monkeypatch):
    speeds = {"frozen": 1.0, "frozen (again)": 1.0, "stock": 2.0, "peft_fast": 1.25}
    row = measured(monkeypatch, speeds, drift=0.02)
    assert row["providers"]["stock"]["total"]["ratio"][0] == pytest.approx(2.0, rel=0.05)
    assert row["providers"]["peft_fast"]["total"]["speedup"][0] == pytest.approx(1.6, rel=0.05)
    assert row["aa"]["ok"] and row["rounds"] in (20, 40, 60)


def test_an_aa_pair_that_differs_marks_the_row_noisy(monkeypatch):
    row = measured(monkeypatch, {"frozen": 1.0, "frozen (again)": 1.2, "stock": 2.0})
    assert not row["aa"]["ok"] and row["rounds"] == 60
    assert "NOISY" in show.caption(row)


def test_an_aa_pair_by_chance_outside_gets_more_rounds(monkeypatch):
    speeds = dict.fromkeys(("frozen", "frozen (again)"), 1.0)
    rows = [measured(monkeypatch, speeds, seed=seed) for seed in range(60)]
    assert sum(row["aa"]["ok"] for row in rows) >= 57
    assert {row["rounds"] for row in rows} >= {20, 40}


def test_time_ends_a_case_but_not_before_the_least_rounds(monkeypatch):
    hour = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(harness.time, "monotonic", lambda: next(hour))
    row = measured(monkeypatch, {"frozen": 1.0, "frozen (again)": 1.0})
    assert row["rounds"] % harness.MIN_ROUNDS == 0


def test_a_wrong_provider_is_refused_before_anything_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_sample", lambda *a: pytest.fail("timed"))
    cases = [case(provider("frozen"), provider("peft_fast", gate=wrong), title="bad")]
    document = harness.run("toy", cases, TINY, Silent(), tmp_path / "out.json")
    assert document["rows"] == []
    (refused,) = document["refused"]
    assert refused["title"] == "bad" and "provider 'peft_fast': y: rms error" in refused["reason"]
    assert len(refused["reason"].splitlines()) == 3


def test_gate_only_times_nothing(monkeypatch):
    monkeypatch.setattr(harness, "_sample", lambda *a: pytest.fail("timed"))
    both = case(provider("frozen"), provider("peft_fast", gate=right))
    row = harness.measure(both, harness.Options(gate_only=True), Silent())
    assert row["match"] == {"peft_fast": 0.5} and "providers" not in row


def test_gate_error_is_one_of_ours():
    with pytest.raises(PeftFastError):
        harness.gate(provider("x", gate=wrong))


def test_deadline_and_memory_leave_rows_out():
    def out_of_memory():
        raise torch.cuda.OutOfMemoryError("too large")

    cases = [case(provider("frozen"), title="fits"), harness.Case("huge", {}, out_of_memory, threads=1)]
    document = harness.run("toy", cases, TINY, Silent())
    assert [row["title"] for row in document["rows"]] == ["fits"]
    assert document["skipped"] == ["huge: out of memory"]
    late = harness.Options(scale="tiny", deadline=time.monotonic() - 1)
    assert harness.run("toy", cases, late, Silent())["skipped"] == ["fits", "huge"]


def test_threads_are_set_and_put_back():
    before = torch.get_num_threads()
    seen = []
    rows = harness.Case("t", {}, lambda: seen.append(torch.get_num_threads()) or [provider("frozen")], threads=2)
    harness.measure(rows, TINY, Silent())
    assert seen == [2] and torch.get_num_threads() == before


def test_short_calls_are_repeated_within_a_sample():
    cpu = torch.device("cpu")
    assert max(harness._warm(provider("frozen"), cpu, "full") for _ in range(9)) > 1
    assert harness._warm(provider("frozen"), cpu, "tiny") == 1


def test_document_on_disk(tmp_path):
    path = tmp_path / "deep" / "out.json"
    document = harness.run("toy", [case(provider("frozen"))], TINY, Silent(), path)
    assert harness.read(path) == json.loads(json.dumps(document))
    assert not list(path.parent.glob("*.part"))
    machine = document["machine"]
    assert {"cpu", "flags", "cores", "load_average", "packages", "commit", "date", "peft_fast"} <= set(machine)
    assert machine["packages"]["torch"] == torch.__version__
    assert not any(ch in path.read_text() for ch in ("NaN", "Infinity")) and math.isfinite(machine["cores"])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema": "peft_fast.bench/0"}'])
def test_a_foreign_file_is_an_error(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match="x.json"):
        harness.read(path)


def test_plain_and_rich_show_the_same_row(capsys):
    row = harness.measure(case(provider("frozen"), provider("stock", gate=right)), TINY, Silent())
    for screen in (show.Plain(), show.Rich()):
        with screen.progress(1) as progress:
            progress.case("case")
            progress.round(1, 2)
            screen.row(row)
            screen.refused("bad", "given: x")
        text = capsys.readouterr().out
        assert "A/A" in text and "stock" in text and "given: x" in text
