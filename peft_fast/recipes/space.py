"""What a search tries: option -> choices or a range, and the options of one trial from what was drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from peft_fast.errors import SettingsError, fail
from peft_fast.recipes import config as configs
from peft_fast.recipes.config import ADAPTERS, RATIOS, Config

# what is the same in all trials: they are compared, and lie in folders of their own
FIXED = {"task", "data", "columns", "subset", "validation_share", "train_rows", "validation_rows", "test_rows"}
FIXED |= {"bad_rows", "metric", "out", "overwrite", "resume", "search", "name", "keep", "save_every", "report_to"}
FIXED |= {"evaluate_every", "training_arguments", "model_options", "network", "device", "log_every", "keep_best"}
# the seed draws rows that are held out, and the words that are asked
FIXED |= {"seed", "long_rows", "mask_share"}
NEEDED = "values to choose from, [a, b, …], or a range {low: …, high: …} with log: true or step: …"


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from low to high."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether both ends are whole numbers, and so is what is drawn."""
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)


Space = dict[str, Range | list]


def default(config: Config) -> Space:
    """Rank, scaling, learning rate, dropout, targets and method: what the literature says matters, in this order."""
    space: Space = {"learning_rate_ratio": Range(0.1, 10.0, log=True)}
    if config.method in ADAPTERS:
        space = {
            "method": ["lora", "dora", "full"],
            "r": [4, 8, 16, 32, 64],
            "alpha_ratio": [0.5, 1.0, 2.0, 4.0],
            **space,
            "lora_dropout": Range(0.0, 0.2, step=0.05),
            "target_modules": ["attention", "all-linear"],
        }
    if config.method == "gradual":
        space |= {"layer_decay": Range(0.7, 1.0, step=0.05)}
    return space | {"weight_decay": [0.0, 0.01, 0.1]}


def read(config: Config) -> Space:
    """The config's space, or the default; SettingsError with all that is wrong in it."""
    if not config.search:
        return default(config)
    wrong: list[str] = []
    space = {name: part for name, given in config.search.items() if (part := _part(name, given, wrong)) is not None}
    wrong += _overlaps(config, space)
    for name, part in space.items():
        wrong += _values(config, name, part, space)
    if wrong:
        given = configs.listed("search with", wrong)
        fail(SettingsError, given, f"option: {NEEDED}", "mend these in `search:` and start again")
    return space


def _part(name: str, given: Any, wrong: list[str]) -> Range | list | None:
    if name in FIXED:
        wrong.append(f"{name}: is the same in all trials, or they could not be compared")
    elif isinstance(given, list):
        if given and len({repr(value) for value in given}) == len(given):
            return given
        wrong.append(f"{name}: {given}; {'a value twice' if given else 'no value'}")
    elif isinstance(given, Mapping) and {"low", "high"} <= set(given) <= {"low", "high", "log", "step"}:
        return _range(name, dict(given), wrong)
    else:
        wrong.append(f"{name}: {given!r}; {NEEDED}")
    return None


def _range(name: str, given: dict[str, Any], wrong: list[str]) -> Range | None:
    given = {key: _number(value) for key, value in given.items()}
    low, high, log, step = given["low"], given["high"], given.get("log", False), given.get("step")
    numbers = [value for value in (low, high, step) if value is not None]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in numbers):
        wrong.append(f"{name}: {given}; low, high and step are numbers")
    elif not low < high:
        wrong.append(f"{name}: {given}; low is below high")
    elif not isinstance(log, bool):
        wrong.append(f"{name}: {given}; log is true or false")
    elif log and (low <= 0 or step is not None):
        wrong.append(f"{name}: {given}; {'log has no step' if step is not None else 'log starts above 0'}")
    elif step is not None and not 0 < step <= high - low:
        wrong.append(f"{name}: {given}; step is above 0 and fits between low and high")
    else:
        return Range(low, high, log, step)
    return None


def _number(value: Any) -> Any:
    """YAML reads 1e-5 as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _overlaps(config: Config, space: Space) -> Iterator[str]:
    if "max_length" in space and config.long_rows == "skip":
        yield "max_length: with long_rows: skip it decides which rows there are; take long_rows: truncate"
    for ratio, option in RATIOS.items():
        if ratio in space and option in space:
            yield f"{ratio}, {option}: both say the same; keep one"


def _values(config: Config, name: str, part: Range | list, space: Space) -> Iterator[str]:
    """What no trial could be made of."""
    tried = part if isinstance(part, list) else [part.low, part.high]
    all_methods = [m for m in space.get("method", [config.method]) if m in configs.METHODS]
    about = Config.model_fields[RATIOS.get(name, name)].json_schema_extra
    if about["methods"] and all_methods and not set(about["methods"]) & set(all_methods):
        yield f"{name}: means nothing for {', '.join(all_methods)}, only for {', '.join(about['methods'])}"
        return
    method = next((m for m in all_methods if not about["methods"] or m in about["methods"]), config.method)
    for value in tried:
        drawn = {"method": method, name: value} if name != "method" else {"method": value}
        try:
            options(config, drawn)
        except SettingsError as error:
            reasons = [line.strip() for line in str(error).splitlines()[1:] if line.startswith("  ")]
            yield from (f"{name}: {value!r}: {reason}" for reason in reasons)


def draw(trial: Any, config: Config, space: Space) -> dict[str, Any]:
    """The values of one trial: the method first, then what means something for it."""
    drawn: dict[str, Any] = {}
    for name in sorted(space, key=lambda name: name != "method"):
        methods = Config.model_fields[RATIOS.get(name, name)].json_schema_extra["methods"]
        if methods and drawn.get("method", config.method) not in methods:
            continue
        part = space[name]
        if isinstance(part, list):
            # optuna takes plain values alone: anything else goes by its text
            plain = all(value is None or isinstance(value, bool | int | float | str) for value in part)
            names = part if plain else [str(value) for value in part]
            chosen = trial.suggest_categorical(name, names)
            drawn[name] = chosen if plain else part[names.index(chosen)]
        elif part.whole:
            drawn[name] = trial.suggest_int(name, part.low, part.high, log=part.log, step=part.step or 1)
        else:
            drawn[name] = trial.suggest_float(name, part.low, part.high, log=part.log, step=part.step)
    return drawn


def options(config: Config, drawn: Mapping[str, Any], **more: Any) -> Config:
    """The config of a trial; what the trial's method has no use for is left out."""
    given = config.model_dump(mode="json", exclude_unset=True) | {"search": {}} | dict(drawn) | more
    ratios = {name: given.pop(name) for name in RATIOS if name in given}
    method = given.get("method", config.method)
    fields = Config.model_fields
    given = {
        name: value
        for name, value in given.items()
        if name not in fields or not fields[name].json_schema_extra["methods"] or method in _of(fields[name])
    }
    if "alpha_ratio" in ratios and method in ADAPTERS:
        given["alpha"] = _digits(ratios["alpha_ratio"] * given.get("r", fields["r"].default))
    if "learning_rate_ratio" in ratios:
        alike = method == config.method or {method, config.method} <= set(ADAPTERS)
        plain = {key: value for key, value in given.items() if key != "learning_rate"}
        base = config.learning_rate if config.learning_rate and alike else configs.read(plain).rate
        given["learning_rate"] = _digits(base * ratios["learning_rate_ratio"])
    elif "learning_rate" not in drawn and not {method, config.method} <= set(ADAPTERS) and method != config.method:
        given.pop("learning_rate", None)  # meant for the method it was given with
    return configs.read(given)


def _of(field: Any) -> list[str]:
    return field.json_schema_extra["methods"]


def _digits(value: float) -> float:
    """Four digits are enough to try, and to read."""
    return float(f"{value:.4g}")
