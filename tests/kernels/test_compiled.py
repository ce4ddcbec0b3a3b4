"""The kernels as each architecture's compiler leaves them, from the project's own launches, without a GPU."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton

from peft_fast.backends.triton import dora_linear as dora
from peft_fast.backends.triton import lora_decode as few
from peft_fast.backends.triton import lora_embedding as embedding
from peft_fast.backends.triton import lora_group as group
from peft_fast.backends.triton import lora_linear as backend
from peft_fast.backends.triton import lora_mlp as mlp
from peft_fast.kernels import launch, lora_group, lora_linear, skinny, tiles
from peft_fast.kernels.tiles import Tile
from peft_fast.ops.spec import ActSpec, EmbeddingSpec, GroupSpec, Spec
from tests.kernels.launches import ONE_TILE, OP_OF, PLAIN, WITH_DROPOUT, empty, launches
from tests.kernels.recording import ARCHS, MATRIX, PRODUCTS, Launch, count, recording

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# of x, W, H and of the adapters
KINDS = {"bf16": (BF16, BF16), "f16": (F16, F16), "f32": (F32, F32), "bf16_f32_adapters": (BF16, F32)}
M, K, N = 8192, 4096, 4096
FIRST = ("sm_80", "sm_90", "gfx942")
# these share their parts with the launches of lora_linear
FEWER = ("group forward", "group backward", "embedding backward", "decode", *ONE_TILE)


def rows():
    """(arch, kind, launch, rank, p) of the shipped tiles; what `make test` leaves out is slow."""
    found, names = [], (*OP_OF, *ONE_TILE)
    for arch, kind, name, rank, p in itertools.product(ARCHS, KINDS, names, (16, 32, 64, 128, 256), (0.1, 0.0)):
        masked = p > 0 or name not in WITH_DROPOUT
        if (p > 0 and name not in WITH_DROPOUT) or (p == 0 and name == "expand") or (rank > 16 and "act" in name):
            continue
        deep = arch in FIRST and kind in ("f32", "bf16_f32_adapters")
        if name in FEWER:
            quick = masked and deep and rank == (64 if "group" in name else 16)
        else:
            # 16-bit adapters take fewer registers and less memory than float32 ones: elsewhere these stand for them
            shallow = arch in FIRST or kind in ("f32", "bf16_f32_adapters")
            quick = (rank == 16 and masked and shallow) or (deep and (rank, masked) in ((256, True), (64, False)))
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
    if any(plain in kernel.name for plain in PLAIN) or (kind == "f32" and arch != "gfx942"):
        return ""
    return ARCHS[arch].gemm if "fused" in kernel.name or "group" in kernel.name else MATRIX


def faults(arch, kind, found):
    return [f"{kernel}: {fault}" for kernel in found for fault in kernel.faults(matrix(arch, kind, kernel))]


def products_of(name, kind):
    """An embedding's products are made in its adapter's dtype."""
    return "f32" if "embedding" in name and KINDS[kind][1] == F32 else kind


@pytest.mark.parametrize(("arch", "kind", "name", "rank", "p"), rows())
def test_shipped_tiles(arch, kind, name, rank, p):
    found = compiled(arch, name, kind, rank, p)
    assert found and not faults(arch, products_of(name, kind), found)


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
        found = compiled(arch, name, kind, rank, p, overrides=Only(tile))
        assert not faults(arch, products_of(name, kind), found), tile


def heavier(arch, name, kind="bf16_f32_adapters", **options):
    """What the main loop has more of than the frozen layer's, with the same tile; empty when nothing."""
    shape = tiles.shape_class("fused", M, K, N, 16, name.endswith("backward"))
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


@pytest.mark.parametrize("name", ["group forward", "group backward"])
@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=() if arch in FIRST else pytest.mark.slow) for arch in ARCHS]
)
def test_adapters_add_nothing_to_the_main_loop_of_a_group(arch, name):
    assert not heavier(arch, name)


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


@dataclasses.dataclass
class Group(Layer):
    """Queries, keys and values in one call, of which the keys have no adapter."""

    def __call__(self):
        dtype, adapter = KINDS[self.kind]
        R, n, Ns = sum(self.ranks), len(self.ranks), (self.N, self.N // 4, self.N // 4)
        counts, ranks, ps = [n, 0, n], [*self.ranks] * 2, [*self.ps] * 2
        spec = GroupSpec(counts, ranks, [2.0] * 2 * n, ps, dtype, [False] * 3, False, "triton", self.plan)
        x, Ws = empty(self.M, self.K, dtype=dtype), [empty(N, self.K, dtype=dtype) for N in Ns]
        biases, Bs = (
            [empty(Ns[0], dtype=dtype), None, None],
            [empty(N, r, dtype=adapter) for N, r in zip(Ns, (R, 0, R), strict=True)],
        )
        A, seed = empty(2 * R, self.K, dtype=adapter), empty(2 * n, dtype=torch.int64)
        ys, H = group.run_forward(x, Ws, biases, A, Bs, seed, spec)
        needs = True, [True] * 3, [bias is not None for bias in biases], True, [True, False, True]
        group.run_backward([torch.empty_like(y) for y in ys], x, Ws, biases, A, Bs, H, seed, spec, needs)


def block(M):
    """A gated block's activation, both ways."""
    gate, up, seed, spec = empty(M, 11008), empty(M, 11008), empty(1, dtype=torch.int64), ActSpec("silu", "", 0.1)
    mlp.run_activate(gate, up, seed, spec)
    mlp.run_activate_backward(empty(M, 11008), gate, up, seed, spec)


def words(M):
    """An adapted embedding, both ways."""
    V, D, R, spec = 32000, 4096, 16, EmbeddingSpec(2.0, -1, "triton")
    ids, W, scale = empty(M, dtype=torch.int64), empty(V, D), empty(2, dtype=F32)
    A, B = empty(R, V, dtype=F32), empty(D, R, dtype=F32)
    y, H = embedding.run_forward(ids, W, A, B, scale, spec)
    embedding.run_backward(y, ids, A, B, H, scale, spec, (True, True))


def few_tokens(M):
    """A layer that decodes."""
    K, N, R = 4096, 4096, 16
    x, W, A, B = empty(M, K), empty(N, K), empty(R, K, dtype=F32), empty(N, R, dtype=F32)
    few.run_forward(x, W, empty(N), A, B, [R], [2.0], False)


def magnitudes(M):
    """A DoRA layer with dropout, both ways."""
    K, N, R = 4096, 4096, 16
    spec = Spec([R], [2.0], [0.1], BF16, False, False, "triton", "accumulate")
    x, W, A, B = empty(M, K), empty(N, K), empty(R, K, dtype=F32), empty(N, R, dtype=F32)
    c, norm, seed = empty(N, dtype=F32), empty(N, dtype=F32), empty(1, dtype=torch.int64)
    y, H, P = dora.run_forward(x, W, None, A, B, c, seed, spec, True)
    dora.run_backward(y, x, W, None, A, B, c, H, P, norm, seed, spec, [True, False, False, True, True, True])


@pytest.mark.parametrize("plan", ["accumulate", "fused"])
@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=() if arch in FIRST else pytest.mark.slow) for arch in ARCHS]
)
def test_three_adapters_on_one_layer(arch, plan):
    with recording(arch) as found:
        Layer(ranks=(8, 16, 64), ps=(0.1, 0.0, 0.5), plan=plan)()
    assert not faults(arch, "bf16_f32_adapters", found)
    assert any("fused" in kernel.name for kernel in found) == (plan == "fused")


@pytest.mark.parametrize("arch", FIRST)
def test_a_crowd_of_adapters_is_a_loop(arch):
    """Their number is in the code that finds a rank's adapter, not in how often a mask is made."""
    sizes = []
    for n in (2, backend.MOST_ADAPTERS):
        with recording(arch) as found:
            launches(M, K, N, (4,) * n, (0.1,) * n, BF16, F32)["backward"]()
        assert not faults(arch, "bf16_f32_adapters", found)
        sizes.append(len(found[0].code[0]))
    assert sizes[1] < 2 * sizes[0]


@pytest.mark.parametrize("plan", ["accumulate", "fused"])
def test_launches_of_a_group(plan):
    """One skinny product for all A's, one for all their gradients, and one of size M·N each way with plan `fused`."""
    with recording("sm_90") as found:
        Group(plan=plan)()
    names = [kernel.name.removeprefix("_lora_").removesuffix("_kernel") for kernel in found]
    large = ["group_forward", "group_backward"] if plan == "fused" else ["linear_expand"]
    assert [name for name in names if "finalize" not in name and "shrink_outer" not in name] == sorted(
        ["linear_shrink", *large, "linear_outer"], key=names.index
    )
    assert names.count("linear_shrink_outer") == 2, "one an adapted sibling"


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


CALLS = {
    "group-accumulate": lambda M: Group(M=M)(),
    "group-fused": lambda M: Group(M=M, plan="fused")(),
    "block": block,
    "embedding": words,
    "magnitudes": magnitudes,
    "few": few_tokens,
}


@pytest.mark.parametrize("call", CALLS)
def test_the_token_count_specialises_nothing_in_other_ops(call, monkeypatch):
    found = kernels_of(CALLS[call], monkeypatch)
    assert len(found.pop("_lora_linear_finalize_kernel", "")) <= 5
    # siblings differ in what divides their columns of H
    assert found and all(len(kernels) <= (2 if "shrink_outer" in name else 1) for name, kernels in found.items())


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
    for offset, bias in ((0, None), (0, H[0]), (1, None)):
        Ws = place(0, 16, 256), place(offset, 16, 256)
        Bs = [place(0, 16, 8)] * 2
        calls.append(partial(lora_group.forward, place(0, 64, 256), Ws, (None, bias), H, Bs))
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


@pytest.mark.parametrize("call", ["accumulate", "fused", *CALLS])
def test_the_compiler_knows_what_is_aligned(call):
    with recording("sm_90") as found:
        CALLS[call](4096) if call in CALLS else Layer(plan=call)()
    counts = {"M", "X", "parts", "splits", "k_blocks", "m_blocks", "padding"}
    for kernel in found:
        for name, kind in kernel.arguments.items():
            if kind == "fp32":  # a scale
                continue
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
