"""lora_decode: the numeric contract on every instruction set, and what it leaves to lora_linear."""

import pytest
import torch

from peft_fast import native, ops
from peft_fast.errors import SettingsError, ShapeError
from peft_fast.ops import Adapter, lora_decode, lora_linear
from peft_fast.ops.lora_decode import MOST, most
from tests import cases_lora_decode as table
from tests import numerics
from tests.inputs import DTYPES
from tests.numerics import Provider

ON_CPU = numerics.DEVICE.type == "cpu"
pytestmark = pytest.mark.skipif(ON_CPU and not native.load(), reason=f"the compiled operators: {native.reason()}")
cpu_only = pytest.mark.skipif(not ON_CPU, reason="about the compiled operator")

ISAS = [Provider("cpu", isa=isa) for isa in numerics.isas()] if ON_CPU else []
GPU = numerics.gpu_providers("lora_decode")
COMPILED = [
    (provider, case, dtypes)
    for case, dtypes in table.rows()
    for provider in ISAS
    if DTYPES[dtypes].compute in (torch.float32, torch.bfloat16)
    # memory is read the same way on every instruction set, and for every dtype of the adapters
    if (provider is ISAS[-1] and dtypes != "bf16") or case.name in table.EVERYWHERE
]
ROWS = [
    pytest.param(provider, case, dtypes, id=f"{provider}-{case.op}-{dtypes}-{case.name}")
    for provider, case, dtypes in (*COMPILED, *((provider, *row) for row in table.rows() for provider in GPU))
]


@pytest.mark.parametrize(("provider", "case", "dtypes"), ROWS)
def test_no_less_accurate_than_peft(provider, case, dtypes):
    assert not numerics.failures(numerics.default_verdicts(provider, case, dtypes))


@pytest.mark.parametrize("case", table.EMPTY, ids=lambda case: case.name)
def test_no_tokens(case):
    problem = numerics.problem(case, DTYPES["bf16_f32_adapters"])
    out = numerics.ours(problem, (GPU or ISAS)[-1])
    assert {name: t.shape for name, t in out.items()} == {n: torch.Size(s) for n, s in case.outputs().items()}


# fault -> what it makes of the adapter and of y, planted around the operator
FAULTS = {
    "scale off by 1 %": (lambda a: a._replace(scaling=a.scaling * 1.01), lambda y: y),
    "no scale": (lambda a: a._replace(scaling=1.0), lambda y: y),
    "sign": (lambda a: a._replace(B=-a.B), lambda y: y),
    "last rank missing": (lambda a: a._replace(A=a.A[:-1], B=a.B[:, :-1]), lambda y: y),
    "last column of A": (lambda a: a._replace(A=torch.cat([a.A[:, :-1], 0 * a.A[:, -1:]], 1)), lambda y: y),
    "adapter's bias unscaled": (lambda a: a._replace(bias=a.bias / a.scaling), lambda y: y),
    "four parts of a thousand": (lambda a: a, lambda y: (y.double() * 1.004).to(y.dtype)),
    "last token without the adapter": (lambda a: a, lambda y: torch.cat([y[:-1], y[-1:] * 0.5])),
}


@pytest.mark.parametrize("dtypes", ["f32", "bf16_f32_adapters"])
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_rejected(fault, dtypes):
    on_adapter, on_y = FAULTS[fault]
    case = table.Case("planted", lead=(7,), K=130, N=90, ranks=(5,), bias=True, adapter_bias=True)

    def faulty(x, W, bias, adapters, op, **options):
        return on_y(lora_decode(x, W, bias, [on_adapter(a) for a in adapters], **options))

    assert numerics.failures(numerics.verdicts(faulty, case, dtypes, round_adapters=False))


def tensors(M=3, K=70, N=50, dtype=torch.bfloat16, r=4, grad=False):
    torch.manual_seed(0)
    x, W, A, B = (torch.randn(*s) for s in ((M, K), (N, K), (r, K), (N, r)))
    return x.to(dtype), W.to(dtype), [Adapter(A.requires_grad_(grad), B.requires_grad_(grad), 0.5)]


# tokens beside whole tiles of 16 and 32, columns beside them, k beside 32 and beyond the 1024 that are packed at a time
SIZES = [(1, 16, 128), (5, 16, 128), (6, 33, 130), (16, 300, 127), (17, 47, 161), (32, 64, 4128), (33, 31, 4099),
         (64, 15, 128), (70, 290, 200), (7, 40, 8300)]  # fmt: skip


@cpu_only
@pytest.mark.parametrize("provider", ISAS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_sums_of_integers_are_exact(provider, size):
    """Float32 sums of these have no rounding: one element of W or x that is missed or taken twice shows."""
    M, N, K = size
    torch.manual_seed(0)
    wide = torch.randint(-3, 4, (N, K + 8)).bfloat16()
    x = torch.randint(-3, 4, (M, K)).bfloat16()
    wide[:, K:] = torch.nan  # what lies behind a row of W is not W's
    W = wide[:, :K]
    with provider.active():
        # without a bias of another dtype a layer that adds nothing is torch's own
        y = torch.ops.peft_fast.lora_decode(x, W, torch.zeros(N), [], [], [], [], False)
    assert torch.equal(y, (x.double() @ W.double().T).bfloat16())


@cpu_only
@pytest.mark.parametrize("transposed", [False, True])
def test_threads_make_no_difference(transposed):
    x, W, adapters = tensors(2, 700, 900)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(lora_decode(x, W.t().contiguous() if transposed else W, None, adapters, transposed=transposed))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_no_adapter_and_one_that_is_zero():
    x, W, (adapter,) = tensors()
    zero = adapter._replace(B=torch.zeros_like(adapter.B))
    assert torch.equal(lora_decode(x, W), lora_decode(x, W, None, [zero]))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_stay_in_their_row(bad, transposed):
    x, W, adapters = tensors(6, 37)
    W = W.t().contiguous() if transposed else W
    clean = lora_decode(x, W, None, adapters, transposed=transposed)
    x[3, 36] = bad
    y = lora_decode(x, W, None, adapters, transposed=transposed)
    kept = [0, 1, 2, 4, 5]
    assert torch.equal(y[kept], clean[kept]) and not y[3].isfinite().any()


def test_gradients_and_dropout_are_lora_linears():
    x, W, adapters = tensors(grad=True)
    y = lora_decode(x, W, None, adapters)
    assert y.requires_grad and torch.equal(y, lora_linear(x, W, None, adapters))
    with torch.no_grad():
        assert not lora_decode(x, W, None, adapters).requires_grad
    dropped = [a._replace(A=a.A.detach(), B=a.B.detach(), p=0.5) for a in adapters]
    torch.manual_seed(1)
    y = lora_decode(x, W, None, dropped)
    torch.manual_seed(1)
    assert torch.equal(y, lora_linear(x, W, None, dropped))


@cpu_only
def test_other_dtypes_and_backends():
    x, W, (adapter,) = tensors(dtype=torch.float64)
    wide = [Adapter(adapter.A.double(), adapter.B.double(), 0.5)]
    assert torch.equal(lora_decode(x, W, None, wide), lora_linear(x, W, None, wide))
    x, W, adapters = tensors(dtype=torch.float32)
    assert torch.equal(
        lora_decode(x, W, None, adapters, backend="torch"), lora_linear(x, W, None, adapters, backend="torch")
    )
    with pytest.raises(SettingsError):
        lora_decode(x.half(), W.half(), None, adapters, backend="cpu")


@cpu_only
def test_errors_name_what_is_wrong():
    x, W, adapters = tensors()
    with pytest.raises(ShapeError, match=r"x \(3, 69\)"):
        lora_decode(x[:, 1:], W, None, adapters)
    with pytest.raises(ShapeError):
        lora_decode(x, W, torch.zeros(3, dtype=x.dtype), adapters)
    with pytest.raises(RuntimeError, match="shapes that do not fit"):
        torch.ops.peft_fast.lora_decode(x, W, None, [adapters[0].A], [adapters[0].B[1:]], [None], [1.0], False)
    with pytest.raises(RuntimeError, match="shapes that do not fit"):
        torch.ops.peft_fast.lora_decode(x, W, None, [adapters[0].A], [], [None], [1.0], False)


@cpu_only
def test_it_is_counted_and_traces():
    x, W, adapters = tensors()
    before = ops.fast_calls()
    y = lora_decode(x, W, None, adapters)
    assert ops.fast_calls() == before + 1
    compiled = torch.compile(lambda x: lora_decode(x, W, None, adapters), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), y)
    torch.library.opcheck(
        torch.ops.peft_fast.lora_decode.default,
        (x, W, None, [adapters[0].A], [adapters[0].B], [None], [0.5], False),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_how_many_tokens_it_is_for(monkeypatch):
    """More than MOST only where that was measured: on other machines a product with packed operands may be faster."""
    monkeypatch.setattr(native, "isa", lambda: "avx512_bf16")
    assert (most(torch.float32), most(torch.bfloat16), most(torch.float16)) == (127, 96, MOST)
    monkeypatch.setattr(native, "isa", lambda: "amx")
    assert (most(torch.float32), most(torch.bfloat16), most(torch.float16)) == (64, 64, MOST)
    monkeypatch.setattr(native, "isa", lambda: "avx512")
    assert most(torch.float32) == most(torch.bfloat16) == MOST
