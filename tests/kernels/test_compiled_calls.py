"""The backends' own calls as the compiler sees them: which kernels, for how many sizes, and what is aligned."""

import dataclasses
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
from peft_fast.kernels import launch, lora_group, lora_linear, skinny
from peft_fast.ops.spec import ActSpec, EmbeddingSpec, GroupSpec, Spec
from tests.kernels.launches import KINDS, empty
from tests.kernels.recording import ARCHS, FIRST, faults, recording

BF16, F32 = torch.bfloat16, torch.float32


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
    assert found
    counts = {"M", "X", "parts", "splits", "k_blocks", "m_blocks", "padding"}
    for kernel in found:
        for name, kind in kernel.arguments.items():
            if kind == "fp32":  # a scale
                continue
            assert kind.endswith("aligned") == (name not in counts), f"{kernel}: {name} is {kind}"


@pytest.mark.parametrize("name", ["_lora_linear_fused_kernel", "_lora_linear_expand_kernel"])
def test_a_kernel_that_depends_on_the_token_count_is_seen(name, monkeypatch):
    monkeypatch.setattr(lora_linear, name, triton.jit(getattr(lora_linear, name).fn))
    plan = "fused" if "fused" in name else "accumulate"
    assert len(kernels_of(lambda tokens: Layer(M=tokens, plan=plan)(), monkeypatch)[name]) > 2


def test_unaligned_rows_are_seen():
    x = torch.empty_strided((4096, 4096), (4097, 1), dtype=BF16, device="meta")
    with recording("sm_90") as found:
        skinny.shrink(x, empty(16, 4096), None, (16,), (2.0,), (0.0,))
    assert found[0].arguments["x_sm"] == "i32" and found[0].arguments["A_sr"] == "i32 aligned"
