"""The kernels as each architecture's compiler leaves them, from the project's own launches, without a GPU."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from peft_fast.backends.triton import lora_linear as backend
from peft_fast.kernels import tiles
from peft_fast.kernels.tiles import Tile
from tests.kernels.launches import KINDS, ONE_TILE, OP_OF, WITH_DROPOUT, launches
from tests.kernels.recording import ARCHS, FIRST, PRODUCTS, Launch, count, faults, recording

BF16, F32 = torch.bfloat16, torch.float32
M, K, N = 8192, 4096, 4096
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
