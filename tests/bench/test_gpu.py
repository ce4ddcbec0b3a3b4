"""`gpu.sh` without a GPU: its record, its clocks, and steps that fail, hang or break; the models that fit a card."""

import json
import os
import subprocess
import sys
import time

import pytest

from peft_fast.benchmarks import gpu, harness, lora_linear, machine, plans, sanitize, shapes, steps, train_step, watch
from peft_fast.errors import DeviceError, SettingsError

HEADER = {"gpu": {"name": "NVIDIA H200", "capability": "9.0"}, "date": "2026-01-31 10:00 UTC"}


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


def test_a_plan_in_a_process_of_its_own():
    """The real command: a plan that is there runs, and words that it does not know are broken."""
    found = plans.tried(["torch augmented", "--nonsense"], "cpu", 120.0)
    assert found["torch augmented"] == plans.Tried(plans.RUNS, "")
    assert found["--nonsense"].verdict == plans.BROKEN and "error" in found["--nonsense"].why


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


def test_where_time_is_short_racecheck_goes_first(tmp_path, capsys):
    assert steps.ENDS["racecheck"] == steps.ENDS["memcheck"]  # only what memcheck leaves
    begin = time.monotonic()
    with (tmp_path / "log").open("w") as log:
        found = [gpu._step(steps.Step(n, ["-c", ""]), 5.0, begin, log, watch.Watch(None)) for n in ("ops", "racecheck")]
    assert [step["status"] for step in found] == ["ok", "skipped"] and "no time" in found[1]["note"]


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
