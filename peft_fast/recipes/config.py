"""Config: every option of a fine-tuning in one table, from YAML, flags or Python; all that is wrong is said at once.

Nothing else knows an option: `train --help`, the JSON schema and the page of options are made of this table.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from peft_fast.errors import SettingsError, fail, program
from peft_fast.recipes import yamls

TASKS = (
    "sequence-classification",
    "token-classification",
    "question-answering",
    "translation",
    "summarization",
    "causal-lm",
    "masked-lm",
    "image-classification",
    "object-detection",
    "speech-recognition",
    "audio-classification",
    "regression",
    "time-series",
)
METHODS = ("head", "lora", "dora", "full", "gradual")
HINGES = {"schedule", "warmup", "unfreeze_by", "unfreeze_patience"}  # options that decide what others mean
APART = "fields apart"  # a context of validation: the rules between fields are not asked
SCHEDULES = ("linear", "cosine", "wsd", "constant", "inverse_sqrt")
SECTIONS = {
    "what": "what is learnt, from what, how",
    "data": "reading and preparing the rows",
    "method": "which weights train",
    "optimisation": "how they train",
    "evaluation": "when and by what they are judged",
    "run": "where results go, and on what it runs",
}

TEXT = ("sequence-classification", "token-classification", "question-answering", "translation", "summarization")
TEXT += ("causal-lm", "masked-lm", "regression")
SEQ2SEQ = ("translation", "summarization")
GENERATES = (*SEQ2SEQ, "causal-lm", "speech-recognition")
IMAGES = ("image-classification", "object-detection")
DETECTION = ("object-detection",)
AUDIO = ("speech-recognition", "audio-classification")
# a row that is too long loses something; others read a long one in windows, or scale it
MEASURED = ("sequence-classification", "token-classification", "causal-lm", "regression", *SEQ2SEQ, *AUDIO)
LABELLED = ("sequence-classification", "token-classification", "image-classification", "audio-classification")
ADAPTERS = ("lora", "dora")
# what `search` tries in place of an option: alpha = alpha_ratio · r, learning_rate = ratio · the method's own
RATIOS = {"alpha_ratio": "alpha", "learning_rate_ratio": "learning_rate"}
# what others call an option, where its spelling alone would not lead to it
ELSEWHERE = {"lr": "learning_rate", "rank": "r", "lora_alpha": "alpha", "output_dir": "out", "max_steps": "steps"}


# fields of TrainingArguments that options set, or a run that goes on depends on
OWN_ARGUMENTS = {
    *("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "weight_decay"),
    *("gradient_accumulation_steps", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing", "bf16", "fp16"),
    *("activation_checkpointing_kwargs", "eval_strategy", "eval_steps", "eval_on_start", "eval_delay"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better", "logging_steps", "logging_strategy", "logging_first_step"),
    *("logging_nan_inf_filter", "report_to", "run_name", "log_level", "disable_tqdm", "seed", "data_seed", "use_cpu"),
    *("resume_from_checkpoint", "ignore_data_skip", "restore_callback_states_from_checkpoint", "label_names"),
    *("remove_unused_columns", "predict_with_generate", "generation_num_beams", "generation_max_length"),
    *("batch_eval_metrics", "prediction_loss_only", "train_sampling_strategy", "length_column_name"),
    *("auto_find_batch_size", "deepspeed", "fsdp", "fsdp_config", "parallelism_config", "sortish_sampler"),
    "dataloader_persistent_workers",
}


def option(section: str, default: Any, help: str, tasks: Any = None, methods: Any = None, **limits: Any) -> Any:
    """One row of the table; ``tasks`` and ``methods`` are those it has a meaning for, None for all."""
    return Field(default, description=help, json_schema_extra=_about(section, tasks, methods), **limits)


def _about(section: str, tasks: Any, methods: Any) -> dict[str, Any]:
    return {"section": section, "tasks": tasks and list(tasks), "methods": methods and list(methods)}


class Config(BaseModel):
    """A fine-tuning, whole: one config on one machine, by as many threads, gives one result."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), title="peft_fast fine-tuning", allow_inf_nan=False
    )

    task: Literal[TASKS] = option("what", ..., "what is learnt")
    model: str = option("what", ..., "hub id, local folder, or example:NAME", min_length=1)
    data: str | dict[str, str] = option(
        "what", ..., "hub id, file, folder or example:NAME, or a mapping {train: …, validation: …, test: …}"
    )
    method: Literal[METHODS] = option(
        "what", "lora", "what trains: the head alone, adapters, everything, or layer after layer from the top"
    )
    model_options: dict[str, Any] = option("what", {}, "more arguments of from_pretrained, such as revision")

    columns: dict[str, str] = option("data", {}, "role -> column, where a column's name does not tell its role")
    subset: str | None = option("data", None, "configuration of a hub dataset")
    validation_share: float = option(
        "data", 0.1, "share of the training rows held out where there is no validation split", gt=0, lt=1
    )
    train_rows: int = option("data", 0, "training rows at most, drawn by the seed; 0: all", ge=0)
    validation_rows: int = option("data", 0, "validation rows at most; 0: all", ge=0)
    test_rows: int = option("data", 0, "test rows at most; 0: all", ge=0)
    bad_rows: Literal["stop", "skip"] = option("data", "stop", "rows that cannot be used: stop and name them, or skip")
    long_rows: Literal["truncate", "skip", "stop"] = option(
        "data", "truncate", "rows longer than max_length: cut them (and say how many), skip them, or stop", MEASURED
    )
    max_length: int = option("data", 0, "tokens of a row at most; 0: what the model takes, 512 at most", TEXT, ge=0)
    max_target_length: int = option("data", 128, "tokens of a target at most", (*SEQ2SEQ, "speech-recognition"), ge=1)
    prefix: str = option("data", "", "text before every source, such as 'summarize: '", SEQ2SEQ)
    source_language: str | None = option(
        "data", None, "language code of a multilingual tokenizer", (*SEQ2SEQ, "speech-recognition")
    )
    target_language: str | None = option("data", None, "language code of a multilingual tokenizer", SEQ2SEQ)
    doc_stride: int = option("data", 128, "tokens two windows of a long context share", ("question-answering",), ge=0)
    packing: bool = option("data", False, "short rows share one sequence, none sees another", ("causal-lm",))
    loss_on: Literal["answers", "all"] = option(
        "data", "answers", "of a conversation: learn what the assistant says, or every token", ("causal-lm",)
    )
    chat_template: str = option(
        "data",
        "auto",
        "auto: the tokenizer's, or words for the roles where it has none; none: prompt and completion are one text; "
        "or a file with a Jinja template",
        ("causal-lm",),
        min_length=1,
    )
    mask_share: float = option("data", 0.15, "share of tokens that are masked", ("masked-lm",), gt=0, lt=1)
    image_size: int = option("data", 0, "pixels of a side; 0: the image processor's", IMAGES, ge=0)
    augment: bool = option("data", False, "random crops and flips of the training images", IMAGES)
    box_format: Literal["xywh", "xyxy"] = option(
        "data", "xywh", "boxes of the data: left, top, width, height (COCO) or two corners (Pascal)", DETECTION
    )
    max_seconds: float = option("data", 30.0, "seconds of a recording at most", AUDIO, gt=0)
    context: int = option("data", 0, "past values the forecast reads; 0: what the model does", ("time-series",), ge=0)
    horizon: int = option("data", 0, "values it forecasts; 0: what the model does", ("time-series",), ge=0)
    season: int = option(
        "data", 0, "values of one season, which the naive forecast repeats; 0: found", ("time-series",), ge=0
    )
    class_weights: Literal["none", "balanced"] | dict[str, float] = option(
        "data", "none", "weight of a class in the loss: balanced is inverse to its rows; or {class: weight}", LABELLED
    )

    r: int = option("method", 16, "rank of the adapters", None, ADAPTERS, ge=1)
    alpha: float = option("method", 32, "the adapters' scaling is alpha / r", None, ADAPTERS, gt=0)
    lora_dropout: float = option("method", 0.05, "dropout before the adapters", None, ADAPTERS, ge=0, lt=1)
    target_modules: str | list[str] = option(
        "method", "all-linear", "adapted layers: all-linear, attention, a regular expression or names", None, ADAPTERS
    )
    rslora: bool = option("method", False, "scaling alpha / √r (arXiv 2312.03732)", None, ADAPTERS)
    lora_bias: Literal["none", "all", "lora_only"] = option("method", "none", "biases that train", None, ADAPTERS)
    init_lora_weights: bool | str = option("method", True, "true, gaussian, pissa, olora, … as PEFT's", None, ADAPTERS)
    modules_to_save: list[str] = option("method", [], "layers trained whole besides the head", None, ADAPTERS)
    adapter: str | None = option("method", None, "folder of an adapter to go on from", None, ADAPTERS)
    unfreeze_by: Literal["epoch", "plateau"] = option(
        "method",
        "epoch",
        "next layers train after unfreeze_every, or when evaluation stops improving",
        None,
        ("gradual",),
    )
    unfreeze_every: float = option("method", 1.0, "epochs between two unfreezings", None, ("gradual",), gt=0)
    unfreeze_layers: int = option("method", 1, "layers that join at a time", None, ("gradual",), ge=1)
    unfreeze_patience: int = option("method", 1, "evaluations without progress = plateau", None, ("gradual",), ge=1)

    epochs: float = option("optimisation", 3.0, "passes over the training rows", gt=0)
    steps: int = option("optimisation", 0, "optimizer steps instead of epochs; 0: epochs", ge=0)
    batch_size: int = option("optimisation", 16, "rows a device takes at once", ge=1)
    gradient_accumulation: int = option("optimisation", 1, "batches of one optimizer step", ge=1)
    learning_rate: float | None = option(
        "optimisation", None, "at its highest; default head 1e-3, lora 5e-4, dora 5e-4, full 2e-5, gradual 5e-5", gt=0
    )
    head_learning_rate: float | None = option(
        "optimisation",
        None,
        "of the head, which begins from nothing; default learning_rate, with lora and dora ten times that",
        gt=0,
    )
    layer_decay: float = option(
        "optimisation", 1.0, "each layer below the head learns by this factor slower (arXiv 1801.06146)", gt=0, le=1
    )
    loraplus_ratio: float = option(
        "optimisation", 1.0, "learning rate of B over that of A (LoRA+, arXiv 2402.12354)", None, ADAPTERS, ge=1
    )
    optimizer: str = option("optimisation", "adamw_torch", "any name that TrainingArguments.optim takes")
    weight_decay: float = option("optimisation", 0.01, "of matrices; none on biases and norms", ge=0)
    schedule: Literal[SCHEDULES] = option(
        "optimisation", "linear", "course of the learning rate after the warm-up; wsd: warm up, stay, decay"
    )
    warmup: float = option("optimisation", 0.06, "below 1 a share of all steps, else a number of steps", ge=0)
    decay: float = option("optimisation", 0.2, "of wsd: the share of steps that decays", gt=0, le=1)
    max_grad_norm: float = option(  # infinite: never clipped, but logged
        "optimisation", 1.0, "gradients are clipped to this norm; 0: never", ge=0, allow_inf_nan=True
    )
    label_smoothing: float = option(
        "optimisation", 0.0, "share of a label given to all others", LABELLED + GENERATES + ("masked-lm",), ge=0, lt=1
    )
    dropout: float | None = option(
        "optimisation", None, "every dropout of the model itself; default: its own", ge=0, lt=1
    )
    neftune: float = option("optimisation", 0.0, "noise on embeddings (NEFTune, arXiv 2310.05914)", TEXT, ge=0)
    progressive: list[int] = option(
        "optimisation", [], "growing sizes: tokens (text) or pixels (images), in equal shares", (*TEXT, *IMAGES)
    )
    group_by_length: bool = option("optimisation", True, "batches of rows alike in length: less padding", TEXT)
    gradient_checkpointing: bool = option("optimisation", False, "compute activations again instead of keeping them")

    evaluate_every: Literal["epoch"] | int = option("evaluation", "epoch", "epoch, or a number of steps")
    metric: str | None = option("evaluation", None, "what says which checkpoint is best; default: the task's")
    early_stopping: int = option("evaluation", 0, "stop after so many evaluations without progress; 0: never", ge=0)
    min_delta: float = option("evaluation", 0.0, "what counts as progress", ge=0)
    keep_best: bool = option("evaluation", True, "end with the best weights, be it those before training, not the last")
    eval_batch_size: int = option("evaluation", 0, "rows at once in evaluation; 0: twice batch_size", ge=0)
    beams: int = option("evaluation", 1, "beams of generation", GENERATES, ge=1)
    min_score: float = option(
        "evaluation", 0.5, "found objects less certain than this are not shown and not answered", DETECTION, ge=0, lt=1
    )
    max_new_tokens: int = option("evaluation", 64, "generated tokens at most", GENERATES, ge=1)

    out: Path = option("run", Path("runs/last"), "folder of the run")
    overwrite: bool = option("run", False, "throw away what is in that folder")
    resume: bool = option("run", False, "go on where the run in that folder stopped")
    save_every: Literal["epoch"] | int | None = option(
        "run", None, "checkpoints: epoch, or a number of steps; default: at every evaluation"
    )
    keep: int = option("run", 2, "checkpoints kept besides the best", ge=1)
    seed: int = option("run", 0, "of everything drawn", ge=0, lt=2**32)
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "run", "auto", "of frozen weights; auto: bf16 where the machine multiplies it; what trains stays fp32"
    )
    device: Literal["auto", "cpu", "cuda"] = option("run", "auto", "where it runs")
    threads: int = option("run", 0, "CPU threads; 0: torch's choice", ge=0)
    fast: bool = option("run", True, "false: stock PEFT, to compare")
    log_every: int = option("run", 10, "steps between two entries of the log", ge=1)
    report_to: str | list[str] = option("run", [], "wandb, tensorboard, … : the Trainer's own callbacks")
    name: str | None = option("run", None, "the run's name in reports; default: the folder's")
    network: bool = option("run", True, "false: only what is on this machine already")
    training_arguments: dict[str, Any] = option("run", {}, "any other field of transformers.TrainingArguments")
    search: dict[str, Any] = option("run", {}, "option -> values or {low, high, log}: what `search` tries")

    @pydantic.field_validator("report_to")
    @classmethod
    def _listed(cls, value: str | list[str]) -> list[str]:
        names = [value] if isinstance(value, str) else value
        return [] if names == ["none"] else names

    @pydantic.model_validator(mode="after")
    def _together(self, info: pydantic.ValidationInfo) -> Config:
        if info.context != APART and (wrong := list(self.contradictions())):
            raise ValueError("\n".join(wrong))
        return self

    def contradictions(self) -> Iterable[str]:
        """What no single field can know, one line each."""
        for name in sorted(self.model_fields_set):
            about = type(self).model_fields[name].json_schema_extra
            for given, key in ((self.task, "tasks"), (self.method, "methods")):
                if about[key] and given not in about[key]:
                    yield f"{name}: means nothing for {given}, only for {', '.join(about[key])}"
        if isinstance(self.data, dict) and (strange := sorted(set(self.data) - {"train", "validation", "test"})):
            yield f"data: split {', '.join(strange)}; there are train, validation and test"
        if isinstance(self.data, dict) and "train" not in self.data:
            yield "data: no train split"
        if self.progressive and sorted(set(self.progressive)) != self.progressive:
            yield f"progressive: {self.progressive}; sizes have to grow"
        if self.progressive and self.progressive[0] < 1:
            yield f"progressive: {self.progressive}; sizes are above 0"
        if self.overwrite and self.resume:
            yield "overwrite, resume: one throws away what the other needs"
        for name in ("evaluate_every", "save_every"):
            if isinstance(value := getattr(self, name), int) and value < 1:
                yield f"{name}: {value}; epoch, or 1 step or more"
        if isinstance(self.class_weights, dict) and min(self.class_weights.values(), default=0) < 0:
            yield f"class_weights: {self.class_weights}; weights of 0 or more"
        for name in sorted(set(self.search) - set(type(self).model_fields) - set(RATIOS)):
            yield f"search: {name} is no option{near(name)}"
        if taken := sorted(set(self.training_arguments) & OWN_ARGUMENTS):
            yield f"training_arguments: {', '.join(taken)} are set by options of their own"
        for name, value in self.training_arguments.items():
            if isinstance(value, float) and not math.isfinite(value):
                yield f"training_arguments: {name}: {value}; a finite number"

    @property
    def rate(self) -> float:
        """The learning rate in force."""
        return self.learning_rate or {"full": 2e-5, "gradual": 5e-5, "head": 1e-3}.get(self.method, 5e-4)

    @property
    def head_rate(self) -> float:
        """The head's learning rate in force: at that of adapters it hardly learns what single tokens are."""
        # twelve digits: ten times 9.668e-05 is not 0.0009668000000000001
        return self.head_learning_rate or float(f"{self.rate * (10 if self.method in ADAPTERS else 1):.12g}")


def read(
    source: str | Path | Mapping[str, Any] | None = None,
    also: Callable[[Config], Iterable[str]] = lambda config: (),
    /,
    **options: Any,
) -> Config:
    """The config of a YAML file or mapping, with ``options`` over it. Raises SettingsError with all that is wrong.

    ``also`` finds what else is wrong with a config that is not refused for it alone.
    """
    found, twice = ({}, []) if source is None else yamls.mapping(source)
    given, wrong, cause = found | options, [], None
    try:
        config = Config(**given)
    except pydantic.ValidationError as error:
        cause = error
        wrong += _problems(error)
        bad = {entry["loc"][0] for entry in error.errors() if entry["loc"]}
    else:
        bad = set()
    if not twice and not wrong:
        return config
    # what only several fields make wrong is asked of those that are fine
    fine = {"model": "-", "data": "-"} | {key: value for key, value in given.items() if key not in bad}
    if "method" in bad:
        fine = {key: value for key, value in fine.items() if not Config.model_fields[key].json_schema_extra["methods"]}
    if "task" in fine:
        apart = Config.model_validate(fine, context=APART)
        more = (text for text in [*apart.contradictions(), *also(apart)] if text not in wrong)
        # what is said of a default that stands for a bad option is not said
        wrong += [text for text in more if not HINGES & bad & {*re.findall(r"\w+", text)}]
    need = f"options as `{program()} train --help` lists them"
    fail(SettingsError, _listing(source, options, twice, wrong), need, "mend these and start again", cause)


def _listing(source: Any, options: Mapping[str, Any], twice: list[str], wrong: list[str]) -> str:
    """The problems, those of a file apart from those of flags or arguments beside it."""
    if not isinstance(source, str | Path):
        return listed("the config with", wrong)
    beside = [text for text in wrong if set(text.partition(":")[0].split(", ")) & set(options)]
    own = [*twice, *(text for text in wrong if text not in beside)]
    parts = [(f"{source} with", own), (f"options beside {source} with", beside)]
    return "\n  ".join(listed(head, some) for head, some in parts if some)


def listed(head: str, wrong: list[str]) -> str:
    """A heading with the number of problems, and a line for each."""
    return "\n  ".join([f"{head} {len(wrong)} problem{'s' * (len(wrong) > 1)}:", *wrong])


def _problems(error: pydantic.ValidationError) -> list[str]:
    """A line for each thing that is wrong; of a union's branches the shortest."""
    lines: dict[str, str] = {}
    for entry in error.errors():
        name = str(entry["loc"][0]) if entry["loc"] else ""
        if entry["type"] == "extra_forbidden":
            text = f"{name}: no such option{near(name)}"
        elif entry["type"] == "missing":
            text = f"{name}: missing; {Config.model_fields[name].description}"
        elif not name:
            lines |= {line: line for line in str(entry["ctx"]["error"]).splitlines()}
            continue
        else:
            value = "no value" if entry["input"] is None else repr(entry["input"])
            text = f"{name}: {value}; {entry['msg'][0].lower()}{entry['msg'][1:]}"
        if name not in lines or len(text) < len(lines[name]):
            lines[name] = text
    return list(lines.values())


def near(name: str, known: Iterable[str] = ()) -> str:
    """Which of the known names (the options') was meant, as the end of a message; '' where none is like it."""
    plain = name.replace("-", "_")
    meant = [] if known else [ELSEWHERE[plain]] if plain in ELSEWHERE else []
    meant = meant or difflib.get_close_matches(plain, list(known) or Config.model_fields, n=1, cutoff=0.6)
    return f"; {meant[0]} is one" if meant else ""


def dump(config: Config) -> str:
    """YAML that `read` reads back to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)
