"""The command that compares: it sees what differs; and, where the tests can be fetched, a part of PEFT's own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.peft_suite import __main__ as command
from tests.peft_suite import hub, record, suite
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


ON = {**OFF, "a": Outcome("passed", "", 7)}


def test_a_record_is_put_together_from_runs(tmp_path, monkeypatch):
    path, peft = tmp_path / "outcome.json", record.versions()["peft"]
    commit = "abc1234"
    record.add(path, "test_b", "lora", OFF, ON, commit)
    record.add(path, "test_a", "lora", OFF, OFF, commit)
    record.add(path, "test_b", "lora", {**OFF, "e": Outcome("xfailed")}, {**ON, "e": Outcome("xfailed", "", 2)}, commit)
    known = json.loads(path.read_text())
    assert list(known["files"]) == ["test_a", "test_b"] and len(path.read_text().splitlines()) == 7
    counts = {"tests": 5, "passed": 1, "failed": 2, "skipped": 1, "xfailed": 1}
    assert known["files"]["test_b"] == {
        **{"commit": "abc1234", "select": "lora", "stock": counts, "accelerated": counts},
        **{"failed_by": {"OSError": 1, "ValueError": 1}, "differing": [], "fast_calls": 9},
    }
    assert record.problems(known, peft) == []
    assert record.problems(known, "0.1") == [f"a record of PEFT {peft}, but 0.1 is pinned"]
    monkeypatch.setattr(record, "versions", lambda: {**known["versions"], "torch": "9.9"})
    assert list(record.add(path, "test_c", "lora", OFF, ON, commit)["files"]) == ["test_c"], (
        "lines of other versions stayed"
    )


def faulty(change):
    """A record with a change to its only line."""
    entry = {"commit": "abc1234", **record.line("lora", OFF, ON)}
    change(entry)
    return {"versions": record.versions(), "files": {"test_a": entry}}


FAULTS = {
    "ended differently: b": lambda e: e.update(record.line("lora", OFF, {**ON, "b": Outcome("passed")})),
    "stock: outcomes that do not add up": lambda e: e["stock"].update(passed=2),
    "accelerated: no counts": lambda e: e["accelerated"].pop("skipped"),
    "other counts, but no test that differs": lambda e: e["accelerated"].update(failed=1, passed=2),
    "cannot be imported": lambda e: e["stock"].update({"not collected": 1, "tests": 5}),
    "reasons of failures": lambda e: e["failed_by"].clear(),
    "no file made a fast call": lambda e: e.update(fast_calls=0),
    "not of a commit": lambda e: e.update(commit="abc1234+"),
    "other fields": lambda e: e.pop("differing"),
}


@pytest.mark.parametrize("told", FAULTS)
def test_what_is_wrong_with_a_record_is_told(told):
    peft = record.versions()["peft"]
    assert record.problems(faulty(lambda e: None), peft) == []
    found = record.problems(faulty(FAULTS[told]), peft)
    assert any(told in problem for problem in found), found


def test_the_record_in_the_repository(root):
    """Of the pinned PEFT; `python -m tests.peft_suite --record tests/peft_suite/outcome.json` makes it anew."""
    pins = dict(
        line.strip().split("==") for line in (root / "requirements.txt").read_text().splitlines() if "==" in line
    )
    known = json.loads((root / "tests/peft_suite/outcome.json").read_text())
    assert record.problems(known, pins["peft"]) == []


def test_the_record_has_every_file(root, download_cache):
    known = json.loads((root / "tests/peft_suite/outcome.json").read_text())
    assert list(known["files"]) == suite.files(fetched(download_cache), [])


def test_a_part_of_a_file_is_not_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peft_suite", "test_mixed", "-k", "a", "--record", str(tmp_path / "o.json")])
    with pytest.raises(SystemExit):
        command.main()
    assert "leave -k and --json out" in capsys.readouterr().err


def fetched(download_cache):
    """PEFT's sources."""
    folder = Path(download_cache) / "peft_suite"
    try:
        with suite.alone(folder):
            return suite.fetch(folder)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"pip could not fetch PEFT's source distribution, which has its tests (status {error.returncode})")


@pytest.fixture
def theirs(root, download_cache, tmp_path):
    """Runs the command on files of PEFT's tests, which are fetched first -> what it printed, and the outcomes."""
    folder = fetched(download_cache).parent

    def run(*args):
        command = [sys.executable, "-m", "tests.peft_suite", *args, "--folder", str(folder)]
        done = subprocess.run(
            [*command, "--json", str(tmp_path / "out.json")], cwd=root, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, json.loads((tmp_path / "out.json").read_text())

    return run


# of the file that puts every method on every kind of layer, the tests in which a LoRA layer is called
PART = """
(-LoraConfig- and (test_training_custom or test_only_params or test_forward_bfloat16[ or test_forward_float16[
or test_merge_layers[ or test_safe_merge or adapters_with_merging or test_disable_adapters[ or save_load_roundtrip[))
or (TestMultipleActiveAdapters and (-lora-LoraConfig- or dora)) or TestMixedAdapterBatches or gpt2_dora
or cat_with_rank_pattern or lora_to_embedding_layer
""".replace("\n", " ")
# kinds of layers, and what is done with them, of which a test made fast calls
REACHED = [
    "MLP",
    "with DoRA",
    "Conv1D 1 LoRA",
    "Conv1D 1 DoRA",
    "Conv2d 2 LoRA",
    "Conv3d 2 LoRA",
    "MHA 2",
    "lora_b bias",
]
REACHED += ["test_training", "bfloat16", "float16", "merge_layers", "safe_merge", "with_merging", "roundtrip"]
REACHED += ["TestMultipleActiveAdapters", "TestMixedAdapterBatches"]


def test_pefts_own_tests_of_every_kind_of_layer(theirs):
    """A part of them, in every run: it ends as it does without peft_fast."""
    text, outcomes = theirs("test_custom_models", "-k", PART)
    assert "0 differ" in text.splitlines()[-3], text
    on = {test: Outcome(*outcome) for test, outcome in outcomes["test_custom_models"][1].items()}
    fast = [test for test, outcome in on.items() if outcome.outcome == "passed" and outcome.fast]
    assert len(on) > 450 and len(fast) > 150, text
    assert [word for word in REACHED if not any(word in test for test in fast)] == []


@pytest.mark.slow
def test_pefts_own_tests_of_mixed_models_and_variants(theirs):
    """The whole of it takes half an hour: `python -m tests.peft_suite`."""
    text, _ = theirs("test_mixed", "test_lora_variants")
    assert "0 differ" in text.splitlines()[-3]
