"""Sibling layers that read one x, as q, k and v do: the first one called computes all of them with lora_group.

Who is whose sibling is seen at run time: layers of one parent that were called with the very same tensor. The others'
results wait in one slot a thread, and are taken only by a call that would compute just that: same tensor, same
version, same weights, same modes. So a group that is wrong costs time and nothing else. What nobody counts is not
seen, though: values written to .data, or to memory shared with numpy, between the calls of two siblings.

A checkpoint that is recomputed must go the way its forward went. Where gradients or dropout masks are wanted, a group
therefore starts and stops only once an optimizer has written to its adapters since.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from peft_fast import settings
from peft_fast.ops import Sibling, lora_group
from peft_fast.patch import ledger, places, plan
from peft_fast.patch.marks import wanted
from peft_fast.patch.steps import Watch

MOST = 8  # layers in a group: all results exist at once, of which a loop over many heads would keep one
TRIES = 3  # times that the group of a layer may turn out wrong


class Group:
    """Layers that are computed together."""

    def __init__(self, parent: nn.Module, members: Sequence[weakref.ref[nn.Module]], watch: Watch) -> None:
        self.parent, self.members = weakref.ref(parent), tuple(members)
        self.quiet = True  # does it run where no recomputation can follow: no gradients, no masks
        self.loud = False  # does it run elsewhere
        self.watch: Watch | None = watch  # since it last went the way that it is to leave
        self.led = 0  # runs
        self.lost = 0  # runs of which a result was not taken
        self.outdated = False  # the parent got a layer since

    def layers(self) -> list[nn.Module]:
        """The layers that are alive."""
        return [layer for ref in self.members if (layer := ref()) is not None]


class Record:
    """Layers of one parent that were called with one tensor, while that is being learned."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.version = weakref.ref(x), x._version
        self.members: list[weakref.ref[nn.Module]] = []
        self.plans: list[Sibling] = []

    def add(self, layer: nn.Module, own: Sibling) -> None:
        """Notes one more layer."""
        self.members.append(weakref.ref(layer))
        self.plans.append(own)
        self.watch = Watch(_adapters(self.plans))

    def has(self, layer: nn.Module) -> bool:
        """Was it called with this tensor?"""
        return any(member() is layer for member in self.members)


class Slot:
    """One thread's Pending, without or with gradients: what is done without must not lead the other another way."""

    pending: Pending | None = None

    def drop(self, *_) -> None:
        """Lets go of what nobody came for."""
        if self.pending is not None:
            self.pending.group.lost += 1
            self.pending = None


class Pending:
    """Results that layers of a group have not asked for yet, each beside the state it was computed in."""

    def __init__(self, group: Group, x: Tensor, plans: Sequence[Sibling], results: list[tuple | None], slot: Slot):
        self.group, self.x, self.version, self.mode = group, weakref.ref(x), x._version, _mode(x)
        self.plans = plans  # _state holds ids: nothing else may get them meanwhile
        self.results = results
        # it holds weights and a graph, and must not outlive the layers
        self.ends = [weakref.ref(layer, slot.drop) for layer in group.layers()]


# of every thread: what autograd's left in theirs counts as well
_slots: weakref.WeakSet[Slot] = weakref.WeakSet()


class _Local(threading.local):
    def __init__(self) -> None:
        self.slots = Slot(), Slot()
        _slots.update(self.slots)
        self.records: weakref.WeakKeyDictionary[nn.Module, list[Record]] = weakref.WeakKeyDictionary()


_local = _Local()
# layer -> its group, or None if it has no siblings; a layer that is not in here is being learned
_groups: weakref.WeakKeyDictionary[nn.Module, Group | None] = weakref.WeakKeyDictionary()
_seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_failed: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_UNKNOWN = object()


def run(layer: nn.Module, x: Tensor, own: Sibling) -> Tensor | None:
    """x (..., K) -> the layer's y (..., N) if it is the first of its group, or None: then it is computed alone."""
    group = _groups.get(layer, _UNKNOWN)
    if group is None or x.is_inference():  # of such a tensor nobody counts the changes in place
        return None
    if group is _UNKNOWN:
        group = _learn(layer, x, own)
    return None if group is None else _lead(group, layer, x, own)


def take(layer: nn.Module, x: Tensor, own: Sibling) -> Tensor | None:
    """What the first layer of a group computed for this one, if it is what the layer would compute now."""
    slot = _local.slots[torch.is_grad_enabled()]
    pending = slot.pending
    if pending is None:
        return None
    if pending.x() is not x or pending.version != x._version:
        if places.known_parent(layer) is not pending.group.parent():
            slot.drop()  # the forward that it was computed in has been left
        return None
    i = next((i for i, member in enumerate(pending.group.members) if member() is layer), None)
    if i is None or pending.results[i] is None:
        return None
    y, state = pending.results[i]
    if state != _state(own) or pending.mode != _mode(x):
        return None
    pending.results[i] = None
    if not any(pending.results):
        slot.pending = None
    return y


def groups_of(layers: Iterable[nn.Module]) -> list[Group]:
    """The groups of these layers."""
    found = (_groups.get(layer) for layer in layers)
    return list(dict.fromkeys(group for group in found if group is not None))


def forget(layers: Iterable[nn.Module]) -> None:
    """Drops what is known of some layers."""
    for slot in _local.slots:
        slot.pending = None
    for layer in layers:
        for known in (_groups, _failed):
            known.pop(layer, None)
        _seen.discard(layer)


def _lead(group: Group, layer: nn.Module, x: Tensor, own: Sibling) -> Tensor | None:
    """Computes all layers of the group, or None if one of them cannot join or it is not the time."""
    members = group.layers()
    if len(members) < len(group.members):
        group.outdated = True
        _dissolve(group)
        return None
    i = next(i for i, member in enumerate(members) if member is layer)
    plans = [own if member is layer else _joins(member, x) for member in members]
    if None in plans or any(p.W.dtype is not own.W.dtype for p in plans):
        return None
    states = [_state(p) for p in plans]
    if None in states or not _runs(group, plans):
        return None
    slot = _local.slots[torch.is_grad_enabled()]
    slot.drop()  # before anything is allocated: it may hold a whole graph
    group.led += 1
    ys = lora_group(x, plans, exact=settings.get().exact)
    ledger.count_group(layer)
    results = list(zip(ys, states, strict=True))
    y, _ = results[i]
    results[i] = None
    slot.pending = Pending(group, x, plans, results, slot)
    return y


def _joins(layer: nn.Module, x: Tensor) -> Sibling | None:
    """Another layer of the group as it would run on x, or None if it would not."""
    if not wanted(layer) or "forward" in layer.__dict__:
        return None
    own = plan.plan_of(layer)
    return None if type(own) is str or plan.refuse_input(layer, x, own) else own


def _runs(group: Group, plans: Sequence[Sibling]) -> bool:
    """Does the group run in this mode? Here it starts and stops."""
    failing = group.outdated or 8 * group.lost > group.led + 8
    if not torch.is_grad_enabled() and not any(a.p > 0 for own in plans for a in own.adapters):
        group.quiet = group.quiet and not failing
        runs = group.quiet
    else:
        if group.loud != failing:  # it goes on as it is
            group.watch = None if group.loud else group.watch
        else:
            adapters, watch = _adapters(plans), group.watch
            if watch is not None and watch.written():
                group.loud, group.watch = not failing, None
            elif watch is None or not watch.sees(adapters):  # another adapter is active
                group.watch = Watch(adapters if watch is None else [*watch.tensors, *adapters])
        runs = group.loud
    if failing and not runs and not group.loud:
        _dissolve(group)
    return runs


def _dissolve(group: Group) -> None:
    for layer in group.layers():
        _groups.pop(layer, None)
        if not group.outdated:
            _failed[layer] = _failed.get(layer, 0) + 1


def _learn(layer: nn.Module, x: Tensor, own: Sibling) -> Group | None:
    """Notes a call; once a layer comes again with another tensor, those that came with its last one are a group."""
    parent = places.parent_of(layer, [t for a in own.adapters for t in (a.A, a.B)])
    if parent is None or _failed.get(layer, 0) >= TRIES:
        _groups[layer] = None
        return None
    records = _local.records.setdefault(parent, [])
    before = [record for record in records if record.has(layer)]
    now = next((record for record in records if record.x() is x and record.version == x._version), None)
    for record in before:
        records.remove(record)
    if before and (now is None or now in before):
        _settle(parent, before[-1])
        return _groups.get(layer)
    if layer not in _seen:
        _seen.add(layer)
        _reopen(parent)
    if now is None:
        now = Record(x)
        records.append(now)
    now.add(layer, own)
    return None


def _settle(parent: nn.Module, record: Record) -> None:
    """Makes groups of a record's layers, unless a group of their parent is to be found anew with them."""
    if any(group.outdated for group in groups_of(parent._modules.values())):
        return
    for i in range(0, len(record.members), MOST):
        members = record.members[i : i + MOST]
        group = Group(parent, members, record.watch) if len(members) > 1 else None
        for member in members:
            if (layer := member()) is not None:
                _groups[layer] = group


def _reopen(parent: nn.Module) -> None:
    """A layer was called for the first time: what is known of its parent's others was found without it."""
    for layer in parent._modules.values():
        if layer in _groups and _failed.get(layer, 0) < TRIES:
            if (group := _groups[layer]) is None:
                del _groups[layer]
            else:
                group.outdated = True


def _adapters(plans: Iterable[Sibling]) -> list[Tensor]:
    return [t for own in plans for a in own.adapters for t in (a.A, a.B)]


def _state(own: Sibling) -> list | None:
    """What a layer's y depends on beside x, to compare while its tensors live; None if their changes go uncounted."""
    state = [own.transposed]
    try:
        for t in (own.W,) if own.bias is None else (own.W, own.bias):
            state += (id(t), t.data_ptr(), t._version, t.requires_grad)
        for adapter in own.adapters:
            for value in adapter:
                if isinstance(value, Tensor):
                    state += (id(value), value.data_ptr(), value._version, value.requires_grad)
                else:
                    state.append(value)
    except RuntimeError:  # a weight that was made in inference mode
        return None
    return state


def _mode(x: Tensor) -> tuple:
    """What a forward depends on beside its tensors."""
    kind = x.device.type
    return (
        torch.is_grad_enabled(),
        x.requires_grad,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        settings.get(),
        # a recomputation under way saves into a place of its own
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch.cuda.current_stream(x.device) if x.is_cuda else None,
    )
