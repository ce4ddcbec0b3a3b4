"""The kernels of lora_mixed as each architecture's compiler leaves them, without a GPU."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft_fast.backends.triton import lora_mixed as backend
from peft_fast.kernels import launch
from peft_fast.ops.spec import MixedSpec
from tests.kernels.launches import KINDS, empty
from tests.kernels.recording import ARCHS, FIRST, MATRIX, recording

BF16, F32 = torch.bfloat16, torch.float32
K, N, CROWD = 4096, 4096, 16


def call(dtype, adapter, rank, tokens, words=False, crowd=CROWD):
    """One call of the backend for a row of each adapter, with biases."""
    spec = MixedSpec(list(range(crowd)), [1] * crowd, [2.0] * crowd, -1, "triton")
    x = empty(crowd, tokens, dtype=torch.int64) if words else empty(crowd, tokens, K, dtype=dtype)
    As, Bs = ([empty(*size, dtype=adapter) for _ in range(crowd)] for size in ((rank, K), (N, rank)))
    biases = [empty(N, dtype=adapter), *[None] * (crowd - 1)]
    backend.run(empty(crowd, tokens, N, dtype=dtype), x, As, Bs, biases, spec, (rank,) * crowd)


def compiled(arch, *args, **kwargs):
    with recording(arch) as found:
        call(*args, **kwargs)
    return found


def faults(arch, adapter, found):
    """What no kernel may show; float32 is multiplied without matrix instructions on NVIDIA's."""
    wanted = "" if adapter == F32 and arch != "gfx942" else MATRIX
    return [
        f"{kernel}: {fault}" for kernel in found for fault in kernel.faults("" if "gather" in kernel.name else wanted)
    ]


def _rows():
    found = []
    for arch, kind, rank in itertools.product(ARCHS, KINDS, (16, 32, 64, 256)):
        quick = arch in FIRST and (kind, rank) in (("bf16_f32_adapters", 16), ("bf16", 256))
        found.append(pytest.param(arch, kind, rank, marks=() if quick else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("arch", "kind", "rank"), _rows())
def test_shipped_tiles(arch, kind, rank):
    dtype, adapter = KINDS[kind]
    found = compiled(arch, dtype, adapter, rank, 128) + compiled(arch, dtype, adapter, rank, 128, words=True)
    names = [kernel.name.removeprefix("_lora_mixed_").removesuffix("_kernel") for kernel in found]
    assert names == ["shrink", "expand", "gather", "expand"] and not faults(arch, adapter, found)


def test_neither_tokens_nor_their_number_nor_the_crowd_specialise_anything(monkeypatch):
    monkeypatch.setattr(launch, "KNOWN", False)
    with recording("sm_90") as found:
        for tokens, crowd in ((1, 16), (16, 16), (128, 3), (4095, 9)):
            call(BF16, F32, 16, tokens, crowd=crowd)
            call(BF16, F32, 16, tokens, words=True, crowd=crowd)
    kernels = {}
    for kernel in found:
        kernels.setdefault(kernel.name, set()).add(kernel.identity)
    # B's rows are as long as all ranks together
    assert {name: len(same) for name, same in kernels.items() if "expand" not in name} == {
        "_lora_mixed_shrink_kernel": 1,
        "_lora_mixed_gather_kernel": 1,
    }


@pytest.mark.parametrize("rank", [16, 3])
def test_the_compiler_knows_what_is_aligned(rank):
    for kernel in compiled("sm_90", BF16, BF16, rank, 128):
        counts = {"adapters", "T", "P", "k_blocks", "parts"} | ({"R"} if rank % 16 else set())
        for name, kind in kernel.arguments.items():
            assert kind.endswith("aligned") == (name not in counts), f"{kernel}: {name} is {kind}"
