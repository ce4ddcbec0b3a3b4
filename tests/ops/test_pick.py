"""Which backend takes an op: a backend has the ops it has files for, and another one stands in for the rest."""

from types import SimpleNamespace

import pytest
import torch

from peft_fast import backends, dispatch, native, settings
from peft_fast.backends.triton import tuning
from peft_fast.errors import SettingsError
from tests import cases_lora_group, cases_lora_mlp, numerics
from tests.inputs import DTYPES

NEW = ("lora_group", "lora_mlp", "lora_embedding")


def picked(device, op, **named):
    x = SimpleNamespace(device=torch.device(device), shape=(4, 8))
    W, A = torch.empty(6, 8), torch.empty(2, 8)
    return dispatch.pick(x, torch.float32, W, [A], op=op, **named)


def test_every_backend_has_every_op_but_cuda():
    for op in NEW:
        assert [name for name in backends.BACKENDS if not backends.has(name, op)] == ["cuda"]
        assert list(backends.modules(op)) == ["torch", "cpu", "triton"]


@pytest.mark.parametrize("op", NEW)
def test_triton_takes_what_cuda_has_no_file_for(monkeypatch, op):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(tuning, "load", lambda index: {})
    monkeypatch.setitem(dispatch._refusals, "triton", lambda *_: "")
    found = picked("cuda:0", op, backend="cuda")
    assert found == ("triton", "accumulate", f"cuda, asked for by name, has no {op}")
    with settings.override(backend="cuda"):
        assert picked("cuda:0", op) == found
        assert picked("cpu", op).backend in ("triton", "torch")


@pytest.mark.skipif(not native.load(), reason=native.reason() or "live")
@pytest.mark.parametrize(("table", "missing"), [(cases_lora_group, "lora_group"), (cases_lora_mlp, "lora_group")])
def test_a_backend_without_the_op_leaves_it_to_torch(monkeypatch, table, missing):
    monkeypatch.setitem(backends._ops, "cpu", backends._ops["cpu"] - {missing})
    op = table.STEP.op
    assert picked("cpu", op)[::2] == ("torch", f"it has no {op}")
    with pytest.raises(SettingsError, match=f"it has no {op}"):
        picked("cpu", op, backend="cpu")
    p = numerics.problem(table.STEP, DTYPES["f32"])
    mine = numerics.ours(p, lambda *args, op, **options: getattr(numerics.ops, op)(*args, **options))
    theirs = numerics.ours(p, numerics.Provider("torch", "accumulate"))
    assert all(numerics.same_bits(mine[name], theirs[name]) for name in theirs)


def test_a_blocks_rank_is_that_of_its_first_layers(monkeypatch):
    """The plan was tuned by the rank beside x; down's adapters read h."""
    asked = []
    monkeypatch.setattr(tuning, "plan", lambda N, K, R, *rest: asked.append((N, K, R)) or "accumulate")
    monkeypatch.setitem(dispatch._refusals, "triton", lambda *_: "")
    x, W = SimpleNamespace(device=torch.device("cuda", 0), shape=(4, 8)), torch.empty(6, 8)
    others = [torch.empty(6), torch.empty(2, 8), torch.empty(3, 8), torch.empty(5, 6)]
    dispatch.pick(x, torch.float32, W, others, op="lora_mlp")
    dispatch.pick(x, torch.float32, W, others, op="lora_embedding")
    assert asked == [(6, 8, 5)], "an embedding has no plan"


@pytest.mark.skipif(not native.load(), reason=native.reason() or "live")
def test_float32_without_dropout_is_torchs_on_a_processor_of_intels(monkeypatch):
    """Of a base that is dense and large: what torch multiplies slower, or cannot fuse, stays with the kernels."""
    x, wide, narrow = torch.empty(4, 512), torch.empty(512, 512), torch.empty(511, 512)
    half = [t.bfloat16() for t in (x, wide)]
    for intel in (True, False):
        monkeypatch.setattr(native, "tuned_vendor", lambda intel=intel: intel)
        for op in ("lora_linear", "lora_group", "lora_mlp"):
            found = dispatch.pick(x, x.dtype, wide, op=op)
            assert found[:2] == ("torch" if intel else "cpu", "accumulate")
            assert ("oneMKL" in found.reason) == intel
        kept = [
            dispatch.pick(x, x.dtype, wide, dropout=True),
            dispatch.pick(x, x.dtype, wide, packed=True),
            dispatch.pick(x, x.dtype, wide, op="lora_decode"),
            dispatch.pick(x, x.dtype, wide, op="lora_add"),
            dispatch.pick(x, x.dtype, narrow),
            dispatch.pick(half[0], half[0].dtype, half[1]),
            dispatch.pick(half[0], half[0].dtype, wide),
            dispatch.pick(x, x.dtype, wide, backend="cpu"),
        ]
        with settings.override(backend="cpu"):
            kept.append(dispatch.pick(x, x.dtype, wide))
        assert {choice.backend for choice in kept} == {"cpu"}


def test_older_builds_know_no_vendor(monkeypatch):
    for module, tuned in ((None, False), (SimpleNamespace(), False), (SimpleNamespace(intel=lambda: True), True)):
        monkeypatch.setattr(native, "_module", lambda module=module: module)
        assert native._tuned_vendor.__wrapped__() == (tuned and torch.backends.mkl.is_available())
