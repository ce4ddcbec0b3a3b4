"""The cuda backend without a GPU: what it says, and that a failure of its kernels costs speed alone."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest
import torch

from peft_fast import dispatch
from peft_fast.backends import cuda
from peft_fast.backends.cuda import lora_linear, selftest
from peft_fast.ops import Adapter
from peft_fast.ops.lora_linear import lora_linear as op
from tests.ops.test_compile import Layer, assert_same, step

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
built = pytest.mark.skipif(not cuda.archs(), reason=cuda.reason())


@pytest.fixture
def fresh(monkeypatch):
    """No failure remembered before, none left behind."""
    monkeypatch.setattr(lora_linear.guarded, "failed", {})
    monkeypatch.setattr(selftest, "_found", {})


def call(**options):
    torch.manual_seed(1)
    x, W = torch.randn(9, 24, requires_grad=True), torch.randn(16, 24)
    adapter = Adapter(torch.randn(4, 24, requires_grad=True), torch.randn(16, 4, requires_grad=True), 0.5, 0.5)
    y = op(x, W, adapters=[adapter], **options)
    return y.detach(), *torch.autograd.grad(y.sum(), (x, adapter.A, adapter.B))


@no_gpu
def test_doctor_says_no_device():
    done = subprocess.run([sys.executable, "-m", "peft_fast", "doctor", "--json"], text=True, capture_output=True)
    row = next(row for row in json.loads(done.stdout)["backends"] if row["name"] == "cuda")
    assert not row["live"]
    assert ("no device" if cuda.archs() else "without CUDA kernels") in row["why"]


@no_gpu
@built
def test_the_reason_without_a_driver():
    assert cuda.reason() == cuda.device_reason(0)
    assert cuda.reason().startswith("no device: ")


@no_gpu
def test_the_self_test_alone_says_why_it_cannot_run():
    done = subprocess.run([sys.executable, "-m", "peft_fast.backends.cuda", "--json"], text=True, capture_output=True)
    rows = json.loads(done.stdout)
    assert done.returncode == 1 and not done.stderr
    assert {row["dtype"] for row in rows} == set(selftest.NAMES.values())
    assert all(not row["ok"] and row["why"] == cuda.reason() for row in rows)


def test_a_launch_that_fails_is_torchs_from_then_on(on_the_host, fresh, monkeypatch):
    tried = []

    def refused(*args):
        tried.append(args)
        raise RuntimeError(f"{selftest.LAUNCH}: no kernel image is available\nmore")

    want, before = call(backend="torch"), lora_linear.fallbacks()
    monkeypatch.setattr(lora_linear, "run_forward", refused)
    with pytest.warns(RuntimeWarning, match="no kernel image"):
        y, *_ = call(backend="cuda")
    assert torch.equal(y, want[0]) and lora_linear.fallbacks() == before + 1
    call(backend="cuda")
    assert len(tried) == 1, "tried again"
    assert lora_linear.fallbacks() == before + 2
    (why,) = lora_linear.failures()
    assert "no kernel image is available" in why and "\n" not in why


def test_memory_that_ran_out_is_tried_again(on_the_host, fresh, monkeypatch):
    """The stable ABI shows it as a RuntimeError like any other."""
    real, errors = lora_linear.run_forward, [RuntimeError("a call of the ABI failed")]
    monkeypatch.setattr(
        lora_linear, "run_forward", lambda *a: (_ for _ in ()).throw(errors.pop()) if errors else real(*a)
    )
    before = lora_linear.fallbacks()
    with pytest.warns(RuntimeWarning):
        call(backend="cuda")
    call(backend="cuda")
    assert lora_linear.fallbacks() == before + 1 and not lora_linear.failures()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_torch_would_meet_too_is_not_hidden(on_the_host, fresh, monkeypatch, error):
    def broken(*args):
        raise error("the device is lost")

    monkeypatch.setattr(lora_linear, "run_forward", broken)
    with pytest.raises(error):
        call(backend="cuda")


def pretend_gpu(monkeypatch, capturing=False):
    """selftest.reason believes its device, and runs the problems on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    real = selftest.mismatches
    monkeypatch.setattr(selftest, "mismatches", lambda sizes, device, *rest: real(sizes, torch.device("cpu"), *rest))
    return torch.device("cuda", 0), torch.bfloat16, "accumulate"


def test_kernels_that_are_right_pass(on_the_host, fresh, monkeypatch):
    assert selftest.reason(*pretend_gpu(monkeypatch)) == "" and not selftest.failures()


@pytest.mark.parametrize("index, name", [(0, "dx"), (3, "dA"), (4, "dB")])
def test_a_wrong_gradient_is_named(on_the_host, fresh, monkeypatch, index, name):
    real = lora_linear.run_backward

    def wrong(*args):
        grads = list(real(*args))
        grads[index] = grads[index].clone()
        grads[index].view(-1)[-1].neg_().add_(8)
        return grads

    monkeypatch.setattr(lora_linear, "run_backward", wrong)
    why = selftest.reason(*pretend_gpu(monkeypatch))
    assert why.endswith(f"gave wrong values of {name}") and "bfloat16" in why
    assert selftest.failures() == lora_linear.failures() == [why]


def test_kernels_that_do_not_run_are_not_trusted(on_the_host, fresh, monkeypatch):
    monkeypatch.setattr(lora_linear, "run_forward", lambda *_: torch.ones(2) @ torch.ones(3))
    assert "did not run (" in selftest.reason(*pretend_gpu(monkeypatch))


def test_while_a_graph_is_captured_nothing_is_tested(on_the_host, fresh, monkeypatch):
    where = pretend_gpu(monkeypatch, capturing=True)
    assert "captured" in selftest.reason(*where)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert selftest.reason(*where) == ""


@pytest.mark.parametrize("plan", ["accumulate", "fused"])
def test_the_result_may_be_written_in_place(on_the_host, fresh, plan):
    x, W = torch.randn(2, 3, 24, requires_grad=True), torch.randn(16, 24)
    y = op(x, W, adapters=[Adapter(torch.randn(4, 24), torch.randn(16, 4), 0.5)], backend="cuda", plan=plan)
    assert y._base is None and y.is_contiguous()
    (expected,) = torch.autograd.grad(y.clone().mul(3).sum(), x, retain_graph=True)
    y *= 3
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_ranks_that_no_launch_takes_are_torchs(on_the_host, fresh):
    before = lora_linear.fallbacks()
    x, W = torch.randn(5, 8), torch.randn(6, 8)
    adapters = [Adapter(torch.randn(1, 8), torch.randn(6, 1)) for _ in range(lora_linear.MAX_CHUNKS + 1)]
    assert torch.equal(op(x, W, adapters=adapters, backend="cuda"), op(x, W, adapters=adapters, backend="torch"))
    assert lora_linear.fallbacks() == before


def fused(N, ps):
    """How many of forward's and dx's products Hopper's GEMM did not take, and why."""
    before, failed = lora_linear.refusals(), lora_linear.fallbacks()
    x = torch.randn(6, 24, dtype=torch.bfloat16, requires_grad=True)
    adapters = [Adapter(torch.randn(5, 24).bfloat16(), torch.randn(N, 5).bfloat16(), 1.0, p) for p in ps]
    W = torch.randn(N, 24).bfloat16()
    torch.manual_seed(5)
    y = op(x, W, adapters=adapters, backend="cuda", plan="fused")
    y.sum().backward()
    assert not lora_linear.failures() and lora_linear.fallbacks() == failed
    torch.manual_seed(5)
    want = op(x, W, adapters=adapters, backend="torch")
    torch.testing.assert_close(y, want, rtol=0.1, atol=1.0)
    return lora_linear.refusals() - before


def test_what_hopper_refuses_is_accumulated_and_counted(on_the_host, fresh):
    assert fused(16, (0.5,)) == fused(16, (0.0, 0.0)) == {}
    assert fused(15, (0.0,)) == {"the Hopper GEMM wants every operand's rows on 16 bytes": 2}
    assert fused(16, (0.5, 0.0)) == {"the Hopper GEMM has one dropout mask": 1}


def test_a_plan_that_refuses_is_told_from_one_that_failed(on_the_host, fresh, monkeypatch):
    watch = dispatch.Watch()
    fused(15, (0.0,))
    assert watch.refused().startswith("the Hopper GEMM wants") and not watch.failed()
    assert not dispatch.Watch().refused()
    monkeypatch.setattr(lora_linear, "run_forward", lambda *_: (_ for _ in ()).throw(RuntimeError("a bad kernel")))
    watch = dispatch.Watch()
    with pytest.warns(RuntimeWarning):
        call(backend="cuda", plan="fused")
    assert watch.failed()


def test_what_the_self_test_refuses_is_nobodys_call(on_the_host, fresh, monkeypatch):
    watch = dispatch.Watch()
    device, dtype, _ = pretend_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert selftest.reason(device, dtype, "fused") == "" and watch.refused() == ""


@pytest.mark.parametrize("plan", cuda.PLANS)
def test_compiles_as_one_graph(on_the_host, fresh, plan):
    torch._dynamo.reset()
    layer = Layer(0.5, functools.partial(op, backend="cuda", plan=plan))
    x = torch.randn(2, 13, 40)
    eager, compiled = step(layer, x), step(torch.compile(layer, fullgraph=True, backend="aot_eager"), x)
    torch._dynamo.reset()
    assert_same(eager, compiled)
