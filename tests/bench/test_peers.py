"""Other projects' functions and named plans as providers: gated, and never under another's name."""

import collections
import importlib.util
import sys

import pytest

from peft_fast import dispatch
from peft_fast.benchmarks import gate, gpu_page, harness, lora_linear, peers
from peft_fast.benchmarks.criterion import Verdict
from peft_fast.cli import bench


class Theirs(peers.Addmm):
    """Another project's argument names around the same arithmetic, without dropout."""

    @staticmethod
    def forward(ctx, X, W, W_quant, A, B, S):
        return peers.Addmm.forward(ctx, X.squeeze(0), W, None, A, B, S, 0.0).unsqueeze(0)

    @staticmethod
    def backward(ctx, g):
        dx, dW, _, dA, dB, ds, _ = peers.Addmm.backward(ctx, g.squeeze(0))
        return dx.unsqueeze(0), dW, None, dA, dB, ds


@pytest.fixture
def theirs(monkeypatch):
    module = type(sys)("theirs")
    module.LoRA = Theirs
    module.__spec__ = importlib.util.spec_from_loader("theirs", None)
    monkeypatch.setitem(sys.modules, "theirs", module)
    monkeypatch.setattr(peers, "FUNCTIONS", {"theirs": ("theirs", "LoRA"), "absent": ("absent.lora", "LoRA")})


def test_a_peer_is_gated_and_measured_where_it_can_do_the_work(theirs):
    assert peers.installed() == ["theirs"]
    options = harness.Options(scale="tiny", peers=True, repeats=2)
    rows = [harness.measure(case, options, Silent()) for case in lora_linear.cases(options)]
    assert ["theirs" in row["providers"] for row in rows] == [True, False]  # p = 0, then 0.05
    assert rows[0]["match"]["theirs"] <= 1


def test_a_peer_of_another_version_costs_only_itself(theirs, monkeypatch):
    monkeypatch.setattr(Theirs, "forward", staticmethod(lambda ctx, X, W, new: None))
    options = harness.Options(scale="tiny", peers=True, repeats=1, dropouts=(0.0,))
    (row,) = [harness.measure(case, options, Silent()) for case in lora_linear.cases(options)]
    assert "theirs" not in row["providers"] and "another version" in row["left_out"]["theirs"]
    assert "peft_fast" in row["providers"]


class Silent:
    def round(self, done, of): ...


def test_a_plan_that_is_not_for_these_tensors_is_a_note(monkeypatch, capsys, tmp_path):
    """As the CUDA backend's `fused` on an A100: nothing has failed, and it has no figures under its name."""
    done, real = collections.Counter(), gate.check_layer

    def refuses(*args, **options):
        done["it needs another GPU"] += 1
        return real(*args, **options)

    monkeypatch.setattr(dispatch, "refusals", done.copy)
    monkeypatch.setattr(gate, "check_layer", refuses)
    for more in ([], ["--gate-only"]):
        out = tmp_path / "out.json"
        assert bench.app(["lora_linear", "--tiny", "--dropout", "0", "--repeats", "1", "--json", str(out), *more]) == 0
        shown = capsys.readouterr().out
        why = "not for these tensors or this device: it needs another GPU"
        assert f"without peft_fast torch accumulate: {why}" in shown and "refused" not in shown
        document = harness.read(out)
        row = document["rows"][0]
        assert "peft_fast torch accumulate" in row["not_for_these"] and document["refused"] == []
        assert row["left_out"]["peft_fast torch accumulate"] == why
        named = f"- peft_fast torch accumulate, {len(document['rows'])} rows: {why}"
        assert named in gpu_page._without_figures([document])

    def wrong(layer, x, g, mask, run=None, fast=False):
        found = refuses(layer, x, g, mask, run, fast)
        return {**found, "y": Verdict(False, "y is wrong")} if run and fast else found

    monkeypatch.setattr(gate, "check_layer", wrong)
    assert bench.app(["lora_linear", "--tiny", "--dropout", "0", "--gate-only"]) == 1
    assert "peft_fast torch accumulate" in capsys.readouterr().out.partition("refused: ")[2], "wrong results are wrong"


def test_a_plan_whose_kernels_failed_has_no_figures_under_its_name(monkeypatch, capsys):
    count = iter(range(10**6))
    monkeypatch.setattr(dispatch, "fallbacks", lambda: next(count))
    monkeypatch.setattr(dispatch, "failures", lambda: ["a Triton kernel failed and torch runs it instead"])
    assert bench.app(["lora_linear", "--tiny", "--dropout", "0", "--repeats", "1"]) == 1
    out = capsys.readouterr().out
    assert "refused: square M=48 K=64 N=96 r=8 bf16 p=0 threads=1: peft_fast torch accumulate" in out
    assert "note: a Triton kernel failed" in out
    names = [line.split("  ")[0] for line in out.splitlines()]
    assert "peft_fast bf16" in names and "peft_fast torch accumulate" not in names
