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
