"""README: its tables are what the results say, its Python runs, its commands exist."""

import contextlib
import re
import shlex

import pytest

from peft_fast.benchmarks import harness, kinds, table
from peft_fast.cli import app
from peft_fast.errors import DataError


@pytest.fixture(scope="module")
def readme(root=table.ROOT):
    return (root / "README.md").read_text()


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_tables_are_generated_from_the_committed_results():
    assert table.update(check=True), "run `python -m peft_fast bench table`"


def test_first_screen_has_the_line_the_table_and_the_picture(readme):
    first = readme.partition("\n## ")[0]
    assert "model = peft_fast.accelerate(model)" in first
    assert "<!-- bench:start -->" in first and "<!-- bench:end -->" in first
    assert "benchmarks/results/demo.png" in first


def test_python_blocks_run_in_order(readme, monkeypatch, tmp_path):
    import transformers

    def download(name, dtype):
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
        )
        return transformers.LlamaForCausalLM(config).to(getattr(__import__("torch"), dtype))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", download)
    from peft_fast import disable

    names = {"__name__": "__main__"}
    try:
        for block in blocks(readme, "python"):
            exec(compile(block, "README.md", "exec"), names)
    finally:
        disable()
    assert "model" in names


def test_commands_exist(readme, root, capsys):
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    lines = [line.partition("#")[0].strip() for block in blocks(readme, "sh") for line in block.splitlines()]
    for words in map(shlex.split, filter(None, lines)):
        words = [word for word in words if "=" not in word or word.startswith("-")]
        if words[0] == "make":
            assert words[1] in targets
        elif words[:3] == ["python", "-m", "peft_fast"]:
            assert words[3] in app.COMMANDS
            if words[3] == "bench":
                with pytest.raises(SystemExit):
                    app.main(["bench", "--help"])
                known = capsys.readouterr().out
                assert all(word in known for word in words[4:] if word.startswith("--"))
        elif words[0] == "peft-fast":
            assert words[1] in app.COMMANDS
            with contextlib.suppress(SystemExit):  # argparse's way to end
                app.main([words[1], "--help"])
            known = capsys.readouterr().out
            assert all(word in known for word in words[2:] if word.startswith("--"))
        else:
            assert words[0] in ("pip", "git", "cd", "python", "torchrun", "bash")


def test_every_setting_is_in_the_table(readme):
    from peft_fast import settings

    variables = re.findall(r"PEFT_FAST_[A-Z_]+", settings.__doc__)
    assert len(set(variables)) > 5 and all(f"`{variable}`" in readme for variable in variables)


def document(ratio):
    figures = {"ms": 1.0, "ratio": [ratio, ratio, ratio], "speedup": [2 / ratio, 2 / ratio, 2 / ratio]}
    stock = {"ms": 2.0, "ratio": [2.0, 2.0, 2.0], "speedup": [1.0, 1.0, 1.0]}
    phases, stocks = ({"forward": f, "backward": f, "total": f} for f in (figures, stock))
    row = {
        "settings": {
            "model": "toy",
            "dtype": "bf16",
            "p": 0.05,
            "M": 1,
            "K": 2,
            "N": 3,
            "r": 4,
            "threads": 1,
        },
        "aa": {"ratio": [1.0, 1.0, 1.0], "ok": ratio < 1.5},
        "providers": {"stock": stocks, "peft_fast": phases},
        "bytes": {"stock": {"saved": 3 * 2**20, "peak": 8 * 2**20}, "peft_fast": {"saved": 2**20, "peak": 2**20}},
    }
    packages = {"torch": "2", "peft": "0", "transformers": "5"}
    machine = {
        "cpu": "Toy",
        "cores": 1,
        "flags": [],
        "torch_isa": "AVX2",
        "date": "2026-01-31",
        "packages": packages,
    }
    return {"schema": harness.SCHEMA, "scale": "full", "machine": machine, "rows": [row], "refused": []}


def test_render_rewrites_only_between_the_markers(tmp_path):
    text = "a\n<!-- bench:start -->\nold\n<!-- bench:end -->\nb\n"
    text += "".join(f"<!-- {n}:start --><!-- {n}:end -->" for n in table.SECTIONS if n not in ("bench", "layer"))
    text += "<!-- layer:start --><!-- layer:end -->c"
    for bench in ("train_step", "lora_linear"):
        harness.write(tmp_path / f"{bench}.json", {**document(1.25), "bench": bench})
    harness.write(tmp_path / "quick.json", {**document(9.99), "bench": "train_step", "scale": "quick"})
    new = table.render(text, table.documents(tmp_path))
    assert new.startswith("a\n<!-- bench:start -->\n| model") and new.endswith("<!-- layer:end -->c")
    assert "**1.60×** [1.60, 1.60] | 3 → 1 |" in new and "**1.25 / 1.25**" in new and "old" not in new
    assert "9.99" not in new and "†" not in new
    assert table.render(new, table.documents(tmp_path)) == new


def test_runs_of_one_machine_and_day_share_a_table():
    runs = [{**document(ratio), "bench": "lora_linear"} for ratio in (1.25, 1.5)]
    assert table.lora_linear(runs).count("<sub>") == 1 and table.lora_linear(runs).count("\n| 1 × 2 × 3") == 2
    runs[1]["machine"]["date"] = "2026-02-01"
    assert table.lora_linear(runs).count("<sub>") == 2


def test_the_summary_takes_the_median_and_the_extremes_of_a_machine():
    # the last is not of a quiet machine
    runs = [{**document(ratio), "bench": "lora_linear"} for ratio in (1.25, 1.0, 1.4, 2.0)]
    runs.append({**document(1.25), "bench": "train_step"})
    lines = table.summarized(runs).splitlines()
    wanted = "| a linear layer | bf16 | 0.05 | 3 | 2.00 | **1.25** | **1.60×** (1.43–2.00) | 12 % |"
    assert lines[2:] == [wanted, "", "<sub>Toy (1 cores, AVX2).</sub>"], "the usual steps have a table of their own"
    runs[-1]["rows"][0]["settings"]["model"] = "llama-dora"
    runs[0]["rows"][0]["providers"].pop("stock")
    runs[1]["machine"]["cpu"] = "Other"
    lines = table.summarized(runs).splitlines()
    assert sum(line.startswith("| a linear layer | bf16 | 0.05 | 1 |") for line in lines) == 2
    assert sum(line.startswith("| training steps") for line in lines) == 1
    assert lines[-1] != lines[4] and sum(line.startswith("<sub>") for line in lines) == 2


APART = {
    "dora_linear": ("llama-like", "llama-like-token", "embedding-token", "embedding"),
    "lora_mixed": ("llama-like", "llama-like-ranks"),
    "generate": ("llama-1024", "llama-1024-dora", "llama-1024-nf4", "llama-1024-merged", "llama-1024-dora-merged"),
    "quantized": ("nf4", "nf4-token", "nf4-dense"),
}


def of_model(bench, model):
    """A document of one row."""
    run = {**document(1.25), "bench": bench}
    row = run["rows"][0] | {"title": f"a row of {model}", "baseline": "frozen"}
    row["settings"] = row["settings"] | {"model": model, "adapters": 16, "rows": 72}
    return {**run, "rows": [row]}


@pytest.mark.parametrize("bench", APART)
def test_rows_of_another_question_have_a_table_of_their_own(bench):
    first, *others = APART[bench]
    alone = table.single(bench, [of_model(bench, first)])
    assert "###" not in alone and f"a row of {first}" in alone
    text = table.single(bench, [of_model(bench, model) for model in (first, *others)])
    assert text.startswith(alone) and all(f"| a row of {model} |" in text for model in others)
    assert text.count("### ") == len(kinds.APART[bench]) == text.count("<sub>") - 1
    without = table.single(bench, [of_model(bench, others[0])])
    assert without.startswith("_Nothing measured yet") and without.count("### ") == 1
    runs = [of_model(bench, model) for model in (first, *others)]
    found = {line.split("|")[1] for line in table.summarized(runs).splitlines() if "bf16" in line}
    assert len(found) == len({kinds.kind(bench, run["rows"][0]["settings"]) for run in runs})


def test_a_noisy_row_is_marked():
    assert "| toy † |" in table.train_step([{**document(1.75), "bench": "train_step"}])


def test_a_gpu_record_gives_its_runs(tmp_path):
    runs = [{**document(1.25), "bench": "lora_linear"}]
    harness.write(tmp_path / "gpu.json", {"schema": harness.SCHEMA, "bench": "gpu", "runs": runs})
    assert table.documents(tmp_path) == runs


def test_missing_markers_and_missing_readme_are_errors(tmp_path):
    with pytest.raises(DataError, match="bench:start"):
        table.render("no markers", [])
    with pytest.raises(DataError, match="clone"):
        table.update(tmp_path / "README.md")
