"""`gpu.sh` end to end on the CPU, and the parts of it that a machine without a GPU can hold to account."""

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest

from peft_fast.benchmarks import gpu, harness, lora_linear, machine, plans, sanitize, shapes, steps, train_step, watch
from peft_fast.errors import DeviceError, SettingsError

HEADER = {"gpu": {"name": "NVIDIA H200", "capability": "9.0"}, "date": "2026-01-31 10:00 UTC"}
NAMES = list(steps.ENDS)
TRITON = not machine.no_interpreter()


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory, root):
    """One dry run for all tests here: (finished process, folder)."""
    out = tmp_path_factory.mktemp("gpu")
    environment = {**os.environ, "PEFT_FAST_GPU_DRY_RUN": "1", "OUT": str(out), "PYTHON": sys.executable}
    # the share of a step is that of a GPU: a slow CPU gets more than nine minutes
    command = ["bash", str(root / "benchmarks" / "gpu.sh"), "--minutes", "30"]
    return subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True), out


def test_dry_run_leaves_a_record_a_page_a_log_and_pictures(dry_run, root):
    done, out = dry_run
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    (path,) = out.glob("dry-run-*.json")
    record = harness.read(path)
    status = {step["name"]: step["status"] for step in record["steps"]}
    assert list(status) == NAMES and "failed" not in status.values()
    ran = {"plans", "doctor", "gate", "contract", "ops", "memcheck", "lora_linear", *shapes.OPS, "train_step"}
    assert {name for name, word in status.items() if word == "ok"} >= ran
    assert set(record["plans"]) and {found["verdict"] for found in record["plans"].values()} == {plans.RUNS}
    assert all(row["settings"]["gated_tokens"] == row["settings"]["M"] for row in record["runs"][0]["rows"])
    assert {target["verdict"] for target in record["targets"]} == {"not measured"}
    notes = {step["name"]: step["note"] for step in record["steps"]}
    assert all("passed" in notes[name] for name in ("contract", "ops")) and "unsloth" in notes["peers"]
    assert int(notes["contract"].split()[0]) >= (3 if TRITON else 1) * len(steps.A_FEW)
    assert [run["bench"] for run in record["runs"]] == ["lora_linear", *shapes.OPS, "train_step"]
    assert all(run["rows"] and not run["refused"] for run in record["runs"])
    assert path.with_suffix(".log").stat().st_size > 1000 and len(list(out.glob("*.png"))) == 5
    page = path.with_suffix(".md").read_text()
    assert "dry run" in page and "torch, augmented" in page and "| contract | ok |" in page
    assert not any(str(root) in text or str(out) in text for text in (path.read_text(), page))
    assert sorted(p.suffix for p in out.iterdir()) == [".json", ".log", ".md", *[".png"] * 5]


def test_dry_run_shows_steps_and_targets(dry_run):
    done, _ = dry_run
    assert "never slower than stock: layers" in done.stdout and "not measured" in done.stdout
    assert "missed" not in done.stdout and " met" not in done.stdout
    assert "== tune" in done.stdout
    if TRITON:
        assert "tuned: " in done.stdout and "nothing was kept" in done.stdout


@pytest.mark.skipif(not TRITON, reason=machine.no_interpreter())
def test_what_was_tuned_comes_back_with_the_record(dry_run):
    (path,) = dry_run[1].glob("*.json")
    tuning = harness.read(path)["tuning"]
    assert {"fused", "outer", "shrink", "lora_linear"} <= {entry["op"] for entry in tuning["entries"]}
    assert not any(entry["refused"] for entry in tuning["entries"])


def test_every_plan_is_measured_by_name(dry_run):
    (path,) = dry_run[1].glob("*.json")
    rows = harness.read(path)["runs"][0]["rows"]
    named = {"peft_fast torch accumulate", "peft_fast torch augmented"}
    named |= {"peft_fast triton accumulate", "peft_fast triton fused"} if TRITON else set()
    for row in rows:
        assert named <= set(row["providers"]) and named <= set(row["match"])
        assert not row.get("left_out")


def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(DeviceError, match="PEFT_FAST_GPU_DRY_RUN"):
        gpu.main(["--out", str(tmp_path / "nothing")])
    assert not (tmp_path / "nothing").exists()


def test_a_run_on_a_gpu_is_named_watched_and_never_lost(tmp_path, monkeypatch, capsys):
    """main() itself, with a torch that says it has a GPU and steps that write, fail and hang."""
    import torch

    rows = [{"title": "a row", "match": {}}]
    card = {"name": "NVIDIA H200", "major": 9, "minor": 0, "total_memory": 2**37, "uuid": "12-34"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("Card", (), card))
    asked = []
    monkeypatch.setattr(watch, "limits", lambda gpu: asked.append(gpu) or {"most_watts": 700.0})

    def three(out, stem, dry_run):
        part = json.dumps(
            {"bench": "lora_linear", "scale": "full", "rows": rows, "machine": machine.header(torch.device("cpu"))}
        )
        write = f"import pathlib; pathlib.Path({str(out / f'{stem}-lora_linear.json')!r}).write_text({part!r})"
        fails, hangs = "raise SystemExit('no luck')", "import time; time.sleep(60)"
        return [steps.Step(n, ["-c", c]) for n, c in (("doctor", fails), ("lora_linear", write), ("train_step", hangs))]

    monkeypatch.setattr(gpu, "steps", three)
    monkeypatch.setattr(gpu, "ENDS", {"doctor": 0.5, "lora_linear": 0.8, "train_step": 1.0})
    assert gpu.main(["--out", str(tmp_path), "--minutes", "0.1"]) == 1
    (path,) = tmp_path.glob("nvidia-h200-*.json")
    record = harness.read(path)
    assert asked == ["GPU-12-34"] and record["limits"] == {"most_watts": 700.0}
    assert [step["status"] for step in record["steps"]] == ["failed", "ok", "out of time"]
    assert [run["bench"] for run in record["runs"]] == ["lora_linear"]
    assert {target["verdict"] for target in record["targets"]} == {"not measured"}
    assert "not as it should be: doctor (failed), train_step (out of time)" in capsys.readouterr().out
    assert path.with_suffix(".md").read_text().startswith("# NVIDIA H200")


def run(tmp_path, code, limit=60.0, **extra):
    with (tmp_path / "log").open("w") as log:
        return gpu._run("step", ["-c", code], limit, log, extra)


def test_a_step_that_runs_out_of_time_is_ended_and_recorded(tmp_path):
    # with the process it started, as pytest's workers are
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    step = run(tmp_path, f"print('here', flush=True); {child}", 1.0)
    assert (step["rc"], step["status"]) == (124, "out of time") and step["seconds"] < 20
    assert "here" in (tmp_path / "log").read_text()


def test_a_step_that_fails_leaves_its_last_line(tmp_path):
    step = run(tmp_path, "raise SystemExit('no such thing')")
    assert (step["rc"], step["status"], step["note"]) == (1, "failed", "no such thing")


@pytest.mark.parametrize(
    "line, note",
    [
        ("===== 12 passed, 3 skipped in 4.56s =====", "12 passed, 3 skipped in 4.56s"),
        ("2 failed, 12 passed in 4.56s", "2 failed, 12 passed in 4.56s"),
        ("========= ERROR SUMMARY: 0 errors", "ERROR SUMMARY: 0 errors"),
        ("tuned: 3 of 9 choices not the shipped one", "tuned: 3 of 9 choices not the shipped one"),
    ],
)
def test_the_line_that_says_how_it_went_is_in_the_record(tmp_path, line, note):
    assert run(tmp_path, f"print({line!r}); print('after')")["note"] == note


def test_a_step_gets_its_environment(tmp_path):
    run(tmp_path, "import os; print(os.environ['PEFT_FAST_CUDA_ARCHS'])", PEFT_FAST_CUDA_ARCHS="90")
    assert (tmp_path / "log").read_text().endswith("\n90\n")


def test_the_record_is_named_after_the_card_and_the_day():
    assert gpu.name(HEADER, dry_run=False) == "nvidia-h200-2026-01-31"
    assert json.dumps(gpu.name(HEADER, dry_run=True)) == '"dry-run-2026-01-31"'


def on_a_gpu(tmp_path):
    return {step.name: step for step in steps.steps(tmp_path, "stem", dry_run=False)}


def test_commands_on_a_gpu(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.touch()
    monkeypatch.setattr(steps.shutil, "which", lambda name: str(tool) if name == "compute-sanitizer" else None)
    found = on_a_gpu(tmp_path)
    assert list(found) == NAMES and sorted(steps.ENDS.values()) == list(steps.ENDS.values())
    assert steps.ENDS["train_step"] < 1 and set(steps.TIMED) <= set(NAMES)
    assert found["build"].extra == {"PEFT_FAST_CUDA_ARCHS": "native"}
    for name in ("contract", "ops"):
        assert "--device cuda" in " ".join(found[name].command)
    assert "--ignore=tests/ops/test_random.py" in found["ops"].command
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
    live = lora_linear.live_plans("cpu")
    assert set(live) - set(lora_linear.live_plans("cpu", ["torch augmented"])) == {("torch", "augmented")}


def test_a_plan_that_breaks_its_process_breaks_nothing_else(tmp_path, monkeypatch, capsys):
    python = tmp_path / "python"
    acts = {"a": "kill -SEGV $$", "b": "echo ran", "c": "echo 'Error: a trap'; exit 1"}
    # compiling, before or after it said something, or waiting for kernels that were launched
    acts |= {"d": "exec sleep 60", "e": "echo ran; exec sleep 60", "f": f"echo {sanitize.WAITS}; exec sleep 60"}
    cases = "".join(f"  '{plan}') {act};;\n" for plan, act in acts.items())
    python.write_text(f'#!/bin/sh\nfor last; do :; done\ncase "$last" in\n{cases}esac\n')
    python.chmod(0o755)
    monkeypatch.setattr(plans.sys, "executable", str(python))
    found = plans.tried(list(acts), "cuda", 3.0)
    assert {plan: verdict for plan, (verdict, _) in found.items()} == {
        **dict.fromkeys("acf", plans.BROKEN),
        **dict.fromkeys("de", plans.UNKNOWN),
        "b": plans.RUNS,
    }
    assert (found["a"].why, found["c"].why, found["b"].why) == ("it said nothing", "Error: a trap", "")
    for plan, rc in (("c", 1), ("d", 0), ("b", 0)):
        monkeypatch.setattr(plans.sanitize, "watched", lambda device, plan=plan: [(plan,)])
        assert plans.main(["--minutes", "0.05", "--json", str(tmp_path / "x.json")]) == rc
        assert json.loads((tmp_path / "x.json").read_text()) == {plan: found[plan]._asdict()}
        assert found[plan].verdict in capsys.readouterr().out


def test_only_a_broken_plan_is_left_out(tmp_path, monkeypatch):
    """One that had no time to compile keeps its place in the contract, at the gate and among the figures."""
    ran = []

    def two(out, stem, dry_run):
        found = {name: plans.Tried(name, "why")._asdict() for name in (plans.RUNS, plans.BROKEN, plans.UNKNOWN)}
        (out / f"{stem}-plans.json").write_text(json.dumps(found))
        return [steps.Step("plans", []), steps.Step("lora_linear", [])]

    def ends(step, *rest):
        ran.append(step)
        return {"name": step.name, "status": "ok", "rc": 0, "seconds": 0.0, "note": ""}

    monkeypatch.setattr(gpu, "steps", two)
    monkeypatch.setattr(gpu, "_step", ends)
    gpu.main(["--dry-run", "--out", str(tmp_path)])
    assert ran[1].command == ["--without", plans.BROKEN]


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


@pytest.mark.parametrize("backend, waits", [("triton", 1), ("cuda", 2)])
def test_a_plan_says_when_all_it_waits_for_is_the_device(monkeypatch, backend, waits):
    """With kernels that are compiled at their first use, not before that."""
    from peft_fast import ops

    real, said = ops.lora_linear, []
    monkeypatch.setattr(ops, "lora_linear", lambda *a, **o: real(*a, **{**o, "backend": "torch"}))
    import torch

    refusal = sanitize.once(backend, "accumulate", torch.bfloat16, "cpu", *sanitize.CALLS[0], said.append)
    assert refusal == "" and said == [sanitize.WAITS] * waits


def test_files_that_a_step_leaves_out_exist(root):
    named = *steps.CPU_TESTS, *steps.MANY_KERNELS
    assert all((root / "tests" / "ops" / name).is_file() for name in named)


def test_where_time_is_short_racecheck_goes_first(tmp_path, capsys):
    assert steps.ENDS["racecheck"] == steps.ENDS["memcheck"]  # only what memcheck leaves
    begin = time.monotonic()
    with (tmp_path / "log").open("w") as log:
        found = [gpu._step(steps.Step(n, ["-c", ""]), 5.0, begin, log, watch.Watch(None)) for n in ("ops", "racecheck")]
    assert [step["status"] for step in found] == ["ok", "skipped"] and "no time" in found[1]["note"]


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


def test_a_python_without_torch_is_three_lines(root, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(root / "benchmarks" / "gpu.sh")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "which has no torch" in done.stderr
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["given", "needed", "do"]


def test_a_folder_that_cannot_be_written_is_three_lines(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError) as caught:
        gpu.main(["--dry-run", "--out", str(tmp_path / "file")])
    assert len(str(caught.value).splitlines()) == 3


def test_a_step_may_say_how_far_it_came(tmp_path):
    """pytest prints its summary on Ctrl-C, a benchmark keeps its rows."""
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('7 passed in 1.00s')"
    step = run(tmp_path, code, 2.0)
    assert (step["status"], step["note"]) == ("out of time", "7 passed in 1.00s")


@pytest.mark.parametrize(
    "statuses, rc, words",
    [
        (["ok", "skipped"], 0, "wrote stem.json"),
        (["ok", "failed", "out of time"], 1, "not as it should be: b (failed), c (out of time)"),
    ],
)
def test_the_exit_status_is_that_of_the_worst_step(capsys, statuses, rc, words):
    went = [{"name": n, "status": s, "seconds": 1.0, "note": ""} for n, s in zip("abc", statuses, strict=False)]
    assert gpu._summary({"steps": went, "runs": []}, "stem") == rc
    assert words in capsys.readouterr().out


def test_half_a_result_is_collected(tmp_path):
    record = {"runs": []}
    gpu._collect(tmp_path / "absent.json", "lora_linear", record)
    (tmp_path / "broken.json").write_text("{")
    gpu._collect(tmp_path / "broken.json", "lora_linear", record)
    (tmp_path / "part.json").write_text('{"rows": []}')
    gpu._collect(tmp_path / "part.json", "lora_linear", record)
    assert record == {"runs": [{"rows": []}]} and not (tmp_path / "part.json").exists()


def test_the_clocks_are_watched_by_nvidia_smi(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\necho '1980, 700.00'\nfor mhz in 1755 1980 1900; do echo $mhz, 500.5, [N/A]; done\nsleep 60\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    begin = time.monotonic()
    with watch.Watch("GPU-1") as clocks:
        while len(clocks.samples) < 4 and time.monotonic() < begin + 30:
            time.sleep(0.01)
    found = clocks.between(begin, time.monotonic())
    assert found == {"sm_mhz": [1755, 1940.0, 1980], "watts": [500.5, 500.5, 700.0]}
    assert clocks.between(begin - 2, begin - 1) == {} and clocks.process.poll() is not None
    smi.write_text("#!/bin/sh\necho '1980, 700.00'\n")
    assert watch.limits("GPU-1") == {"most_sm_mhz": 1980, "most_watts": 700}
    monkeypatch.setenv("PATH", "")
    with watch.Watch("GPU-1") as clocks:
        assert clocks.between(0, time.monotonic()) == watch.limits("GPU-1") == watch.limits(None) == {}


def test_the_headline_comes_first_and_every_promise_has_a_row():
    cases = [case.settings for case in lora_linear.cases(harness.Options(device="cuda"))]
    M, K, N = shapes.GPU_SQUARE
    assert [(c["M"], c["K"], c["N"], c["r"], c["p"]) for c in cases[:2]] == [(M, K, N, 16, 0.05), (M, K, N, 16, 0.0)]
    assert {c["M"] for c in cases} >= {512, 1024, 2048, 4096, 8192, 16384}
    assert {c["r"] for c in cases} == {8, 16, 64, 256} and {c["p"] for c in cases} == {0.0, 0.05}
    llama = {(4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024)}
    assert {(c["K"], c["N"]) for c in cases} >= llama | {(3584, 18944), (768, 3072)}
    with_dropout = [c["p"] == 0.05 for c in cases[2:]]
    assert with_dropout == sorted(with_dropout, reverse=True)


def test_a_model_has_as_many_layers_as_fit():
    model = train_step.GPU_MODELS["llama-3-8b-like"]
    layers = [train_step.fitting(model, gib * 2**30).layers for gib in (2, 24, 80, 141)]
    assert layers[0] == 1 and layers == sorted(layers) and layers[-1] == model.layers
    bert = train_step.GPU_MODELS["bert-base"]
    assert train_step.fitting(bert, 80 * 2**30) == bert


def test_a_large_model_is_drawn_where_it_is_used_and_its_weights_are_shared():
    import torch

    model = train_step.scaled(train_step.GPU_MODELS["llama-3-8b-like"], "tiny")
    base = train_step.placed(model, torch.bfloat16, torch.device("meta"))
    weights = list(base.parameters())
    assert {(w.dtype, w.device.type) for w in weights} == {(torch.bfloat16, "meta")}
    assert torch.get_default_dtype() == torch.float32
    assert all(a is b for a, b in zip(train_step._copy(base).parameters(), weights, strict=True))
    on_cpu = train_step.placed(model, torch.bfloat16, torch.device("cpu"))
    assert not {id(w) for w in train_step._copy(on_cpu).parameters()} & {id(w) for w in on_cpu.parameters()}


def test_too_large_a_model_is_tried_with_half_the_layers():
    cases = train_step.cases(harness.Options(device="cuda", models=("llama-3-8b-like",)))
    assert [case.settings["p"] for case in cases] == [0.05, 0.0]
    case, layers = cases[0], []
    while case:
        layers.append(case.settings["layers"])
        case = case.smaller
    assert layers == [8, 4, 2, 1]
    assert train_step.cases(harness.Options())[0].smaller is None


def test_the_sanitizers_subset_runs_every_plan(capsys):
    assert sanitize.main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.count("torch accumulate") == out.count("torch augmented") == 2 * (len(sanitize.CALLS) + len(shapes.OPS))
    assert sanitize.main(["--device", "cpu", "--minutes", "0"]) == 0
    assert "the time ended after 0 of" in capsys.readouterr().out
    assert "ran" in out and "Error" not in out
