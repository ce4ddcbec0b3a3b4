"""What `tune` wrote is read back, and a file that is damaged, foreign or stale changes nothing but doctor's words."""

import json
from types import SimpleNamespace

import pytest
import torch

from peft_fast import dispatch, settings
from peft_fast.backends import triton as backend
from peft_fast.backends.triton import tuning

tiles = pytest.importorskip("peft_fast.kernels.tiles")
GPU = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
TILE = tiles.candidates("fused", "r16", "bf16", 90)[1]
GOOD = {
    "schema": tuning.SCHEMA,
    "gpu": GPU.name,
    "capability": "9.0",
    "triton": backend.version(),
    "entries": [
        {"op": "fused", "shape": "r16", "dtype": "bf16", "tile": TILE._asdict(), "gain": 1.07},
        {"op": "lora_linear", "shape": "24x40-r16", "dtype": "bf16", "plan": "fused"},
    ],
}


@pytest.fixture
def read(tmp_path, monkeypatch):
    """read(text) -> (entries, why ignored) of a machine with this tuning file."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (GPU.major, GPU.minor))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: GPU)
    backend._device_reason.cache_clear()

    def reader(text):
        tuning.forget()
        file = tuning.path(GPU.name)
        if text is not None:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return tuning.load(0), tuning.why_ignored(0)

    with settings.override(cache_dir=tmp_path):
        yield reader
    tuning.forget()
    backend._device_reason.cache_clear()


def test_no_file(read):
    assert read(None) == ({}, "")


def test_a_good_file_decides(read):
    entries, why = read(json.dumps(GOOD))
    assert why == "" and entries[("fused", "r16", "bf16")] == TILE
    assert tiles.pick("fused", "r16", torch.bfloat16, 90, entries) == TILE
    x = SimpleNamespace(device=torch.device("cuda", 0), shape=(4, 40))
    W, A = torch.empty(24, 40, dtype=torch.bfloat16), torch.empty(16, 40, dtype=torch.bfloat16)
    assert dispatch.pick(x, torch.bfloat16, W, [A])[:2] == ("triton", "fused")
    assert dispatch.pick(x, torch.bfloat16, W, [A], dropout=True).plan == "accumulate", "no entry for it"


@pytest.mark.parametrize(
    ("text", "words"),
    {
        "cut short": (json.dumps(GOOD)[:50], "not readable JSON"),
        "not text": (b"\xff\xfe\x00", "not readable JSON"),
        "a list": ("[]", "here it is 'peft_fast.tuning/1'"),
        "other schema": (json.dumps({**GOOD, "schema": "x"}), "is for schema 'x'"),
        "other GPU": (json.dumps({**GOOD, "gpu": "A100"}), "is for gpu 'A100', here it is 'NVIDIA H200'"),
        "other capability": (json.dumps({**GOOD, "capability": "8.0"}), "is for capability '8.0'"),
        "other Triton": (json.dumps({**GOOD, "triton": "3.1.0"}), "is for triton '3.1.0'"),
    }.values(),
)
def test_a_bad_file_is_left_alone(read, text, words):
    entries, why = read(text)
    assert entries == {} and words in why and str(tuning.path(GPU.name)) in why


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"op": "fused", "shape": "r16", "dtype": "bf16", "tile": {**TILE._asdict(), "BM": 48}},
        {"op": "fused", "shape": "r16", "dtype": "bf16", "tile": {"BM": 128}},
        {"op": "fused", "shape": "r16", "dtype": "bf16", "tile": {"colour": 3}},
        {"op": "fused", "shape": "wide", "dtype": "bf16", "tile": TILE._asdict()},
        {"op": "fused", "shape": "r16", "dtype": "int4", "tile": TILE._asdict()},
        {"op": ["fused"], "shape": "r16", "dtype": "bf16", "tile": TILE._asdict()},
        {"op": "lora_linear", "shape": "24x40-r16", "dtype": "bf16", "plan": "augmented"},
    ],
    ids=str,
)
def test_a_bad_entry_is_skipped(read, entry):
    """A tile that no test has compiled can never be launched."""
    entries, why = read(json.dumps({**GOOD, "entries": [entry, GOOD["entries"][1]]}))
    assert why == "" and list(entries) == [("lora_linear", "24x40-r16", "bf16")]


def test_forced_entries_hold_for_a_block(read):
    with tuning.using({("fused", "r16", "bf16"): TILE}):
        assert read(None)[0] == {("fused", "r16", "bf16"): TILE}
    assert read(None)[0] == {}
