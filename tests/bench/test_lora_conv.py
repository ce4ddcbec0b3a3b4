"""`bench lora_conv`: its rows, its gate, and the layers that it must not take."""

import pytest
import torch

from peft_fast.benchmarks import gate, harness, lora_conv
from peft_fast.cli import bench
from peft_fast.patch import conv


def test_a_tiny_run_writes_a_document(tmp_path, capsys):
    result = tmp_path / "out.json"
    assert bench.app(["lora_conv", "--tiny", "--repeats", "2", "--json", str(result)]) == 0
    document = harness.read(result)
    assert document["bench"] == "lora_conv" and not document["refused"]
    for row in document["rows"]:
        low = row["settings"]["p"] or "last" in row["title"]
        adapted = {"stock", "peft_fast", *(["stock bf16", "peft_fast bf16"] if low else [])}
        assert set(row["providers"]) == {"frozen", "full", *adapted}
        assert max(row["match"].values()) <= 1
    saved = {name: size["saved"] for name, size in document["rows"][-1]["bytes"].items()}
    assert saved["peft_fast"] < saved["stock"], "with dropout"
    assert "A/A" in capsys.readouterr().out


def test_rows():
    titles = [case.title for case in lora_conv.cases(harness.Options())]
    assert len(set(titles)) == len(titles) == 9 * 2 + 4 + 9
    assert any("8 × 512 × 200 → 1024 r=16 bf16" in title for title in titles)
    # in full precision without dropout channels-first images and sequences are left to PEFT
    assert not any("fp32 p=0 " in title and "last" not in title for title in titles)
    on_gpu = lora_conv.cases(harness.Options(device="cuda"))
    assert {case.settings["shape"].rpartition(", ")[2] for case in on_gpu} == {"channels last"}
    assert {case.settings["model"] for case in lora_conv.cases(harness.Options())} == set(lora_conv.names("cpu"))


@pytest.mark.parametrize("last", [False, True])
def test_rows_and_images(last):
    order = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, 5, 3, 4).to(memory_format=order)
    rows = lora_conv._rows(x)
    assert rows.shape == (24, 5) and torch.equal(rows[4], x[0, :, 1, 0])
    again = lora_conv._like(rows.contiguous(), x)
    assert torch.equal(again, x) and again.stride() == x.stride()


def test_a_wrong_product_is_refused(monkeypatch, capsys):
    real = conv.lora_linear
    monkeypatch.setattr(conv, "lora_linear", lambda x, W, *rest, **how: real(x, W * 1.01, *rest, **how))
    assert bench.app(["lora_conv", "--tiny", "--gate-only", "--dtype", "bf16", "--dropout", "0"]) == 1
    assert "provider 'peft_fast'" in capsys.readouterr().out


def test_a_layer_that_peft_runs_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(conv, "refuse_input", lambda *_: "not today")
    assert bench.app(["lora_conv", "--tiny", "--gate-only", "--dropout", "0.1"]) == 1
    assert "the layer ran PEFT's forward" in capsys.readouterr().out


def test_weights_of_a_convolution_are_a_linear_layers():
    layer = lora_conv.lora_layer(torch.nn.Conv2d(6, 9, 1, bias=False), 4, 0.0, fp32=True)
    w = gate.weights(layer, torch.float32)
    assert [tuple(t.shape) for t in (w.W, w.A, w.B)] == [(9, 6), (4, 6), (9, 4)]
