"""Forecasts: from the last `context` values of a series the next `horizon`, by PatchTST, PatchTSMixer, or an
encoder-decoder (TimeSeriesTransformer, Informer, Autoformer) that draws the future from a distribution.

MASE = mean over series of |forecast - value| / mean |value[t] - value[t - season]| of the training part
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peft_fast.errors import DataError, SettingsError, UnsupportedError, fail
from peft_fast.recipes import tasks
from peft_fast.recipes.tasks import Column, Problem, loading, media, series, series_checks, text

if TYPE_CHECKING:
    from datasets import Dataset

CLASSES = {
    "patchtst": "PatchTSTForPrediction",
    "patchtsmixer": "PatchTSMixerForPrediction",
    "time_series_transformer": "TimeSeriesTransformerForPrediction",
    "informer": "InformerForPrediction",
    "autoformer": "AutoformerForPrediction",
}
PATCHED = ("patchtst", "patchtsmixer")
TIMES = ("date", "timestamp", "datetime", "ds", "month", "day", "hour", "week", "year", "step", "t")
VALUES = ("y", "target", "values", "sales", "demand", "load", "price", "temp", "temperature", "count")
IDS = ("series_id", "unique_id", "item_id", "id", "item", "store", "sensor", "station", "city")
SHOWN = 4


class Task(tasks.Task):
    columns = (
        Column("time", "text", TIMES, truth=False),
        Column("value", "number", VALUES, truth=False),
        Column("series", "text", IDS, required=False),
    )
    modality = "series"
    unit = "values"
    metric = "mase"
    judged_by = {"loss": False, "mase": False, "mae": False, "rmse": False, "naive_mase": False, "naive_mae": False}

    def __init__(self, config: Any, facts: dict[str, Any] | None = None) -> None:
        super().__init__(config, facts)
        self.held: dict[str, list[series.Series]] = {}  # the arrays that windows are cut from
        self.known: Any = None

    # ---- the model's configuration, asked before there are rows

    def model_config(self) -> Any:
        """The model's configuration with the context and horizon in force."""
        if self.known is None:
            known = loading.load_config(self.config)
            if known.model_type not in CLASSES:
                given = f"model: {self.config.model}, a {type(known).__name__}"
                fail(UnsupportedError, given, f"one of {', '.join(CLASSES.values())}", "take another model")
            if self.config.dtype in ("bf16", "fp16"):
                given = f"dtype: {self.config.dtype} of a model that scales values inside"
                fail(SettingsError, given, "fp32, or auto, which is fp32 here", "leave dtype out")
            known.context_length = self.config.context or known.context_length
            known.prediction_length = self.config.horizon or known.prediction_length
            if getattr(known, "num_time_features", 0) > series.CALENDAR:
                given = f"model: {self.config.model} with {known.num_time_features} time features"
                fail(UnsupportedError, given, f"{series.CALENDAR} at most", "take another model")
            for name in ("num_static_categorical_features", "num_static_real_features", "num_dynamic_real_features"):
                if getattr(known, name, 0) and known.model_type not in PATCHED:
                    given = f"model: {self.config.model} with {name}: {getattr(known, name)}"
                    fail(UnsupportedError, given, "a model of values and times alone", "take another model")
            self.known = known
        return self.known

    @property
    def horizon(self) -> int:
        """Values that are forecast."""
        return self.model_config().prediction_length

    @property
    def past(self) -> int:
        """Values that a window needs before them: the context, and what lags reach back to."""
        known = self.model_config()
        lags = getattr(known, "lags_sequence", None) if known.model_type not in PATCHED else None
        return known.context_length + (max(lags) if lags else 0)

    @property
    def patched(self) -> bool:
        """Whether the model reads patches, not single values with their times."""
        return self.model_config().model_type in PATCHED

    # ---- rows

    def divide(self, rows: Dataset, share: float) -> tuple[Dataset, Dataset]:
        """The last part of each series is held out, with the values before it that its first forecast reads."""
        first, last = [], []
        self._times_or_stop(rows)
        for one in series.grouped(rows):
            cut = len(one.values) - max(self.horizon, round(len(one.values) * share))
            if cut < self.past + self.horizon:  # too short to give up any
                first += one.places.tolist()
                continue
            first += one.places[:cut].tolist()
            last += one.places[cut - self.past :].tolist()
        if not last:
            need = self.past + 2 * self.horizon
            given = f"no series of {need} rows ({self.past} to read, twice {self.horizon} to forecast)"
            fail(DataError, given, "longer series", "pass more rows, or a smaller context or horizon")
        return rows.select(sorted(first)), rows.select(sorted(last))

    def draw(self, rows: Dataset, count: int, split: str) -> Dataset:
        """Of training the newest rows, of the others the first, as many of each series."""
        self._times_or_stop(rows)
        found, kept = series.grouped(rows), []
        each = max(1, count // len(found))
        for one in found:
            kept += (one.places[-each:] if split == "train" else one.places[:each]).tolist()
        return rows.select(sorted(kept))

    def _times_or_stop(self, rows: Dataset) -> None:
        bad = series.parsed(list(rows["time"]))[1]
        if bad.any():
            place = int(bad.argmax())
            where = f"row {rows['row'][place]}, " if "row" in rows.column_names else ""
            given = f"{where}column time: {rows['time'][place]!r} ({int(bad.sum())} such rows)"
            fail(DataError, given, "dates such as 2024-01-31 or 2024-01-31 13:00, or whole numbers", "correct them")

    def learn(self, splits: dict[str, Dataset]) -> None:
        self._times_or_stop(splits["train"])
        found = series.grouped(splits["train"])
        values = np.concatenate([one.values for one in found])
        longest = max(found, key=lambda one: len(one.values)).values
        lags = [series.season_of(longest[:, c]) for c in range(longest.shape[1])]
        season = self.config.season or max(set(lags), key=lags.count)
        std = values.std(0)
        self.facts |= {
            "channels": values.shape[1],
            "names": self._names(values.shape[1]),
            "mean": values.mean(0).tolist(),
            "std": np.where(std > 0, std, 1.0).tolist(),
            "season": season,
            "naive": {one.name: self._steps(one.values, season) for one in found},
        }

    def _names(self, count: int) -> list[str]:
        """The columns that the values come from."""
        from peft_fast.recipes.data import given_columns

        found = [name.strip() for name in given_columns(self.config).get("value", "value").split(",")]
        return found if len(found) == count else [f"value_{i + 1}" for i in range(count)]

    @staticmethod
    def _steps(values: np.ndarray, season: int) -> list[float]:
        """Mean |value - value a season before| of each channel."""
        season = season if len(values) > season else 1
        steps = np.abs(values[season:] - values[:-season]).mean(0) if len(values) > 1 else np.ones(values.shape[1])
        return np.where(steps > 0, steps, 1.0).tolist()

    def check(self, splits: dict[str, Dataset]) -> Iterator[Problem]:
        """Times that are times, one row each; series long enough; something that moves."""
        for split, rows in splits.items():
            _, bad = series.parsed(list(rows["time"]))
            for place in np.flatnonzero(bad).tolist():
                what = f"{rows['time'][place]!r} is no time"
                yield media.problem(splits, split, place, "time", what, "Write 2024-01-31 13:00, or a whole number")
            widths = {len(v) if isinstance(v, list) else 1 for v in rows["value"]}
            if bad.any():
                continue
            if widths != {self.facts["channels"]}:
                what = f"{sorted(widths)} values a row, {self.facts['channels']} in training"
                yield media.problem(splits, split, 0, "value", what, "Give the same columns in every file")
                continue
            found = series.grouped(rows)
            yield from series_checks.each(splits, split, found, self.past, self.horizon)
            if split != "train" and not series.parsed(list(splits["train"]["time"]))[1].any():
                yield from series_checks.seen(splits, split, found, self.past)

    # ---- model

    def load_processor(self) -> None:
        """There is none: values are scaled by what `learn` saw."""
        self.model_config()

    def load_model(self, dtype: torch.dtype) -> Any:
        known, channels = self.model_config(), self.facts["channels"]
        setattr(known, "num_input_channels" if self.patched else "input_size", channels)
        if not self.patched:
            # sizes that follow from others were computed for other channels
            fields = known.to_dict()
            known = self.known = type(known)(**{k: v for k, v in fields.items() if k not in ("feature_size",)})
        name = CLASSES[known.model_type]
        # fp32: these models scale each window inside
        model, self.fresh = loading.load_model(self.config, name, torch.float32, known, other_sizes=True)
        return model

    def head(self, model: Any) -> list[str]:
        return loading.new_modules(model, self.fresh)

    # ---- features

    def encode(self, rows: Dataset, split: str) -> Dataset:
        """One feature a window: where it begins. The values stay in one array a series."""
        from datasets import Dataset as Table

        self.held[split] = found = series.grouped(rows)
        places = list(series.windows(found, self.past, self.horizon))
        columns = {"split": [split] * len(places), "series": [which for which, _ in places],
                   "start": [start for _, start in places],
                   "row": [int(found[which].places[start + self.past]) for which, start in places]}  # fmt: skip
        return Table.from_dict(columns)

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        past, horizon = self.past, self.horizon
        cut = [(self.held[f["split"]][f["series"]], f["start"], past + horizon) for f in features]
        values = self._scaled(np.stack([one.values[start : start + size] for one, start, size in cut]))
        times = [one.times[start : start + size] for one, start, size in cut]
        return self._batch(values[:, :past], times, [start for _, start, _ in cut], values[:, past:])

    def _scaled(self, values: np.ndarray) -> torch.Tensor:
        mean, std = np.array(self.facts["mean"]), np.array(self.facts["std"])
        return torch.tensor((values - mean) / std, dtype=torch.float32)

    def _batch(
        self, past: torch.Tensor, times: list[np.ndarray], ages: list[int], future: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """What the model takes; ``times`` are those of past and future rows."""
        squeeze = (lambda t: t) if self.patched or self.facts["channels"] > 1 else (lambda t: t[..., 0])
        batch = {"past_values": squeeze(past)}
        if not self.patched:
            count = self.model_config().num_time_features
            about = np.stack([series.calendar(t, age, count) for t, age in zip(times, ages, strict=True)])
            about = torch.tensor(about, dtype=torch.float32)
            batch |= {
                "past_time_features": about[:, : past.shape[1]],
                "future_time_features": about[:, past.shape[1] :],
            }
            batch["past_observed_mask"] = torch.ones_like(batch["past_values"])
        return batch if future is None else batch | {"future_values": squeeze(future)}

    def length(self, feature: dict[str, Any]) -> int:
        return self.past + self.horizon

    def count(self, batch: dict[str, Any]) -> int:
        return sum(batch[name].numel() for name in ("past_values", "future_values") if name in batch)

    # ---- judging

    def forecast(self, model: Any, batch: dict[str, torch.Tensor]) -> np.ndarray:
        """(B, horizon, C) in the data's own unit; of a distribution the median of what is drawn from it."""
        asked = {name: value for name, value in batch.items() if name != "future_values"}
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        if self.patched and plain.config.loss == "mse":
            found = model(**asked)["prediction_outputs"]
        else:
            found = plain.generate(**asked).sequences.median(1).values
        found = found.float().cpu().numpy().reshape(len(found), self.horizon, -1)
        return found * np.array(self.facts["std"]) + np.array(self.facts["mean"])

    def evaluation_loop(self, trainer: Any, loader: Any, prefix: str) -> Any:
        """Loss and forecasts of every window; draws are the same at every evaluation."""
        from transformers.trainer_utils import EvalLoopOutput

        model, total, seen, answers, truth = trainer.model, 0.0, 0, [], []
        with media.judging(trainer) as device, self._drawing(device):
            for batch in loader:
                batch = media.to_device(dict(batch), device)
                count = len(batch["past_values"])
                total, seen = total + float(model(**batch)["loss"]) * count, seen + count
                answers.append(self.forecast(model, batch))
                future = batch["future_values"].cpu().numpy().reshape(count, self.horizon, -1)
                truth.append(future * np.array(self.facts["std"]) + np.array(self.facts["mean"]))
        answers, truth = np.concatenate(answers), np.concatenate(truth)
        found = {"loss": total / seen} | self._judge(answers, truth, loader.dataset)
        metrics = {f"{prefix}_{name}": value for name, value in found.items()}
        return EvalLoopOutput(answers, truth, metrics, seen)

    @contextlib.contextmanager
    def _drawing(self, device: torch.device) -> Iterator[None]:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.config.seed)
            yield

    def _windows(self, features: Any) -> Iterator[tuple[series.Series, int]]:
        for split, which, start in zip(features["split"], features["series"], features["start"], strict=True):
            yield self.held[split][which], start

    def _naive(self, features: Any) -> np.ndarray:
        season = self.facts["season"]
        earlier = {one.name: one for one in self.held.get("train", [])}
        found = []
        for one, start in self._windows(features):
            past = one.values[: start + self.past]
            if len(past) < season and one.name in earlier:
                before = earlier[one.name]
                past = np.concatenate([before.values[before.times < one.times[0]], past])
            found.append(series.seasonal_naive(past, self.horizon, season))
        return np.stack(found)

    def _judge(self, answers: np.ndarray, truth: np.ndarray, features: Any) -> dict[str, float]:
        known = self.facts["naive"]
        other = np.mean(list(known.values()), 0).tolist()
        steps = np.array([known.get(one.name, other) for one, _ in self._windows(features)])[:, None]  # (N, 1, C)
        wrong, naive = np.abs(answers - truth), np.abs(self._naive(features) - truth)
        return {
            "mase": float((wrong / steps).mean()),
            "mae": float(wrong.mean()),
            "rmse": float(np.sqrt(np.square(wrong).mean())),
            "naive_mase": float((naive / steps).mean()),
            "naive_mae": float(naive.mean()),
        }

    def show(self, output: Any, features: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        answers, truth, naive = output.predictions, output.label_ids, self._naive(features)
        judged, season = self._judge(answers, truth, features), self.facts["season"]
        head = ["", "MASE", "MAE", "RMSE"]
        rmse = float(np.sqrt(np.square(naive - truth).mean()))
        lines = [["the model", *(round(judged[name], 4) for name in ("mase", "mae", "rmse"))],
                 [f"the last season of {season} again", *(round(v, 4) for v in (
                     judged["naive_mase"], judged["naive_mae"], rmse))]]  # fmt: skip
        found = [{"kind": "table", "title": "Against the seasonal naive forecast", "head": head, "rows": lines}]
        ahead = {name: [[i + 1, round(float(v), 4)] for i, v in enumerate(np.abs(part - truth).mean((0, 2)))]
                 for name, part in (("the model", answers), ("naive", naive))}  # fmt: skip
        found.append(
            {"kind": "lines", "title": "Mean absolute error by steps ahead", "x": "steps ahead", "series": ahead}
        )
        listed = list(self._windows(features))
        for place in np.unique(np.linspace(0, len(listed) - 1, SHOWN).astype(int)).tolist():
            one, start = listed[place]
            split = start + self.past
            before = one.values[max(0, split - 3 * self.horizon) : split, 0]
            drawn = {"past": [[i - len(before), round(float(v), 4)] for i, v in enumerate(before)]}
            for name, part in (("truth", truth), ("forecast", answers), ("naive", naive)):
                drawn[name] = [[i, round(float(v), 4)] for i, v in enumerate(part[place, :, 0])]
            when = _written(one.times[split : split + 1], one.dated)[0]
            title = f"{one.name + ', ' if one.name else ''}from {when}"
            found.append({"kind": "lines", "title": title, "x": "steps", "series": drawn})
        return found

    # ---- use

    def predict(self, model: Any, rows: Dataset) -> list[dict[str, Any]]:
        """For each series of the rows its next `horizon` values: one answer a series."""
        self._times_or_stop(rows)
        found, answers = series.grouped(rows), []
        short = [one for one in found if len(one.values) < self.past]
        if short:
            given = f"{len(short[0].values)} rows{' of series ' + short[0].name if short[0].name else ''}"
            fail(DataError, given, f"the last {self.past} values of each series", "pass more of its past")
        device = next(model.parameters()).device
        with text.evaluating(model), torch.no_grad(), self._drawing(device):
            for one in found:
                future = one.future(self.horizon)
                times = np.concatenate([one.times[-self.past :], future])
                past = self._scaled(one.values[None, -self.past :])
                batch = media.to_device(self._batch(past, [times], [len(one.values) - self.past]), device)
                values = self.forecast(model, batch)[0]
                steps = zip(_written(future, one.dated), values.tolist(), strict=True)
                rows_of = [{"time": t, "value": self._told(v)} for t, v in steps]
                answers.append({"series": one.name, "forecast": rows_of} if one.name else {"forecast": rows_of})
        return answers

    def _told(self, values: list[float]) -> float | dict[str, float]:
        """One value, or several by the names of their columns."""
        values = [round(value, 6) for value in values]
        return values[0] if len(values) == 1 else dict(zip(self.facts["names"], values, strict=True))


def _written(times: np.ndarray, dated: bool) -> list[Any]:
    """Times as text: the day alone where all are midnight."""
    if not dated:
        return times.tolist()
    whole = (times == times.astype("datetime64[D]")).all()
    return np.datetime_as_string(times, unit="D" if whole else "m").tolist()
