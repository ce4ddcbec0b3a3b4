"""`gpu.sh` end to end on the CPU: the steps that no other quick test runs, and (slow) all of them."""

import os
import re
import subprocess
import sys

import pytest

from peft_fast.backends import has
from peft_fast.benchmarks import harness, machine, plans, sanitize, shapes, steps, table
from peft_fast.dispatch import BACKEND_PLANS
from peft_fast.errors import SettingsError

NAMES = list(steps.ENDS)
TRITON = not machine.no_interpreter()
# the command lines of the others are tests of their own: test_commands.py, test_tuner.py, test_gpu.py (`plans`, which
# runs the calls of `memcheck`, each plan's in a process)
QUICK = ("contract", "lora_linear", "memcheck")


def dry_run(root, out, *arguments):
    """(finished process, record)"""
    environment = {**os.environ, "PEFT_FAST_GPU_DRY_RUN": "1", "OUT": str(out), "PYTHON": sys.executable}
    # the share of a step is that of a GPU: a slow CPU gets more than nine minutes
    command = ["bash", str(root / "benchmarks" / "gpu.sh"), "--minutes", "30", *arguments]
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    (path,) = out.glob("dry-run-*.json")
    return done, harness.read(path)


@pytest.fixture(scope="module")
def quick(tmp_path_factory, root):
    """(finished process, record, folder) of some steps."""
    out = tmp_path_factory.mktemp("gpu")
    return *dry_run(root, out, "--only", ",".join(QUICK)), out


def test_it_leaves_a_record_a_page_a_log_and_pictures(quick, root):
    done, record, out = quick
    status = {step["name"]: step["status"] for step in record["steps"]}
    assert list(status) == NAMES and {name for name, word in status.items() if word == "ok"} == set(QUICK)
    assert "gate: skipped, not asked for" in done.stdout
    assert all(row["settings"]["gated_tokens"] == row["settings"]["M"] for row in record["runs"][0]["rows"])
    notes = {step["name"]: step["note"] for step in record["steps"]}
    assert "passed" in notes["contract"] and "failed" not in notes["contract"]
    assert int(notes["contract"].split()[0]) >= (2 if TRITON else 1) * len(steps.A_FEW)
    assert [run["bench"] for run in record["runs"]] == ["lora_linear"]
    assert all(run["rows"] and not run["refused"] for run in record["runs"])
    (path,) = out.glob("*.json")
    assert path.with_suffix(".log").stat().st_size > 1000
    page = path.with_suffix(".md").read_text()
    assert "dry run" in page and "torch, augmented" in page and "| contract | ok |" in page
    assert not any(str(root) in text or str(out) in text for text in (path.read_text(), page))
    assert sorted(p.suffix for p in out.iterdir()) == [".json", ".log", ".md", ".png"]


def test_every_plan_and_op_ran_under_the_sanitizers_calls(quick):
    (log,) = quick[2].glob("*.log")
    calls = re.findall(r"^(\S+ \S+) \S+ (?:bf16|fp32) M, K, N = \(.*?\): (.*)$", log.read_text(), re.MULTILINE)
    backend = "triton" if TRITON else "torch"
    names = [*BACKEND_PLANS[backend], *(op for op in sanitize.SINGLE if TRITON and has("triton", op))]
    assert {plan for plan, _ in calls} == {f"{backend} {name}" for name in names}
    assert {how for _, how in calls} == {"ran"}


def test_nothing_is_said_to_be_met_without_a_gpu(quick):
    done, record, _ = quick
    assert {target["verdict"] for target in record["targets"]} == {"not measured"}
    assert "never slower than stock: layers" in done.stdout and "not measured" in done.stdout
    assert "missed" not in done.stdout and " met" not in done.stdout


def test_every_plan_is_measured_by_name(quick):
    rows = quick[1]["runs"][0]["rows"]
    named = {"peft_fast torch accumulate", "peft_fast torch augmented"}
    named |= {"peft_fast triton accumulate", "peft_fast triton fused"} if TRITON else set()
    for row in rows:
        assert named <= set(row["providers"]) and named <= set(row["match"])
        assert not row.get("left_out")


def test_a_step_that_is_not_there_cannot_be_asked_for(tmp_path):
    from peft_fast.benchmarks import gpu

    with pytest.raises(SettingsError, match="(?s)--only contact\n.*contract, tune"):
        gpu.main(["--dry-run", "--out", str(tmp_path / "out"), "--only", "plans,contact"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_all_steps(tmp_path, root):
    done, record = dry_run(root, tmp_path)
    status = {step["name"]: step["status"] for step in record["steps"]}
    assert list(status) == NAMES and "failed" not in status.values()
    measured = ["lora_linear", "train_step", *shapes.ALONE, "generate", *shapes.OPS, "quantized", "lora_conv"]
    ran = {"plans", "doctor", "gate", "contract", "ops", "memcheck", *measured}
    assert {name for name, word in status.items() if word == "ok"} >= ran
    assert record["plans"] and {found["verdict"] for found in record["plans"].values()} == {plans.RUNS}
    notes = {step["name"]: step["note"] for step in record["steps"]}
    assert "passed" in notes["ops"] and "unsloth" in notes["peers"]
    assert [run["bench"] for run in record["runs"]] == measured
    assert all(run["rows"] and not run["refused"] for run in record["runs"])
    (page,) = tmp_path.glob("*.md")
    assert all(f"## {title}" in page.read_text() for title in (*table.OPS.values(), *table.SINGLE.values()))
    assert len(list(tmp_path.glob("*.png"))) == len(record["runs"])
    assert "== tune" in done.stdout
    if TRITON:
        assert "tuned: " in done.stdout and "nothing was kept" in done.stdout
        assert {"fused", "outer", "shrink", "lora_linear"} <= {entry["op"] for entry in record["tuning"]["entries"]}
        assert not any(entry["refused"] for entry in record["tuning"]["entries"])
