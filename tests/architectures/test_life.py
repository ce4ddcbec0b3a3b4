"""A random life beside stock's: steps, evaluation, other adapters, merging, checkpointing, copies, in any order.

Everything is float64, so that what differs from stock's is a fault and no rounding.
"""

import copy
import io
import random

import pytest
import torch
from peft import LoraConfig

import peft_fast
from tests.architectures import training
from tests.architectures.zoo import ARCHITECTURES

pytestmark = pytest.mark.filterwarnings("ignore")
NEAR = 1e-5  # some classes compute in float32 inside


class Life:
    """Two models. An action draws its choices first and returns what it does to either, which gives tensors or None."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.architecture = self.random.choice([a for a in ARCHITECTURES.values() if not a.experts])
        self.data = training.batches(self.architecture, 3)
        self.stock = self.architecture.adapted(bias=self.random.choice(["none", "lora_only", "all"])).double()
        self.ours = peft_fast.accelerate(copy.deepcopy(self.stock))
        self.adapters = ["default"]

    def live(self, action):
        act = action(self)
        expected, got = act(self.stock), act(self.ours)
        if expected is not None:
            assert expected.keys() == got.keys()
            assert training.distance(got, expected) < NEAR

    def step(self, backwards=1):
        batch = self.random.choice(self.data)

        def act(model):
            for _ in range(backwards):
                loss = training.loss_of(model, batch)
                loss.backward()
            found = {name: p for name, p in model.named_parameters() if p.grad is not None}
            gradients = {name: p.grad.clone() for name, p in found.items()}
            torch.nn.utils.clip_grad_norm_(found.values(), 1.0)
            torch.optim.SGD(found.values(), lr=training.RATE).step()
            model.zero_grad()
            return {"loss": loss.detach(), **gradients}

        return act

    def accumulate(self):
        return self.step(backwards=2)

    def evaluate(self):
        batches, mode = self.random.choices(self.data, k=3), self.random.choice([torch.no_grad, torch.inference_mode])

        def act(model):
            trained = model.training
            model.eval()
            with mode():
                losses = {str(i): training.loss_of(model, batch).clone() for i, batch in enumerate(batches)}
            model.train(trained)
            return losses

        return act

    def add(self):
        name, rank = f"number {len(self.adapters)}", self.random.choice([1, 5])
        layers = sorted(n for n, m in self.stock.named_modules() if hasattr(m, "lora_dropout"))
        chosen = [n.removeprefix("base_model.model.") for n in layers if self.random.random() < 0.6] or layers[:1]
        config = LoraConfig(r=rank, target_modules=chosen, init_lora_weights=False)
        self.adapters.append(name)

        def act(model):
            torch.manual_seed(len(self.adapters))
            model.add_adapter(name, copy.deepcopy(config))
            model.double()

        return act

    def choose(self):
        names = self.random.choice([[self.random.choice(self.adapters)], self.adapters])
        return lambda model: model.base_model.set_adapter(list(names))

    def merge(self):
        batch = self.random.choice(self.data)

        def act(model):
            model.merge_adapter()
            with torch.no_grad():
                loss = training.loss_of(model, batch)
            model.unmerge_adapter()
            return {"loss": loss}

        return act

    def without_adapters(self):
        batch = self.random.choice(self.data)

        def act(model):
            with model.disable_adapter(), torch.no_grad():
                return {"loss": training.loss_of(model, batch)}

        return act

    def freeze(self):
        names = sorted(name for name, _ in self.stock.named_parameters() if "lora_" in name)
        name = self.random.choice(names[1:])

        def act(model):
            parameter = model.get_parameter(name)
            parameter.requires_grad_(not parameter.requires_grad)

        return act

    def checkpoint(self):
        ways = [None, False, True] if self.architecture.reentrant else [None, False]
        way = self.random.choice(ways) if self.stock.base_model.model.supports_gradient_checkpointing else None

        def act(model):
            base = model.base_model.model
            base.gradient_checkpointing_disable()
            if way is not None:
                base.gradient_checkpointing_enable({"use_reentrant": way})
                if way:
                    base.enable_input_require_grads()

        return act

    def copied(self):
        self.ours = copy.deepcopy(self.ours)
        return lambda model: None

    def saved(self):
        try:
            torch.save(self.stock, io.BytesIO())
        except Exception:  # parametrized convolutions and hooks that are local functions
            return lambda model: None
        file = io.BytesIO()
        torch.save(self.ours, file)
        file.seek(0)
        self.ours = torch.load(file, weights_only=False)
        return lambda model: None

    def again(self):
        peft_fast.accelerate(peft_fast.restore(self.ours))
        return lambda model: None


ACTIONS = [getattr(Life, name) for name in vars(Life) if name[0] != "_" and name != "live"]


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 150))])
def test_a_random_life(seed):
    life, past = Life(seed), []
    for _ in range(10):
        action = life.random.choice([*ACTIONS, *[Life.step] * 8])
        past.append(action.__name__)
        try:
            life.live(action)
        except Exception as error:
            raise AssertionError(f"{life.architecture.name}: {', '.join(past)}") from error
