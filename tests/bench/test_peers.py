"""Other projects' functions and named plans as providers: gated, and never under another's name."""

import importlib.util
import sys

import pytest

from peft_fast import dispatch
from peft_fast.benchmarks import harness, lora_linear, peers
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
