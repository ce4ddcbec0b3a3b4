"""Rows that are asked for by name, most of them inference: what is compared in them, and what their gates refuse."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch

import peft_fast
from peft_fast import settings
from peft_fast.benchmarks import (
    dora_embedding,
    dora_linear,
    generate,
    harness,
    kinds,
    lora_mixed,
    merged,
    nf4,
    quantized,
    show,
    train_step,
)
from peft_fast.cli import bench
from peft_fast.errors import UnsupportedError
from peft_fast.ops.nf4 import Packed
from peft_fast.patch import dora, mixed

CACHED = {"stock", "peft_fast", "stock cached", "peft_fast cached"}
LOW = {"stock bf16", "peft_fast bf16"}
TRAINED = {"stock", "stock bf16", "peft_fast", "peft_fast bf16", "peft_fast torch"}
# benchmark, model -> baseline, who is in its rows in bf16, heading (or not) of a table of its own
ROWS = {
    ("dora_linear", "gpt2"): ("frozen", TRAINED | {"frozen", "lora", "peft_fast cpu"}, False),
    ("dora_linear", "embedding"): ("stock", TRAINED, True),
    ("dora_linear", "llama-like-token"): ("frozen", CACHED | LOW | {"frozen", "lora"}, True),
    ("dora_linear", "gpt2-token"): ("frozen", CACHED | LOW | {"frozen", "lora"}, True),
    ("dora_linear", "embedding-token"): ("frozen", CACHED | LOW | {"frozen"}, True),
    ("generate", "llama-1024-dora"): ("merged", CACHED | {"merged", "peft_fast bf16"}, True),
    ("generate", "llama-1024-merged"): ("stock", {"stock", "peft_fast"}, True),
    ("lora_mixed", "llama-like-ranks"): ("frozen", {"frozen", *TRAINED} - {"peft_fast torch"}, True),
}


@pytest.mark.parametrize("name, model", ROWS)
def test_a_tiny_run_of_rows_by_name(name, model, tmp_path):
    result = tmp_path / "out.json"
    args = ["--tiny", "--threads", "1", "--repeats", "1", "--dtype", "bf16,fp32", "--dropout", "0"]
    assert bench.app([name, *args, "--model", model, "--json", str(result)]) == 0
    baseline, everyone, apart = ROWS[name, model]
    rows = harness.read(result)["rows"]
    assert {row["settings"]["dtype"] for row in rows} == {"bf16", "fp32"}
    for row in rows:
        # compiled kernels, where there are some, are measured by their name, too
        wanted = everyone if row["settings"]["dtype"] == "bf16" else {n for n in everyone if not n.endswith("bf16")}
        assert wanted ^ set(row["providers"]) <= {"peft_fast cpu", "peft_fast triton"}
        assert row["baseline"] == baseline and max(row["match"].values()) <= 1 and "peft_fast" in row["match"]
        assert bool(kinds.heading(name, row["settings"])) == apart
        assert "speedup" in row["providers"]["peft_fast"]["total"]


MODULES = {"dora_linear": dora_linear, "generate": generate, "lora_mixed": lora_mixed}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("scale", ["full", "quick", "tiny"])
@pytest.mark.parametrize("name", MODULES)
def test_rows_by_name_are_in_no_other_run(name, scale, device):
    module = MODULES[name]
    usual = module.cases(harness.Options(scale=scale, device=device))
    assert not any(kinds.heading(name, case.settings) for case in usual)
    for model in module.names(device):
        cases = module.cases(harness.Options(scale=scale, device=device, models=(model,)))
        assert cases and {case.settings["model"] for case in cases} == {model}
        assert len({case.title for case in cases}) == len(cases)


def test_the_sizes_of_rows_by_name():
    def shapes(module, *models):
        options = harness.Options(models=models, dtypes=("bf16",), dropouts=(0.0,))
        return [case.settings["shape"] for case in module.cases(options)]

    assert shapes(dora_linear, "embedding") == ["512 of 32000 × 1024"]
    assert shapes(dora_linear, "llama-like-token") == ["1 × 1024 × 1024", "1 × 1024 × 2816", "1 × 2816 × 1024"]
    assert shapes(lora_mixed, "llama-like-ranks")[:2] == [f"72 × {n} tokens, 1024 → 1024" for n in (1, 16)]
    batch = lora_mixed.MANY
    assert len(batch.ranks) == len(set(batch.names) - {"__base__"}) == 64 and batch.names.count("__base__") == 8
    assert {batch.ranks.count(r) for r in (4, 8, 16, 32, 64)} == {12, 13} and nf4.SHAPES[-1] == (4096, 4096)


def few(module, *args):
    """The providers of a case by name, adapters in the base's dtype."""
    torch.manual_seed(0)
    return {p.name: p for p in module(*args, "fp32", harness.Options())}


def test_the_gates_of_dora_see_a_wrong_magnitude(monkeypatch):
    token, trained = few(dora_linear.one_token, 64, 96), few(dora_embedding.providers, 48, 96, 64)
    one = few(dora_embedding.providers, 1, 96, 64)
    with settings.override(min_tokens=0):
        assert all(all(rows["peft_fast"].gate().values()) for rows in (token, trained, one))
        monkeypatch.setattr(dora.Plan, "m", property(lambda self: self.magnitude.weight * 1.01))
        assert not token["peft_fast"].gate()["y"] and not token["peft_fast cached"].gate()["y"]
        real = dora.run_embedding
        monkeypatch.setattr(dora, "run_embedding", lambda *args: real(*args) * 1.01)
        found = trained["peft_fast"].gate()
        assert not any(found[name] for name in ("y", "dA", "dB", "dm")) and not one["peft_fast"].gate()["y"]


def test_the_gates_of_inference_see_who_ran(monkeypatch):
    rows = few(dora_linear.one_token, 64, 96)
    monkeypatch.setattr(dora, "_refuse", lambda *_: "not today")
    verdicts = rows["peft_fast"].gate()
    assert verdicts["y"] and not verdicts["path"] and verdicts["path of stock"]


def test_the_gate_of_a_mixed_batch_sees_a_wrong_rank_and_a_wrong_row(monkeypatch):
    options = harness.Options(scale="tiny")
    (ours,) = (p for p in lora_mixed.providers(lora_mixed.MANY, 64, 96, 1, "fp32", options) if p.name == "peft_fast")
    assert all(ours.gate().values())
    real = mixed.linear
    monkeypatch.setattr(mixed, "linear", lambda layer, x, *rest: real(layer, x, *rest).roll(1, 0))
    assert not ours.gate()["y"]


def test_a_row_of_users_settings_has_them():
    seen = []
    few = harness.Provider("frozen", {"forward": lambda: seen.append(settings.get().min_tokens)})
    with settings.override(min_tokens=0):
        for as_used in (False, True):
            case = harness.Case("t", {"model": "toy"}, lambda: [few], threads=1, as_used=as_used)
            harness.measure(case, harness.Options(scale="tiny"), show.Plain())
        assert settings.get().min_tokens == 0
    assert {*seen} == {0, settings.Settings().min_tokens} and seen == sorted(seen)


def pair(dtype):
    return generate._pair("llama-1024-merged", dtype, True, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_of_merging_sees_other_bits(dtype, monkeypatch):
    assert all(merged.verdicts(lambda: pair(dtype)).values())

    def worse():
        stock, ours = pair(dtype)
        ours.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.data.mul_(1.01)
        return stock, ours

    assert not merged.verdicts(worse)["merged"]

    @contextlib.contextmanager
    def by_peft(model):
        model.merge_adapter()
        yield model
        model.unmerge_adapter()

    monkeypatch.setattr(peft_fast, "merged", by_peft)
    found = merged.verdicts(lambda: pair(dtype))
    assert found["merged"] and not found["restored"], "what PEFT subtracts again leaves other bits"


QUANTIZED = ("nf4-token", "int8-token", "nf4-dense", "nf4-double-dense")


@pytest.fixture
def by_itself(tmp_path, root):
    """Rows of a benchmark in a process of its own: what is imported there PEFT would see in the other tests."""
    if not (quantized.FOLDER / "bitsandbytes").is_dir():
        pytest.skip("bitsandbytes is not installed")

    def run(*args):
        result = tmp_path / "out.json"
        command = [sys.executable, "-m", "peft_fast", "bench", *args, "--tiny", "--threads", "1", "--repeats", "1"]
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
        env = {**os.environ, "PYTHONPATH": path}
        subprocess.run([*command, "--json", result], cwd=root, env=env, check=True, capture_output=True)
        return harness.read(result)["rows"]

    return run


def test_quantized_rows_by_name(by_itself):
    rows = by_itself("quantized", "--dtype", "bf16,fp32", "--model", ",".join(QUANTIZED))
    assert [row["settings"]["model"] for row in rows] == [model for model in QUANTIZED for _ in range(2)]
    token = {"frozen", "stock", "peft_fast", quantized.FORCED}
    for row in rows:
        dense = row["settings"]["model"].endswith("-dense")
        assert set(row["providers"]) == ({"stock", "peft_fast"} if dense else token)
        assert max(row["match"].values()) <= 1 and kinds.heading("quantized", row["settings"])


WHOLE = {
    ("train_step", "llama-nf4"): {"frozen", "stock", "stock bf16", "peft_fast", "peft_fast bf16"},
    ("generate", "llama-1024-nf4"): {"merged", "stock", "peft_fast", "peft_fast bf16"},
}


@pytest.mark.parametrize("name, model", WHOLE)
def test_whole_models_over_four_bits(name, model, by_itself):
    (row,) = by_itself(name, "--dtype", "bf16", "--dropout", "0.1", "--model", model)
    assert set(row["providers"]) == WHOLE[name, model]
    assert max(row["match"].values()) <= 1 and "peft_fast" in row["match"]


def test_whole_models_need_the_library(monkeypatch):
    monkeypatch.setattr(quantized, "_there", lambda library: False)
    for name, model in WHOLE:
        run = {"train_step": train_step, "generate": generate}[name]
        with pytest.raises(UnsupportedError, match="make setup"):
            run.cases(harness.Options(models=(model,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_of_a_dense_weight_sees_a_wrong_one(dtype):
    data, scales = torch.randint(256, (64 * 96 // 2,), dtype=torch.uint8), 0.5 + torch.rand(96)
    W = Packed(data, scales, torch.linspace(-1, 1, 16), 64, (96, 64))
    wrong = W._replace(absmax=W.absmax * 1.01)
    assert all(nf4._verdicts(lambda: W.dense(dtype), lambda: W.dense(dtype), W).values())
    assert not nf4._verdicts(lambda: W.dense(dtype), lambda: wrong.dense(dtype), W)["W"]


def test_no_quantized_row_by_name_is_in_another_run():
    cases = quantized.cases(harness.Options(scale="tiny", models=(quantized.OP,)))
    assert cases and not any(kinds.heading("quantized", case.settings) for case in cases)
    assert set(QUANTIZED) <= set(quantized.names("cpu")) and quantized.OP in quantized.names("cpu")
