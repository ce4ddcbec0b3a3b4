"""The kernels of lora_experts as each architecture's compiler leaves them, without a GPU."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft_fast.backends.triton import lora_experts as backend
from peft_fast.kernels import launch, lora_experts, tiles
from peft_fast.ops.spec import ExpertsSpec, Routing
from tests.kernels.experts import launches
from tests.kernels.launches import KINDS, empty
from tests.kernels.recording import ARCHS, PRODUCTS, count, faults, recording

BF16, F32 = torch.bfloat16, torch.float32
E, K, N = 128, 2048, 1536
# rows of an expert: blocks of rows are narrow, and wide
ROWS = {"few": 32, "many": 512}
# the others are slow
QUICK = {("sm_80", 64, "few"), ("sm_90", 64, "many"), ("gfx942", 256, "many")}
NAMES = ("shrink", "shrink of g", "forward", "backward", "dA", "dB", "dbias", "collect")


def compiled(arch, name, kind="bf16_f32_adapters", rank=16, rows="many", tokens=True):
    counts = [ROWS[rows]] * E
    with recording(arch) as found:
        launches(counts, 0, K, N, rank, *KINDS[kind], tokens=sum(counts) // 8 if tokens else 0)[name]()
    return found


def rows_of():
    found = []
    for arch, kind, rank, rows in itertools.product(ARCHS, KINDS, (16, 32, 64, 256), ROWS):
        quick = (arch, rank, rows) in QUICK and kind == ("f16" if arch == "sm_90" else "bf16_f32_adapters")
        found.append(pytest.param(arch, kind, rank, rows, marks=() if quick else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("arch", "kind", "rank", "rows"), rows_of())
def test_shipped_tiles(arch, kind, rank, rows):
    for name in NAMES:
        found = compiled(arch, name, kind, rank, rows)
        assert found and not faults(arch, kind, found)


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize("arch", ["sm_90", *(pytest.param(a, marks=pytest.mark.slow) for a in ("sm_80", "gfx942"))])
def test_adapters_add_nothing_to_the_main_loop(arch, name):
    (ours,), (base,) = compiled(arch, name), compiled(arch, f"frozen {name}")
    products = [count(PRODUCTS, kernel.main_loop) for kernel in (ours, base)]
    assert products[0] == products[1] > 0
    assert len(ours.main_loop) <= 1.05 * len(base.main_loop)


def layer(tokens, k=8):
    """One call of the backend, forward and backward."""
    S = tokens * k
    spec = ExpertsSpec([16], [2.0], True, False, False, "triton")
    places = empty(S, dtype=torch.int64)
    x, W, bias = empty(tokens, K), empty(E, N, K), empty(E, N)
    A, B = empty(E, 16, K, dtype=F32), empty(N, 16 * E, dtype=F32)
    routing = Routing(places, places, empty(E, dtype=torch.int64), k)
    y, H = backend.run_forward(x, W, bias, A, B, routing, spec)
    backend.run_backward(y, x, W, bias, A, B, H, routing, spec, (True,) * 4)


def test_the_token_count_chooses_between_two_tiles_and_specialises_nothing(monkeypatch):
    monkeypatch.setattr(launch, "KNOWN", False)
    with recording("sm_90") as found:
        for tokens in (16, 511, 4096):
            layer(tokens)
    names = {}
    for kernel in found:
        names.setdefault(kernel.name, set()).add(kernel.identity)
    # forward and backward; a bias' gradient has one column of ranks
    assert {name.removeprefix("_lora_experts_").removesuffix("_kernel"): len(v) for name, v in names.items()} == {
        "shrink": 2,
        "product": 4,
        "outer": 3,
        "collect": 1,
    }


def test_launches_of_a_layer():
    with recording("sm_90") as found:
        layer(512)
    names = [kernel.name.removeprefix("_lora_experts_").removesuffix("_kernel") for kernel in found]
    assert names == ["shrink", "product", "shrink", "product", "collect", "outer", "outer", "outer"]


def test_the_compiler_knows_what_is_aligned():
    with recording("sm_90") as found:
        layer(512)
    for kernel in found:
        for name, kind in kernel.arguments.items():
            if kind == "fp32" or (
                kind.startswith("i32") and name in ("k", "R", "D_sm", "B_sr", "A_sr", "A_sk", "W_sk")
            ):
                continue  # scales, and what may be 1 or 8
            assert kind.endswith("aligned") == (name not in ("S", "T")), f"{kernel}: {name} is {kind}"


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_wide_loads(arch):
    for name in ("shrink", "forward", "dA"):
        (kernel,) = compiled(arch, name)
        assert count(r"LDG(STS)?\S*\.128|(buffer|global)_load_dwordx4", kernel.code[0]), kernel


def test_gathered_rows_are_read_ahead():
    """dA's loop reads x through another read: its copies go to shared memory while the last are multiplied."""
    (kernel,) = compiled("sm_90", "dA")
    assert count(r"LDGSTS", kernel.main_loop) and count(r"HMMA|HGMMA", kernel.main_loop)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("E", [1, 8, 128, 512])
def test_grids_cover_the_worst_routing(arch, E):
    with recording(arch):
        for S in (1, 7, E, 40 * E, 4096 * E):
            tile = lora_experts.product_tile(S, E, N, K, 16, BF16)
            groups = min(E + 1, S)  # one row each, and all others in the last
            blocks = (groups - 1) + tiles_of(S - groups + 1, tile.BM)
            assert lora_experts.most_blocks(S, E, tile.BM) == blocks
            assert tile in tiles.candidates("fused", "r16", "bf16", ARCHS[arch].target.arch) or tile.BM == 64


def tiles_of(rows, block):
    return -(-rows // block)


def test_a_tile_that_spills_is_seen(monkeypatch):
    tile = tiles.Tile(128, 256, 64, 4, 3, 8)
    monkeypatch.setattr(lora_experts, "product_tile", lambda *_: tile)
    (kernel,) = compiled("sm_90", "forward")
    assert "spill" in str(faults("sm_90", "bf16", [kernel]))
