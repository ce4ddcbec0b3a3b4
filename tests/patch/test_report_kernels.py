"""report() tells of fast layers that no compiled kernel runs, and of kernels that failed on this machine."""

import pytest
import torch

import peft_fast
from peft_fast import dispatch, native, settings
from peft_fast.backends.triton import lora_linear
from tests.patch.toys import toy


@pytest.fixture(autouse=True)
def _built():
    if not native.load():
        pytest.skip(native.reason())


def test_nothing_to_tell():
    report = peft_fast.report(toy())
    assert len(report.fast) == 2 and report.plain == {} and report.failures == ()


def test_a_dtype_without_kernels():
    model = toy(base_dtype=torch.float16)
    report = peft_fast.report(model)
    assert set(report.plain) == set(report.fast) and "float16" in report.plain[report.fast[0]]
    assert "  2 by torch's own GEMMs: the compiled kernels have no float16 (" in str(report)


def test_a_backend_asked_for_by_name():
    model = toy()
    with settings.override(backend="torch"):
        assert set(peft_fast.report(model).plain.values()) == {"asked for by name"}


def test_what_torch_multiplies_faster(monkeypatch):
    monkeypatch.setattr(dispatch, "vendor_faster", lambda dtype, W: dtype == torch.float32)
    report = peft_fast.report(toy())
    assert set(report.plain) == set(report.fast) and "oneMKL" in report.plain[report.fast[0]]
    assert peft_fast.report(toy(lora_dropout=0.1)).plain == {}


def test_kernels_that_failed(monkeypatch):
    why = "a Triton kernel of lora_linear's forward failed and torch runs it instead (PTXASError: planted)"
    monkeypatch.setattr(
        lora_linear.guarded, "failed", {("lora_linear's forward", 16): why, ("lora_linear's forward", 8): why}
    )
    for report in (peft_fast.report(toy()), peft_fast.report()):
        assert report.failures == (why,) and f"  {why}" in str(report).splitlines()
