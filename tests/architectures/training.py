"""A few training steps of one model, and how far two runs may lie apart."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

import peft_fast
from peft_fast.ops import fast_calls

RATE = 0.1
FACTOR = 3
FEW = 8


class Run(NamedTuple):
    """What one training run left behind; every tensor is float64."""

    losses: dict[str, Tensor]
    first: dict[str, Tensor]  # gradients of the first step
    last: dict[str, Tensor]  # gradients of the last step
    moved: dict[str, Tensor]  # what the steps added to the parameters
    operations: int  # calls of our operators in the last step


def batches(architecture, count: int, draw: int = 0) -> list[dict]:
    """Different inputs for each step."""
    torch.manual_seed(1 + draw)
    return [architecture.inputs() for _ in range(count)]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model: nn.Module, batch: dict) -> Tensor:
    """The model's own loss; of a model that has none, the mean square of its outputs."""
    dtype = model.base_model.model.dtype
    output = model(**{k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()})
    if output.get("loss") is not None:
        return output.loss
    return output.logits.square().mean() + output.pred_boxes.square().mean()


def train(model: nn.Module, data: list[dict]) -> Run:
    """Clipped gradient descent: a rounding error stays one, which Adam would blow up where a gradient is zero."""
    parameters = trainable(model)
    start = {name: p.detach().double().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=RATE)
    losses, gradients = {}, []
    for step, batch in enumerate(data):
        before = fast_calls()
        loss = loss_of(model, batch)
        loss.backward()
        operations = fast_calls() - before
        losses[f"step {step}"] = loss.detach().double()
        gradients.append({name: p.grad.double().clone() for name, p in parameters.items()})
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    moved = {name: p.detach().double() - start[name] for name, p in parameters.items()}
    return Run(losses, gradients[0], gradients[-1], moved, operations)


def idle_step(model: nn.Module) -> None:
    """An optimizer's step that moves nothing: from the next call on, siblings that were seen run as groups."""
    parameters = trainable(model).values()
    for p in parameters:
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(parameters, lr=0.0).step()
    model.zero_grad()


def exact(model: nn.Module, data: list[dict]) -> Run:
    """Stock's run in float64."""
    return train(copy.deepcopy(model).double(), data)


def count_calls(model: nn.Module, names: list[str], batch: dict) -> dict[str, int]:
    """How often one forward of stock calls each of the named modules."""
    calls = dict.fromkeys(names, 0)

    def counter(name: str):
        def hook(*_) -> None:
            calls[name] += 1

        return hook

    handles = [model.get_submodule(name).register_forward_hook(counter(name)) for name in names]
    with torch.no_grad():
        loss_of(model, batch)
    for handle in handles:
        handle.remove()
    return calls


def distance(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest relative error of a tensor; one of nearly no length counts as a thousandth of the longest."""
    least = max(t.norm() for t in truth.values()) / 1000
    return max((ours[name] - t).norm() / max(t.norm(), least) for name, t in truth.items()).item()


def mean_distance(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The relative error of all tensors together."""
    error = sum((ours[name] - t).square().sum() for name, t in truth.items())
    return (error / sum(t.square().sum() for t in truth.values())).sqrt().item()


def excess(ours: Run, stock: Run, truth: Run) -> str:
    """Where ours is farther from the truth than stock is, up to a factor, or to a few roundings of float32."""
    for part in ("losses", "first", "last", "moved"):
        far = distance(getattr(ours, part), getattr(truth, part))
        near = distance(getattr(stock, part), getattr(truth, part))
        assert near < 0.1, f"{part}: stock itself is off by {near:.1e}, which proves nothing"
        if not far <= FACTOR * near + FEW * torch.finfo(torch.float32).eps:
            return f"{part}: {far:.1e}, stock {near:.1e}"
    return ""


def assert_rounding(architecture, steps: int, *runs: Run) -> None:
    """Nothing in excess in these runs, or in one of two of other inputs: the farthest tensor is often one with hardly
    a gradient, whose noise is one draw from a wide distribution; what is wrong is wrong in every draw."""
    wrong = [excess(*runs)]
    for draw in (1, 2):
        if wrong[-1]:
            stock, data = architecture.adapted(), batches(architecture, steps, draw)
            ours, truth, expected = copy.deepcopy(stock), exact(stock, data), train(stock, data)
            peft_fast.accelerate(ours)
            wrong.append(excess(train(ours, data), expected, truth))
    assert not wrong[-1], wrong
