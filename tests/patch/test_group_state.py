"""What is learned of groups, saved and restored: another process goes on as this one would have."""

import json
import threading

import pytest
import torch
from torch import nn

import peft_fast
from peft_fast.patch import groups, resume
from tests.patch.test_group_training import REENTRANT, assert_equal_steps, pair
from tests.patch.test_groups import QKV, Attention, attention, found, learned, runs, steps
from tests.patch.toys import K, adapt, assert_same, inputs, toy


def saved(model):
    """The state as a file has it."""
    return json.loads(json.dumps(resume.state(model)))


def twin(model, make=attention, **config):
    """What another process makes of the weights and the state."""
    other = make(**config)
    other.load_state_dict(model.state_dict())
    assert resume.restore_state(other, saved(model))
    assert saved(other) == saved(model)
    return other


@pytest.mark.parametrize("done", range(5))
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_each_step_goes_on_bit_for_bit(done, p):
    """Whether nothing was seen yet, a record, a group that waits for its optimizer step, or one that runs."""
    model = attention(lora_dropout=p)
    steps(model, inputs(), n=done)
    other = twin(model, lora_dropout=p)
    before = runs(model)
    assert runs(other) == before and found(other) == found(model)
    assert_equal_steps(steps(model, inputs(), n=4), steps(other, inputs(), n=4))
    assert runs(other) == runs(model) > before
    assert saved(other) == saved(model)


def test_a_model_that_learned_anew_would_differ():
    """The test above is about something."""
    model = attention()
    steps(model, inputs(), n=4)
    other = attention()
    other.load_state_dict(model.state_dict())
    before = runs(model)
    steps(model, inputs())
    steps(other, inputs())
    assert runs(model) == before + 1 and runs(other) == 0


@REENTRANT
@pytest.mark.parametrize("done", range(4))
def test_recomputation_goes_the_forwards_way_from_the_first_step_on(done, reentrant):
    plain, again = pair(reentrant, lora_dropout=0.1)
    others = pair(reentrant, lora_dropout=0.1)
    for model, other in zip((plain, again), others, strict=True):
        steps(model, inputs(), n=done)
        other.load_state_dict(model.state_dict())
        assert resume.restore_state(other, saved(model))
    expected = steps(plain, inputs(), n=4)
    for model in (again, *others):
        assert_equal_steps(expected, steps(model, inputs(), n=4))
        assert found(model) == {QKV}


def test_a_group_that_waits_still_waits_for_an_optimizer_that_holds_its_adapters():
    model = attention()
    for _ in range(2):
        model(inputs()).sum().backward()
    other, stranger = twin(model), toy()
    assert found(other) == {QKV}
    theirs = torch.optim.SGD([p for p in stranger.parameters() if p.requires_grad], lr=0.1)
    ours = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1)
    for optimizer, expected in ((theirs, 0), (ours, 1)):
        stranger(inputs()).sum().backward()
        other(inputs()).sum().backward()
        assert runs(other) == 0
        optimizer.step()
        other(inputs()).sum().backward()
        assert runs(other) == expected


def test_a_step_before_the_save_counts_after_it():
    """Saved between the optimizer's step and the next forward, where the group would have started."""
    model = attention()
    for _ in range(2):
        model(inputs()).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert runs(model) == 0 and found(model) == {QKV}
    other = twin(model)
    for each in (model, other):
        each(inputs()).sum().backward()
        assert runs(each) == 1


@pytest.mark.parametrize("done", range(1, 5))
def test_losses_tries_and_dissolved_groups_come_along(done):
    """q alone is called: of a group's results two are never taken, the last of them after the save."""
    model = learned(attention())
    inner = model.base_model.model
    inner.forward = lambda x: inner.q(x)
    steps(model, inputs(), n=done)
    other = twin(model)
    there = other.base_model.model
    there.forward = lambda x: there.q(x)
    for _ in range(3):
        assert_equal_steps(steps(model, inputs(), n=4), steps(other, inputs(), n=4))
        assert saved(other) == saved(model)
    assert not found(other) and groups._failed
    del inner.forward, there.forward
    assert_equal_steps(steps(model, inputs(), n=4), steps(other, inputs(), n=4))
    assert found(other) == found(model) and saved(other) == saved(model)


def test_results_that_wait_in_another_thread_count_as_lost():
    """Autograd's threads recompute checkpoints, and may stop before the last sibling."""
    model, ready, done = learned(attention()), threading.Event(), threading.Event()

    def recompute():
        model.base_model.model.q(inputs())
        ready.set()
        done.wait()

    thread = threading.Thread(target=recompute)
    thread.start()
    ready.wait()
    try:
        assert [group["lost"] for group in saved(model)["groups"]] == [1]
    finally:
        done.set()
        thread.join()


def test_a_group_that_stopped_where_nothing_is_recomputed():
    model = learned(attention())
    inner = model.base_model.model
    with torch.no_grad():
        for _ in range(6):
            inner.q(inputs())
    assert [group["quiet"] for group in saved(model)["groups"]] == [False]
    other = twin(model)
    for _ in range(2):
        with torch.no_grad():
            model(inputs()), other(inputs())
        assert runs(model) == runs(other)
        assert_equal_steps(steps(model, inputs(), n=1), steps(other, inputs(), n=1))


def test_layers_without_siblings_are_not_learned_again():
    class Latent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(K, 8), nn.Linear(8, 24)

        def forward(self, x):
            return self.b(self.a(x))

    model = adapt(Latent, ["a", "b"])
    steps(model, inputs(), n=2)
    other = twin(model, lambda: adapt(Latent, ["a", "b"]))
    assert len(saved(other)["alone"]) == 2 and not groups._local.records.get(other.base_model.model)


def test_what_the_target_had_learned_itself_is_dropped():
    """A forward that measures something runs before the weights are loaded."""
    model = attention()
    steps(model, inputs(), n=1)
    other = attention()
    with torch.no_grad():
        for _ in range(3):
            other(inputs())
    assert found(other) == {QKV} and not found(model)
    other.load_state_dict(model.state_dict())
    assert resume.restore_state(other, saved(model))
    assert not found(other) and saved(other) == saved(model)
    assert_equal_steps(steps(model, inputs(), n=3), steps(other, inputs(), n=3))


REFUSED = {
    "another rank": lambda: attention(r=2),
    "fewer adapters": lambda: attention("q k"),
    "another model": toy,
    "one that is not accelerated": lambda: peft_fast.restore(attention()),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_another_model_is_refused_and_goes_on_as_it_is(make):
    state = saved(learned(attention()))
    other = make()
    before = saved(other)
    assert resume.restore_state(other, state) is False
    assert saved(other) == before and not found(other)


def test_a_state_of_nothing_is_refused():
    assert resume.restore_state(attention(), {}) is False


def test_no_restore_inside_a_backward():
    """A recomputation may be under way there."""
    model, state, got = attention(), saved(learned(attention())), []
    y = model(inputs())
    y.register_hook(lambda g: got.append(resume.restore_state(model, state)))
    y.sum().backward()
    assert got == [False] and not found(model)


def test_counts_of_calls_go_on():
    model = learned(attention())
    other = twin(model)
    one, two = peft_fast.report(model), peft_fast.report(other)
    assert (one.fast_calls, one.group_calls) == (two.fast_calls, two.group_calls) and one.fast_calls
    steps(other, inputs())
    assert peft_fast.report(other).fast_calls == one.fast_calls + 3


def test_a_state_keeps_no_model_alive_and_names_no_dead_layer():
    model = learned(attention())
    inner = model.base_model.model
    inner.v = inner.v.base_layer
    state = saved(model)
    assert [group["outdated"] for group in state["groups"]] == [True]
    assert not any("v" in name.split(".") for group in state["groups"] for name in group["members"])
    other = attention()
    other.base_model.model.v = other.base_model.model.v.base_layer
    other.load_state_dict(model.state_dict())
    assert resume.restore_state(other, state)
    assert_equal_steps(steps(model, inputs(), n=4), steps(other, inputs(), n=4))
    assert found(other) == found(model) == {frozenset(["q", "k"])}
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    assert isinstance(inner, Attention)
