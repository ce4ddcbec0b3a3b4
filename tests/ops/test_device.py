"""`pytest --device cuda` leaves no tensor of the harness on the CPU, as shown on a device that holds no data."""

import contextlib

import pytest
import torch

from peft_fast.ops import checks
from tests import cases_lora_embedding, cases_lora_group, cases_lora_mlp, numerics
from tests.cases import EMPTY, LAYOUTS, OPTIONS
from tests.inputs import DTYPES

TABLES = cases_lora_group, cases_lora_mlp, cases_lora_embedding


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    monkeypatch.setattr(numerics, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(checks, "_check_dense", lambda *_: None)  # refuses tensors without data
    # there is no autocast for this device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


@pytest.mark.parametrize("dtypes", ["f32", "bf16_f32_adapters"])
def test_everything_is_on_the_device(dtypes):
    # layouts move tensors on their own ways, sizes do not
    for case in LAYOUTS + OPTIONS + EMPTY + [case for table in TABLES for case in table.CORNERS + table.EMPTY]:
        p = numerics.problem(case, DTYPES[dtypes])
        for out in (numerics.stock(p), numerics.truth(p), numerics.ours(p, numerics.Provider("torch"))):
            for name, tensor in out.items():
                assert tensor.is_meta, (case.name, name)


def test_a_tensor_left_behind_is_seen():
    p = numerics.problem(numerics.by_name("dropout_0.5"), DTYPES["bf16"])
    p.tensors["A0"] = torch.zeros_like(p.tensors["A0"], device="cpu").requires_grad_()
    with pytest.raises(RuntimeError, match="device"):
        numerics.stock(p)
