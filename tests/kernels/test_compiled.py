"""The kernels as each architecture's compiler leaves them, from the project's own launches, without a GPU."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton

from peft_fast.backends.triton import lora_linear as backend
from peft_fast.kernels import launch, lora_linear, skinny, tiles
from peft_fast.kernels.tiles import Tile
from peft_fast.ops.spec import Spec
from tests.kernels.launches import OP_OF, WITH_DROPOUT, empty, launches
from tests.kernels.recording import ARCHS, MATRIX, PRODUCTS, Launch, count, recording

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# of x, W, H and of the adapters
KINDS = {"bf16": (BF16, BF16), "f16": (F16, F16), "f32": (F32, F32), "bf16_f32_adapters": (BF16, F32)}
M, K, N = 8192, 4096, 4096
FIRST = ("sm_80", "sm_90", "gfx942")


def rows():
    """(arch, kind, launch, rank, p) of the shipped tiles; what `make test` leaves out is slow."""
    found = []
    for arch, kind, name, rank, p in itertools.product(ARCHS, KINDS, OP_OF, (16, 32, 64, 128, 256), (0.1, 0.0)):
        masked = p > 0 or name not in WITH_DROPOUT
        if (p > 0 and name not in WITH_DROPOUT) or (p == 0 and name == "expand"):
            continue
        deep = arch in FIRST and kind in ("f32", "bf16_f32_adapters")
        quick = (rank == 16 and masked) or (deep and (rank, masked) in ((256, True), (64, False)))
        found.append(pytest.param(arch, kind, name, rank, p, marks=() if quick else pytest.mark.slow))
    return found


class Only(dict):
    """Overrides that give every op and shape class the same tile."""

    def __init__(self, tile):
        super().__init__(every=tile)

    def __contains__(self, key):
        return True

    def __getitem__(self, key):
        return self.get("every")


def compiled(arch, name, kind="bf16_f32_adapters", rank=16, p=0.1, sizes=(M, K, N), **options) -> list[Launch]:
    """The kernels of one launch of tests/kernels/launches.py, the one that is named first."""
    with recording(arch) as found:
        launches(*sizes, (rank,), (p,), *KINDS[kind], **options)[name]()
    return found


def matrix(arch, kind, kernel):
    """The matrix instructions a kernel must have: float32 is multiplied without them on NVIDIA's."""
    if "finalize" in kernel.name or (kind == "f32" and arch != "gfx942"):
        return ""
    return ARCHS[arch].gemm if "fused" in kernel.name else MATRIX


def faults(arch, kind, found):
    return [f"{kernel}: {fault}" for kernel in found for fault in kernel.faults(matrix(arch, kind, kernel))]


@pytest.mark.parametrize(("arch", "kind", "name", "rank", "p"), rows())
def test_shipped_tiles(arch, kind, name, rank, p):
    found = compiled(arch, name, kind, rank, p)
    assert found and not faults(arch, kind, found)


# past MOST_SHARED_RANK shrink_outer is two launches of other ops
CHOICES = [
    (name, rank)
    for name, rank in itertools.product(OP_OF, (16, 32, 64, 256))
    if name != "shrink_outer" or rank <= tiles.MOST_SHARED_RANK
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rank"), CHOICES)
@pytest.mark.parametrize("kind", ["f32", "bf16_f32_adapters"])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_tile_the_tuner_may_choose(arch, kind, name, rank):
    p = 0.1 if name in WITH_DROPOUT else 0.0
    shape = tiles.shape_class(OP_OF[name], M, K, N, rank, p > 0)
    dtype = tiles.dtype_name(KINDS[kind][0])
    for tile in tiles.candidates(OP_OF[name], shape, dtype, ARCHS[arch].target.arch):
        assert not faults(arch, kind, compiled(arch, name, kind, rank, p, overrides=Only(tile))), tile


def heavier(arch, name, kind="bf16_f32_adapters", frozen=None, **options):
    """What the main loop has more of than the frozen layer's, with the same tile; empty when nothing."""
    shape = tiles.shape_class("fused", M, K, N, 16, name == "backward")
    tile = tiles.pick("fused", shape, KINDS[kind][0], ARCHS[arch].target.arch)
    ours, base = (
        compiled(arch, which, kind, overrides=Only(tile), **more)[0]
        for which, more in ((name, options), (f"frozen {name}", {}))
    )
    assert base.main_loop, "no loop was found"
    products = count(PRODUCTS, ours.main_loop), count(PRODUCTS, base.main_loop)
    lengths = len(ours.main_loop), len(base.main_loop)
    if products[0] == products[1] and lengths[0] <= 1.05 * lengths[1]:
        return ""
    return f"{products} products and {lengths} instructions, adapted and frozen"


@pytest.mark.parametrize(
    "kind", ["bf16_f32_adapters", *(pytest.param(k, marks=pytest.mark.slow) for k in ("bf16", "f16", "f32"))]
)
@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_adapter_adds_nothing_to_the_main_loop(arch, name, kind):
    assert not heavier(arch, name, kind)


@dataclasses.dataclass
class Layer:
    """One call of the backend on meta tensors, forward and backward, as autograd would make it."""

    M: int = 4096
    K: int = 4096
    N: int = 4096
    ranks: tuple = (16,)
    ps: tuple = (0.1,)
    plan: str = "accumulate"
    kind: str = "bf16_f32_adapters"

    def __call__(self):
        dtype, adapter = KINDS[self.kind]
        R, n = sum(self.ranks), len(self.ranks)
        spec = Spec(list(self.ranks), [2.0] * n, list(self.ps), dtype, False, False, "triton", self.plan)
        x, W, bias = empty(self.M, self.K, dtype=dtype), empty(self.N, self.K, dtype=dtype), empty(self.N, dtype=dtype)
        A, B, seed = empty(R, self.K, dtype=adapter), empty(self.N, R, dtype=adapter), empty(n, dtype=torch.int64)
        y, H = backend.run_forward(x, W, bias, A, B, seed, spec)
        backend.run_backward(torch.empty_like(y), x, W, bias, A, B, H, seed, spec, [True] * 5)


@pytest.mark.parametrize("plan", ["accumulate", "fused"])
@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=() if arch in FIRST else pytest.mark.slow) for arch in ARCHS]
)
def test_three_adapters_on_one_layer(arch, plan):
    with recording(arch) as found:
        Layer(ranks=(8, 16, 64), ps=(0.1, 0.0, 0.5), plan=plan)()
    assert not faults(arch, "bf16_f32_adapters", found)
    assert any("fused" in kernel.name for kernel in found) == (plan == "fused")


def kernels_of(run, monkeypatch):
    """Name -> the kernels that Triton compiles for sm_90 while run(M) runs for token counts of every kind."""
    monkeypatch.setattr(launch, "KNOWN", False)
    with recording("sm_90") as found:
        for tokens in (4096, 4095, 1, 16, 1024):
            run(tokens)
    names = {}
    for kernel in found:
        names.setdefault(kernel.name, set()).add(kernel.identity)
    return names


@pytest.mark.parametrize("ps", [(0.0,), (0.1,)], ids=["plain", "dropout"])
@pytest.mark.parametrize("plan", ["accumulate", "fused"])
def test_the_token_count_specialises_nothing(plan, ps, monkeypatch):
    found = kernels_of(lambda tokens: Layer(M=tokens, ps=ps, plan=plan)(), monkeypatch)
    # one layer finalizes H, D, dB and dA, each with its own layout
    several = found.pop("_lora_linear_finalize_kernel")
    assert len(several) <= 4 and {len(kernels) for name, kernels in found.items() if "fused" not in name} <= {1}
    assert len(found.get("_lora_linear_fused_kernel", "")) == (2 if plan == "fused" else 0)  # forward, backward


def unlike():
    """Launches that differ in what Triton compiles different code for, or in what it must not; real memory, small."""

    def place(offset, *shape, dtype=BF16, step=1):
        rows = torch.zeros(offset + shape[0] * shape[1] * step, dtype=dtype)[offset:]
        return rows.as_strided(shape, (shape[1] * step, 1))

    calls = []
    for adapter, rank, columns in ((BF16, 16, 256), (F32, 16, 256), (F32, 3, 250)):
        A, seed = place(0, rank, columns, dtype=adapter), torch.zeros(1, dtype=torch.int64)
        for tokens, offset, step, p in (
            (64, 0, 1, 0.0),
            (61, 0, 1, 0.0),
            (64, 1, 1, 0.0),
            (64, 0, 2, 0.1),
            (1, 8, 1, 0.1),
        ):
            x = place(offset, tokens, columns, step=step)
            calls.append(partial(skinny.shrink, x, A, seed, (rank,), (2.0,), (p,)))
    H = place(0, 64, 16)
    for x, W in ((place(0, 64, 256), place(0, 96, 256)), (place(0, 64, 256), place(0, 256, 96).t())):
        calls.append(partial(lora_linear.fused, x, W, None, H, place(0, 96, 16), None, (16,), (0.0,), BF16))
    for tokens in (64, 1 << 23):  # past 2 GiB AMD's code addresses memory in another way
        tensors = empty(tokens, 256), empty(16, 256), empty(1, dtype=torch.int64)
        calls.append(partial(skinny.shrink, *tensors, (16,), (2.0,), (0.0,)))
    return calls


def chosen(known, arch, monkeypatch):
    monkeypatch.setattr(launch, "KNOWN", known)
    monkeypatch.setattr(launch, "_compiled", {})
    with recording(arch) as found:
        for run in unlike():
            run()
    return [(kernel.name, kernel.grid, kernel.identity) for kernel in found]


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_a_launch_found_by_our_key_is_the_one_triton_would_choose(arch, monkeypatch):
    ours = chosen(True, arch, monkeypatch)
    assert ours == chosen(False, arch, monkeypatch) and len(launch._compiled) == 0
    assert len({identity for _, _, identity in ours}) > 10

    with monkeypatch.context() as forgetting:
        forgetting.setattr(launch, "_kind", lambda argument: getattr(argument, "dtype", None))
        assert chosen(True, arch, monkeypatch) != ours, "a key that forgets alignment is seen"
    if arch == "gfx942":
        monkeypatch.setattr(launch, "_near", lambda argument: True)
        assert chosen(True, arch, monkeypatch) != ours, "a key that forgets how far memory reaches is seen"


@pytest.mark.parametrize("plan", ["accumulate", "fused"])
def test_the_compiler_knows_what_is_aligned(plan):
    with recording("sm_90") as found:
        Layer(plan=plan)()
    counts = {"M", "X", "parts", "k_blocks", "m_blocks"}
    for kernel in found:
        for name, kind in kernel.arguments.items():
            assert kind.endswith("aligned") == (name not in counts), f"{kernel}: {name} is {kind}"


@pytest.mark.parametrize("arch", FIRST)
def test_wide_loads(arch):
    for name in OP_OF:
        kernel = compiled(arch, name)[0]
        assert count(r"LDG(STS)?\S*\.128|UTMALDG|(buffer|global)_load_dwordx4", kernel.code[0]), kernel


# faults planted on purpose: each of the checks above sees its own


def test_a_tile_that_spills_is_seen():
    (kernel,) = compiled("sm_90", "forward", overrides=Only(Tile(128, 256, 64, 4, 3, 8)))
    assert kernel.stack and "spill" in str(kernel.faults())
    (kernel,) = compiled("gfx942", "forward", overrides=Only(Tile(256, 256, 32, 4, 1, 8)))
    assert kernel.stack and "spill" in str(kernel.faults())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_a_tile_that_is_too_large_is_seen(arch):
    stages = ARCHS[arch].shared // (2 * (128 + 128) * 64) + 2
    (kernel,) = compiled(arch, "forward", overrides=Only(Tile(128, 128, 64, 8, stages, 8)))
    assert "shared memory" in str(kernel.faults())


def test_missing_matrix_instructions_are_seen():
    kernels = compiled("sm_90", "forward", "f32")
    assert not faults("sm_90", "f32", kernels) and "wgmma" in str(faults("sm_90", "bf16", kernels))


def test_a_heavier_main_loop_is_seen():
    # the last step of K is masked, where the frozen layer's is full
    assert heavier("sm_90", "forward", sizes=(M, K - 6, N))


@pytest.mark.parametrize("name", ["_lora_linear_fused_kernel", "_lora_linear_expand_kernel"])
def test_a_kernel_that_depends_on_the_token_count_is_seen(name, monkeypatch):
    monkeypatch.setattr(lora_linear, name, triton.jit(getattr(lora_linear, name).fn))
    plan = "fused" if "fused" in name else "accumulate"
    assert len(kernels_of(lambda tokens: Layer(M=tokens, plan=plan)(), monkeypatch)[name]) > 2


def test_unaligned_rows_are_seen():
    x = torch.empty_strided((M, K), (K + 1, 1), dtype=BF16, device="meta")
    with recording("sm_90") as found:
        skinny.shrink(x, empty(16, K), None, (16,), (2.0,), (0.0,))
    assert found[0].arguments["x_sm"] == "i32" and found[0].arguments["A_sr"] == "i32 aligned"
