"""A task's model and processor from a hub id, a folder or example:NAME, and a clear word when that cannot be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from peft_fast.errors import PeftFastError, UnsupportedError, fail
from peft_fast.recipes import examples
from peft_fast.recipes.config import Config

if TYPE_CHECKING:
    import torch

# of model_options those that say where files are: the processor and the config need them too
WHERE = ("revision", "token", "cache_dir", "subfolder", "trust_remote_code", "code_revision")
PLACES = "a hub id, a folder with config.json and weights, or example:NAME"


def load_config(config: Config, **fields: Any) -> Any:
    """The model's configuration, with ``fields`` set over it."""
    transformers = library()
    where, options = _source(config), dict(config.model_options)
    more = {key: options[key] for key in (*WHERE, "gguf_file") if key in options}
    loaded = _try(config, transformers.AutoConfig.from_pretrained, where, **more, **_offline(config))
    for name, value in fields.items():
        setattr(loaded, name, value)
    return loaded


def load_processor(config: Config, auto: str, **more: Any) -> Any:
    """``auto``, such as AutoTokenizer, of the model; ``more`` goes to its from_pretrained."""
    options = {key: value for key, value in config.model_options.items() if key in (*WHERE, "gguf_file")}
    loader = getattr(library(), auto).from_pretrained
    return _try(config, loader, _source(config), **more, **options, **_offline(config))


def load_model(
    config: Config, auto: str, dtype: torch.dtype, model_config: Any, other_sizes: bool = False
) -> tuple[Any, set[str]]:
    """The model in ``dtype``, and the names of its parameters that the checkpoint did not have.

    ``other_sizes``: the configuration was given other sizes on purpose, weights of another shape begin anew.
    """
    cls = getattr(library(), auto)
    model, info = _try(
        config,
        cls.from_pretrained,
        _source(config),
        config=model_config,
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **config.model_options,
        **_offline(config),
    )
    body = f"{model.base_model_prefix}."
    torn = sorted(str(entry[0]) for entry in info["mismatched_keys"] if str(entry[0]).startswith(body))
    if torn and not other_sizes:
        given = (
            f"model: {config.model}: {len(torn)} weights have another shape than its config.json says ({torn[0]}, …)"
        )
        fail(UnsupportedError, given, "weights and config.json of one model", "download or save the model again")
    names = {name for name, _ in model.named_parameters()}
    fresh = {name for name in info["missing_keys"] if name in names} | {str(e[0]) for e in info["mismatched_keys"]}
    inner = {name for name in names if name.startswith(body)}
    if inner and len(inner & fresh) > len(inner) // 2:
        given = f"model: {config.model}: {len(inner & fresh)} of {len(inner)} weights of {type(model).__name__} missing"
        do = "check that config.json and the weights in that place belong together"
        fail(UnsupportedError, given, "a checkpoint of the model that config.json names", do)
    return model, fresh


def new_modules(model: Any, fresh: set[str]) -> list[str]:
    """The modules around the base model, and those within it that the checkpoint had nothing for."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = plain.base_model_prefix
    found = [name for name, child in plain.named_children() if name != body and any(True for _ in child.parameters())]
    for name in sorted(fresh):
        owner = name.rpartition(".")[0]
        if owner and not any(owner == known or owner.startswith(f"{known}.") for known in found):
            found.append(owner)
    return found


def library() -> Any:
    """transformers."""
    try:
        import transformers
    except ImportError as error:
        fail(UnsupportedError, "no transformers", "the libraries of training", "pip install 'peft_fast[train]'", error)
    return transformers


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no load report: that a head is new is what a task is for."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _source(config: Config) -> str:
    """A folder of this machine, or a hub id."""
    name = config.model
    if examples.named(name):
        entry = examples.get(name)
        if entry.splits is not None:
            fail(UnsupportedError, f"model: {name}, which is data: {entry.what}", PLACES, "give it as data")
        return str(examples.path(name, config.network))
    path = Path(name).expanduser()
    if path.is_dir():
        _check_folder(name, path, config.model_options)
        return str(path)
    if path.is_file():
        do = f"give its folder, {path.parent}"
        if path.suffix == ".gguf":
            do += f", and model_options: {{gguf_file: {path.name}}}"
        fail(UnsupportedError, f"model: {name}, a file", PLACES, do)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        fail(UnsupportedError, f"model: {name}: no such folder", PLACES, "correct the path")
    return name


def _check_folder(name: str, path: Path, options: dict[str, Any]) -> None:
    inner = path / options.get("subfolder", "")
    if (inner / "config.json").is_file() or "gguf_file" in options:
        return
    if (inner / "adapter_config.json").is_file():
        do = f"give its base model as model and --adapter {name}"
        fail(UnsupportedError, f"model: {name} is an adapter, not a model", PLACES, do)
    if (inner / "model" / "config.json").is_file():
        fail(UnsupportedError, f"model: {name}, a run", PLACES, f"give its model: {Path(name) / 'model'}")
    there = ", ".join(sorted(entry.name for entry in inner.iterdir())[:8]) if inner.is_dir() else "no such subfolder"
    fail(UnsupportedError, f"model: {name}: no config.json there ({there or 'empty'})", PLACES, "correct the path")


def _offline(config: Config) -> dict[str, bool]:
    return {} if config.network else {"local_files_only": True}


def _try(asked: Config, load: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    """``load``'s result; whatever it raises, in three lines."""
    try:
        with quiet():
            return load(*args, **options)
    except PeftFastError:
        raise
    except Exception as error:  # each of the libraries below has errors of its own
        _explain(asked, error)


def _explain(config: Config, error: Exception) -> NoReturn:
    text = " ".join(str(error).split()) or type(error).__name__
    given, local = f"model: {config.model}", Path(config.model).expanduser().is_dir()
    if "Unrecognized configuration class" in text:
        kind = text.partition("<class '")[2].partition("'")[0].rpartition(".")[2]
        auto = text.partition("AutoModel: ")[2].partition(".")[0]
        given += f", {kind or 'a class'} that transformers has no {auto or 'model'} of"
        fail(UnsupportedError, given, f"a model that can do {config.task}", "take another model or task", error)
    if "unexpected keyword argument" in text:
        given += f": {text}"
        fail(UnsupportedError, given, "model_options that from_pretrained takes", "correct model_options", error)
    if isinstance(error, ImportError):
        fail(UnsupportedError, f"{given}: {text[:300]}", "the library it names", "install it", error)
    if isinstance(error, OSError) and not local and not examples.named(config.model):
        asked = "the hub" if config.network else "this machine's cache (--no-network)"
        given += f": not a folder here, and {asked} has it not or did not answer ({text[:160]})"
        do = "check the name and the connection; a private model needs model_options: {token: …}"
        fail(UnsupportedError, given, PLACES, do, error)
    fail(UnsupportedError, f"{given}: {type(error).__name__}: {text[:300]}", PLACES, "check its files", error)
