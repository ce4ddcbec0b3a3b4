"""`doctor`: everything it promises is on the screen and in the JSON, whatever is missing."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

from peft_fast import dispatch, native, settings
from peft_fast.cli import doctor, gpu


@pytest.fixture(scope="module")
def report() -> dict:
    return doctor.gather()


def screen(report: dict, width: int, capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    doctor.show(report)
    return capsys.readouterr().out


def test_versions_are_the_installed_ones(report):
    rows = {row["name"]: row for row in report["versions"]}
    assert set(rows) == {"peft_fast", "python", "torch", "transformers", "peft", "accelerate", "triton"}
    assert rows["torch"]["version"] == importlib.metadata.version("torch")
    assert rows["torch"]["ok"] and rows["triton"]["ok"]


def test_the_machine(report):
    machine = report["machine"]
    assert machine["cpu"] and machine["cores"] >= 1 and machine["torch_threads"] == 1
    if native.load():
        assert set(machine["isa_found"]) == {k for k, v in native.capabilities().items() if v and k != "portable"}
        assert machine["isa_used"] in settings.ISAS


def test_instruction_sets_are_found_without_the_extension_too(report, monkeypatch):
    monkeypatch.setattr(native, "capabilities", dict)
    assert doctor.machine()["isa_found"] == report["machine"]["isa_found"]


def test_backends_have_a_state_and_a_reason(report):
    names = [row["name"] for row in report["backends"]]
    assert set(names) == set(dispatch.BACKEND_PLANS) and names[-2:] == ["torch", "reference"]
    assert all(row["why"] for row in report["backends"])


def test_pefts_forward(report):
    assert report["peft_forward"]["known"] is True
    assert importlib.metadata.version("peft") in report["peft_forward"]["why"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_screen_fits_and_says_it_all(report, width, capsys, monkeypatch):
    text = screen(report, width, capsys, monkeypatch)
    assert max(map(len, text.splitlines())) <= width
    for word in (
        "torch",
        "triton",
        "transformers",
        "peft",
        "accelerate",
        "processor",
        "GPU",
        "backend",
        "setting",
    ):
        assert word in text
    for row in report["settings"]:
        assert row["name"] in text


def test_the_plain_screen_says_the_same(report, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.box", None)
    text = screen(report, 80, capsys, monkeypatch)
    cells = [c for _, header, rows in doctor.tables(report) for row in [header, *rows] for c in row]
    assert all(cell in text for cell in cells)


def test_json_is_the_report(root):
    command = [sys.executable, "-m", "peft_fast", "doctor", "--json"]
    done = subprocess.run(command, cwd=root, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    keys = {"versions", "machine", "extension", "backends", "gpu_kernels", "peft_forward", "settings", "to_do"}
    assert set(json.loads(done.stdout)) == keys


def changed(report: dict, **parts: dict) -> list[str]:
    report = {**report, **{key: {**report[key], **part} for key, part in parts.items()}}
    return doctor.to_do(report)


def test_a_missing_and_an_old_package(report, monkeypatch):
    installed = {"torch": "2.11.0+cu130", "transformers": "4.57.1", "accelerate": "1.15.0"}

    def version(name):
        if name in installed:
            return installed[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    todo = doctor.to_do({**report, "versions": doctor.versions()})
    assert any(line.startswith("transformers 4.57.1 is too old") and ">=5" in line for line in todo)
    assert any(line.startswith("peft is missing") and "pip install 'peft>=0.19'" in line for line in todo)
    assert not any(line.startswith(("torch", "triton")) for line in todo)


def test_what_to_do(report):
    failed = {"reason": "no C++ compiler on PATH", "do": "install one"}
    cases = {
        "no C++ kernels, because no C++ compiler on PATH: install one": {
            "extension": {"loads": False, "why_not": "not built", "build": failed}
        },
        "no C++ kernels: it is broken": {"extension": {"loads": False, "why_not": "it is broken", "build": {}}},
        "older than their sources": {"extension": {"loads": True, "sources_changed": True}},
        "every call goes to PEFT itself, because it is new": {"peft_forward": {"known": False, "why": "it is new"}},
        "install a CUDA build of torch": {"machine": {"gpus": ["a GPU"], "torch_sees_gpu": False}},
    }
    for sentence, parts in cases.items():
        assert any(sentence in line for line in changed(report, **parts)), sentence


# ---- GPUs


KERNELS = {
    "devices": ["NVIDIA H200, compute capability 9.0"],
    "version": "13.0",
    "self_test": [{"name": "triton, accumulate", "why": "", "refused": ""}],
    "tuned": 3,
    "ignored": "",
}


def on_a_gpu(report: dict, off: dict | None = None, **kernels) -> dict:
    """The report of a machine with a GPU; `off`: backends that are not live, with the reason."""
    rows = [
        {"name": name, "live": name not in (off or {}), "why": (off or {}).get(name, "it runs")}
        for name in dispatch.BACKEND_PLANS
    ]
    machine = {**report["machine"], "gpus": ["a GPU"], "torch_cuda": "13.0", "torch_sees_gpu": True}
    return {**report, "machine": machine, "backends": rows, "gpu_kernels": {**KERNELS, **kernels}}


@pytest.mark.parametrize(
    "sentence, changes",
    [
        ("`python -m peft_fast tune` may find faster ones", {"tuned": 0}),
        ("the tuning result is not used, because it is for triton '3.5'", {"ignored": "it is for triton '3.5'"}),
        (
            "torch's own GEMMs do all the work (cuda: not built; triton: triton is not installed)",
            {"off": {"triton": "triton is not installed", "cuda": "not built"}},
        ),
        (
            "triton, fused failed its self-test (dx is off by 0.3): set PEFT_FAST_BACKEND=torch",
            {"self_test": [{"name": "triton, fused", "why": "dx is off by 0.3", "refused": ""}]},
        ),
        (
            "cuda, fused failed its self-test (dx is off by 0.3): do not ask for cuda by name until it passes",
            {"self_test": [{"name": "cuda, fused", "why": "dx is off by 0.3", "refused": ""}]},
        ),
    ],
)
def test_what_to_do_about_a_gpu(report, sentence, changes):
    assert any(sentence in line for line in gpu.to_do(on_a_gpu(report, **changes)))
    assert gpu.to_do(on_a_gpu(report)) == []


def test_a_failing_plan_of_a_backend_taken_by_name_is_no_reason_to_leave_triton(report):
    tests = [{"name": "cuda, fused", "why": "dx is off by 0.3", "refused": ""}]
    assert "BACKEND=torch" not in " ".join(gpu.to_do(on_a_gpu(report, self_test=tests)))


def test_a_plan_that_is_not_for_this_gpu_has_not_failed(report, capsys, monkeypatch):
    """The CUDA build on an A100."""
    import collections

    import torch

    from peft_fast import ops

    done, real = collections.Counter(), ops.lora_linear

    def refuses(x, W, bias, adapters, **options):
        if options["backend"] == "torch":
            done["the Hopper GEMM needs compute capability 9.0"] += 1
        return real(x, W, bias, adapters, **options)

    monkeypatch.setattr(dispatch, "refusals", done.copy)
    monkeypatch.setattr(ops, "lora_linear", refuses)
    tests = gpu.self_test(torch.device("cpu"), ("torch",))
    why = "the Hopper GEMM needs compute capability 9.0"
    assert tests[0] == {"name": "torch, accumulate", "why": "", "refused": why}
    found = on_a_gpu(report, self_test=tests)
    assert gpu.to_do(found) == []
    text = " ".join(screen(found, 120, capsys, monkeypatch).split())
    assert "not for this GPU" in text and "failed" not in text


def test_a_driver_that_is_too_old(report, monkeypatch):
    import torch

    def init():
        raise RuntimeError("The driver is too old (found version 11040). Please update it.\nAnd more.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(gpu, "_driver_shows", lambda: ["a GPU, 470.1"])
    (line,) = [line for line in changed(report, machine=gpu.machine()) if "GPU" in line]
    what, _, do = line.partition(": ")
    assert what.endswith("torch's CUDA 13.0 cannot use it (The driver is too old (found version 11040))")
    assert do == "update the driver, or install a torch for an older CUDA"


def test_a_card_without_a_driver(report, tmp_path, monkeypatch, capsys):
    for name, vendor, kind in (("a", "0x10de", "0x030200"), ("b", "0x10de", "0x040300"), ("c", "0x1002", "0x030000")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    (tmp_path / "d").mkdir()
    monkeypatch.setattr(gpu, "PCI", tmp_path)
    monkeypatch.setattr(gpu, "_driver_shows", list)
    found = gpu.machine()
    assert found["gpu_cards"] == 1  # neither its sound nor another maker's
    (line,) = [line for line in changed(report, machine=found) if "driver" in line]
    assert "install NVIDIA's driver" in line and "container" in line
    text = screen({**report, "machine": {**report["machine"], **found}}, 80, capsys, monkeypatch)
    assert "a card without a driver" in text


def test_a_gpu_that_the_kernels_do_not_serve_is_named(monkeypatch):
    import torch

    from peft_fast.backends import triton

    properties = type("P", (), {"name": "Tesla T4", "major": 7, "minor": 5, "total_memory": 16 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(triton, "device_reason", lambda index: "compute capability 7.5 is below 8.0")
    line = "Tesla T4, compute capability 7.5, 16 GiB; no Triton kernels: compute capability 7.5 is below 8.0"
    assert gpu._device(0) == line


@pytest.mark.parametrize(
    "build, words",
    [
        ({"archs": "80;90a", "ptx": "80", "reason": ""}, "for 80, 90a, and PTX 80 for later ones"),
        ({"archs": "", "reason": "no nvcc on PATH"}, "none: no nvcc on PATH"),
    ],
)
def test_what_the_extension_holds_for_gpus(report, build, words):
    changed = {**report, "extension": {**report["extension"], "build": {**report["extension"]["build"], "cuda": build}}}
    (rows,) = [rows for title, _, rows in doctor.tables(changed) if title == "C++ kernels"]
    assert ("CUDA kernels", words) in rows


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_of_a_gpu_machine(report, width, capsys, monkeypatch):
    why = "RuntimeError: a kernel that ran out of shared memory, of which it wanted 240000 of 232448 bytes"
    tests = [*KERNELS["self_test"], {"name": "triton, fused", "why": why, "refused": ""}]
    text = screen(on_a_gpu(report, self_test=tests), width, capsys, monkeypatch)
    assert max(map(len, text.splitlines())) <= width
    for word in ("NVIDIA H200, compute capability 9.0", "triton, accumulate", "agrees", "failed: RuntimeError", "tune"):
        assert word in text


def test_the_self_test_passes_what_is_right_and_names_what_is_not(monkeypatch):
    import torch

    from peft_fast import ops

    cpu = torch.device("cpu")
    passed = gpu.self_test(cpu, ("cpu", "torch"))
    assert {"torch, accumulate", "torch, augmented"} <= {row["name"] for row in passed}
    assert not any(row["why"] for row in passed)
    real = ops.lora_linear

    def wrong(x, W, bias, adapters, **options):
        changed = [a._replace(scaling=a.scaling * 1.1) for a in adapters]
        return real(x, W, bias, changed if options["backend"] == "torch" else adapters, **options)

    def broken(x, W, bias, adapters, **options):
        raise RuntimeError("no image for this device\nand more")

    for fault, words in ((wrong, "is off by"), (broken, "RuntimeError: no image for this device")):
        monkeypatch.setattr(ops, "lora_linear", fault)
        assert all(words in row["why"] for row in gpu.self_test(cpu, ("torch",)))


def test_a_kernel_that_left_the_call_to_torch_did_not_pass(monkeypatch):
    import torch

    counts = iter([0, 1])
    monkeypatch.setattr(dispatch, "fallbacks", lambda: next(counts))
    monkeypatch.setattr(dispatch, "failures", lambda: ["a Triton kernel failed and torch runs it instead"])
    assert "failed" in gpu._wrong(torch.device("cpu"), "torch", "accumulate")


def test_triton_is_needed_only_where_there_is_a_gpu(monkeypatch):
    def version(name):
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return "99"

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    for sees, ok in ((False, True), (True, False)):
        monkeypatch.setattr(doctor, "_sees_gpu", lambda sees=sees: sees)
        (row,) = [row for row in doctor.versions() if row["name"] == "triton"]
        assert row["ok"] is ok and row["version"] is None and row["needs"] == "3.6"


def test_a_setting_that_switches_everything_off(report):
    with settings.override(disable=True):
        rows = doctor.settings_rows()
    assert "disable" in [row["name"] for row in rows if row["changed"]]
    assert any("PEFT_FAST_DISABLE" in line for line in doctor.to_do({**report, "settings": rows}))


def test_wrong_settings_are_named_and_set_aside():
    env = {"PEFT_FAST_BACKEND": "gpu", "PEFT_FAST_MIN_TOKENS": "many", "PEFT_FAST_EXACT": "1", "HOME": "/"}
    wrong = settings.set_aside(env)
    assert env == {"PEFT_FAST_EXACT": "1", "HOME": "/"}
    assert len(wrong) == 2
    assert any("PEFT_FAST_BACKEND='gpu'" in line and "one of auto" in line for line in wrong)
    assert any("PEFT_FAST_MIN_TOKENS='many'" in line and "whole number" in line for line in wrong)
