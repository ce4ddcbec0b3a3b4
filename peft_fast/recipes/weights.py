"""Weights of a checkpoint: as PEFT or transformers write them if that is all that trains, else the part that trains."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from peft_fast.errors import UnsupportedError, fail

WHOLE, PART = "model.safetensors", "trained.safetensors"


def trained(model: nn.Module, more: set[str] = frozenset()) -> dict[str, Tensor]:
    """What a run changes: the parameters that train, those in ``more``, and all buffers that are saved."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad or name in more}
    saved = model.state_dict().keys()
    return found | {name: b for name, b in model.named_buffers() if name in saved}


def save(model: nn.Module, folder: Path, more: set[str] = frozenset()) -> None:
    """Adapters as PEFT writes them; a model that trains whole as transformers does; of any other the part that trains.

    The part has a name that from_pretrained does not know: what it would load is no model.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = trained(model, more)
    if is_peft(model):
        from peft import get_peft_model_state_dict

        # an embedding that trains is among the rest below; PEFT would look for others on the hub, at every save
        model.save_pretrained(str(folder), save_embedding_layers=False)
        written = set()
        for adapter in model.peft_config:
            found = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
            written |= {t.data_ptr() for t in found.values() if t.numel()}
        tensors = {name: t for name, t in tensors.items() if t.data_ptr() not in written}
        name = PART
    else:
        for config in (getattr(model, "config", None), getattr(model, "generation_config", None)):
            if hasattr(config, "save_pretrained"):
                config.save_pretrained(str(folder))
        whole = {id(p) for p in model.parameters()} <= {id(t) for t in tensors.values()}
        name = WHOLE if whole else PART
    if tensors:
        save_file(_own(tensors), folder / name, metadata={"format": "pt"})


def load(model: nn.Module, folder: Path) -> None:
    """Puts back what save() wrote, in place."""
    from safetensors.torch import load_file

    if is_peft(model):
        from peft import load_peft_weights, set_peft_model_state_dict

        for adapter in model.peft_config:
            inside = folder if adapter == "default" else folder / adapter
            found = load_peft_weights(str(inside), device="cpu")
            set_peft_model_state_dict(model, found, adapter_name=adapter)
    for name in (PART, WHOLE):
        if (folder / name).exists():
            found = load_file(folder / name)
            if strange := model.load_state_dict(found, strict=False).unexpected_keys:
                another_model(folder, f"{len(strange)} tensors that this model has not, such as {strange[0]}")


def is_peft(model: nn.Module) -> bool:
    """Is it a PeftModel, whose save_pretrained writes adapters alone?"""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, none in another's memory: the file format knows no views."""
    seen, out = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        place = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return out


def fingerprints(model: nn.Module) -> dict[str, list]:
    """Parameter -> [checksum, mean] of some of its values, to know a weight again that no checkpoint holds."""
    prints = {}
    for name, p in model.named_parameters():
        if p.layout is torch.strided and p.is_floating_point() and p.numel():
            flat = p.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // 256)].cpu().contiguous()
            checksum = zlib.crc32(some.view(torch.uint8).numpy().tobytes(), p.numel())
            prints[name] = [checksum, float(some.float().abs().mean())]
    return prints


def compare(before: Mapping[str, list], now: Mapping[str, list], folder: Path) -> None:
    """Refuses to go on from a checkpoint over other frozen weights than it was made with."""
    if missing := [name for name in before if name not in now]:
        another_model(folder, f"{len(missing)} frozen weights that this model has not, {missing[0]} for one")
    other = [name for name in before if before[name] != now[name]]
    if far := [n for n in other if abs(before[n][1] - now[n][1]) > 0.02 * max(before[n][1], now[n][1])]:
        another_model(folder, f"{len(far)} frozen weights of other values, {far[0]} for one")
    if other:
        text = "frozen weights differ in their last bits from those the run began with (another dtype or machine?)"
        warnings.warn(f"{len(other)} {text}: it goes on, not bit for bit", stacklevel=4)


def another_model(folder: Path, what: str, cause: BaseException | None = None) -> NoReturn:
    """Refuses a checkpoint that is not of this run."""
    fail(
        UnsupportedError,
        f"{folder.name}, made with {what}",
        "the base model that the run began with, and the same method and options",
        "resume with the config of the run's own folder, or start a new run with --overwrite",
        cause,
    )
