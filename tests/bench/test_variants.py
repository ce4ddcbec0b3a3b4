"""train_step's models by name only, PEFT's options with toy sizes; experts that see one token: judged, tabled."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_fast.benchmarks import gate, harness, lora_experts, lora_linear, table, train_step
from peft_fast.cli import bench
from tests.bench.test_readme import document


@pytest.mark.parametrize("model", [name for name in train_step.VARIANTS if not name.endswith(train_step.NF4)])
def test_a_step_is_judged(model, capsys):
    args = ["train_step", "--tiny", "--model", model, "--dropout", "0.1"]
    assert bench.app([*args, "--gate-only"]) == 0
    assert "error / allowed: " in capsys.readouterr().out


def test_they_are_taken_by_name_alone():
    assert set(train_step.VARIANTS) < set(train_step.names("cpu"))
    options = harness.Options(scale="tiny")
    assert not any(case.settings["adapters"] != "lora" for case in train_step.cases(options))


def test_a_readme_has_them_in_a_table_of_their_own():
    usual, named = ({**document(1.25), "bench": "train_step"} for _ in range(2))
    usual["rows"][0]["settings"]["model"], named["rows"][0]["settings"]["model"] = "bert-base-like", "llama-head"
    first, second = table.SECTIONS["bench"]([usual, named]), table.SECTIONS["variants"]([usual, named])
    assert "bert-base-like" in first and "llama-head" not in first
    assert "llama-head" in second and "bert-base-like" not in second
    assert table.SECTIONS["variants"]([usual]).startswith("_Nothing")


def biased():
    """A PEFT LoRA layer whose two biases train."""
    base = torch.nn.Linear(64, 96)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"], bias="all", lora_bias=True)
    model = get_peft_model(torch.nn.Sequential(base), config)
    lora_linear.draw_adapters(model)
    lora_linear.accelerate(model)
    return model.base_model.model[0]


def test_the_gate_judges_biases():
    x, g, layer = torch.randn(67, 64), torch.randn(67, 96), biased()
    found = gate.check_layer(layer, x, g, gate.our_mask, fast=True)
    assert set(found) == {"y", "dx", "dA", "dB", "db", "dbias", "path"} and all(found.values())


# of the adapter's bias, of the base's: outputs that are refused
@pytest.mark.parametrize("of_b, of_bias", [(1.05, 1.0), (1.0, 1.05)])
def test_the_gate_refuses_wrong_biases(of_b, of_bias):
    x, g, layer = torch.randn(67, 64), torch.randn(67, 96), biased()
    b, bias = layer.lora_B["default"].bias, layer.base_layer.bias

    def wrong(x):
        return layer(x) + (of_b - 1) * layer.scaling["default"] * b + (of_bias - 1) * bias

    found = gate.check_layer(layer, x, g, gate.our_mask, wrong, fast=True)
    refused = {name for name, verdict in found.items() if not verdict}
    assert refused == {"y", "db" if of_b != 1 else "dbias"}


@pytest.mark.parametrize("model", [name for name in lora_experts.EXPERTS if name.endswith("-token")])
def test_experts_of_a_single_token(model, tmp_path):
    result = tmp_path / "out.json"
    assert bench.app(["lora_experts", "--tiny", "--model", model, "--repeats", "1", "--json", str(result)]) == 0
    (row,) = harness.read(result)["rows"]
    assert row["settings"]["M"] == 1 and set(row["providers"]) == {"frozen", "stock", "peft_fast"}
    assert 0 < row["match"]["peft_fast"] <= 1 and set(row["providers"]["peft_fast"]) >= {"forward", "total"}
    assert "backward" not in row["providers"]["peft_fast"]


def test_wrong_experts_of_a_single_token_are_refused(monkeypatch):
    results, factors = lora_experts._results_one_by_one, iter((1.02, 1.0))  # of ours, of stock
    monkeypatch.setattr(lora_experts, "_results_one_by_one", lambda *a: [next(factors) * y for y in results(*a)])
    assert bench.app(["lora_experts", "--tiny", "--model", "mixtral-like-token", "--gate-only"]) == 1
