"""A GPU's record: its targets judged, its page, and its place among README's results."""

import pytest

from peft_fast.benchmarks import gpu, gpu_page, harness, plots, shapes, table, targets

MACHINE = {
    **{"cpu": "Toy", "cores": 1, "flags": [], "torch_isa": "AVX2", "date": "2026-01-31"},
    "gpu": {"name": "NVIDIA H200"},
    "packages": {"torch": "2", "peft": "0", "transformers": "5"},
}


def figures(ratio, ms=1.0):
    one = {"ms": ms, "cpu_ms": ms, "ratio": [ratio] * 3, "speedup": [1.0] * 3}
    return {"forward": one, "backward": one, "total": one}


def layer_row(ours, stock=2.0, **settings):
    shape = dict(zip("MKN", shapes.GPU_SQUARE, strict=True))
    return {
        "settings": {**shape, "r": 16, "p": 0.05, "dtype": "bf16", "threads": 1, "model": "square", **settings},
        "aa": {"ratio": [1.0] * 3, "ok": True},
        "providers": {"stock": figures(stock, stock), "peft_fast": figures(ours, ours)},
        "bytes": {},
    }


def document(bench, *rows):
    return {"schema": harness.SCHEMA, "bench": bench, "scale": "full", "rows": list(rows), "machine": MACHINE}


@pytest.mark.parametrize(
    "rows, words",
    [
        ([], "?? ??? ??? ????? ?? ?"),
        ([layer_row(1.05)], "++ +?? +?? ????? ?? +"),
        ([layer_row(1.05), layer_row(1.08, p=0.0)], "+- -?? +?? ????? ?? +"),
        ([layer_row(1.05), layer_row(1.2, M=512)], "++ -?? +?? ????? ?? +"),
        ([layer_row(1.05), layer_row(1.2, r=256)], "++ +?? +?? ????? ?? +"),
        ([layer_row(1.2, stock=1.1)], "-- -?? -?? ????? ?? -"),
    ],
)
def test_targets(rows, words):
    word = {"+": "met", "-": "missed", "?": "not measured"}
    found = [target.word for target in targets.judge([document("lora_linear", *rows)])]
    assert found == [word[letter] for letter in words.replace(" ", "")]


@pytest.mark.parametrize("alone, words", [(1.2, "++"), (1.1, "+-")])
def test_targets_of_joined_layers(alone, words):
    """A Llama layer, and an op over siblings, beside the same layer by layer."""
    rows = {}
    for bench, settings in (("train_step", {"model": shapes.LAYER}), ("lora_group", {"shape": "8 × 8 → 4 + 4"})):
        row = layer_row(1.15, stock=1.3)
        row["providers"]["layer by layer"] = figures(alone, alone)
        row["settings"] = {"model": "toy", "p": 0.05, **settings}
        rows[bench] = document(bench, row)
    found = {target.name: target for target in targets.judge(list(rows.values()))}
    assert found["adapted / frozen, a Llama-3-8B layer"].word == "missed"
    assert found["adapted / frozen, a whole model forward and backward"].word == "not measured"
    assert found["never slower than stock: groups, blocks, embeddings"].word == "met"
    for name in ("groups and blocks", "training steps"):
        assert (found[f"never slower than layer by layer: {name}"].word == "met") == (words == "++")
    assert "8 × 8 → 4 + 4 p=0.05" in found["never slower than layer by layer: groups and blocks"].found


ALONE = {
    "lora_experts": "times stock's speed: a mixture's experts",
    "dora_linear": "times stock's speed: DoRA's layers",
    "lora_mixed": "times stock's speed: 16 adapters in a batch",
    "generate": "generation with adapters on / merged",
}


@pytest.mark.parametrize("ours, peak, met", [(0.5, 40, True), (1.2, 60, False)])
def test_targets_of_ops_with_one_plan(ours, peak, met):
    """Each against what was asked of it: four times or three times stock's speed, half its memory, merged's time."""
    runs = []
    for bench in ALONE:
        row = layer_row(ours, stock=2.0)
        row |= {"settings": {"model": "toy", "shape": "a shape", "p": 0.0}, "title": f"a row of {bench}"}
        row["baseline"] = "frozen"
        row["bytes"] = {name: {"saved": 0, "peak": size} for name, size in (("stock", 100), ("peft_fast", peak))}
        runs.append(document(bench, row))
    found = {target.name: target for target in targets.judge(runs)}
    share = found["peak memory / stock's: a mixture's experts"]
    assert {found[name].met for name in ALONE.values()} == {share.met} == {met}
    assert "a shape" in share.found and found[ALONE["dora_linear"]].need == ">= 3.00"
    page = table.single("lora_mixed", runs)
    assert f"**{ours:.2f}**" in page and "speed-up over stock" in page and page.count("\n| ") == 2


def test_rows_with_a_table_of_their_own_have_no_target():
    models = {"dora_linear": "embedding", "lora_mixed": "llama-like-ranks", "generate": "llama-1024-dora"}
    runs = []
    for bench, model in models.items():
        row = layer_row(9.0, model=model) | {"title": f"a row of {model}", "baseline": "frozen"}
        runs.append(document(bench, row))
    found = {target.name: target for target in targets.judge(runs)}
    assert {found[ALONE[bench]].word for bench in models} == {"not measured"}
    page = gpu_page.page({"machine": MACHINE, "scale": "full", "targets": [], "steps": [], "runs": runs})
    assert page.count("\n### ") == 3 and all(f"| a row of {model} |" in page for model in models.values())


def test_toy_sizes_measure_nothing():
    run = {**document("lora_linear", layer_row(1.2, stock=1.1)), "scale": "tiny"}
    assert {target.word for target in targets.judge([run])} == {"not measured"}


def test_a_target_names_the_worst_row():
    step = {**layer_row(1.3, stock=1.2), "settings": {"model": "llama-3-8b-like", "p": 0.0}}
    # the optimizer's update is not the layers' work
    phases = {name: {"forward": {"ms": a}, "backward": {"ms": b}} for name, a, b in (("frozen", 4, 6), ("ours", 4, 7))}
    step["providers"]["peft_fast"] |= {**phases["ours"], "update": {"ms": 5.0}}
    step["providers"]["frozen"] = phases["frozen"]
    found = targets.judge([document("lora_linear", layer_row(1.04), layer_row(1.3)), document("train_step", step)])
    assert found[0].found == "1 of 2; worst 1.300 (peft_fast, 8192×4096×4096 r=16 p=0.05)"
    assert found[3].found == "worst 1.100 (peft_fast, llama-3-8b-like p=0)" and found[3].word == "missed"
    assert found[7].found == "0 of 1; least 0.923 (peft_fast, llama-3-8b-like p=0)"


def test_a_record_does_not_disturb_bench_table(tmp_path):
    run = document("lora_linear", layer_row(1.05))
    steps = [{"name": "peers", "status": "skipped", "rc": 0, "seconds": 0.0, "note": "a | b"}]
    record = {"schema": harness.SCHEMA, "bench": "gpu", "scale": "full", "machine": MACHINE, "steps": steps, "runs": []}
    for runs in ([], [run], [{**run, "rows": []}]):
        gpu._write(tmp_path, "nvidia-h200-2026-01-31", {**record, "runs": runs})
        found = table.documents(tmp_path)
        assert found == [r for r in runs if r["rows"]]
        markers = "".join(f"<!-- {name}:start --><!-- {name}:end -->" for name in table.SECTIONS)
        text = table.render(markers, found)
        assert table.render(text, found) == text
    readme = tmp_path / "README.md"
    gpu._write(tmp_path, "nvidia-h200-2026-01-31", {**record, "runs": [run]})
    readme.write_text(markers)
    assert not table.update(readme, tmp_path, check=True) and not table.update(readme, tmp_path)
    assert table.update(readme, tmp_path, check=True) and "NVIDIA H200" in readme.read_text()
    page = (tmp_path / "nvidia-h200-2026-01-31.md").read_text()
    assert page.startswith("# NVIDIA H200") and "| peers | skipped | 0 | a / b |" in page and "1.05" in page


def test_a_page_says_what_the_clocks_did_and_what_has_no_figures():
    row = {**layer_row(1.05), "title": "a row", "starved": ["stock"]}
    row["left_out"] = {"theirs": "Error: no", "peft_fast x": "y"}
    run = {**document("lora_linear", row), "skipped": ["another"], "kernel_failures": ["a kernel failed"]}
    run["refused"] = [{"title": "a row: peft_fast x", "reason": "given: y\nneeded: z"}]
    clocks = {"sm_mhz": [1755.0, 1980.0, 1980.0], "watts": [200.0, 650.5, 699.0]}
    done = {"name": "lora_linear", "status": "ok", "rc": 0, "seconds": 9.0, "note": "", "clocks": clocks}
    record = {"machine": MACHINE, "scale": "full", "targets": [], "steps": [done], "limits": {"most_watts": 700.0}}
    page = gpu_page.page({**record, "runs": [run]})
    assert "clocks during lora_linear: 1980 MHz (1755–1980), 650.5 W (200–699 of 700)" in page
    for line in (
        "- no time for or no room: another",
        "- refused: a row: peft_fast x: given: y needed: z",
        "- a kernel failed",
        "- a row: without theirs: Error: no",
        "- a row: the GPU waited for the host in stock",
    ):
        assert line in page.splitlines()


def test_a_row_without_stock_or_ours_is_still_a_row():
    """On a GPU each provider is refused alone."""
    row = {**layer_row(1.05), "title": "a row", "bytes": {"stock": {"saved": 2**20}}}
    row["providers"] = {"stock": row["providers"]["stock"]}
    step = {**row, "settings": {"model": "llama-3-8b-like", "layers": 8, "dtype": "bf16", "p": 0.0}}
    found = [document("lora_linear", row), document("train_step", step)]
    assert {target.word for target in targets.judge(found)} == {"not measured"}
    assert "| llama-3-8b-like, 8 layers | bf16 | 0 | 2.00 |  | 1 |" in table.train_step(found)


@pytest.mark.parametrize("rows", [1, 40])
def test_pictures_of_a_record_are_drawn_where_there_is_matplotlib(tmp_path, rows):
    one = {**layer_row(1.05), "title": "a row", "baseline": "frozen"}
    one["providers"]["a new plan"] = figures(9.0)  # without a colour of its own, and off the axis
    record = {"schema": harness.SCHEMA, "runs": [document("lora_linear", *[one] * rows), document("train_step", one)]}
    harness.write(tmp_path / "gpu.json", record)
    assert plots.main([str(tmp_path / "gpu.json")]) == 0
    pictures = sorted(tmp_path.glob("*.png"))
    assert [p.name for p in pictures] == ["gpu-lora_linear.png", "gpu-train_step.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
