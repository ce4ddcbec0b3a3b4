"""What is wrong with a config that its table of options cannot know, all of it before rows or a model are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from peft_fast.errors import PeftFastError, SettingsError, fail
from peft_fast.recipes import reporters, tasks
from peft_fast.recipes.config import OWN_ARGUMENTS, Config, listed, near
from peft_fast.recipes.process import device_of


def check(config: Config) -> None:
    """Raises one error with every problem; of one alone, that one's own."""
    found = list(problems(config))
    if len(found) == 1:
        raise found[0]
    if found:
        fail(SettingsError, listed("the config with", lines(found)), "options that act on this run", "mend these")


def also(config: Config) -> list[str]:
    """The same as lines, beside those of `config.read`."""
    return lines(problems(config))


def lines(errors: Iterable[PeftFastError]) -> list[str]:
    """Of each error what was given and what is needed; of one that lists several, each of them."""
    out: list[str] = []
    for error in errors:
        given, need, _ = error.parts
        head, *several = given.split("\n  ")
        out += several or [f"{head}; {need}"]
    return out


def problems(config: Config) -> Iterator[PeftFastError]:
    """One error for each stage that has something to say."""
    import torch
    from transformers import Seq2SeqTrainingArguments

    from peft_fast.recipes import methods, optimizer
    from peft_fast.recipes.trainer import arguments

    task = tasks.get(config.task)(config)
    if config.metric and config.metric not in task.judged_by:
        need = f"one of {', '.join(sorted(task.judged_by))}"
        yield from _raised(fail, SettingsError, f"metric: {config.metric}", need, f"leave it out for {task.metric}")
    yield from _raised(methods.check, config, task)
    roles = [column.role for column in task.columns]
    for name in sorted(set(config.columns) - set(roles)):
        given, need = f"columns: no role {name}{near(name, roles)}", f"roles of this task: {', '.join(roles)}"
        yield from _raised(fail, SettingsError, given, need, "correct columns")
    device, precision = torch.device("cpu"), {}
    try:
        device = device_of(config)
    except PeftFastError as error:
        yield error
    try:
        precision = methods.dtypes(config, task.modality)[1]
    except PeftFastError as error:
        yield error
    for name in config.report_to:
        yield from _raised(reporters.check, name)
    yield from _raised(optimizer.check, config)
    fields = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}
    for name in sorted(set(config.training_arguments) - fields):
        given, need = f"training_arguments: {name}{near(name, fields - OWN_ARGUMENTS)}", "a field of TrainingArguments"
        yield from _raised(fail, SettingsError, given, need, "correct it or leave it out")
    # without what was refused above or by the table, which TrainingArguments would refuse under names of its own
    rest = {n: v for n, v in config.training_arguments.items() if n in fields - OWN_ARGUMENTS}
    fine = {"optimizer": "adamw_torch", "report_to": [], "metric": None, "evaluate_every": "epoch", "save_every": None}
    plain = config.model_copy(update=fine | {"training_arguments": rest})
    yield from _raised(arguments, plain, task, config.out, 1, device, False, precision)


def _raised(stage: Callable[..., Any], *given: Any) -> Iterator[PeftFastError]:
    try:
        stage(*given)
    except PeftFastError as error:
        yield error
