"""Batches of gradients, as is_grads_batched, vectorized jacobians and vmap make them: each is what it is alone."""

import importlib
import pkgutil

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_fast
from peft_fast import ops
from peft_fast.ops.function import Function
from tests.architectures import training
from tests.architectures.zoo import ARCHITECTURES
from tests.patch.toys import K, conv1d, inputs, toy

pytestmark = pytest.mark.filterwarnings("ignore")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def architecture(name, dtype, **options):
    """(an accelerated model whose groups stand, its output)"""
    found = ARCHITECTURES[name]
    model = peft_fast.accelerate(found.adapted(dtype=dtype, **options))
    batch = training.batches(found, 1)[0]
    for _ in range(2):
        training.loss_of(model, batch).backward()
        training.idle_step(model)
    return model, model(**batch).logits


def layers_only(dtype, layer=nn.Linear, **config):
    model = toy(layer, base_dtype=dtype, **config)
    return model, model(inputs(8, 7, K, dtype=dtype))


def checkpointed(**config):
    model = toy(base_dtype=F32, **config)
    return model, checkpoint(model, inputs(8, 7, K), use_reentrant=False)


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES = {
    "layers": lambda: layers_only(F32, lora_dropout=0.3, bias="all"),
    "checkpointed": lambda: checkpointed(bias="all"),
    "float64": lambda: layers_only(F64, conv1d, lora_bias=True),
    "DoRA": lambda: layers_only(BF16, use_dora=True, lora_dropout=0.3),
    "groups, blocks, embeddings": lambda: architecture("Llama", F32),
    "the same, DoRA": lambda: architecture("Llama", F64, use_dora=True),
    "experts": lambda: architecture("Mixtral", F32, target_parameters=EXPERTS),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_each_is_what_it_is_alone(make):
    model, y = make()
    assert peft_fast.report(model).fast_calls and not peft_fast.report(model).handed_back
    wanted = [p for p in model.parameters() if p.requires_grad]
    gs = torch.randn(3, *y.shape).to(y.dtype)
    alone = [torch.autograd.grad(y, wanted, g, retain_graph=True) for g in gs]
    together = torch.autograd.grad(y, wanted, gs, is_grads_batched=True)
    for i, found in enumerate(together):
        assert found.norm() > 0
        torch.testing.assert_close(found, torch.stack([grads[i] for grads in alone]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("n", [2, 3])
def test_siblings_one_after_the_other(n):
    x, siblings = torch.randn(3, K), []
    for _ in range(n):
        A, B = (torch.randn(shape, requires_grad=True) for shape in ((4, K), (6, 4)))
        siblings.append(ops.Sibling(torch.randn(6, K), None, [ops.Adapter(A, B, 2.0)], False))
    gs = torch.randn(5, 3, 6)
    ys, same = ops.lora_group(x, siblings), ops.lora_group(x, siblings)
    for i, sibling in enumerate(siblings):
        of = sibling.adapters[0][:2]
        alone = [torch.autograd.grad(same[i], of, g, retain_graph=True) for g in gs]
        together = torch.autograd.grad(ys[i], of, gs, is_grads_batched=True)
        torch.testing.assert_close(together, tuple(map(torch.stack, zip(*alone, strict=True))))


def test_jacobians_hessians_and_vmap():
    model, x = toy(), inputs(3, K)
    y, gs = model(x), torch.randn(4, 3, K)
    mapped = torch.func.vmap(lambda g: torch.autograd.grad(y, x, g, retain_graph=True)[0])(gs)
    alone = [torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in gs]
    torch.testing.assert_close(mapped, torch.stack(alone))
    jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    torch.testing.assert_close(jacobian(model, x, vectorize=True), jacobian(model, x))
    torch.testing.assert_close(*(hessian(lambda x: model(x).square().sum(), x[:1], vectorize=v) for v in (True, False)))


def test_every_op_takes_them():
    modules = [importlib.import_module(f"peft_fast.ops.{found.name}") for found in pkgutil.iter_modules(ops.__path__)]
    kinds = {k for m in modules for k in vars(m).values() if isinstance(k, type)}
    kinds = {k for k in kinds if issubclass(k, torch.autograd.Function) and k is not torch.autograd.Function}
    assert len(kinds) > 8 and all(issubclass(kind, Function) for kind in kinds)
