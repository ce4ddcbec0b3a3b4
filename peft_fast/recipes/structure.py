"""Where the layers of a model are: found by how its modules are nested, never by a list of names.

A transformer's layers are blocks in an `nn.ModuleList`; what is registered before them is below (embeddings), what
comes after them is above (the last norm, the pooler, the head).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

MISSING = -1


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that are equally far from the head."""

    titles: tuple[str, ...]  # what the log calls it: the blocks' names
    parameters: tuple[str, ...]


def groups(model: nn.Module, head: Sequence[str] = ()) -> list[Group]:
    """Every parameter's name once, in groups from the embeddings, by blocks, up to the head.

    Two towers (encoder and decoder, text and image) stand side by side: their topmost blocks are one group. ``head``
    are modules that belong to the top wherever they are registered.
    """
    inner, prefix = unwrapped(model)
    towers = stacks(inner)
    depth = max((len(blocks) for _, blocks in towers), default=0)
    names = [name for name, _ in model.named_parameters()]
    bare = [name.removeprefix(prefix) for name in names]
    order = {name: i for i, name in enumerate(bare)}
    found: list[list[str]] = [[] for _ in range(depth + 2)]
    for full, name in zip(names, bare, strict=True):
        found[_level(name, towers, depth, head, order)].append(full)
    titles: list[list[str]] = [["embeddings"], *([] for _ in range(depth)), ["head"]]
    for path, blocks in towers:
        for i in range(len(blocks)):
            titles[1 + depth - len(blocks) + i].append(f"{path}.{i}")
    return [Group(tuple(t), tuple(p)) for t, p in zip(titles, found, strict=True)]


def layers(model: nn.Module, head: Sequence[str] = ()) -> list[list[str]]:
    """The parameter names of `groups`."""
    return [list(group.parameters) for group in groups(model, head)]


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The model inside a PEFT model, and what its parameters' names begin with there."""
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model, ""
    inner = model.get_base_model()
    return inner, next(f"{name}." for name, module in model.named_modules() if module is inner)


def stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """(path, blocks) of the model's towers: one, or two in an encoder-decoder and in a model of two modalities."""
    lists = list(_block_lists(model))
    if not lists:
        return []
    paths = {module: name for name, module in lists}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        sides = [_side(model, name) for name in ("get_encoder", "get_decoder")]
        largest = [_largest(paths.keys() & set(side.modules()), paths) for side in sides if side is not None]
        both = [blocks for blocks in dict.fromkeys(largest) if blocks is not None]
        if len(both) == 2:
            return [(paths[blocks], blocks) for blocks in both]
    top = _largest(paths, paths)
    # a tower beside it has its blocks at the same place under another parent
    twins = [(name, blocks) for name, blocks in lists if blocks is top or _alike(name, paths[top])]
    return twins if len(twins) == 2 else [(paths[top], top)]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer, for the linear layers (`Conv1D` of GPT-2 too) whose forward the model calls."""
    from transformers.pytorch_utils import Conv1D

    # torch's attention takes the weights of its output layer and never calls it
    unused = {m for module in model.modules() if isinstance(module, nn.MultiheadAttention) for m in module.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module not in unused
    }


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside a module whose class is an attention."""
    owners = [name for name, m in model.named_modules() if name and "attention" in type(m).__name__.lower()]
    return {name: m for name, m in linear_layers(model).items() if within(name, owners)}


def within(name: str, modules: Iterable[str]) -> bool:
    """Is a module or parameter one of these modules, or inside one?"""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Outermost lists of blocks: modules of one kind, each made of modules, each with parameters."""
    outer: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or within(name, outer):
            continue
        if _one_kind(module) and all(any(b.children()) and any(True for _ in b.parameters()) for b in module):
            outer.append(name)
            yield name, module


def _one_kind(blocks: nn.ModuleList) -> bool:
    """One class, or several of transformers' layers, as hybrids of attention and recurrence have."""
    if len({type(block) for block in blocks}) == 1:
        return True
    from transformers.modeling_layers import GradientCheckpointingLayer

    return all(isinstance(block, GradientCheckpointingLayer) for block in blocks)


def _largest(lists: Iterable[nn.ModuleList], paths: dict[nn.ModuleList, str]) -> nn.ModuleList | None:
    sizes = {blocks: sum(p.numel() for p in blocks.parameters()) for blocks in paths if blocks in set(lists)}
    return max(sizes, key=sizes.__getitem__, default=None)


def _side(model: nn.Module, getter: str) -> nn.Module | None:
    """What get_encoder or get_decoder returns, if it is a part and not the whole."""
    try:
        side = getattr(model, getter)()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return side if isinstance(side, nn.Module) and side is not model else None


def _alike(name: str, other: str) -> bool:
    a, b = name.split("."), other.split(".")
    return len(a) == len(b) > 2 and a[-2:] == b[-2:] and a[0] != b[0]


def _level(
    name: str, towers: list[tuple[str, nn.ModuleList]], depth: int, head: Sequence[str], order: dict[str, int]
) -> int:
    """0: below the blocks; depth + 1: above; else the block's place, counted so that topmost blocks are equal."""
    if within(name, head):
        return depth + 1
    for path, blocks in towers:
        if within(name, [path]):
            return 1 + depth - len(blocks) + int(name[len(path) + 1 :].partition(".")[0])
    # some norms of embeddings, and tables of relative positions, are registered after the blocks
    if not towers or "embedding" in name.lower():
        return 0
    # the tower that it shares most of its path with says whether it comes before or after
    shared = {path: _shared(name, path) for path, _ in towers}
    nearest = [path for path in shared if shared[path] == max(shared.values())]
    starts = [min((i for n, i in order.items() if within(n, [path])), default=MISSING) for path in nearest]
    return depth + 1 if order[name] > max(starts) else 0


def _shared(name: str, path: str) -> int:
    count = 0
    for a, b in zip(name.split("."), path.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of distinct tensors."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
