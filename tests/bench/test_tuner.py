"""The tuner: what it times, what it refuses, what it writes; real kernels in Triton's interpreter."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import types
from typing import NamedTuple

import pytest
import torch

from peft_fast import settings
from peft_fast.benchmarks import tuner
from peft_fast.cli import tune
from peft_fast.errors import DeviceError, SettingsError, UnsupportedError

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")


class Tile(NamedTuple):
    """The fields that tuner.label reads."""

    BM: int
    BN: int
    BK: int
    num_warps: int = 4
    num_stages: int = 3
    persistent: int = 0
    tma: int = 0


A, B, C = Tile(128, 256, 64), Tile(64, 0, 128), Tile(32, 0, 128, tma=1)


def best(times, results=None, calls=2):
    """The choice among A, B, C when tile t takes times[t] seconds and computes results[t]."""

    def call(override):
        (tile,) = override.values()
        value = (results or {}).get(tile, 1.0)
        if isinstance(value, Exception):
            raise value
        clock.seconds = times[tile]
        return torch.full((3,), value)

    clock = types.SimpleNamespace(seconds=0.0)

    def measure(fn):
        fn()
        return clock.seconds

    return tuner._best("shrink", "r16", "bf16", [A, B, C], [call] * calls, measure)


def test_the_fastest_tile_wins():
    choice = best({A: 3.0, B: 1.5, C: 2.0})
    assert (choice.shipped, choice.chosen, choice.gain, choice.tried) == (A, B, 2.0, 3) and choice.changed
    assert choice.entry() == {
        "op": "shrink",
        "shape": "r16",
        "dtype": "bf16",
        "tile": {"BM": 64, "BN": 0, "BK": 128, "num_warps": 4, "num_stages": 3, "persistent": 0, "tma": 0},
        "gain": 2.0,
    }


def test_a_gain_that_may_be_noise_changes_nothing():
    choice = best({A: 1.0, B: 0.99, C: 1.5})
    assert choice.chosen == A and not choice.changed and choice.gain == 1.0


def test_a_tile_that_does_not_run_is_no_candidate():
    choice = best({A: 2.0, B: 1.0, C: 1.5}, {B: RuntimeError("out of resources")})
    assert choice.chosen == C and choice.refused == ("64×128 w4 s3: RuntimeError",)


@pytest.mark.parametrize("value", [1.01, math.nan, 0.0])
def test_a_tile_that_computes_something_else_is_no_candidate(value):
    choice = best({A: 2.0, B: 1.0, C: 1.9}, {B: value})
    assert choice.chosen == C and "other results" in choice.refused[0]


def test_results_may_differ_by_the_order_of_summation():
    out = torch.randn(64, 64).bfloat16()
    assert tuner._same(out, (out.float() * (1 + 1e-3)).bfloat16())
    assert not tuner._same((out, out), (out, out * 1.1)) and tuner._same((out, out), (out, out))


def test_labels():
    assert [tuner.label(t) for t in (A, C, "fused")] == ["128×256×64 w4 s3", "32×128 w4 s3 tma", "fused"]


# ---- the command


@pytest.mark.parametrize(
    "args, words",
    [
        (["--shapes", "4096"], "--shapes '4096,4096;4096,14336'"),
        (["--shapes", "0,16"], "pairs K,N"),
        (["--shapes", ";"], "pairs K,N"),
        (["--rank", "0"], "from 1 to 256"),
        (["--dropout", "1"], "from 0 to below 1"),
        (["--dropout", "x"], "--dropout x"),
        (["--dtype", "int8"], "bf16, fp16, fp32"),
        (["--minutes", "0"], "more than 0 minutes"),
        (["--tokens", "0"], "at least 1 token"),
    ],
)
def test_bad_input(args, words):
    with pytest.raises(SettingsError) as caught:
        tune.app(args)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["given", "needed", "do"] and words in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(DeviceError) as caught:
        tune.app([])
    assert len(str(caught.value).splitlines()) == 3 and "torch has no GPU" in str(caught.value)


def test_without_triton_it_says_so(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else real(name))
    with pytest.raises(UnsupportedError, match="pip install 'triton>=3.6'"):
        tune.app(["--dry-run"])


@needs_triton
def test_the_whole_path_in_the_interpreter(root, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PEFT_FAST_CACHE": str(tmp_path), "COLUMNS": "80"}
    command = [sys.executable, "-m", "peft_fast", "tune", "--dry-run", "--minutes", "3", "--dropout", "0.1"]
    done = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("fused", "shrink", "outer", "expand", "plan", "tuned: ", "nothing was kept"):
        assert word in done.stdout
    assert "refused" not in done.stdout and not any(tmp_path.iterdir())
    assert max(map(len, done.stdout.splitlines())) <= 80


@needs_triton
def test_a_dry_run_needs_the_interpreter():
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this run is in the interpreter")
    with pytest.raises(UnsupportedError, match="TRITON_INTERPRET=1"):
        tune.app(["--dry-run"])


MACHINE = {"gpu": "NVIDIA H200", "capability": "9.0", "triton": "3.6.0", "torch": "2.11.0"}


@needs_triton
def test_labels_tell_candidates_apart():
    from peft_fast.kernels import tiles

    shapes = ("r16", "r16-drop", "r64", "r256-drop")
    for op, shape, dtype, arch in itertools.product(tiles.OPS, shapes, ("bf16", "fp32"), (80, 90, 100, "gfx942")):
        found = dict.fromkeys(tiles.candidates(op, shape, dtype, arch))
        assert len({tuner.label(tile) for tile in found}) == len(found)


@needs_triton
def test_the_file_is_what_the_backend_reads(tmp_path, monkeypatch):
    from peft_fast.backends.triton import tuning
    from peft_fast.kernels import tiles

    monkeypatch.setattr(tune, "_gpu", lambda device: MACHINE)
    first, second = tiles.candidates("outer", "r16", "bf16", 90)[:2]
    tile = tuner.Choice("outer", "r16", "bf16", first, second, 1.5, 4)
    plan = tuner.Choice("lora_linear", "64x64", "bf16", "accumulate", "fused", 1.2, 2)
    with settings.override(cache_dir=tmp_path):
        path = tune._write(torch.device("cuda"), [tile])
        assert tune._write(torch.device("cuda"), [plan]) == path == tuning.path("NVIDIA H200")
    document = json.loads(path.read_text())
    assert {key: document[key] for key in ("schema", *MACHINE)} == {"schema": tuning.SCHEMA, **MACHINE}
    read = tuning.checked(document["entries"], 90)
    assert read == {("outer", "r16", "bf16"): second, ("lora_linear", "64x64", "bf16"): "fused"}
    assert read == tuner.overrides([tile, plan])
    assert [p.name for p in path.parent.iterdir()] == ["nvidia-h200.json"]


@needs_triton
@pytest.mark.parametrize("text", ["{", "[]", '{"entries": 3}', '{"schema": "old", "entries": []}'])
def test_a_damaged_or_foreign_file_is_replaced(tmp_path, monkeypatch, text):
    from peft_fast.backends.triton import tuning

    monkeypatch.setattr(tune, "_gpu", lambda device: MACHINE)
    with settings.override(cache_dir=tmp_path):
        path = tuning.path("NVIDIA H200")
        path.parent.mkdir(parents=True)
        path.write_text(text)
        tune._write(torch.device("cuda"), [])
    assert json.loads(path.read_text())["entries"] == []
