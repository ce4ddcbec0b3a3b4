"""Hard places of the Triton backend, played without a GPU: never wrong, only slower, and the reason is told.

Launches never reach a compiler here: they are noted, or made to fail.
"""

import contextlib
import os
import re
from types import SimpleNamespace

import pytest
import torch

from peft_fast import dispatch
from peft_fast.backends import triton as backend
from peft_fast.backends.torch import lora_linear as vendor
from peft_fast.backends.triton import lora_linear as ours
from peft_fast.ops import draw_seed
from peft_fast.ops.spec import Spec
from tests import numerics

jit = pytest.importorskip("triton.runtime.jit")
errors = pytest.importorskip("triton.runtime.errors")
compiler = pytest.importorskip("triton.compiler.errors")
recording = pytest.importorskip("tests.kernels.recording")

PLANS = dispatch.BACKEND_PLANS["triton"]
pytestmark = pytest.mark.skipif(numerics.DEVICE.type != "cpu", reason="the devices of these tests are played")


@pytest.fixture(autouse=True)
def _a_clean_slate(monkeypatch):
    from peft_fast.kernels import launch

    monkeypatch.setattr(ours.guarded, "failed", {})
    monkeypatch.setattr(launch, "_compiled", {})
    for cached in (backend._reason, backend._device_reason):
        cached.cache_clear()
    yield
    for cached in (backend._reason, backend._device_reason):
        cached.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """machine("sm_90"): Triton's driver is that of such a device."""
    from peft_fast.kernels import device

    def become(arch):
        monkeypatch.setattr(recording.driver, "_active", recording.Recorder(arch))

    yield become
    device.target.cache_clear()


@pytest.fixture
def launches(monkeypatch, machine):
    """(kernel's name, its arguments, the device its launch went to) of every launch, none of which runs."""
    from peft_fast.kernels import device, dropout, skinny
    from peft_fast.kernels import lora_linear as gemm

    current, noted = [], []

    @contextlib.contextmanager
    def on(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    def run(self, *args, grid, warmup, **options):
        noted.append((self.__name__, dict(zip(self.arg_names, args, strict=True)), current[-1] if current else None))

    for module in (device, dropout, skinny, gemm):
        monkeypatch.setattr(module, "on", on)
    monkeypatch.setattr(jit.JITFunction, "run", run)
    machine("sm_90")
    return noted


def problem(device="cpu", ranks=(4, 3), ps=(0.3, 0.0), dtype=torch.bfloat16, plan="accumulate"):
    """x, W, bias, A, B, seed, spec and g of a layer of 37 tokens, 40 → 24."""
    torch.manual_seed(0)
    M, K, N, R = 37, 40, 24, sum(ranks)
    tensors = [torch.randn(*size).to(device, dtype) for size in ((M, K), (N, K), (N,), (R, K), (N, R))]
    seed = draw_seed(len(ranks)).to(device)
    spec = Spec(list(ranks), [0.5] * len(ranks), list(ps), dtype, False, False, "triton", plan)
    return *tensors, seed, spec, torch.randn(M, N).to(device, dtype)


def both_ways(module, x, W, bias, A, B, seed, spec, g):
    y, H = module.forward(x, W, bias, A, B, seed, spec)
    return y, *module.backward(g, x, W, bias, A, B, H, seed, spec, (True,) * 5)


def plain(given):
    return both_ways(vendor, *given[:6], given[6]._replace(plan="accumulate"), given[7])


def same(these, those):
    return all(numerics.same_bits(a, b) for a, b in zip(these, those, strict=True))


# ---- what a launch may do


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("ps", [(0.3, 0.0), (0.0, 0.0)], ids=str)
def test_a_step_reads_no_value_and_launches_on_the_tensors_device(launches, plan, ps):
    """Meta tensors have no values: what runs on them synchronises nothing, so a graph can capture it."""
    x, W, bias, A, B, seed, spec, g = problem("meta", ps=ps, plan=plan)
    y, H = ours.run_forward(x, W, bias, A, B, seed, spec)
    dx, dW, dbias, dA, dB = ours.run_backward(g, x, W, bias, A, B, H, seed, spec, (True,) * 5)
    assert [t.shape for t in (y, dx, dA, dB)] == [g.shape, x.shape, A.shape, B.shape]
    assert launches and {device for _, _, device in launches} == {torch.device("meta")}
    assert ("_lora_linear_fused_kernel" in {name for name, *_ in launches}) == (plan == "fused")


def test_the_tensors_device_is_the_current_one(monkeypatch):
    from peft_fast.kernels import device

    monkeypatch.setattr(torch.cuda, "device", lambda d: contextlib.nullcontext(d))
    with device.on(SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))) as current:
        assert current == torch.device("cuda", 1)
    with device.on(torch.empty(0)) as current:
        assert current is None


def test_each_device_has_its_own_architecture(machine):
    from peft_fast.kernels import device

    for arch in ("sm_90", "sm_80", "gfx942", "sm_90"):
        machine(arch)
        assert device.target() == (recording.ARCHS[arch].target.arch, recording.ARCHS[arch].processors)


@pytest.mark.parametrize(("M", "K", "N"), [(0, 40, 24), (37, 0, 24), (37, 40, 0)], ids=str)
def test_nothing_is_launched_for_nothing(launches, M, K, N):
    x, W, bias, A, B, seed, spec, g = problem()
    y, dx, *_ = both_ways(ours, x[:M, :K], W[:N, :K], bias[:N], A[:, :K], B[:N], seed, spec, g[:M, :N])
    assert (y.shape, dx.shape) == ((M, N), (M, K)) and not launches


def test_a_crowd_of_adapters_is_the_torch_backends(launches):
    given = problem(ranks=(1,) * (ours.MOST_ADAPTERS + 1), ps=(0.0,) * (ours.MOST_ADAPTERS + 1))
    assert same(both_ways(ours, *given), plain(given))
    assert not launches and not ours.failures()


@pytest.mark.parametrize(
    ("what", "change"),
    {
        "fits": lambda x, W: (x, W),
        "W turned": lambda x, W: (x, W.t().contiguous().t()),
        "W strided": lambda x, W: (x, torch.empty(64, 128, 2, dtype=W.dtype)[..., 0]),
        "rows of 258 bytes": lambda x, W: (torch.empty(37, 129, dtype=x.dtype)[:, :128], W),
        "an odd address": lambda x, W: (torch.empty(37 * 128 + 1, dtype=x.dtype)[1:].view(37, 128), W),
        "one row for all": lambda x, W: (x[:1].expand(37, 128), W),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_descriptors_only_where_the_layout_suits_them(launches, what, change):
    from peft_fast.kernels import lora_linear as gemm
    from peft_fast.kernels import tiles

    x, W = change(torch.empty(37, 128, dtype=torch.bfloat16), torch.empty(64, 128, dtype=torch.bfloat16))
    tile = next(t for t in tiles.candidates("fused", "r0", "bf16", 90) if t.tma)
    gemm.fused(x, W, None, None, W[:, :0], None, (), (), x.dtype, overrides={("fused", "r0", "bf16"): tile})
    assert launches[0][1]["TMA"] == (what in ("fits", "W turned"))


# ---- what fails


def failing(monkeypatch, error):
    """Every launch raises; the list of attempts."""
    tried = []

    def run(self, *args, **options):
        tried.append(self.__name__)
        raise error

    monkeypatch.setattr(jit.JITFunction, "run", run)
    return tried


FAILURES = {
    "a kernel that does not compile": (
        compiler.CompilationError("a = b", None, "b is not defined"),
        "b is not defined",
    ),
    "an assembler that fails": (errors.PTXASError("ptxas died\nof something"), "PTXAS error: ptxas died"),
    "a tile that does not fit": (errors.OutOfResources(300000, 232448, "shared memory"), "Hardware limit: 232448"),
    "a driver too old": (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "image is invalid"),
    "no C compiler": (RuntimeError("Failed to find C compiler. Please specify via CC"), "C compiler"),
    "an assertion of Triton's": (AssertionError(), "AssertionError"),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("failure", FAILURES)
def test_torch_takes_over(monkeypatch, machine, failure, plan):
    machine("sm_90")
    error, words = FAILURES[failure]
    given, tried = problem(plan=plan), failing(monkeypatch, error)
    with pytest.warns(RuntimeWarning, match="torch runs it instead"):
        assert same(both_ways(ours, *given), plain(given))
    assert len(tried) == 2 and len(dispatch.failures()) == 2, "forward and backward"
    assert all(words in why and "\n" not in why for why in dispatch.failures())
    assert same(both_ways(ours, *given), plain(given)) and len(tried) == 2, "a failed kernel is not tried again"


def test_without_a_driver(monkeypatch):
    class Drivers:
        @property
        def active(self):
            raise RuntimeError("0 active drivers ([]). There should only be one.")

    monkeypatch.setattr("triton.runtime.driver", Drivers())
    given = problem()
    with pytest.warns(RuntimeWarning, match="0 active drivers"):
        assert same(both_ways(ours, *given), plain(given))


def test_a_failure_while_a_stream_is_captured_is_not_for_ever(monkeypatch, machine):
    machine("sm_90")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    given, tried = problem(ps=(0.0, 0.0)), failing(monkeypatch, RuntimeError("operation not permitted"))
    for calls in (2, 4):
        with pytest.warns(RuntimeWarning, match="not permitted"):
            assert same(both_ways(ours, *given), plain(given))
        assert len(tried) == calls and not ours.failures()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), torch.OutOfMemoryError),
        (RuntimeError("Triton Error [CUDA]: out of memory"), torch.OutOfMemoryError),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), torch.AcceleratorError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), RuntimeError),
    ],
    ids=["torch", "Triton", "a broken device", "cuBLAS"],
)
def test_what_torch_cannot_do_either_is_raised(monkeypatch, machine, error, kind):
    machine("sm_90")
    failing(monkeypatch, error)
    for call in (lambda: both_ways(ours, *problem()), lambda: ours.run_mask(draw_seed(1)[0], 3, 5, 0.5)):
        with pytest.raises(kind, match=re.escape(str(error))):
            call()
    assert not ours.failures(), "the next call may have the memory"


def test_a_child_process_goes_on(monkeypatch, machine):
    machine("sm_90")
    failing(monkeypatch, FAILURES["a driver too old"][0])
    given = problem()
    with pytest.warns(RuntimeWarning):
        expected = both_ways(ours, *given)
    read, write = os.pipe()
    if not (child := os.fork()):
        os.write(write, b"same" if same(both_ways(ours, *given), expected) else b"else")
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as result:
        assert result.read() == b"same"
    os.waitpid(child, 0)


# ---- launches by our own key


@pytest.fixture
def counted(monkeypatch, machine):
    """[launches that Triton looked up, launches found by our key]; nothing is compiled."""
    counts, kernel = [0, 0], SimpleNamespace(function=0, packed_metadata=0, launch_metadata=lambda *_: None)

    def found(*args):
        counts[1] += 1

    def looked_up(self, *args, grid, warmup, **options):
        counts[0] += 1
        return kernel

    kernel.run = found
    monkeypatch.setattr(jit.JITFunction, "run", looked_up)
    machine("sm_90")
    return counts


def test_a_launch_is_looked_up_once(counted):
    given = problem("meta")
    H = ours.run_forward(*given[:7])[1]
    first = counted[0]
    assert first and not counted[1]
    for _ in range(2):
        ours.run_forward(*given[:7])
    assert counted == [first, 2 * first] and H.shape == (37, 7)


OTHERS = {
    "more tokens": (lambda x, A: (torch.empty(4096, 48), A), 0),
    "other rows": (lambda x, A: (torch.empty(37, 64)[:, :48], A), 1),
    "other address": (lambda x, A: (torch.empty(37 * 48 + 1)[1:].view(37, 48), A), 1),
    "other dtype": (lambda x, A: (x.bfloat16(), A), 1),
    "other adapter dtype": (lambda x, A: (x, A.bfloat16()), 1),
    "other width": (lambda x, A: (torch.empty(37, 40), torch.empty(8, 40)), 1),
    "other rank": (lambda x, A: (x, torch.empty(16, 48)), 1),
    "other layout": (lambda x, A: (x, torch.empty(48, 8).t()), 1),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_specialises_a_kernel_is_in_the_key(counted, what):
    from peft_fast.kernels import skinny

    def shrink(x, A):
        skinny.shrink(x, A, None, (A.shape[0],), (1.0,), (0.0,))

    x, A = torch.empty(37, 48), torch.empty(8, 48)
    shrink(x, A)
    before = counted[0]
    change, more = OTHERS[what]
    shrink(*change(x, A))
    assert bool(counted[0] - before) == bool(more)


def test_dropout_and_device_are_in_the_key(counted, machine):
    from peft_fast.kernels import skinny

    x, A, seed = torch.empty(37, 48), torch.empty(8, 48), draw_seed(1)
    for ps, arch in (((0.0,), "sm_90"), ((0.1,), "sm_90"), ((0.2,), "sm_90"), ((0.1,), "sm_80")):
        before = counted[0]
        machine(arch)
        skinny.shrink(x, A, seed if any(ps) else None, (8,), (1.0,), ps)
        assert counted[0] > before
