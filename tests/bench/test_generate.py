"""`bench generate` on a toy model: what is compared, and what its gate refuses."""

import torch

from peft_fast import settings
from peft_fast.benchmarks import generate, harness
from peft_fast.cli import bench
from peft_fast.patch import decode


def test_a_tiny_run(tmp_path, capsys):
    result = tmp_path / "out.json"
    args = ["generate", "--tiny", "--threads", "1", "--repeats", "1", "--dtype", "bf16,fp32", "--json", str(result)]
    assert bench.app(args) == 0
    bf16, fp32 = harness.read(result)["rows"]
    assert set(bf16["providers"]) == {"merged", "stock", "peft_fast", "peft_fast bf16"}
    assert set(fp32["providers"]) == {"merged", "stock", "peft_fast"}
    for row in (bf16, fp32):
        assert row["baseline"] == "merged" and row["settings"]["tokens"] == 2
        assert row["match"]["peft_fast"] <= 1
        assert len(row["providers"]["peft_fast"]["total"]["ratio"]) == 3
    assert "merged" in capsys.readouterr().out


def models(dtype):
    torch.manual_seed(0)
    net = generate.network("llama-1024", tiny=True).to(dtype).eval()
    stock, ours = generate.adapted(net), generate.adapted(net)
    import peft_fast

    with settings.override(quiet=True):
        peft_fast.accelerate(ours)
    return ours, stock, torch.randint(1, 64, (1, generate.PROMPT))


def test_the_gate_refuses_other_arithmetic_and_other_paths(monkeypatch):
    ours, stock, ids = models(torch.float32)
    assert all(generate.verdicts(ours, stock, ids, 2).values())
    assert not generate.verdicts(stock, stock, ids, 2)["path"]
    run = decode.run
    monkeypatch.setattr(decode, "run", lambda layer, x: None if (y := run(layer, x)) is None else y * 1.01)
    found = generate.verdicts(ours, stock, ids, 2)
    assert not found["logits"] and not any(found[name] for name in found if "→" in name)


def test_a_gpu_generates_with_models_that_nobody_downloads():
    rows = generate.cases(harness.Options(device="cuda"))
    assert [(row.settings["model"], row.settings["dtype"]) for row in rows] == [
        (n, "bf16") for n in generate.GPU_LLAMAS
    ]
    assert generate.SMOLLM2 not in generate.names("cuda") and generate.SMOLLM2 in generate.names("cpu")
    assert {p.backlog for p in generate.providers("llama-1024", torch.float32, 2, True)} == {0.0}
