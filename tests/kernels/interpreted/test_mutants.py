"""Faults planted in the source of the kernels: the contract rejects each of them."""

import importlib
import sys
from typing import NamedTuple

import pytest

from peft_fast.backends.triton import lora_linear as backend
from tests import numerics
from tests.cases import Case
from tests.numerics import Provider

SUBJECT = Case("mutated", lead=(67,), K=230, N=140, ranks=(16, 40), p=(0.3, 0.5), scaling=(2.0, 0.5), bias=True)


class Mutant(NamedTuple):
    """``old`` in a file of kernels/ becomes ``new``, and at least these outputs are rejected."""

    file: str
    old: str
    new: str
    outputs: tuple[str, ...]
    plan: str = "accumulate"


MUTANTS = {
    "none": Mutant("skinny", "acc", "acc", ()),
    "mask shifted by 8 columns": Mutant("device", "first // 8 +", "first // 8 + 1 +", ("y", "dx", "dA0")),
    "no mask on dx": Mutant("device", "tl.where(keep, part * scales[i], 0.0)", "part * scales[i]", ("dx",)),
    "no 1/(1-p)": Mutant("device", "return 1 / (1 - p) if p < 1 else 0.0", "return 1.0", ("y", "dx", "dA0")),
    "scales of the first adapter": Mutant("device", "columns >= STARTS[i]", "columns >= STARTS[0]", ("y", "dx")),
    "last row of dx without the adapter": Mutant("device", "mask=(rows < M)[:", "mask=(rows < M - 1)[:", ("dx",)),
    "last column of x": Mutant("skinny", "(cols < K)[None, :], other", "(cols < K - 1)[None, :], other", ("y", "dA0")),
    "H and D accumulated in bf16": Mutant(
        "skinny", "a.to(x.dtype), acc, input", "a.to(x.dtype), acc.to(x.dtype).to(tl.float32), input", ("dA1", "dB1")
    ),
    "dA and dB accumulated in bf16": Mutant(
        "skinny", "(d, x, acc, input", "(d, x, acc.to(x.dtype).to(tl.float32), input", ("dA1", "dB1")
    ),
    "H and dA with the seed of the first adapter": Mutant("skinny", "seed_ptr + owner", "seed_ptr", ("y", "dA1")),
    "dx with the seed of the first adapter": Mutant("device", "seed_ptr + i", "seed_ptr", ("dx",)),
    "last partial sum": Mutant("split", "in range(parts)", "in range(parts - 1)", ("dA0", "dB0")),
    "last step of K": Mutant("lora_linear", "range(0, K, BK)", "range(0, K - BK, BK)", ("y", "dx"), "fused"),
    "bias forgotten": Mutant("lora_linear", "if BIAS:", "if False:", ("y",), "fused"),
    "adapter forgotten": Mutant("lora_linear", "PARTS == 0", "PARTS >= 0", ("y", "dx"), "fused"),
}


@pytest.fixture
def mutate(root, tmp_path, monkeypatch):
    """mutate(mutant): the backend runs a copy of kernels/ with the fault in it."""

    def run(mutant):
        folder = tmp_path / "mutated"
        folder.mkdir()
        for path in (root / "kernels").glob("*.py"):
            text = path.read_text()
            if path.stem == mutant.file:
                assert mutant.old in text, "the kernels have changed: plant this fault anew"
                text = text.replace(mutant.old, mutant.new)
            (folder / path.name).write_text(text.replace("peft_fast.kernels", "mutated"))
        for name in [name for name in sys.modules if name.partition(".")[0] == "mutated"]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        for accessor, name in (("skinny", "skinny"), ("gemm", "lora_linear")):
            module = importlib.import_module(f"mutated.{name}")
            monkeypatch.setattr(backend, accessor, lambda module=module: module)

    monkeypatch.syspath_prepend(tmp_path)
    yield run
    for name in [name for name in sys.modules if name.partition(".")[0] == "mutated"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_dies(name, mutate):
    mutant = MUTANTS[name]
    mutate(mutant)
    found = numerics.verdicts(Provider("triton", mutant.plan), SUBJECT, "bf16", False)
    rejected = set(numerics.failures(found))
    assert set(mutant.outputs) <= rejected and bool(mutant.outputs) == bool(rejected), rejected
