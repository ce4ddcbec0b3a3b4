"""What autograd keeps of each op between forward and backward: x once, H's, seeds, gate and up; no mask and no h."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import cases_lora_embedding, cases_lora_group, cases_lora_mlp, numerics
from tests.cases import Case
from tests.inputs import DTYPES, Layer

M, I = 64, 52
TWO, ONE = Layer(24, (4, 8), (0.3, 0.0), (2.0, 0.5), bias=True, adapter_bias=True), Layer(9, (3,), (0.1,), (1.0,))
NONE = Layer(17, (), (), ())
# case, floats of H for each token, elements in the activations' dtype for each token
KEPT = [
    (Case("saved", (M,), 40, 24, (4, 8), (0.3, 0.0), (2.0, 0.5), bias=True), 12, 0),
    (cases_lora_group.Case("saved_group", (TWO, NONE, ONE), lead=(M,)), 15, 0),
    (cases_lora_group.Case("saved_frozen_group", (NONE, NONE), lead=(M,)), 0, 0),
    (cases_lora_mlp.Case("saved_gated", gate=TWO, up=ONE, down=ONE, lead=(M,), I=I, p=0.1), 18, 2 * I),
    (cases_lora_mlp.Case("saved_plain", "gelu", up=ONE, down=ONE, lead=(M,), I=I, p=0.1), 6, I),
    (cases_lora_mlp.Case("saved_halves", "gelu", "first", up=ONE, down=TWO, lead=(M,), I=I), 15, 2 * I),
    (cases_lora_mlp.Case("saved_frozen", gate=NONE, up=NONE, down=NONE, lead=(M,), I=I), 0, 2 * I),
    (cases_lora_embedding.Case("saved_embedding", (M,), ranks=(8,), scale=2.0), 8, 0),
]
ROWS = [
    pytest.param(*p.values, *row, id=f"{p.id}-{row[0].name}", marks=p.marks)
    for row in KEPT
    for p in numerics.providers(row[0].op)
    if p.values[0].backend != "reference"
]


def kept(p, forward):
    """Storages that autograd keeps beside leaves: address -> (bytes, a tensor in it), and the addresses of leaves."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward(p.tensors)
    leaves = {name: t.untyped_storage().data_ptr() for name, t in p.tensors.items()}
    extra = {address: found for address, found in saved.items() if address not in leaves.values()}
    return extra, {name for name, address in leaves.items() if address in saved}


@pytest.mark.parametrize(("provider", "case", "low", "wide"), ROWS)
@pytest.mark.parametrize("dtypes", ["f32", "bf16", "bf16_f32_adapters"])
def test_saves_no_more(provider, case, low, wide, dtypes):
    p = numerics.problem(case, DTYPES[dtypes])
    with provider.active():
        extra, leaves = kept(p, lambda t: numerics.call(p, provider, t))
    allowed = M * (4 * low + DTYPES[dtypes].compute.itemsize * wide)
    # lora_linear's adapters side by side, merged biases, seeds, an embedding's scales, x's stand-in
    parameters = sum(4 * t.numel() for n, t in p.tensors.items() if n[0] in "AB" and case.op == "lora_linear")
    parameters += sum(4 * t.numel() for n, t in p.tensors.items() if "bias" in n) + 8 * len(case.dropouts()) + 16
    assert sum(size for size, _ in extra.values()) <= allowed + parameters
    assert not any(t.dtype == torch.bool for _, t in extra.values()), "a mask was saved"
    if "frozen" in case.name:
        assert "x" not in leaves, "x is kept for nobody"


@pytest.mark.parametrize("dtypes", ["bf16", "bf16_f32_adapters"])
def test_a_block_keeps_less_than_half_of_stock(dtypes):
    layer = Layer(N=64, ranks=(8,), p=(0.05,))
    case = cases_lora_mlp.Case("llama", gate=layer, up=layer, down=layer, lead=(256,), K=64, I=172)
    p = numerics.problem(case, DTYPES[dtypes])
    ours, _ = kept(p, lambda t: numerics.call(p, numerics.Provider("torch"), t))
    stock, _ = kept(p, lambda t: case.stock(t, p.masks))
    assert sum(size for size, _ in ours.values()) < 0.5 * sum(size for size, _ in stock.values())


class Large(TorchDispatchMode):
    """Storages of at least ``size`` elements that operators return."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found = size, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() >= self.size * t.element_size():
                self.found[t.untyped_storage().data_ptr()] = t  # kept, so that no address comes twice
        return out


@numerics.each(cases_lora_embedding.Case("vocabulary", (5,), V=4001, D=16, padding_idx=1), only=("torch", "cpu"))
def test_an_embedding_makes_one_tensor_of_the_vocabularys_size(provider, case):
    p = numerics.problem(case, DTYPES["f32"])
    A, B = p.tensors["A0"], p.tensors["B0"]
    with provider.active():
        with Large(A.numel()) as forward:
            y = numerics.call(p, provider)
        with Large(A.numel()) as backward:
            dA, dB = torch.autograd.grad(y, [A, B], p.g)
    inputs = {t.untyped_storage().data_ptr() for t in p.tensors.values()}
    assert not forward.found.keys() - inputs, "a forward has no use for the whole vocabulary"
    assert backward.found.keys() - inputs == {dA.untyped_storage().data_ptr()}
