"""What is refused, by which exception, and in three lines: given, needed, do."""

import pytest
import torch

from peft_fast import native, settings
from peft_fast.errors import DeviceError, DtypeError, PeftFastError, SettingsError, ShapeError
from peft_fast.ops import (
    Adapter,
    Sibling,
    draw_seed,
    dropout_mask,
    lora_embedding,
    lora_group,
    lora_linear,
    lora_mlp,
)
from tests import cases_lora_embedding, numerics
from tests.inputs import DTYPES

K, N, R = 8, 6, 2
X, W = torch.ones(3, K), torch.ones(N, K)
A, B = torch.ones(R, K), torch.ones(N, R)
GOOD = Adapter(A, B)


def adapter(**changes):
    return {"adapters": [GOOD._replace(**changes)]}


BAD = {
    "x without dimensions": (ShapeError, {"x": torch.tensor(1.0)}),
    "x of another K": (ShapeError, {"x": torch.ones(3, K + 1)}),
    "x of K = 0": (ShapeError, {"x": torch.ones(3, 0)}),
    "W of another K": (ShapeError, {"W": torch.ones(N, K - 1)}),
    "W transposed by mistake": (ShapeError, {"W": W.t()}),
    "W of one dimension": (ShapeError, {"W": torch.ones(K)}),
    "W of three dimensions": (ShapeError, {"W": torch.ones(2, N, K)}),
    "Conv1D flag by mistake": (ShapeError, {"transposed": True}),
    "bias of another N": (ShapeError, {"bias": torch.ones(N + 1)}),
    "bias of two dimensions": (ShapeError, {"bias": torch.ones(1, N)}),
    "A of another K": (ShapeError, adapter(A=torch.ones(R, K + 1))),
    "A of one dimension": (ShapeError, adapter(A=torch.ones(K))),
    "B of another N": (ShapeError, adapter(B=torch.ones(N + 1, R))),
    "B of another r": (ShapeError, adapter(B=torch.ones(N, R + 1))),
    "r = 0": (ShapeError, adapter(A=torch.ones(0, K), B=torch.ones(N, 0))),
    "r beyond the limit": (ShapeError, adapter(A=torch.ones(5000, K), B=torch.ones(N, 5000))),
    "adapter bias of another N": (ShapeError, adapter(bias=torch.ones(N - 1))),
    "scaling of one dimension": (ShapeError, adapter(scaling=torch.ones(2))),
    "second adapter wrong": (ShapeError, {"adapters": [GOOD, GOOD._replace(A=torch.ones(R, 3))]}),
    "integer x": (DtypeError, {"x": X.long()}),
    "complex x": (DtypeError, {"x": X.to(torch.complex64)}),
    "float8 x": (DtypeError, {"x": X.to(torch.float8_e4m3fn)}),
    "W of another dtype": (DtypeError, {"W": W.to(torch.bfloat16)}),
    "integer W": (DtypeError, {"W": W.to(torch.int8)}),
    "float64 x on float32 W": (DtypeError, {"x": X.double()}),
    "A and B of two dtypes": (DtypeError, adapter(A=A.to(torch.bfloat16))),
    "integer adapter": (DtypeError, adapter(A=A.int(), B=B.int())),
    "integer bias": (DtypeError, {"bias": torch.ones(N, dtype=torch.int32)}),
    "W elsewhere": (DeviceError, {"W": W.to("meta")}),
    "A elsewhere": (DeviceError, adapter(A=A.to("meta"))),
    "bias elsewhere": (DeviceError, {"bias": torch.ones(N, device="meta")}),
    "adapter bias elsewhere": (DeviceError, adapter(bias=torch.ones(N, device="meta"))),
    "x on meta": (DeviceError, {"x": X.to("meta")}),
    "x no tensor": (SettingsError, {"x": None}),
    "W an array": (SettingsError, {"W": W.numpy()}),
    "sparse x": (SettingsError, {"x": X.to_sparse()}),
    "sparse B": (SettingsError, adapter(B=B.to_sparse())),
    "adapters a single one": (SettingsError, {"adapters": GOOD}),
    "adapter a tuple": (SettingsError, {"adapters": [(A, B)]}),
    "A left out": (SettingsError, adapter(A=None)),
    "scaling a string": (SettingsError, adapter(scaling="2")),
    "scaling left out": (SettingsError, adapter(scaling=None)),
    "p a string": (SettingsError, adapter(p="a")),
    "p below 0": (SettingsError, adapter(p=-0.1)),
    "p above 1": (SettingsError, adapter(p=1.1)),
    "p not a number": (SettingsError, adapter(p=float("nan"))),
    "backend of no such name": (SettingsError, {"backend": "gpu"}),
    "plan of no such name": (SettingsError, {"plan": "fastest"}),
    "cpu backend for float16": (
        SettingsError,
        {"x": X.half(), "W": W.half(), "adapters": [Adapter(A.half(), B.half())], "backend": "cpu"},
    ),
}


def three_lines(error):
    lines = str(error.value).splitlines()
    assert isinstance(error.value, PeftFastError)
    assert [line.partition(":")[0] for line in lines] == ["given", "needed", "do"], lines
    assert all(line.partition(":")[2].strip() for line in lines)


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    kind, changes = BAD[name]
    arguments = {"x": X, "W": W, "adapters": [GOOD], **changes}
    state = torch.get_rng_state()
    with pytest.raises(kind) as error:
        lora_linear(arguments.pop("x"), arguments.pop("W"), arguments.pop("bias", None), **arguments)
    three_lines(error)
    assert torch.equal(torch.get_rng_state(), state), "a refused call draws nothing"


S = Sibling(W, None, [GOOD])
DOWN = Sibling(torch.ones(K, N), None, [])
IDS, TABLE = torch.arange(3), torch.ones(5, N)
WORD = Adapter(torch.ones(R, 5), torch.ones(N, R))


def group(**options):
    return lambda: lora_group(**{"x": X, "siblings": [S, S], **options})


def block(**options):
    return lambda: lora_mlp(**{"x": X, "up": S, "down": DOWN, "gate": S, "activation": "silu", **options})


def word(**options):
    return lambda: lora_embedding(**{"ids": IDS, "W": TABLE, "adapters": [WORD], **options})


OTHERS = {
    "no siblings": (SettingsError, group(siblings=[])),
    "one sibling by itself": (SettingsError, group(siblings=S)),
    "a sibling that is a tensor": (SettingsError, group(siblings=[S, W])),
    "a sibling's adapters a single one": (SettingsError, group(siblings=[S, S._replace(adapters=GOOD)])),
    "a sibling of another K": (ShapeError, group(siblings=[S, Sibling(torch.ones(N, K + 1))])),
    "a sibling's adapter of another K": (
        ShapeError,
        group(siblings=[S, Sibling(W, None, [GOOD._replace(A=A[:, 1:])])]),
    ),
    "a sibling's W of float64": (DtypeError, group(siblings=[S, Sibling(W.double())])),
    "a sibling elsewhere": (DeviceError, group(siblings=[S, Sibling(W.to("meta"))])),
    "a group's integer x": (DtypeError, group(x=X.long())),
    "a group's plan of no such name": (SettingsError, group(plan="fastest")),
    "an unknown activation": (SettingsError, block(activation="swish")),
    "halves of no such name": (SettingsError, block(gate=None, halves="third")),
    "halves beside a gate": (SettingsError, block(halves="first")),
    "halves of an odd width": (ShapeError, block(gate=None, halves="first", down=Sibling(torch.ones(K, 4)))),
    "gate of another width": (ShapeError, block(gate=Sibling(torch.ones(N + 1, K)))),
    "down of another width": (ShapeError, block(down=Sibling(torch.ones(K, N + 1)))),
    "down of one dimension": (ShapeError, block(down=Sibling(torch.ones(K)))),
    "down's adapter of another K": (ShapeError, block(down=DOWN._replace(adapters=[GOOD]))),
    "down no sibling": (SettingsError, block(down=W)),
    "up left out": (SettingsError, block(up=None)),
    "the block's p above 1": (SettingsError, block(p=1.5)),
    "the block's p a string": (SettingsError, block(p="a")),
    "float ids": (DtypeError, word(ids=IDS.float())),
    "ids a list": (SettingsError, word(ids=[1, 2])),
    "a table of one dimension": (ShapeError, word(W=torch.ones(5))),
    "an integer table": (DtypeError, word(W=TABLE.int())),
    "A of another vocabulary": (ShapeError, word(adapters=[WORD._replace(A=torch.ones(R, 6))])),
    "B of another width": (ShapeError, word(adapters=[WORD._replace(B=torch.ones(N + 1, R))])),
    "no rank": (ShapeError, word(adapters=[Adapter(torch.ones(0, 5), torch.ones(N, 0))])),
    "A and B of two dtypes": (DtypeError, word(adapters=[WORD._replace(A=WORD.A.to(torch.bfloat16))])),
    "an embedding's dropout": (SettingsError, word(adapters=[WORD._replace(p=0.1)])),
    "an embedding's bias": (SettingsError, word(adapters=[WORD._replace(bias=torch.ones(N))])),
    "an embedding's scaling of one dimension": (ShapeError, word(adapters=[WORD._replace(scaling=torch.ones(2))])),
    "padding beyond the table": (ShapeError, word(padding_idx=5)),
    "a scale of two elements": (SettingsError, word(scale=torch.ones(2))),
    "a scale in words": (SettingsError, word(scale="2")),
    "a table elsewhere": (DeviceError, word(W=TABLE.to("meta"))),
    "an embedding's backend of no such name": (SettingsError, word(backend="gpu")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_refuse(name):
    kind, run = OTHERS[name]
    state = torch.get_rng_state()
    with pytest.raises(kind) as error:
        run()
    three_lines(error)
    assert torch.equal(torch.get_rng_state(), state), "a refused call draws nothing"


@numerics.each(cases_lora_embedding.STEP)
@pytest.mark.parametrize("bad", [-1, 61, 2**40])
def test_no_such_word(provider, case, bad):
    p = numerics.problem(case, DTYPES["f32"])
    p.tensors["ids"][1, 2] = bad
    if numerics.DEVICE.type != "cpu":
        pytest.skip("asserted by the device, which then takes no more calls")
    with provider.active(), pytest.raises((IndexError, RuntimeError)):
        numerics.call(p, provider)


def test_siblings_of_different_dtypes():
    """Adapters of two dtypes, weights of two under autocast: as if each had been widened or rounded by hand."""
    torch.manual_seed(0)
    x, W = torch.randn(5, K), torch.randn(N, K)
    A, B = torch.randn(R, K), torch.randn(N, R)
    half = Adapter(A.to(torch.bfloat16), B.to(torch.bfloat16))
    y, z = lora_group(x, [Sibling(W, None, [Adapter(A, B)]), Sibling(W, None, [half])])
    torch.testing.assert_close(y, x @ W.T + x @ A.T @ B.T)
    torch.testing.assert_close(z, x @ W.T + x @ half.A.float().T @ half.B.float().T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = lora_group(x, [Sibling(W), Sibling(W.to(torch.bfloat16))])
    assert y.dtype == torch.bfloat16 and torch.equal(y, z)


def test_autocast_does_not_turn_integers_into_activations():
    with pytest.raises(DtypeError) as error, torch.autocast("cpu", dtype=torch.bfloat16):
        lora_linear(X.long(), W, None, [GOOD])
    three_lines(error)


@pytest.mark.parametrize("p", [-0.5, 1.5, float("nan")])
def test_mask_of_a_bad_p(p):
    with pytest.raises(SettingsError) as error:
        dropout_mask(draw_seed(1)[0], 3, 4, p)
    three_lines(error)


@pytest.mark.parametrize(("field", "value"), [("backend", "gpu"), ("isa", "sse"), ("pack_mb", -2)])
def test_bad_settings(field, value):
    with pytest.raises(SettingsError) as error, settings.override(**{field: value}):
        pass
    three_lines(error)


@pytest.mark.parametrize(
    "env",
    [{"PEFT_FAST_BACKEND": "gpu"}, {"PEFT_FAST_PACK_MB": "many"}, {"PEFT_FAST_EXACT": "maybe"}],
    ids=str,
)
def test_bad_environment(env):
    with pytest.raises(SettingsError) as error:
        settings.from_env(env)
    three_lines(error)
    assert next(iter(env)) in str(error.value)


def test_a_backend_of_the_settings_that_cannot_serve_falls_back():
    with settings.override(backend="cpu"):
        y = lora_linear(X.half(), W.half(), None, [Adapter(A.half(), B.half())])
    assert torch.equal(y, torch.full((3, N), 24.0, dtype=torch.float16))


@pytest.mark.parametrize("odd", [torch.float64, torch.float16])
@pytest.mark.parametrize("where", ["adapters", "bias"])
def test_dtypes_the_kernels_lack_take_another_backend(odd, where):
    x, W = torch.randn(5, 8), torch.randn(6, 8)
    A, B, bias = torch.randn(2, 8), torch.randn(6, 2), torch.randn(6)
    y = lora_linear(
        x,
        W,
        bias.to(odd) if where == "bias" else bias,
        [Adapter(A.to(odd), B.to(odd)) if where == "adapters" else Adapter(A, B)],
    )
    torch.testing.assert_close(y, x @ W.T + bias + x @ A.T @ B.T, rtol=1e-2, atol=1e-2)


def test_operators_called_directly_check_their_shapes():
    if not native.load():
        pytest.skip(native.reason())
    x, W, A, B = torch.randn(5, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
    rest = (A, B, None, [2], [1.0], [0.0], False)
    with pytest.raises(RuntimeError, match="a bias of another length"):
        torch.ops.peft_fast.lora_linear(x, W, torch.randn(2), *rest)
    with pytest.raises(RuntimeError, match="shapes that do not fit"):
        torch.ops.peft_fast.lora_linear(x, W[:, :4], None, *rest)
    H = torch.randn(5, 2)
    for bad in ((x[:, :4], W, A, B, H), (x, W, A[:1], B, H), (x, W, A, B[:3], H), (x, W, A, B, H[:2])):
        with pytest.raises(RuntimeError, match="that do not fit|another H than the forward's"):
            torch.ops.peft_fast.lora_linear_backward(torch.randn(5, 6), *bad, *rest[2:], [True] * 5, False)
