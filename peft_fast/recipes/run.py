"""A fine-tuning from a config to a folder: rows, model, training, judging, report.

    prepared = prepare(config)                      everything a run needs, before its first step
    learner = trainer(prepared, folder)             a Trainer for it, to train, evaluate or predict with
    run = train("sentiment.yaml", epochs=2)         all of it, and the folder written

`train` leaves the process as it found it: generators, threads, verbosity and signal handlers are the caller's again
afterwards, and other models than its own are not accelerated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_fast import settings
from peft_fast.errors import SettingsError, fail, program
from peft_fast.recipes import before, reporters, tasks
from peft_fast.recipes import config as configs
from peft_fast.recipes import record as records
from peft_fast.recipes import result as results
from peft_fast.recipes.config import ADAPTERS, Config
from peft_fast.recipes.process import Memory, as_it_was, device_of, generators_kept, need_packages

Say = Callable[[str], None]


@dataclasses.dataclass
class Prepared:
    """What stands before the first step."""

    config: Config
    task: tasks.Task
    splits: Any  # split -> rows; .sources, .notes
    notes: list[str]
    model: Any
    features: dict[str, Any]  # split -> what the collator takes
    device: Any
    precision: dict[str, Any]  # what TrainingArguments needs for the dtype
    loaded: bool = True  # False: the weights are on no device, for a forecast only
    memory: Memory | None = None  # since before the model was there

    @property
    def rows(self) -> dict[str, int]:
        """Rows by split."""
        return {name: len(rows) for name, rows in self.splits.items()}


@dataclasses.dataclass
class Run:
    """What a training leaves: its folder, its result (metrics.json), and the objects, ready to use."""

    folder: Path
    result: dict[str, Any]
    trainer: Any
    task: tasks.Task
    model: Any
    signum: int = 0  # the signal that stopped it


def train(
    config: Config | str | Path | Mapping[str, Any] | None = None,
    *,
    callbacks: Sequence[Any] = (),
    say: Say | None = None,
    **options: Any,
) -> Run:
    """Fine-tunes as a config says: a YAML file, a mapping or a Config, and ``options`` over it.

    ``callbacks`` are TrainerCallbacks; ``say`` takes the lines that would be printed. A first Ctrl-C saves a
    checkpoint and returns a Run whose result["state"] is "stopped".
    """
    need_packages()
    config = resolve(config, options)
    record = records.Record(config)
    record.look()
    from peft_fast.recipes.progress import Screen

    screen = Screen(say)
    with as_it_was(config):
        began = time.time()
        try:
            prepared = prepare(config, screen.say)
            record.open(prepared.task.facts, prepared.rows)
            with reporters.closed(config):
                return _train(prepared, record, screen, callbacks, began)
        except Exception as error:
            records.full(error, record.folder)
            raise
        except KeyboardInterrupt:
            record.close()
            screen.say(_standing(record))
            raise
        finally:
            record.close()


def plan(
    config: Config | str | Path | Mapping[str, Any] | None = None, *, say: Say | None = None, **options: Any
) -> dict[str, Any]:
    """Everything up to the first step, and what it will take; the run's folder is not touched."""
    need_packages()
    config = resolve(config, options)
    record = records.Record(config)
    record.look()
    with as_it_was(config):
        from peft_fast.benchmarks import machine

        prepared = prepare(config, say or (lambda text: None), forecast_only=True)
        forecast = forecast_of(prepared)
        return results.description(prepared) | {
            "forecast": forecast,
            "fast": forecast["fast"],
            "machine": machine.header(prepared.device),
        }


def resolve(config: Config | str | Path | Mapping[str, Any] | None, options: Mapping[str, Any]) -> Config:
    """One Config; resume alone means the config in the run's folder."""
    if isinstance(config, Config):
        if not options:
            return config
        config = config.model_dump(exclude_unset=True)
    if config is None and options.get("resume") in (True, "true"):
        folder = options.get("out") or Config.model_fields["out"].default
        return records.config_of(folder, before.also, **{"out": folder, **options})
    return configs.read(config, before.also, **options)


# ---- before the first step


def prepare(config: Config, say: Say = lambda text: None, forecast_only: bool = False) -> Prepared:
    """Rows, model, method and features; every complaint about options and data comes before the model is loaded."""
    from transformers import set_seed

    from peft_fast.recipes import checks, data, methods, optimizer
    from peft_fast.recipes.trainer import steps_per_epoch

    task = tasks.get(config.task)(config)
    before.check(config)
    device = device_of(config)
    load_dtype, precision = methods.dtypes(config, task.modality)
    set_seed(config.seed)
    splits = data.read(config, task)
    task.learn(splits)
    task.load_processor()
    splits, notes = checks.run(splits, task, config)
    say(_rows_line(splits))
    for note in notes:
        say(f"note: {note}")
    # rows may have drawn; adapters and heads begin with the same numbers whatever the rows are
    set_seed(config.seed)
    loaded, watch = True, Memory(device)
    if forecast_only:
        from peft_fast.recipes import forecast

        model, loaded = forecast.load(task, load_dtype)
    else:
        model = task.load_model(load_dtype)
    model = methods.prepare(model, task, config)
    if config.fast and config.method in ADAPTERS and loaded:
        import peft_fast

        with settings.override(quiet=True):
            peft_fast.accelerate(model)
    if loaded:
        model.to(device)
    about = results.about(model, config)
    share = about["trainable"] / max(1, about["parameters"])
    say(f"{about['class']}: {about['parameters']:,} parameters, {about['trainable']:,} train ({share:.2%})")
    features = {name: task.encode(rows, name) for name, rows in splits.items()}
    if not len(features["train"]):
        fail(SettingsError, "no training row is left after encoding", "rows that fit", "raise max_length, or see notes")
    if config.progressive and (note := task.ends_small(features["train"])):
        notes = [*notes, note]
        say(f"note: {note}")
    an_epoch = steps_per_epoch(config, len(features["train"]))
    optimizer.warmup_steps(config, config.steps or math.ceil(config.epochs * an_epoch))
    return Prepared(config, task, splits, list(notes), model, features, device, precision, loaded, watch)


def _rows_line(splits: Any) -> str:
    sources = getattr(splits, "sources", {})
    counts = [f"{len(rows):,} {name}" for name, rows in splits.items()]
    return f"{sources.get('train', 'data')}: {', '.join(counts)} rows"


def trainer(prepared: Prepared, folder: Path | str, callbacks: Sequence[Any] = (), resuming: bool = False) -> Any:
    """The Trainer of a run; ``folder`` is where its checkpoints go."""
    from transformers import EarlyStoppingCallback

    from peft_fast.recipes.trainer import RecipeTrainer, arguments

    config = prepared.config
    args = arguments(
        config, prepared.task, Path(folder), len(prepared.features.get("train", ())), prepared.device, resuming,
        prepared.precision,
    )  # fmt: skip
    own: list[Any] = []
    if config.method == "gradual":
        from peft_fast.recipes.unfreeze import Unfreezing

        own.append(Unfreezing(config, prepared.model, prepared.task))
    if config.early_stopping:
        own.append(EarlyStoppingCallback(config.early_stopping, config.min_delta))
    if reporters.BOARD in config.report_to:
        own.append(reporters.board(Path(folder).parent / records.BOARD))
    return RecipeTrainer(config, prepared.task, prepared.model, prepared.features, args, [*own, *callbacks])


def forecast_of(prepared: Prepared) -> dict[str, Any]:
    """What it will take; nothing is drawn for it."""
    from peft_fast.recipes import forecast

    with generators_kept():
        return forecast.forecast(prepared.config, prepared.task, prepared.model, prepared.features)


# ---- the run


def _train(prepared: Prepared, record: records.Record, screen: Any, callbacks: Sequence[Any], began: float) -> Run:
    import torch

    from peft_fast.pages import run as page
    from peft_fast.recipes import checkpoints
    from peft_fast.recipes.interrupt import Stopped, Stopper
    from peft_fast.recipes.progress import Logger, Progress

    config, folder = prepared.config, record.folder
    saved = folder / records.CHECKPOINTS
    saved.mkdir(exist_ok=True)
    checkpoints.clean(saved)
    found = checkpoints.latest(saved, screen.say) if config.resume else None
    forecast = forecast_of(prepared)
    learner = trainer(prepared, saved, callbacks, resuming=found is not None)
    progress = Progress(screen, learner, prepared.memory.before)
    stopper = Stopper(progress)
    for callback in (Logger(record), progress, stopper):
        learner.add_callback(callback)
    if found is not None:
        step = int(found.name.rpartition("-")[2])
        screen.say(f"going on at step {step:,}")
        if prepared.device.type == "cpu" and record.threads != (now := torch.get_num_threads()):
            screen.say(f"note: CPU threads are {now}, and were {record.threads}: it goes on, not bit for bit")
        record.back_to(step)
    elif config.resume:
        screen.say(f"no checkpoint in {folder} yet: starting from the beginning")
        record.back_to(-1)
    prepared.memory.begin()
    ending = results.Ending()

    def result() -> None:
        made = results.build(prepared, learner, ending, began, forecast, prepared.memory.end())
        records.write_json(folder / records.RESULT, made)

    try:
        with stopper.listening():
            learner.train(resume_from_checkpoint=str(found) if found else None)
        best(learner)
        final, shown = _judge(learner, prepared)
        save(prepared, folder)
        ending = results.Ending("done", final, shown)
    except Stopped as stopped:
        record.begin()  # the checkpoint may be that of the beginning
        ending.signum = stopped.signum
        screen.say(
            f"stopped at step {learner.state.global_step:,}; its checkpoint is saved. To go on:\n  {_go_on(config)}"
        )
    except BaseException:
        if record.begun:  # whatever ended it, the folder says how far it came; what is told is why it ended
            with contextlib.suppress(Exception):
                result()
        raise
    finally:
        progress.close()
    result()
    # as a reader of the file finds it: what is not finite is null
    made = records.read(folder)
    page.write(made, folder)
    return Run(folder, made, learner, prepared.task, prepared.model, ending.signum)


def _standing(record: records.Record) -> str:
    """What is left of a run that was stopped at once, and how to go on with it."""
    from peft_fast.recipes import checkpoints

    ours = record.begun or record.config.resume
    last = checkpoints.latest(record.folder / records.CHECKPOINTS) if ours else None
    if last is not None:
        return f"stopped at once; {last.name} is the last that was saved. To go on from it:\n  {_go_on(record.config)}"
    if record.begun:
        do = f"start it again with --overwrite, or with another --out than {record.folder}"
        return f"stopped at once, before a checkpoint was saved: there is nothing to resume; {do}"
    kept = f"; the run in {record.folder} is as it was" if records.there(record.folder) else ""
    return f"stopped before the first step: nothing was trained, and there is nothing to resume{kept}"


def _go_on(config: Config) -> str:
    return f"{program()} train --resume --out {shlex.quote(str(config.out))}"


def best(learner: Any) -> None:
    """Puts the best checkpoint's weights back, if the last are not the best."""
    state = learner.state
    if learner.config.keep_best and state.best_model_checkpoint and state.best_global_step != state.global_step:
        learner._load_best_model()


def _judge(learner: Any, prepared: Prepared) -> tuple[dict[str, Any], Any]:
    """The final figures on validation and test, and the output that the report shows."""
    final, output = {}, None
    for split, prefix in (("validation", "eval"), ("test", "test")):
        if split in prepared.features:
            output = learner.predict(prepared.features[split], metric_key_prefix=prefix)
            final[split] = results.figures(output.metrics, f"{prefix}_")
    split = "test" if "test" in prepared.features else "validation"
    return final, prepared.task.show(output, prepared.features[split], prepared.splits[split])


def save(prepared: Prepared, folder: Path) -> Path:
    """adapter/ or model/, with the tokenizer or processor; whole or not there."""
    name = records.ADAPTER if prepared.config.method in ADAPTERS else records.MODEL
    part, final = folder / f".{name}.part", folder / name
    shutil.rmtree(part, ignore_errors=True)
    # PEFT would look for the base model on the hub, and fails on a new vocabulary of a model without embeddings
    prepared.model.save_pretrained(part, **({"save_embedding_layers": False} if name == records.ADAPTER else {}))
    if hasattr(prepared.task.processor, "save_pretrained"):
        prepared.task.processor.save_pretrained(part)
    shutil.rmtree(final, ignore_errors=True)
    return part.replace(final)
