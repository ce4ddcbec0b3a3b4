"""A finished run in use: judged on other rows, asked for answers, merged into a plain model."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import peft_fast
from peft_fast import settings
from peft_fast.errors import DataError, SettingsError, UnsupportedError, fail, program
from peft_fast.recipes import methods, process, record, tasks
from peft_fast.recipes.config import ADAPTERS, Config
from peft_fast.recipes.tasks import Task

NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclasses.dataclass
class Loaded:
    """A run as it ended: its best weights in the model it was trained on."""

    folder: Path
    config: Config
    result: dict[str, Any]
    task: Task
    model: Any
    device: torch.device


def load(folder: str | Path, **options: Any) -> Loaded:
    """The run in a folder; ``options`` of this machine: device, threads, network, eval_batch_size, columns, …"""
    process.need_packages()
    folder = Path(folder).expanduser()
    result = _finished(folder)
    config = _config(folder, result, options)
    device = process.device_of(config)
    with process.as_it_was(config):
        task = tasks.get(config.task)(config, _facts(folder))
        task.load_processor()
        loaded_as, _ = methods.dtypes(config, task.modality)
        model = task.load_model(loaded_as)
        if config.method == "head" and loaded_as != torch.float32:
            # nothing of it is new this time: what trained is what was saved with all its digits
            trained = _in_float32(folder / record.MODEL, model)
            task.head = lambda model: trained
        model = methods.prepare(model, task, config)
        if config.method in ADAPTERS:
            _load_adapter(model, folder / record.ADAPTER)
        elif loaded_as != torch.float32:
            _load_exact(model, task.load_model(torch.float32))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if config.fast and config.method in ADAPTERS:
            with settings.override(quiet=True):
                peft_fast.accelerate(model)
    return Loaded(folder, config, result, task, model.to(device).eval(), device)


def _finished(folder: Path) -> dict[str, Any]:
    result = record.read(folder)
    if not any((folder / name).is_dir() for name in (record.ADAPTER, record.MODEL)):
        state = result.get("state", "without a model")
        do = f"go on with it first: `{program()} train --resume --out {folder}`"
        if state == "done":
            do = "train it again: its adapter or model folder was taken away"
        fail(DataError, f"{folder}: a run that is {state}, with no adapter or model in it", "a finished run", do)
    return result


def _facts(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / record.TASK).read_text(encoding="utf-8"))["facts"]
    except (OSError, ValueError, KeyError) as error:
        do = "take the whole folder that train wrote, not parts of it"
        fail(DataError, f"{folder / record.TASK}: {error}", "what the run learnt of its rows", do, error)


def _config(folder: Path, result: Mapping[str, Any], options: dict[str, Any]) -> Config:
    """The run's config for this machine, with the model it ended with."""
    config = record.config_of(folder)
    trained = (result.get("model") or {}).get("dtype")
    changes: dict[str, Any] = {"out": folder, "overwrite": False, "resume": False}
    if config.adapter:  # a run that went on from an adapter has its own now, in the same shape
        changes["adapter"] = str(folder / record.ADAPTER)
    if config.dtype == "auto" and config.method in (*ADAPTERS, "head"):
        changes["dtype"] = NAMES.get(trained, "auto")  # another machine's choice may differ
    if config.method not in ADAPTERS:
        changes["model"] = str(folder / record.MODEL)
        changes["model_options"] = {k: v for k, v in config.model_options.items() if k == "trust_remote_code"}
    return config.model_copy(update=changes | {k: v for k, v in options.items() if v is not None})


def _load_adapter(model: Any, folder: Path) -> None:
    """The adapter's weights into a model that was prepared as in training: what trained keeps its digits."""
    from peft import load_peft_weights, set_peft_model_state_dict

    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError) as error:
        do = "take the whole folder that train wrote"
        fail(DataError, f"{folder}: {error}", "an adapter in PEFT's format", do, error)
    try:
        found = set_peft_model_state_dict(model, weights)
    except (RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        do = "check that model in config.yaml still is the base model it was trained on"
        fail(UnsupportedError, f"{folder}: {reason}", "the adapter's own base model", do, error)
    lost = [name for name in found.missing_keys if "lora_" in name or "modules_to_save" in name]
    if lost or found.unexpected_keys:
        given = f"{folder}: {len(lost)} weights missing, {len(found.unexpected_keys)} that the model has no place for"
        fail(UnsupportedError, given, "the adapter's own base model", "check model in config.yaml")


def _in_float32(folder: Path, model: Any) -> list[str]:
    """Modules of the model whose saved weights are float32."""
    from safetensors import safe_open

    modules, found = dict(model.named_modules()), []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            owners = [name.rpartition(".")[0] for name in file.keys() if file.get_slice(name).get_dtype() == "F32"]
        found += [name for name in dict.fromkeys(owners) if name in modules]
    return found


def _load_exact(model: Any, exact: Any) -> None:
    """What trained, as it was saved: loading in the frozen weights' dtype has rounded it."""
    weights = dict(exact.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])


# ---- judged on rows


def evaluate(folder: str | Path | Loaded, data: Any = None, split: str | None = None, **options: Any) -> dict[str, Any]:
    """Metrics on ``data``, or on the run's own test (else validation) rows, as JSON."""
    from peft_fast.benchmarks import machine
    from peft_fast.recipes import result as results
    from peft_fast.recipes import run as runs

    run = folder if isinstance(folder, Loaded) else load(folder, **options)
    began = time.perf_counter()
    with process.as_it_was(run.config), tempfile.TemporaryDirectory(prefix="peft_fast-eval-") as scratch:
        rows, source, judged = _rows(run, data, split)
        features = run.task.encode(rows, "test")
        if not len(features):
            fail(DataError, f"{source}: no row is left after encoding", "rows that fit", "see the task's page")
        config = run.config.model_copy(update={"report_to": [], "early_stopping": 0})
        precision = methods.dtypes(config, run.task.modality)[1]
        prepared = runs.Prepared(
            config, run.task, {"test": rows}, [], run.model, {"validation": features}, run.device, precision
        )
        output = runs.trainer(prepared, scratch, resuming=True).predict(features, metric_key_prefix="eval")
        shown = run.task.show(output, features, rows)
    return {
        "run": run.result.get("name"),
        "task": run.config.task,
        "data": source,
        "split": judged,
        "rows": len(rows),
        "metric": run.result.get("metric"),
        "metrics": results.figures(output.metrics, "eval_"),
        "shown": shown,
        "seconds": time.perf_counter() - began,
        "machine": machine.header(run.device),
    }


def _rows(run: Loaded, given: Any, split: str | None) -> tuple[Any, str, str | None]:
    """(rows, what they are called, their split) to judge by; the run's own are divided and drawn as in training."""
    from peft_fast.recipes import data, result
    from peft_fast.recipes.splits import listed

    if given is not None and split is None:
        return data.rows(given, run.task, need_truth=True), result.name_of(str(given)), None
    config = run.config if given is None else run.config.model_copy(update={"data": given, "subset": None})
    splits = data.read(config, run.task)
    wanted = split or ("test" if "test" in splits else "validation")
    if wanted not in splits:
        fail(DataError, f"--split {wanted}", "one of " + ", ".join(splits), "pass one of these")
    if splits.problems and config.bad_rows == "stop":
        fail(DataError, listed(splits.problems), "rows that can all be used", data.SKIP_USED)
    return splits[wanted], f"{splits.sources[wanted]} ({wanted})", wanted


# ---- asked for answers


def predict(folder: str | Path | Loaded, rows: Any, **options: Any) -> list[dict[str, Any]]:
    """An answer a row: ``rows`` are texts (paths of images, of recordings), mappings of columns, or a file."""
    return answered(folder if isinstance(folder, Loaded) else load(folder, **options), rows)[1]


def answered(run: Loaded, source: Any) -> tuple[Any, list[dict[str, Any]]]:
    """(the rows that can be answered, their answers); of a series those are what comes after the rows."""
    from peft_fast.recipes import data

    with process.as_it_was(run.config):
        rows = data.rows(source, run.task)
        return rows, run.task.predict(run.model, rows)


# ---- merged


def merge(folder: str | Path, out: str | Path, dtype: str = "keep", overwrite: bool = False, **options: Any) -> dict:
    """A plain transformers model in ``out``; written only if its outputs are the run's. Returns what was compared."""
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        fail(SettingsError, f"out: {out} is there already", "a new or empty folder", "pass another, or --overwrite")
    if out.resolve() in (Path(folder).expanduser().resolve(), *Path(folder).expanduser().resolve().parents):
        fail(SettingsError, f"out: {out}, which holds the run", "a folder of its own", "pass another --out")
    run = load(folder, **options)
    with process.as_it_was(run.config):
        return _merge(run, out, dtype)


def _merge(run: Loaded, out: Path, dtype: str) -> dict[str, Any]:
    held = _held_dtype(run)
    kept = held if dtype == "keep" else methods.DTYPES[dtype]
    batch, what = _probe(run)
    want, without = _outputs(run.model, run.task, batch), None
    if run.config.method in ADAPTERS:
        with run.model.disable_adapter():
            without = _outputs(run.model, run.task, batch)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _write(run, part, kept)
        plain = type(run.task)(run.config.model_copy(update={"model": str(part), "model_options": {}}), run.task.facts)
        plain.load_processor()
        again = plain.load_model(kept).to(run.device).eval()
        # the run's own outputs have no more digits than its frozen weights
        coarse = max(held, kept, key=lambda one: torch.finfo(one).eps)
        found = _compare(want, _outputs(again, plain, batch), without, coarse, kept)
        if out.exists():
            shutil.rmtree(out)
        part.chmod(0o755)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    size = sum(p.numel() for p in again.parameters())
    about = {"class": type(again).__name__, "parameters": size, "dtype": NAMES[str(kept)[6:]]}
    return found | about | {"out": str(out), "asked": what}


def _held_dtype(run: Loaded) -> torch.dtype:
    counts: dict[torch.dtype, int] = {}
    for name, parameter in run.model.named_parameters():
        if parameter.is_floating_point() and "lora_" not in name:
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    return max(counts, key=counts.get)


def _write(run: Loaded, part: Path, dtype: torch.dtype) -> None:
    """Merged in float32 and rounded once: W + BA in bfloat16 would lose what is small beside W."""
    model = run.model
    if run.config.method in ADAPTERS:
        model = model.float().merge_and_unload(safe_merge=True)
    model = model.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(part)
    if run.task.processor is not None:
        run.task.processor.save_pretrained(part)


def _probe(run: Loaded) -> tuple[dict[str, Any], str]:
    """(a batch to compare outputs by, what it is): rows of the run's data, or made-up inputs where that is gone."""
    from peft_fast.errors import PeftFastError
    from peft_fast.recipes import data

    few = {"train_rows": 64, "validation_rows": 8, "test_rows": 8} if run.task.modality != "series" else {}
    try:
        rows = data.read(run.config.model_copy(update=few), run.task)["validation"]
        features = run.task.encode(rows, "validation")
        batch, what = run.task.collate([features[i] for i in range(min(8, len(features)))]), "rows of its own data"
    except PeftFastError:
        batch, what = _made_up(run), "random inputs: its data is not here"
    return {k: v.to(run.device) if torch.is_tensor(v) else v for k, v in batch.items()}, what


def _made_up(run: Loaded) -> dict[str, Any]:
    inner = run.model.get_base_model() if hasattr(run.model, "get_base_model") else run.model
    draw, config = torch.Generator().manual_seed(0), inner.config
    name = getattr(inner, "main_input_name", "input_ids")
    if name == "input_ids":
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        ids = torch.randint(0, text.vocab_size, (4, 12), generator=draw)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | (
            {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
        )
    side = getattr(config, "image_size", None) or 224
    side = side if isinstance(side, int) else side[0]
    shape = {
        "pixel_values": (2, getattr(config, "num_channels", 3), side, side),
        "input_features": (2, getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 1500)),
        "input_values": (2, 16000),
    }.get(name)
    if shape is None:
        given = f"{run.folder}: its data cannot be read, and inputs called {name} cannot be made up"
        fail(DataError, given, "rows to check the merged model by", "put the data back where config.yaml says")
    batch = {name: torch.randn(shape, generator=draw).to(_held_dtype(run))}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = torch.zeros(2, 4, dtype=torch.long)
    return batch


@torch.no_grad()
def _outputs(model: Any, task: Task, batch: dict[str, Any]) -> list[torch.Tensor]:
    """What the model says of a batch: its floating outputs, without loss and caches."""
    inputs = dict(task.inputs(batch))
    if "decoder_input_ids" in inputs or not getattr(model.config, "is_encoder_decoder", False):
        inputs.pop("labels", None)  # no loss: not every one is computed in every dtype
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    cast = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    found = model(**cast)
    return [
        value.float().cpu()
        for name, value in found.items()
        if torch.is_tensor(value) and value.is_floating_point() and name != "loss"
    ]


def _compare(
    want: list[torch.Tensor],
    got: list[torch.Tensor],
    without: list[torch.Tensor] | None,
    dtype: torch.dtype,
    kept: torch.dtype,
) -> dict[str, Any]:
    """The merged model's distance from the run's, against what its rounding explains and what was learnt."""
    error, learnt = _apart(got, want), _apart(without, want) if without else None
    # rounding alone makes the least of these, in a deep model the most
    least, most = {torch.float32: (1e-3, 1e-3), torch.float16: (4e-3, 2e-2), torch.bfloat16: (2e-2, 8e-2)}[dtype]
    allowed = most if learnt is None else min(most, max(learnt / 4, least))
    if learnt and kept != torch.float32:  # a model that is as near to the one before training has learnt nothing
        allowed = min(allowed, learnt / 2)
    if not error <= allowed:
        given = f"outputs that differ by {error:.1e} from the run's (without its adapter: {learnt or 0:.1e})"
        do = "keep the adapter and its base model apart"
        if dtype != torch.float32:
            do = f"merge with --dtype fp32: what was learnt is lost in the digits of {NAMES[str(dtype)[6:]]}"
        fail(UnsupportedError, given, f"at most {allowed:.1e}, and nothing was written", do)
    lost = error / learnt if learnt and error > learnt / 4 else 0.0
    return {"difference": error, "allowed": allowed, "learnt": learnt, "lost": lost}


def _apart(these: list[torch.Tensor], those: list[torch.Tensor]) -> float:
    """Largest relative distance of two models' outputs."""
    apart = [((a - b).norm() / b.norm().clamp_min(1e-12)).item() for a, b in zip(these, those, strict=True)]
    return max(apart, default=float("nan"))
