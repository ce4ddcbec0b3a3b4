"""`doctor`: everything it promises is on the screen and in the JSON, whatever is missing."""

import importlib.metadata
import json
import subprocess
import sys

import pytest

from peft_fast import native, settings
from peft_fast.cli import doctor


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
    assert [row["name"] for row in report["backends"]] == ["cpu", "torch", "reference"]
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
    keys = {"versions", "machine", "extension", "backends", "peft_forward", "settings", "to_do"}
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


def test_a_setting_that_switches_everything_off(report):
    with settings.override(disable=True):
        rows = doctor.settings_rows()
    assert "disable" in [row["name"] for row in rows if row["changed"]]
    assert any("PEFT_FAST_DISABLE" in line for line in doctor.to_do({**report, "settings": rows}))
