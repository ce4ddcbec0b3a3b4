"""Adapters: LoRA and DoRA put on a model by PEFT, new or gone on with, on layers that are asked for by any name."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from peft_fast.errors import DataError, SettingsError, UnsupportedError, fail
from peft_fast.recipes import structure
from peft_fast.recipes.config import Config

if TYPE_CHECKING:
    from peft_fast.recipes.tasks import Task

ALL_LINEAR, ATTENTION = "all-linear", "attention"
SHOWN = 8  # names in a message
# option -> how PEFT's config calls it
OPTIONS = {
    "r": "r",
    "alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "rslora": "use_rslora",
    "lora_bias": "bias",
    "init_lora_weights": "init_lora_weights",
}


def add(model: nn.Module, task: Task, config: Config, head: Sequence[str]) -> nn.Module:
    """The model under a PEFT adapter: what `config` asks for, or the one in the folder `config.adapter`."""
    peft = _peft()
    if config.adapter:
        return resume(model, task, config, head)
    wholes = [*head, *_named(model, config.modules_to_save, "modules_to_save")]
    lora = peft.LoraConfig(
        task_type=task.peft,
        **{theirs: getattr(config, ours) for ours, theirs in OPTIONS.items()},
        target_modules=targets(model, config.target_modules, wholes, config.lora_dropout),
        modules_to_save=list(dict.fromkeys(wholes)) or None,
        use_dora=config.method == "dora",
    )
    if any(p.is_meta for p in model.parameters()):  # a plan: nothing to decompose
        lora.init_lora_weights = True
    return _get(peft, model, lora, head)


def resume(model: nn.Module, task: Task, config: Config, head: Sequence[str]) -> nn.Module:
    """The model under the adapter of a folder; a head that is not in there starts anew."""
    peft = _peft()
    folder = Path(config.adapter).expanduser()
    if not (folder / "adapter_config.json").is_file():
        need = "a folder that PEFT's save_pretrained wrote, with adapter_config.json"
        fail(SettingsError, f"adapter: {folder.name}", need, "give the adapter/ folder of a run, or leave adapter out")
    found = peft.PeftConfig.from_pretrained(str(folder))
    if getattr(found, "peft_type", None) != peft.PeftType.LORA:
        fail(SettingsError, f"adapter: {folder.name}, {found.peft_type}", "a LoRA or DoRA adapter", "leave adapter out")
    _same(found, config, folder)
    found.inference_mode = False
    found.task_type = task.peft or found.task_type
    wholes = [*(found.modules_to_save or ()), *head, *_named(model, config.modules_to_save, "modules_to_save")]
    found.modules_to_save = list(dict.fromkeys(wholes)) or None
    adapted = _get(peft, model, found, head)
    if any(p.is_meta for p in adapted.parameters()):
        return adapted
    try:
        weights = peft.utils.load_peft_weights(str(folder), device="cpu")
        new = peft.get_peft_model_state_dict(adapted)  # of modules that the folder has not
        new = {name: value for name, value in new.items() if "lora_" not in name}
        outcome = peft.set_peft_model_state_dict(adapted, new | weights)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        fail(DataError, f"adapter: {folder.name}: {reason}", "weights that fit this model", "name its own base", error)
    lost = [name for name in outcome.missing_keys if "lora_" in name]
    if lost or outcome.unexpected_keys:
        what = f"{len(lost)} of its weights missing, {len(outcome.unexpected_keys)} too many"
        need = f"an adapter of {type(model).__name__}"
        fail(DataError, f"adapter: {folder.name}, {what}", need, "name the model that it was trained on")
    return adapted


def _same(found: Any, config: Config, folder: Path) -> None:
    """Options of the adapter's shape cannot change when training goes on."""
    wrong = []
    for ours, theirs in OPTIONS.items():
        if ours in config.model_fields_set and getattr(config, ours) != getattr(found, theirs):
            wrong.append(f"{ours}: {getattr(config, ours)}; the adapter has {getattr(found, theirs)}")
    if "target_modules" in config.model_fields_set:
        wrong.append(f"target_modules: {config.target_modules}; the adapter's layers stand in its own config")
    kind = "dora" if found.use_dora else "lora"
    if config.method != kind:
        wrong.append(f"method: {config.method}; the adapter is {kind}")
    if wrong:
        listed = "\n  ".join([f"adapter: {folder.name} and other options:", *wrong])
        fail(SettingsError, listed, "the adapter as it is", "leave these options out")


def _get(peft: Any, model: nn.Module, lora: Any, head: Sequence[str]) -> nn.Module:
    """get_peft_model, with its many kinds of errors as one, and a look at what it did."""
    asked = list(lora.modules_to_save or ())
    names = [name for name, _ in model.named_modules() if name]
    for whole in asked:
        # PEFT takes every module whose name ends so, with or without a dot before
        more = [n for n in names if n.endswith(whole) and not any(_ends_with([n], other) for other in asked)]
        if more:
            given = f"{whole}, to be trained whole, in a {type(model).__name__} that also has {more[0]}"
            fail(UnsupportedError, given, "names that PEFT tells apart", "use head, full or gradual")
    try:
        with warnings.catch_warnings():
            # of GPT-2's layers, which PEFT then treats as they are
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            adapted = peft.get_peft_model(model, lora)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        fail(UnsupportedError, f"PEFT on {type(model).__name__}: {reason}", "layers that PEFT adapts", _DO, error)
    inner, _ = structure.unwrapped(adapted)
    kept = [n for n, m in inner.named_modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)]
    assert not (missed := set(head) - set(kept)), f"{missed} will not be saved"
    return adapted


_DO = "name other target_modules"


def targets(
    model: nn.Module, asked: str | Sequence[str], besides: Sequence[str] = (), dropout: float = 0.0
) -> list[str] | str:
    """The option target_modules -> what PEFT takes: shortest names that mean these layers and no others, or a regex."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {n: m for n, m in structure.linear_layers(model).items() if not structure.within(n, besides)}
    if asked in (ALL_LINEAR, ATTENTION):
        found = linear if asked == ALL_LINEAR else structure.attention_layers(model)
        experts = _experts(model) if dropout else ()
        found = [n for n, m in found.items() if n in linear and m is not output and n.rpartition(".")[2] not in experts]
        if not found:
            need = f"linear layers; {type(model).__name__} has {'some elsewhere' if linear else 'none'}"
            fail(UnsupportedError, f"target_modules: {asked}", need, f"name them: {_some(linear)}")
        return _short(model, found, besides)
    names = [name for name, module in model.named_modules() if name and not structure.within(name, besides)]
    if isinstance(asked, str):
        try:
            hits = [name for name in names if re.fullmatch(asked, name)]
        except re.error as error:
            do = "mend it, or give a list of names"
            fail(SettingsError, f"target_modules: {asked!r}", f"a regular expression ({error})", do, error)
        if not hits:
            last = _ends_with(names, asked)
            do = f"give a list: [{asked}]" if last else f"layers are called {_some(linear)}"
            need = "all-linear, attention, or a regular expression that fits whole names"
            fail(SettingsError, f"target_modules: {asked!r} fits no layer", need, do)
        return asked
    _named(model, asked, "target_modules", besides)
    return list(asked)


def _experts(model: nn.Module) -> set[str]:
    """Names that PEFT takes for experts' parameters, whose adapters know no dropout, in the models that have those."""
    from peft.utils import transformers_weight_conversion as conversion

    kinds = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {})
    kind = kinds.get(getattr(getattr(model, "config", None), "model_type", None))
    return set(getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {}).get(kind, ()))


def _short(model: nn.Module, found: Sequence[str], besides: Sequence[str]) -> list[str]:
    """Last parts of names, as PEFT matches them, where they mean only layers that are meant; whole names else."""
    short: list[str] = []
    wanted = set(found)
    names = [name for name, _ in model.named_modules() if name and not structure.within(name, besides)]
    for name in found:
        parts = name.split(".")
        # numbers of layers mean nothing by themselves
        tails = (".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1))
        tail = next((t for t in tails if not t[0].isdigit() and set(_ends_with(names, t)) <= wanted), name)
        if tail not in short:
            short.append(tail)
    meant = {name for tail in short for name in _ends_with(names, tail)}
    # the name of one layer may be the end of another's
    return short if meant == wanted else f"(?:{'|'.join(map(re.escape, found))})"


def _named(model: nn.Module, asked: Sequence[str], option: str, besides: Sequence[str] = ()) -> list[str]:
    """``asked``, each of which is the name of a module or its last parts."""
    names = [name for name, _ in model.named_modules() if name and not structure.within(name, besides)]
    for name in asked:
        if not _ends_with(names, name):
            ends = sorted({n.rpartition(".")[2] for n in names} - {str(i) for i in range(1000)})
            near = difflib.get_close_matches(name, [*ends, *names], n=1)
            do = f"did you mean {near[0]}?" if near else f"layers are called {_some(structure.linear_layers(model))}"
            fail(SettingsError, f"{option}: {name}", f"a layer of {type(model).__name__}", do)
    return list(asked)


def _ends_with(names: Sequence[str], tail: str) -> list[str]:
    return [name for name in names if name == tail or name.endswith(f".{tail}")]


def _some(layers: dict[str, nn.Module]) -> str:
    ends = dict.fromkeys(name.rpartition(".")[2] for name in layers)
    return ", ".join(list(ends)[:SHOWN]) + ", …" * (len(ends) > SHOWN)


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        do = "pip install 'peft_fast[train]'"
        fail(UnsupportedError, "lora without the package peft", "peft", do, error)
    return peft
