"""`bench` as a user calls it, with toy sizes: what it writes, prints, refuses and returns."""

import sys

import pytest

from peft_fast.benchmarks import harness, lora_embedding, lora_group, lora_linear, lora_mlp, table, train_step
from peft_fast.cli import app, bench
from peft_fast.errors import DeviceError, SettingsError, UnsupportedError

ADAPTED = {"stock", "stock bf16", "peft_fast", "peft_fast bf16"}
EVERYONE = {
    "lora_linear": {"frozen", "full", *ADAPTED},
    "lora_group": {"frozen", "full", "layer by layer", *ADAPTED},
    "lora_mlp": {"frozen", "full", "peft_fast"},  # a frozen block is one of the rows
    "lora_embedding": ADAPTED,
    "train_step": {"frozen", "full", "layer by layer", *ADAPTED},
}


@pytest.mark.parametrize("name", EVERYONE)
def test_a_tiny_run_writes_a_document_and_a_picture(name, tmp_path, capsys):
    result, picture = tmp_path / "out.json", tmp_path / "out.png"
    args = [name, "--tiny", "--dropout", "0.05", "--json", str(result), "--plot", str(picture)]
    assert bench.app([*args, "--threads", "1", "--repeats", "2"]) == 0
    document = harness.read(result)
    assert document["bench"] == name and document["scale"] == "tiny" and not document["refused"]
    for row in document["rows"]:
        assert set(row["providers"]) >= EVERYONE[name] and row["rounds"] == 2
        assert set(row["match"]) >= {"peft_fast", "peft_fast bf16"} & set(row["providers"]) != set()
        assert max(row["match"].values()) <= 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "A/A" in out and f"wrote {result}" in out
    (section,) = (part for name, part in table.SECTIONS.items() if name != "summary" and "| ---" in part([document]))
    assert section([document]).count("\n| ") == 1 + len(document["rows"])


def test_a_tiny_run_of_a_mixed_batch(tmp_path, capsys):
    result = tmp_path / "out.json"
    assert bench.app(["lora_mixed", "--tiny", "--threads", "1", "--repeats", "2", "--json", str(result)]) == 0
    document = harness.read(result)
    one, many, model = document["rows"]
    assert not document["refused"] and "1 tokens" in one["title"] and "generate" in model["title"]
    for row in (one, many):
        assert set(row["providers"]) == {"frozen", *ADAPTED}
        assert set(row["match"]) == ADAPTED and max(row["match"].values()) <= 1
    assert set(model["providers"]) == {"frozen", "stock", "peft_fast"} and "A/A" in capsys.readouterr().out


def test_a_tiny_run_of_quantized_values(tmp_path):
    """Without a library: tests/quantized has the others'."""
    result = tmp_path / "out.json"
    assert bench.app(["quantized", "--tiny", "--model", "nf4-op", "--repeats", "1", "--json", str(result)]) == 0
    for row in harness.read(result)["rows"]:
        assert {"frozen", "peft_fast torch"} <= set(row["providers"]) and max(row["match"].values()) <= 1


@pytest.mark.parametrize("name", ["lora_group", "lora_mlp"])
def test_one_op_saves_fewer_bytes_than_layer_by_layer(name, tmp_path):
    result = tmp_path / "out.json"
    bench.app([name, "--tiny", "--dropout", "0", "--dtype", "fp32", "--repeats", "1", "--json", str(result)])
    rows = [row["bytes"] for row in harness.read(result)["rows"]]
    by_name = [{name: size["saved"] for name, size in row.items()} for row in rows]
    found = [saved for saved in by_name if "stock" in saved]
    assert found
    for saved in found:
        # without dropout x is one tensor for all siblings; a block saves no h
        assert saved["peft_fast"] <= saved["layer by layer"] - (name == "lora_mlp") and saved["peft_fast"] > 0


def test_dropout_saves_fewer_bytes_than_stock(tmp_path):
    result = tmp_path / "out.json"
    bench.app(["lora_linear", "--tiny", "--dropout", "0.1", "--repeats", "1", "--json", str(result)])
    (row,) = harness.read(result)["rows"]
    saved = {name: size["saved"] for name, size in row["bytes"].items()}
    assert saved["frozen"] == 0 < saved["peft_fast"] < saved["stock bf16"] < saved["stock"]


@pytest.mark.parametrize("name", EVERYONE)
def test_gate_only(name, capsys):
    args = [name, "--tiny", "--gate-only", "--dtype", "fp32", "--dropout", "0,0.1"]
    assert bench.app([*args, *(["--model", "gpt2-like"] if name == "train_step" else [])]) == 0
    assert "error / allowed: " in capsys.readouterr().out


def test_a_refused_provider_is_exit_status_one(monkeypatch, capsys):
    def wrong(layer, w, A, B):
        return real(layer, w._replace(scaling=w.scaling * 1.01), A, B)

    real = lora_linear.peers.addmm
    monkeypatch.setattr(lora_linear.peers, "addmm", wrong)
    assert bench.app(["lora_linear", "--tiny", "--dropout", "0"]) == 1
    out = capsys.readouterr().out
    assert "provider 'addmm'" in out and "A/A" not in out


def test_siblings_that_swap_their_masks_are_refused(monkeypatch, capsys):
    from peft_fast import ops

    real = ops.lora_group

    def swapped(x, siblings, **how):
        first, second, *rest = siblings
        ys = real(x, [second, first, *rest], **how)
        return ys[1], ys[0], *ys[2:]

    monkeypatch.setattr(ops, "lora_group", swapped)
    assert bench.app(["lora_group", "--tiny", "--dropout", "0.1", "--gate-only"]) == 1
    assert "provider 'peft_fast'" in capsys.readouterr().out


def test_a_model_without_groups_and_blocks_is_not_called_joined(monkeypatch, capsys):
    from peft_fast import settings

    with settings.override(groups=False, blocks=False):
        assert bench.app(["train_step", "--tiny", "--model", "llama-like", "--dtype", "fp32", "--gate-only"]) == 1
    assert "14 adapted layers ran as 14 ops" in capsys.readouterr().out


def test_a_model_that_is_not_fast_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(train_step, "accelerate", lambda model: None)
    assert bench.app(["train_step", "--tiny", "--model", "llama-like", "--dtype", "fp32"]) == 1
    assert "the layer ran PEFT's forward" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, error, words",
    [
        (["lora_liner"], UnsupportedError, "did you mean lora_linear?"),
        (["nonsense"], UnsupportedError, "smollm2, generate, methods, pages, table"),
        (["train_step", "--model", "bert"], UnsupportedError, "bert-base-like, gpt2-like, llama-like"),
        (["lora_linear", "--dtype", "bf61"], UnsupportedError, "did you mean bf16?"),
        (["lora_linear", "--dropout", "1"], SettingsError, "from 0 to below 1"),
        (["lora_linear", "--dropout", "half"], SettingsError, "--dropout half"),
        (["lora_linear", "--threads", "0"], SettingsError, "whole numbers from 1"),
        (["lora_linear", "--repeats", "-1"], SettingsError, "--repeats -1"),
        (["lora_linear", "--device", "tpu"], DeviceError, "--device tpu"),
        (["lora_linear", "--json", "."], SettingsError, "a folder"),
    ],
)
def test_bad_input(args, error, words):
    with pytest.raises(error) as caught:
        bench.app(args)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["given", "needed", "do"] and words in str(caught.value)


def test_the_command_line_prints_the_three_lines(capsys):
    assert app.main(["bench", "nonsense"]) == 1
    assert capsys.readouterr().err.startswith("given: benchmark 'nonsense'\nneeded: ")


def test_without_matplotlib_there_is_a_note_instead_of_a_picture(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bench._plot({"bench": "train_step", "rows": []}, tmp_path / "x.png")
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_deadline(capsys):
    assert bench.app(["lora_linear", "--tiny", "--minutes", "0.0001"]) == 0
    assert "not measured: square" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("scale", ["full", "quick", "tiny"])
@pytest.mark.parametrize("module", [lora_linear, lora_group, lora_mlp, lora_embedding, train_step])
def test_case_lists(module, scale, device):
    options = harness.Options(scale=scale, device=device)
    cases = module.cases(options)
    assert len({case.title for case in cases}) == len(cases) > 0
    assert {case.settings["model"] for case in cases} <= set(module.names(device))
    for name in module.names(device):
        assert module.cases(harness.Options(scale=scale, device=device, models=(name,)))


def test_the_sizes_that_were_promised():
    full = harness.Options()
    for case in train_step.cases(full):
        s = case.settings
        assert s["hidden"] >= 768 and s["batch"] * s["length"] >= 512
    assert {c.settings["p"] for c in train_step.cases(full)} == {0.0, 0.05}
    squares = [c.settings for c in lora_linear.cases(full) if c.settings["model"] == "square"]
    assert {(s["M"], s["K"], s["N"], s["r"]) for s in squares} == {(2048, 2048, 2048, 16)}
    assert {s["r"] for c in lora_linear.cases(full) for s in [c.settings]} == {8, 16, 64}
    groups = {c.settings["shape"] for c in lora_group.cases(full)}
    assert {"512 × 768 → 768 + 768 + 768", "512 × 4096 → 4096 + 1024 + 1024"} <= groups  # grouped queries, too
    blocks = {c.settings["shape"] for c in lora_mlp.cases(full)}
    assert {"512 × 1024 → 2 × 2816 → 1024, silu, gated", "512 × 768 → 3072 → 768, gelu, plain, frozen"} <= blocks


@pytest.mark.parametrize("family", sorted(train_step.MODELS))
def test_models_are_the_classes_they_say(family):
    model = train_step.network(train_step.scaled(train_step.MODELS[family], "tiny"))
    wanted = {"bert-base-like": "Bert", "gpt2-like": "GPT2", "llama-like": "Llama"}[family]
    assert type(model).__name__.startswith(wanted)


def test_bench_takes_the_gpu_where_there_is_one(monkeypatch):
    import torch

    for there, name in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert bench._device("") == name and bench._device("cpu") == "cpu"
