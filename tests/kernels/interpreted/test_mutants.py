"""Faults planted in the source of the kernels: the contract rejects each of them."""

import importlib
import sys
from dataclasses import replace
from typing import NamedTuple

import pytest

from peft_fast.backends.triton import (
    dora_linear,
    lora_decode,
    lora_embedding,
    lora_experts,
    lora_group,
    lora_linear,
    lora_mixed,
    lora_mlp,
)
from tests import (
    cases_dora_linear,
    cases_lora_decode,
    cases_lora_embedding,
    cases_lora_experts,
    cases_lora_group,
    cases_lora_mixed,
    cases_lora_mlp,
    numerics,
)
from tests.cases import Case
from tests.inputs import Layer
from tests.numerics import Provider

LINEAR = Case("mutated", lead=(67,), K=230, N=140, ranks=(16, 40), p=(0.3, 0.5), scaling=(2.0, 0.5), bias=True)

GROUP = cases_lora_group.Case(
    "mutated_group",
    (
        Layer(N=140, ranks=(16,), p=(0.3,), bias=True),
        Layer(N=60, ranks=(), p=(), scaling=()),
        Layer(N=80, ranks=(8,), p=(0.5,), scaling=(0.5,)),
    ),
    lead=(35,),
    K=70,
)
BLOCK = cases_lora_mlp.Case("mutated_block", "silu", gate=Layer(), lead=(35,), I=140, p=0.3)
WORDS = cases_lora_embedding.Case("mutated_words", lead=(181,), V=4, ranks=(20,), padding_idx=3, scale=1.7)
EXPERTS = cases_lora_experts.Case("mutated_experts", T=80, E=3, K=140, N=70, ranks=(20,), bias=True, tokens=True)
DORA = cases_dora_linear.Case(
    "mutated_dora", lead=(67,), K=140, N=140, ranks=(16,), p=(0.3,), scaling=(2.0,), bias=True
)
FEW = cases_lora_decode.Case(
    "mutated_few", lead=(13,), K=1100, N=60, ranks=(10, 5), p=(0.0, 0.0), scaling=(2.0, 0.5), bias=True
)
MORE = replace(FEW, name="mutated_more", lead=(19,), N=140, ranks=(10, 25))
# K in two parts, rows out of order
MIXED = cases_lora_mixed.Case(
    "mutated_mixed", owners=(1, 0, -1), lead=(11,), K=1100, N=150, ranks=(5, 16), adapter_bias=True
)
NO_DROPOUT = replace(DORA, name="mutated_dora_undropped", p=(0.0,))


class Mutant(NamedTuple):
    """``old`` in a file of kernels/ becomes ``new``, and at least these outputs are rejected in so many draws."""

    file: str
    old: str
    new: str
    outputs: tuple[str, ...]
    plan: str = "accumulate"
    subject: object = LINEAR
    draws: int = 1


MUTANTS = {
    **{
        f"none of {case.name}": Mutant("skinny", "acc", "acc", (), subject=case)
        for case in (LINEAR, GROUP, BLOCK, WORDS, EXPERTS, DORA, NO_DROPOUT, FEW, MORE)
    },
    "none of a fused group": Mutant("skinny", "acc", "acc", (), "fused", GROUP),
    "mask shifted by 8 columns": Mutant("device", "first // 8 +", "first // 8 + 1 +", ("y", "dx", "dA0")),
    "no mask on dx": Mutant(
        "device", "tl.where(keep, part * chosen(i, scales, PARTS), 0.0)", "part * chosen(i, scales, PARTS)", ("dx",)
    ),
    "no 1/(1-p)": Mutant("device", "return 1 / (1 - p) if p < 1 else 0.0", "return 1.0", ("y", "dx", "dA0")),
    "scales of the first adapter": Mutant("device", "columns >= STARTS[i]", "columns >= STARTS[0]", ("y", "dx")),
    "last row of dx without the adapter": Mutant("device", "mask=(rows < M)[:", "mask=(rows < M - 1)[:", ("dx",)),
    "last column of x": Mutant("skinny", "(cols < K)[None, :], other", "(cols < K - 1)[None, :], other", ("y", "dA0")),
    "H and D accumulated in bf16": Mutant(
        "skinny", "a.to(dtype), acc, input", "a.to(dtype), acc.to(dtype).to(tl.float32), input", ("dA1", "dB1"), draws=2
    ),
    "dA and dB accumulated in bf16": Mutant(
        "skinny", "to(d.dtype), acc, input", "to(d.dtype), acc.to(d.dtype).to(tl.float32), input", ("dA1", "dB1")
    ),
    "H and dA with the seed of the first adapter": Mutant("split", "seed_ptr + owner", "seed_ptr", ("y", "dA1")),
    "dx with the seed of the first adapter": Mutant("device", "seed_ptr + i", "seed_ptr", ("dx",)),
    "last partial sum": Mutant("split", "in range(parts)", "in range(parts - 1)", ("dA0", "dB0")),
    "last step of K": Mutant("gemm", "range(0, K, BK)", "range(0, K - BK, BK)", ("y", "dx"), "fused"),
    "bias forgotten": Mutant("lora_linear", "if BIAS:", "if False:", ("y",), "fused"),
    "adapter forgotten": Mutant("device", "PARTS == 0", "PARTS >= 0", ("y", "dx"), "fused"),
    "adapters of one mask": Mutant("device", "in range(PARTS)", "in range(1)", ("dx",)),
    # of a group
    "the first sibling's weight for all": Mutant(
        "lora_group", "chosen(sibling, W_ptrs, SIBLINGS)", "W_ptrs[0]", ("y1", "y2"), "fused", GROUP
    ),
    "the first sibling's columns of H for all": Mutant(
        "lora_group", "H_ptr + chosen(sibling, STARTS, SIBLINGS)", "H_ptr", ("y2",), "fused", GROUP
    ),
    "the first sibling's bias for all": Mutant("lora_group", " & (sibling == i)", "", ("y1", "y2"), "fused", GROUP),
    "another sibling's tile": Mutant(
        "lora_group", "block_n >= end, end", "block_n > end, end", ("y1",), "fused", GROUP
    ),
    "dx without the last sibling": Mutant(
        "lora_group", "in range(SIBLINGS)", "in range(SIBLINGS - 1)", ("dx",), "fused", GROUP
    ),
    "dx with one sibling's mask": Mutant("device", "seed_ptr + i", "seed_ptr", ("dx",), "fused", GROUP),
    "H and dA with one sibling's mask": Mutant(
        "split", "seed_ptr + owner", "seed_ptr", ("y2", "d2_A0"), "accumulate", GROUP
    ),
    "one sibling's scale": Mutant(
        "device", "columns >= STARTS[i]", "columns >= STARTS[0]", ("y0", "d0_A0", "d0_B0"), "accumulate", GROUP
    ),
    "columns of H a sibling further": Mutant(
        "skinny", "rows[:, None] * H_sm", "rows[:, None] * R", ("d0_B0",), "accumulate", GROUP
    ),
    # of a block
    "h without its mask": Mutant("lora_mlp", "h = tl.where(keep, h * scales[0], 0.0)", "h = h", ("y",), subject=BLOCK),
    "dh without its mask": Mutant(
        "lora_mlp", "dh = tl.where(keep, dh * scales[0], 0.0)", "dh = dh", ("dx", "dgate_A0", "dup_A0"), subject=BLOCK
    ),
    "the slope of another function": Mutant("lora_mlp", "s + y * (1 - s)", "s", ("dx", "dgate_A0"), subject=BLOCK),
    "h without up": Mutant("lora_mlp", "        h *= tl.load(u_ptr", "        tl.load(u_ptr", ("y",), subject=BLOCK),
    "last column of h": Mutant("lora_mlp", "(cols < N)[", "(cols < N - 1)[", ("y",), subject=BLOCK),
    # of an embedding
    "long runs cut": Mutant("lora_embedding", "at += BM", "at += M + BM", ("dA0",), subject=WORDS),
    "dA in the order of tokens": Mutant("lora_embedding", "D_ptr + rows[", "D_ptr + places[", ("dA0",), subject=WORDS),
    "a gradient for the padding": Mutant("lora_embedding", " & (token != padding)", "", ("dA0",), subject=WORDS),
    "the adapter without its scale": Mutant("lora_embedding", "low *= tl.load", "tl.load", ("y",), subject=WORDS),
    "dA without its scale": Mutant("lora_embedding", "acc *= tl.load", "tl.load", ("dA0",), subject=WORDS),
    "last rank of an embedding": Mutant("lora_embedding", "ranks < R", "ranks < R - 1", ("y", "dA0"), subject=WORDS),
    # of experts
    "another expert's weight": Mutant("lora_experts", "W_ptr + e * W_se", "W_ptr", ("y", "dx"), subject=EXPERTS),
    "another expert's B": Mutant("lora_experts", "B_ptr + e * B_se", "B_ptr", ("y", "dx"), subject=EXPERTS),
    "another expert's bias": Mutant("lora_experts", "bias_ptr + e * bias_se", "bias_ptr", ("y",), subject=EXPERTS),
    "another expert's gradients": Mutant("lora_experts", "e.to(tl.int64) * A_se", "0", ("y", "dA0"), subject=EXPERTS),
    "another token": Mutant(
        "lora_experts", "sources_ptr + rows,", "sources_ptr + rows // 2,", ("y", "dA0", "dB0"), subject=EXPERTS
    ),
    "a block of rows twice": Mutant(
        "lora_experts", "(block - first) * BM", "(block - first) // 2 * BM", ("y",), subject=EXPERTS
    ),
    "one block of an expert's rows": Mutant(
        "lora_experts", "range(begin, end, BM)", "range(begin, begin + BM, BM)", ("dA0", "dB0"), subject=EXPERTS
    ),
    "rows without their scale": Mutant(
        "lora_experts", "acc *= column_scales", "column_scales", ("y", "dx", "dA0", "dB0"), subject=EXPERTS
    ),
    "one row a token": Mutant("lora_experts", "in range(k)", "in range(1)", ("dx",), subject=EXPERTS),
    # of few tokens
    "the first partial sum alone": Mutant("lora_decode", "in range(splits)", "in range(1)", ("y",), subject=FEW),
    "y without its last block of K": Mutant("lora_decode", "tl.cdiv(K, BK))", "K // BK)", ("y",), subject=FEW),
    "few tokens, one scale": Mutant("device", "columns >= STARTS[i]", "columns >= STARTS[0]", ("y",), subject=FEW),
    "few tokens without their bias": Mutant("lora_decode", "if BIAS:", "if False:", ("y",), subject=FEW),
    "the last rank of few tokens": Mutant("lora_decode", "ranks < R", "ranks < R - 1", ("y",), subject=FEW),
    "the second block of ranks": Mutant("lora_decode", "range(0, R, BR)", "range(0, BR, BR)", ("y",), subject=MORE),
    "the second block of few tokens": Mutant("lora_decode", "% row_blocks", "% 1", ("y",), subject=MORE),
    "another block of columns": Mutant("lora_decode", "block * BN", "block // 2 * BN", ("y",), subject=MORE),
    # of a layer with magnitudes
    "y without the magnitudes": Mutant("dora_linear", "plain * (c - 1)", "plain * 0", ("y",), subject=DORA),
    "the adapter without the magnitudes": Mutant("dora_linear", "low * c", "low", ("y",), subject=NO_DROPOUT),
    "the bias with the magnitudes": Mutant("dora_linear", "elif BIAS:", "elif False:", ("y",), subject=NO_DROPOUT),
    "a neighbour's magnitude": Mutant("dora_linear", "c_ptr + cols", "c_ptr + cols // 2", ("y",), subject=DORA),
    "dx without the magnitudes": Mutant("dora_linear", "(g * by)", "(g * 0)", ("dx",), subject=DORA),
    "dm with the bias": Mutant("dora_linear", "plain -= bias", "bias", ("dm",), subject=NO_DROPOUT),
    "dm of the last tokens": Mutant("dora_linear", "dm += ", "dm = ", ("dm",), subject=DORA),
    "dbias of the last tokens": Mutant("dora_linear", "db += ", "db = ", ("dbias",), subject=DORA),
    "what is dropped without 1/(1-p)": Mutant("dora_linear", "x * scales[0]", "x", ("y", "dx"), subject=DORA),
    "nothing dropped": Mutant("dora_linear", "tl.where(keep, ", "tl.where(keep | True, ", ("y", "dx"), subject=DORA),
    # of a mixed batch
    "rows as they lie": Mutant(
        "lora_mixed", "6 * adapters + first + tokens // T", "6 * adapters + tokens // T", ("y",), subject=MIXED
    ),
    "the ranks of the first adapter": Mutant(
        "lora_mixed", "table_ptr + 3 * adapters + own", "table_ptr", ("y",), subject=MIXED
    ),
    "the scaling of the first adapter": Mutant(
        "lora_mixed", "table_ptr + 5 * adapters + own", "table_ptr + 5 * adapters", ("y",), subject=MIXED
    ),
    "the bias of the first adapter": Mutant("lora_mixed", "own.to(tl.int64) * N", "0", ("y",), subject=MIXED),
    "one part of K": Mutant("lora_mixed", "in range(parts)", "in range(1)", ("y",), subject=MIXED),
    "last rank of a mixed batch": Mutant("lora_mixed", "ranks < rank", "ranks < rank - 1", ("y",), subject=MIXED),
}
# where the backends look for their kernels
PLACES = (
    (lora_linear, "skinny", "skinny"),
    (lora_linear, "gemm", "lora_linear"),
    (lora_group, "skinny", "skinny"),
    (lora_group, "group", "lora_group"),
    (lora_mlp, "kernels", "lora_mlp"),
    (lora_embedding, "skinny", "skinny"),
    (lora_embedding, "kernels", "lora_embedding"),
    (lora_experts, "kernels", "lora_experts"),
    (lora_decode, "kernels", "lora_decode"),
    (dora_linear, "skinny", "skinny"),
    (dora_linear, "kernels", "dora_linear"),
    (lora_mixed, "kernels", "lora_mixed"),
)


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
        for backend, accessor, name in PLACES:
            module = importlib.import_module(f"mutated.{name}")
            monkeypatch.setattr(backend, accessor, lambda module=module: module)

    monkeypatch.syspath_prepend(tmp_path)
    yield run
    for name in [name for name in sys.modules if name.partition(".")[0] == "mutated"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_dies(name, mutate, monkeypatch):
    mutant = MUTANTS[name]
    monkeypatch.setattr(numerics, "MOST_DRAWS", mutant.draws)
    mutate(mutant)
    found = numerics.verdicts(Provider("triton", mutant.plan), mutant.subject, "bf16", False)
    rejected = set(numerics.failures(found))
    assert set(mutant.outputs) <= rejected and bool(mutant.outputs) == bool(rejected), rejected
