"""The command that compares: it sees what differs; and, where the tests can be fetched, a part of PEFT's own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.peft_suite import hub, suite
from tests.peft_suite.suite import Outcome

OFF = {
    "a": Outcome("passed"),
    "b": Outcome("failed", "OSError: no hub"),
    "c": Outcome("skipped"),
    "d": Outcome("failed", "ValueError: 1"),
}


def test_alike_is_alike():
    on = {**OFF, "a": Outcome("passed", "", 7), "d": Outcome("failed", "ValueError: 2")}
    assert suite.differing(OFF, on) == {}
    text = suite.summary(OFF, on)
    assert "4 tests without and with peft_fast, 0 differ" in text and "1 of the passed ones made 7 fast calls" in text
    assert "failed alike by: 1 OSError, 1 ValueError" in text


@pytest.mark.parametrize(
    "test, outcome",
    [
        ("a", Outcome("failed", "AssertionError: off")),
        ("a", Outcome("crashed")),
        ("b", Outcome("failed", "AttributeError: ours")),
        ("b", Outcome("passed")),
        ("c", Outcome("passed")),
        ("e", Outcome("passed")),
    ],
)
def test_what_differs_is_named(test, outcome):
    on = {**OFF, test: outcome}
    assert list(suite.differing(OFF, on)) == [test] and f"  {test}\n" in suite.summary(OFF, on)
    del on["c"]
    assert "c" in suite.differing(OFF, on)


def test_a_file_that_cannot_be_collected_is_no_agreement():
    broken = {"tests/test_a.py": Outcome("not collected", "ImportError: no such module"), **OFF}
    assert suite.differing(broken, broken) == {} and suite.uncollected(broken, broken) == ["tests/test_a.py"]
    assert "tests/test_a.py cannot be collected: ImportError" in suite.summary(broken, broken)
    assert not suite.uncollected(OFF, OFF)


def test_a_test_that_takes_the_process_down(tmp_path):
    path = tmp_path / "results.jsonl"
    lines = [{"started": "a"}, {"test": "a", "outcome": "passed", "error": "", "fast": 3, "slow": 0}, {"started": "b"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert suite.read(path) == ({"a": Outcome("passed", "", 3, 0)}, "b")


def test_a_model_of_another_description_is_made_anew(tmp_path, monkeypatch):
    def made(layers):
        monkeypatch.setattr(
            hub, "MODELS", {"an/llama": (hub.CAUSAL, "llama", dict(hub.LLAMA, num_hidden_layers=layers))}
        )
        assert hub.write(tmp_path) == []
        folder = tmp_path / "hub" / "models--an--llama"
        config = folder / "snapshots" / (folder / "refs" / "main").read_text() / "config.json"
        assert json.loads(config.read_text())["num_hidden_layers"] == layers
        return config.stat().st_mtime_ns

    monkeypatch.setattr(hub, "ADAPTERS", {})
    first = made(1)
    assert made(1) == first
    made(2)


THEIRS = """
import os
import pytest
def test_lora_passes(): pass
def test_lora_fails(): raise OSError("no hub")
@pytest.mark.xfail
def test_lora_expected(): assert 0
def test_other(): pass
def test_lora_ends(): os._exit(3)
def test_lora_behind():
    from peft.tuners.lora.layer import Linear  # takes seconds, and the process that ends is spared them
    assert "peft_fast" not in Linear.forward.__code__.co_filename
"""


def test_a_run_of_a_file(tmp_path):
    """Both ways, of tests that end in every way; the last sees whose forward PEFT's class has."""
    (tmp_path / "tests").mkdir()
    for name, text in {"__init__": "", "testing_utils": "_HUB_MODEL_ACCESSES = {}\n", "test_file": THEIRS}.items():
        (tmp_path / "tests" / f"{name}.py").write_text(text)
    (tmp_path / "pytest.ini").write_text(suite.INI)
    for on in (False, True):
        found = suite.run(tmp_path, "test_file", on, "lora", "", [])
        outcomes = {name.rpartition("::")[2]: outcome.outcome for name, outcome in found.items()}
        assert outcomes == {
            "test_lora_passes": "passed",
            "test_lora_fails": "failed",
            "test_lora_expected": "xfailed",
            "test_lora_ends": "crashed",
            "test_lora_behind": "failed" if on else "passed",
        }


@pytest.mark.slow
def test_pefts_own_tests_of_mixed_models_and_variants(root, download_cache):
    """The whole of it takes hours: `python -m tests.peft_suite`."""
    folder = Path(download_cache) / "peft_suite"
    try:
        suite.fetch(folder)
    except subprocess.CalledProcessError:
        pytest.skip("the source distribution of PEFT can not be had here")
    command = [sys.executable, "-m", "tests.peft_suite", "test_mixed", "test_lora_variants", "--folder", str(folder)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 differ" in done.stdout.splitlines()[-3]
