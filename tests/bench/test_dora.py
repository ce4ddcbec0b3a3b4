"""`bench dora_linear` with toy sizes: who is measured, what the gate refuses."""

import pytest
import torch

from peft_fast import ops
from peft_fast.benchmarks import gate, harness, lora_linear
from peft_fast.cli import bench

OURS = {"peft_fast", "peft_fast bf16", "peft_fast torch"}


def test_a_tiny_run(tmp_path):
    result = tmp_path / "out.json"
    assert bench.app(["dora_linear", "--tiny", "--repeats", "1", "--json", str(result)]) == 0
    rows = harness.read(result)["rows"]
    assert [row["settings"]["p"] for row in rows] == [0.0, 0.05]
    for row in rows:
        assert {"frozen", "stock", "stock bf16", "lora", *OURS} <= set(row["providers"])
        assert OURS <= set(row["match"]) and max(row["match"].values()) <= 1
        assert row["bytes"]["peft_fast"]["saved"] < row["bytes"]["stock"]["saved"]


# of the magnitude, of the scaling: outputs that are refused
FAULTS = {"none": (1.0, 1.0, set()), "magnitude": (1.01, 1.0, {"y", "dx", "dm"}), "scaling": (1.0, 1.05, {"dA", "dB"})}


@pytest.mark.parametrize("of_m, of_scaling, outputs", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_gate_sees_one_percent(of_m, of_scaling, outputs, p):
    base = torch.nn.Linear(64, 96, bias=False).requires_grad_(False)
    layer = lora_linear.lora_layer(base, 8, p, fp32=True, fast=True, dora=True)
    w = gate.weights(layer, torch.float32)
    adapter = ops.Adapter(*gate.adapter(layer), w.scaling * of_scaling, w.p)

    def run(x):
        return ops.dora_linear(x, w.W, None, adapter, gate.magnitude(layer) * of_m)

    x, g = torch.randn(67, 64), torch.randn(67, 96)
    found = gate.check_layer(layer, x, g, gate.our_mask, run, fast=True)
    wrong = {name for name, verdict in found.items() if not verdict}
    assert outputs <= wrong and bool(wrong) == bool(outputs)
