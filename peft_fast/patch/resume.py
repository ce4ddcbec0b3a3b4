"""What was learned of a model's groups, as JSON: a run that goes on in another process groups from its first step.

A group of siblings rounds otherwise than its layers do one by one, and starts only after an optimizer step
(groups.py says why). A resumed run that had to learn its groups anew would differ from one that was never stopped.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_fast.patch import groups, ledger, places
from peft_fast.patch.groups import Group, Record
from peft_fast.patch.steps import Watch
from peft_fast.patch.summary import lora_layers


def state(model: nn.Module) -> dict[str, Any]:
    """All that decides when the siblings of ``model`` run as one, by names, and the calls counted so far.

    To be asked between two steps, in the thread that calls the model: what another one is learning is left out.
    """
    names = {module: name for name, module in model.named_modules()}
    tensors = {id(p): name for name, p in model.named_parameters()}
    known = [layer for layer in names if layer in groups._groups]
    waiting = [pending.group for slot in groups._slots if (pending := slot.pending) is not None]

    def watch_of(watch: Watch | None) -> dict[str, Any] | None:
        if watch is None:
            return None
        return {"written": watch.written(), "tensors": [tensors[id(t)] for t in watch.tensors if id(t) in tensors]}

    def names_of(members: Iterable[weakref.ref[nn.Module]]) -> list[str]:
        return [names[layer] for ref in members if (layer := ref()) in names]

    return {
        "layers": _layers(model),
        "groups": [
            {
                "parent": names.get(group.parent()),
                "members": names_of(group.members),
                "quiet": group.quiet,
                "loud": group.loud,
                "watch": watch_of(group.watch),
                "led": group.led,
                # nobody comes any more for results of the step that is over
                "lost": group.lost + sum(group is other for other in waiting),
                "outdated": group.outdated or len(group.layers()) < len(group.members),
            }
            for group in groups.groups_of(known)
        ],
        "alone": [names[layer] for layer in known if groups._groups[layer] is None],
        "seen": [names[layer] for layer in names if layer in groups._seen],
        "failed": {names[layer]: groups._failed[layer] for layer in names if layer in groups._failed},
        "records": [
            {"parent": names[parent], "members": names_of(record.members), "watch": watch_of(record.watch)}
            for parent, records in groups._local.records.items()
            for record in records
            if parent in names and record.members
        ],
        "calls": ledger.state(names),
    }


def restore_state(model: nn.Module, saved: Mapping[str, Any]) -> bool:
    """Makes the groups of an accelerated ``model`` what they were; False, and nothing changed, if it is another model.

    To be called between two steps, after the weights were loaded: a checkpoint whose forward ran before must not be
    recomputed after. A group that waited for an optimizer step waits for one of this process.
    """
    modules = dict(model.named_modules())
    tensors = dict(model.named_parameters())
    if not _fits(model, saved, modules, tensors):
        return False
    for slot in groups._local.slots:
        slot.drop()  # it may be another model's
    groups.forget(lora_layers(model).values())
    for parent in modules.values():
        groups._local.records.pop(parent, None)

    def watch_of(found: Mapping[str, Any] | None) -> Watch | None:
        if found is None:
            return None
        watch = Watch(tensors[name] for name in found["tensors"])
        watch.stepped = found["written"]
        return watch

    for found in saved["groups"]:
        members = [modules[name] for name in found["members"]]
        group = Group(modules[found["parent"]], [weakref.ref(layer) for layer in members], watch_of(found["watch"]))
        for name in ("quiet", "loud", "led", "lost", "outdated"):
            setattr(group, name, found[name])
        for layer in members:
            groups._groups[layer] = group
    for name in saved["alone"]:
        groups._groups[modules[name]] = None
    groups._seen.update(modules[name] for name in saved["seen"])
    groups._failed.update({modules[name]: tries for name, tries in saved["failed"].items()})
    for found in saved["records"]:
        record = Record(torch.empty(0))  # its tensor was gone when the step was over
        record.members = [weakref.ref(modules[name]) for name in found["members"]]
        record.watch = watch_of(found["watch"])
        groups._local.records.setdefault(modules[found["parent"]], []).append(record)
    ledger.restore(modules, saved["calls"])
    return True


def _layers(model: nn.Module) -> list[str]:
    shapes = {name: [list(p.shape) for p in layer.parameters()] for name, layer in lora_layers(model).items()}
    return sorted(f"{name} {found}" for name, found in shapes.items())


def _fits(
    model: nn.Module, saved: Mapping[str, Any], modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]
) -> bool:
    """Is this the state of a model with the very same layers, which is accelerated, and between two steps?"""
    if torch._C._current_graph_task_id() != -1 or saved.get("layers") != _layers(model):
        return False
    found = [*saved["groups"], *saved["records"]]
    watched = {name for one in found if one["watch"] for name in one["watch"]["tensors"]}
    named = {name for one in found for name in one["members"]} | {*saved["alone"], *saved["seen"], *saved["failed"]}
    if not named <= modules.keys() or not watched <= tensors.keys():
        return False
    return all(
        one["parent"] in modules and places.known_parent(modules[name]) is modules[one["parent"]]
        for one in found
        for name in one["members"]
    )
