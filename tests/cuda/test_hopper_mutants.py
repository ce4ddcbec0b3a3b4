"""Faults planted in the Hopper kernel: the model of the hardware has to see each of them."""

from __future__ import annotations

import shutil

import pytest
import torch

from peft_fast.reference.dropout import keep_mask
from tests.cuda import hopper_model
from tests.cuda.hopper_model import check, operands, truth

MUTANTS = {
    "stages come back before they were read": [
        ("wgmma_wait<1>();\n    give_back();", "give_back();\n    wgmma_wait<1>();")
    ],
    "a stage is given back to one block only": [("owes && lane < CLUSTER", "owes && lane == 0")],
    "the producer does not wait": [("barrier_wait(empty_at(shared, turn.stage), turn.parity ^ 1);", "")],
    "the consumer waits for the wrong turn": [
        ("full_at(shared, turn.stage), turn.parity)", "full_at(shared, turn.stage), 0)")
    ],
    "a barrier expects one warp too few": [("CLUSTER * CONSUMERS * 4)", "CLUSTER * CONSUMERS * 4 - 1)")],
    "a barrier expects too few bytes": [("barrier_expect(full, turn.STAGE_BYTES)", "barrier_expect(full, LEFT_BYTES)")],
    "the last stage of a tile is kept": [("wgmma_finish(sum);\n    give_back();", "wgmma_finish(sum);")],
    "no fence before the store": [("    fence_async();\n", "")],
    "stores share a buffer": [("store_wait_read<OUT_BUFFERS - 1>()", "store_wait_read<OUT_BUFFERS>()")],
    "the block leaves before its stores": [("if (threadIdx.x % 128 == 0) store_wait_all();", "")],
    "both blocks load the same columns": [("at.column + int32_t(rank) * (BN / CLUSTER)", "at.column")],
    "the second box lands on the first": [("share + i * BOX", "share")],
    "blocks of 64 columns in the wrong place": [("LEADING = TURNED ? 64 * BK * 2", "LEADING = TURNED ? 32 * BK * 2")],
    "the next 16 of the sum in the wrong place": [("TURNED ? 16 * 128 : 16 * 2", "TURNED ? 8 * 128 : 16 * 2")],
    "out is not swizzled": [("(unit ^ to % 8)", "unit")],
    "the sum of the tile before is not cleared": [("    adds = 0;\n", "")],
    "the mask of the tile before": [("origin_of<BN>(after,", "origin_of<BN>(tile,")],
    "the mask's halves exchanged": [("* 2 + b % 2]", "* 2 + (b + 1) % 2]")],
    "the mask on the whole sum": [
        ("      mask.apply(sum, job.scale);\n", ""),
        ("    store_tile<T>(", "    if (MASKED) mask.apply(sum, job.scale);\n    store_tile<T>("),
    ],
    "the mask is not drawn to the end": [("for (int c = i; c < DRAWS; ++c) draw(c);", "")],
    "kept elements are not scaled": [("? s * scale : 0.0f", "? s : 0.0f")],
    "the last ranks are left out": [("left <= 16)", "left <= 24)")],
}


def survives(model) -> bool:
    """Do awkward cases in several orders find nothing wrong?"""
    p, seed = 0.25, torch.tensor([99])
    for M, N, K, R, turned, masked in ((300, 512, 392, 24, True, True), (800, 128, 456, 72, False, False)):
        left, right, low = operands(M, N, K, R, torch.bfloat16, turned)
        keep = keep_mask(seed[0], M, N, p) if masked else None
        assert model.is_wide(M, N, 1) == masked
        want = truth(left, right, low, None, keep, p if masked else 0.0, turned)
        for order in range(4):
            got, fault = hopper_model.gemm(
                model, left, right, low, None, seed, p if masked else 0.0, turned, order=order, eagerness=0.1, sms=2
            )
            if fault:
                return False
            try:
                check(got, *want)
            except AssertionError:
                return False
    return True


def test_faults_fit_the_kernel():
    text = (hopper_model.CSRC / "cuda" / "hopper.cuh").read_text()
    assert [old for faults in MUTANTS.values() for old, _ in faults if text.count(old) != 1] == []


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_only_the_kernel_itself_survives(mutant, tmp_path):
    csrc = tmp_path / "csrc"
    (csrc / "cuda").mkdir(parents=True)
    for source in (hopper_model.CSRC / "cuda").glob("*.*h"):
        shutil.copy(source, csrc / "cuda")
    shutil.copy(hopper_model.CSRC / "cuda" / "hopper.cu", csrc / "cuda")
    kernel = csrc / "cuda" / "hopper.cuh"
    text = kernel.read_text()
    for old, new in MUTANTS.get(mutant, ()):
        text = text.replace(old, new)
    kernel.write_text(text)
    assert survives(hopper_model.compiled(tmp_path, csrc)) == (mutant is None)
