"""What `gpu.sh` runs, as data: command lines on a GPU, what is left out and why; and the calls for the sanitizer."""

import importlib.util
import os
import subprocess
import sys

import pytest

from peft_fast.backends import has
from peft_fast.benchmarks import lora_linear, machine, sanitize, shapes, steps

NAMES = list(steps.ENDS)


def on_a_gpu(tmp_path):
    return {step.name: step for step in steps.steps(tmp_path, "stem", dry_run=False)}


def test_commands_on_a_gpu(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.touch()
    monkeypatch.setattr(steps.shutil, "which", lambda name: str(tool) if name == "compute-sanitizer" else None)
    found = on_a_gpu(tmp_path)
    assert list(found) == NAMES and sorted(steps.ENDS.values()) == list(steps.ENDS.values())
    assert max(steps.ENDS.values()) < 1 and set(steps.TIMED) <= set(NAMES)
    assert found["build"].extra == {"PEFT_FAST_CUDA_ARCHS": "native"}
    for name in ("contract", "ops"):
        assert "--device cuda" in " ".join(found[name].command)
    assert "--ignore=tests/ops/test_random.py" in found["ops"].command
    for name in steps.CONTRACT:
        assert f"tests/ops/{name}" in found["contract"].command and f"--ignore=tests/ops/{name}" in found["ops"].command
    for name in (*shapes.ALONE, "generate"):
        assert found[name].command[3:6] == [name, "--device", "cuda"] and name in steps.TIMED
    for name in ("memcheck", "racecheck"):
        assert found[name].command[:3] == [str(tool), "--tool", name]
        assert found[name].command[-1] == "peft_fast.benchmarks.sanitize"
    assert "--dry-run" not in found["tune"].command and "--tiny" not in found["lora_linear"].command
    assert not any("TRITON_INTERPRET" in step.extra for step in found.values())


@pytest.mark.parametrize("name, variable", [("contract", False), ("ops", True)])
def test_the_contract_really_asks_for_the_gpu(tmp_path, root, name, variable):
    """Without one it cannot even begin, by the option alone or with the variable: a run on the CPU would pass here."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    step = on_a_gpu(tmp_path)[name]
    command = [word for word in step.command if word not in ("-n", str(min(steps.MOST_WORKERS, machine.cores())))]
    environment = {**os.environ, **(step.extra if variable else {})}
    few = [sys.executable, *command, "-k", "torch-accumulate-lora_linear-f32-rank_16 or manual_seed"]
    done = subprocess.run(few, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "CUDA" in done.stdout, done.stdout[-2000:]


def test_a_broken_plan_is_left_out_of_what_follows(tmp_path, monkeypatch):
    monkeypatch.setattr(steps.shutil, "which", lambda name: None)
    ends = {name: steps.without(step, ["cuda fused", "triton fused"]) for name, step in on_a_gpu(tmp_path).items()}
    assert ends["contract"] == ends["ops"] == ["-k", "not cuda-fused and not triton-fused"]
    for name in ("gate", "lora_linear", *shapes.OPS, "peers", "memcheck", "racecheck"):
        assert ends[name] == ["--without", "cuda fused,triton fused"]
    assert steps.without(on_a_gpu(tmp_path)["racecheck"], []) == ["--without", "cuda fused"]
    assert ends["build"] == ends["doctor"] == ends["train_step"] == []
    ends = {name: steps.without(step, ["triton nf4"]) for name, step in on_a_gpu(tmp_path).items()}
    assert ends["contract"] == ["-k", "not (triton and nf4)"] and ends["memcheck"] == ["--without", "triton nf4"]
    live = lora_linear.live_plans("cpu")
    assert set(live) - set(lora_linear.live_plans("cpu", ["torch augmented"])) == {("torch", "augmented")}


def test_a_benchmark_of_broken_kernels_is_left_out(tmp_path):
    found = on_a_gpu(tmp_path)
    broken = ["triton lora_experts", "triton lora_decode", "cuda fused"]
    left = {name: why for name, step in found.items() if (why := steps.no_figures(step, broken))}
    assert set(left) == {"lora_experts", "generate"} and "triton lora_decode" in left["generate"]
    assert set(steps.OP_OF) <= set(found)


def test_every_library_or_none_of_a_quantized_base(tmp_path, monkeypatch):
    def command():
        return on_a_gpu(tmp_path)["quantized"].command[-2:]

    real = importlib.util.find_spec
    for there in (None, steps):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n, there=there: there if n in steps.LIBRARIES else real(n)
        )
        assert (command() == ["--model", "nf4-op"]) == (there is None)


def test_files_that_a_step_leaves_out_exist(root):
    named = *steps.CPU_TESTS, *steps.MANY_KERNELS, *steps.CONTRACT
    assert all((root / "tests" / "ops" / name).is_file() for name in named)


def test_a_dry_run_builds_only_where_there_is_no_library(tmp_path, monkeypatch):
    """And then without CUDA kernels; whatever is there, also what does not load, is not replaced."""

    def build():
        return steps.steps(tmp_path, "stem", dry_run=True)[0]

    monkeypatch.setattr(steps.native, "load", lambda: True)
    assert "replaces none" in build().skip
    monkeypatch.setattr(steps.native, "load", lambda: False)
    monkeypatch.setattr(steps.native, "LIBRARY", tmp_path / "lib.so")
    assert not build().skip and build().extra == {"PEFT_FAST_CUDA_ARCHS": "none"}
    (tmp_path / "lib.so").touch()
    assert "replaces none" in build().skip


@pytest.mark.parametrize(
    "archs, native, sources, builds",
    [
        (("80", "90a"), ["90a"], "same", False),
        (("80",), ["90a"], "same", True),
        (("80", "90a"), ["90a"], "others", True),
        (("80", "90a"), None, "same", True),
    ],
)
def test_a_library_for_more_machines_is_not_replaced(tmp_path, monkeypatch, archs, native, sources, builds):
    def shown():
        if native is None:
            raise steps.build.cuda.NoCuda("nvidia-smi shows no GPU")
        return native

    monkeypatch.setattr(steps.native, "load", lambda: True)
    monkeypatch.setattr(steps.cuda, "archs", lambda: archs)
    monkeypatch.setattr(steps.build.cuda, "native", shown)
    monkeypatch.setattr(steps.build, "sources_hash", lambda: "same")
    monkeypatch.setattr(steps.build, "read_info", lambda: {"sources_hash": sources})
    assert bool(on_a_gpu(tmp_path)["build"].skip) is not builds


def test_an_interpreter_that_is_not_to_be_relied_on_is_left_out_of_a_dry_run(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_version", {"triton": "3.6.0", "numpy": "2.4.1"}.get)
    assert "triton 3.6.0" in machine.no_interpreter()
    found = {step.name: step for step in steps.steps(tmp_path, "stem", dry_run=True)}
    assert not any("TRITON_INTERPRET" in step.extra for step in found.values())
    assert "triton" not in found["contract"].command[-1]
    if importlib.util.find_spec("triton"):
        assert found["tune"].skip == machine.no_interpreter()
    monkeypatch.setattr(machine, "_version", {"triton": "3.7.0", "numpy": "2.4.1"}.get)
    assert machine.no_interpreter() == ""
    monkeypatch.setattr(machine, "_version", {"triton": machine.ABSENT, "numpy": "2.4.1"}.get)
    assert machine.no_interpreter() == "triton is not installed"


def test_what_is_not_there_is_skipped_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(steps.shutil, "which", lambda name: None)
    monkeypatch.setattr(steps, "_cuda_homes", list)
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    skipped = {name: step.skip for name, step in on_a_gpu(tmp_path).items() if step.skip}
    assert "compute-sanitizer is not installed" in skipped["memcheck"]
    assert "clone" in skipped["contract"] and set(skipped) >= {"memcheck", "racecheck", "contract", "ops", "peers"}


def test_the_plans_begin_with_what_is_large_and_measured(monkeypatch):
    seen = []
    monkeypatch.setattr(sanitize, "watched", lambda device, without: [("triton", "fused"), ("cuda", "fused")])
    monkeypatch.setattr(sanitize, "once", lambda *call: seen.append(call) or "")
    assert sanitize.main(["--plan", "cuda fused"]) == 0
    large = len(sanitize.LARGE)
    assert [call[4:9] for call in seen[:large]] == [tuple(size) for size in sanitize.LARGE]
    assert {call[2] for call in seen[:large]} == {lora_linear.DTYPES["bf16"]}
    assert {call[:2] for call in seen} == {("cuda", "fused")} and len(seen) == large + 2 * len(sanitize.CALLS)
    assert {call[-1] for call in seen} == {"lora_linear"}  # the only op that cuda has


def test_a_plan_is_tried_with_every_op_it_has(monkeypatch):
    seen = []
    monkeypatch.setattr(sanitize, "watched", lambda device, without: [("triton", "fused")])
    monkeypatch.setattr(sanitize, "once", lambda *call: seen.append(call) or "")
    assert sanitize.main(["--plan", "triton fused"]) == 0
    assert {call[-1] for call in seen} == {"lora_linear", *shapes.OPS}
    assert seen[len(sanitize.LARGE)][4:9] == sanitize.LARGE[-1] and seen[len(sanitize.LARGE)][-1] == "lora_group"


@pytest.mark.parametrize("op", [op for op in sanitize.SINGLE if has("triton", op)])
def test_an_op_with_one_plan_is_tried_by_itself(monkeypatch, op):
    """A kernel of its own that breaks the device leaves the plans of all other ops alone."""
    monkeypatch.setattr(sanitize, "live_plans", lambda device: [("triton", "fused"), ("torch", "accumulate")])
    assert ("triton", op) in sanitize.watched("cuda") and ("torch", op) not in sanitize.watched("cuda")
    assert ("triton", op) not in sanitize.watched("cuda", [f"triton {op}"])
    seen = []
    monkeypatch.setattr(sanitize, "once", lambda *call: seen.append(call) or "")
    assert sanitize.main(["--plan", f"triton {op}"]) == 0
    assert {call[-1] for call in seen} == {op} and seen[0][4:9] == sanitize.LARGE[0] and len(seen) == 3


@pytest.mark.parametrize("op", ["lora_embedding", *sanitize.SINGLE])
def test_the_calls_of_an_op_with_one_plan_run(op):
    for dtype in ("fp32", "bf16"):
        assert sanitize.once("torch", op, lora_linear.DTYPES[dtype], "cpu", *sanitize.CALLS[1], None, op) == ""


@pytest.mark.parametrize("backend, waits", [("triton", 1), ("cuda", 2)])
def test_a_plan_says_when_all_it_waits_for_is_the_device(monkeypatch, backend, waits):
    """With kernels that are compiled at their first use, not before that."""
    from peft_fast import ops

    real, said = ops.lora_linear, []
    monkeypatch.setattr(ops, "lora_linear", lambda *a, **o: real(*a, **{**o, "backend": "torch"}))
    import torch

    refusal = sanitize.once(backend, "accumulate", torch.bfloat16, "cpu", *sanitize.CALLS[0], said.append)
    assert refusal == "" and said == [sanitize.WAITS] * waits


def test_the_sanitizers_subset_runs_every_plan(capsys):
    assert sanitize.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("torch accumulate") == out.count("torch augmented") == 2 * (len(sanitize.CALLS) + len(shapes.OPS))
    assert sanitize.main(["--device", "cpu", "--minutes", "0"]) == 0
    assert "the time ended after 0 of" in capsys.readouterr().out
    assert "ran" in out and "Error" not in out
