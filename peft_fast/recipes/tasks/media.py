"""What tasks of images and sound share: reading, sizes, augmentation, batches in the model's dtype, answers."""

from __future__ import annotations

import base64
import contextlib
import inspect
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from peft_fast.errors import SettingsError, UnsupportedError, fail
from peft_fast.recipes import tasks
from peft_fast.recipes.config import Config
from peft_fast.recipes.tasks import classes, loading, text

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

ENCODERS = ("encoder", "model", "backbone")  # children that are no head, whatever the base model is called
IMAGES = ("images", "img", "picture", "pixel_values", "image_path", "image_file", "file_name", "file", "path")
LEAST_SECONDS = 0.4  # below, convolutions of wav2vec and its masks have nothing to work on
SOUNDS = ("sound", "speech", "recording", "wav", "audio_path", "audio_file", "file_name", "file", "path")


class MediaTask(tasks.Task):
    """Rows of files through a processor, in batches of the model's dtype."""

    def __init__(self, config: Config, facts: dict[str, Any] | None = None) -> None:
        super().__init__(config, facts)
        self.fresh: set[str] = set()  # parameters that the checkpoint did not have
        self.dtype = torch.float32
        self.takes: set[str] = set()  # what the model's forward takes

    def load(self, dtype: torch.dtype, **fields: Any) -> Any:
        """The model of ``auto``, its configuration with ``fields``."""
        model_config = loading.load_config(self.config, **fields)
        model, self.fresh = loading.load_model(self.config, self.auto, dtype, model_config)
        self.see(model)
        return model

    def see(self, model: Any) -> None:
        """Learn what a model is fed with; a loaded adapter's model may come from elsewhere."""
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.takes = set(inspect.signature(plain.forward).parameters)
        self.dtype = next((p.dtype for p in plain.parameters() if p.dim() > 2 and p.is_floating_point()), plain.dtype)

    def head(self, model: Any) -> list[str]:
        return [name for name in loading.new_modules(model, self.fresh) if name not in ENCODERS]

    def feed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch in the dtype that the model's first layer multiplies."""
        floats = {name for name, value in batch.items() if torch.is_tensor(value) and value.is_floating_point()}
        return {name: value.to(self.dtype) if name in floats else value for name, value in batch.items()}

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A processor may make a mask that this model does not take."""
        return {name: value for name, value in batch.items() if name in self.takes}

    def place(self, rows: Dataset) -> Dataset:
        """Rows with `row`, their place; the reader's own numbers go."""
        if "row" in rows.column_names:
            rows = rows.remove_columns("row")
        return rows.add_column("row", list(range(len(rows))))

    def forward(self, model: Any, features: Dataset) -> Iterator[tuple[list[int], dict[str, Any], Any]]:
        """(places, batch, output) of all features in order; the model as it was afterwards."""
        size = self.config.eval_batch_size or 2 * self.config.batch_size
        device = next(model.parameters()).device
        self.see(model)
        with text.evaluating(model), torch.no_grad():
            for start in range(0, len(features), size):
                places = list(range(start, min(start + size, len(features))))
                batch = to_device(self.collate([features[i] for i in places]), device)
                asked = {name: value for name, value in self.inputs(batch).items() if name != "labels"}
                yield places, batch, model(**asked)


class Labelled(MediaTask):
    """One class a row: what classification of images and of sound share."""

    metric = "accuracy"
    judged_by = {"loss": False, **classes.JUDGED}

    def learn(self, splits: dict[str, Dataset]) -> None:
        named = [classes.name_of(value) for value in splits["train"]["label"][:]]
        names = classes.ordered(named)
        counts = classes.counts_of(named, names)
        self.facts |= {"labels": names, "counts": counts}
        if len(names) == 2:
            self.facts["positive"] = names[classes.positive(names, counts)]
        self._weights()  # class_weights that name no class are said before a model is loaded

    def check(self, splits: dict[str, Dataset]) -> Iterator[tasks.Problem]:
        """A row has one class."""
        for split, rows in splits.items():
            for place, value in enumerate(rows["label"][:]):
                if isinstance(value, list | tuple):
                    what, fix = f"{len(value)} labels", f"{self.config.task} takes one class a row: name one"
                    yield problem(splits, split, place, "label", what, fix)

    def _weights(self) -> list[float] | None:
        return classes.weights(self.config, self.facts["labels"], self.facts["counts"])

    def load_labelled(self, dtype: torch.dtype) -> Any:
        """The model with one output a class; one that has learnt these very classes goes on with its own order."""
        known = {classes.name_of(k): int(v) for k, v in (loading.load_config(self.config).label2id or {}).items()}
        names = self.facts["labels"]
        if set(known) == set(names) and sorted(known.values()) == list(range(len(known))):
            order = sorted(known, key=known.get)
            self.facts["counts"] = [self.facts["counts"][names.index(name)] for name in order]
            self.facts["labels"] = names = order
        return self.load(
            dtype, id2label=dict(enumerate(names)), label2id={name: place for place, name in enumerate(names)}
        )

    def labels(self, rows: Dataset) -> list[int]:
        """The class of each row as a number."""
        places = {name: place for place, name in enumerate(self.facts["labels"])}
        return [classes.index(classes.name_of(value), places, "label") for value in rows["label"][:]]

    def inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in super().inputs(batch).items() if name != "labels"}

    def loss(self, outputs: Any, batch: dict[str, Any]) -> torch.Tensor:
        return classes.loss(outputs["logits"], batch["labels"], self._weights(), classes.smoothing(self.config))

    def keep_logits(self, logits: Any, labels: Any) -> Any:
        return text.first(logits).float()

    def shares(self, logits: Any) -> Any:
        """(N, C) probabilities."""
        return classes.softmax(text.first(logits))

    def metrics(self, prediction: Any, features: Dataset) -> dict[str, float]:
        names, positive = self.facts["labels"], self.facts.get("positive")
        where = names.index(positive) if positive else 1
        return classes.judge(self.shares(prediction.predictions), prediction.label_ids, where)

    def judged(self, output: Any) -> tuple[list[dict[str, Any]], list[tuple[int, int, int, float]]]:
        """Confusion and table by class; (place, truth, answer, probability) of mistakes, the most certain first."""
        shares, truth, names = self.shares(output.predictions), output.label_ids, self.facts["labels"]
        answers = shares.argmax(1)
        order = [int(i) for i in (-shares.max(1)).argsort(kind="stable") if answers[i] != truth[i]]
        wrong = [(i, int(truth[i]), int(answers[i]), float(shares[i].max())) for i in order]
        return [classes.confusion(truth, answers, names), classes.per_class(truth, answers, names)], wrong

    def predict(self, model: Any, rows: Dataset) -> list[dict[str, Any]]:
        features = self.encode(rows.remove_columns([n for n in ("label",) if n in rows.column_names]), "predict")
        names, answers = self.facts["labels"], []
        for _, _, output in self.forward(model, features):
            for row in self.shares(output["logits"].float().cpu().numpy()):
                scores = {name: round(float(share), 6) for name, share in zip(names, row, strict=True)}
                best = names[int(row.argmax())]
                answers.append({"label": best, "score": scores[best], "scores": scores})
        return answers


class Pictured(MediaTask):
    """Images of one size: what classification and detection share."""

    modality = "image"
    unit = "images"

    def load_processor(self) -> None:
        # the same pixels on every machine, whether torchvision is there or not
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.processor = loading.load_processor(self.config, "AutoImageProcessor", backend="pil")
        if not hasattr(self.processor, "size"):
            given = f"model: {self.config.model}, whose processor is a {type(self.processor).__name__}"
            fail(UnsupportedError, given, "a model with an image processor", "take a model for images")
        if self.config.image_size:
            set_size(self.processor, self.config.image_size)

    def ends_small(self, features: Any) -> str:
        last, size = self.config.progressive[-1], dict(self.processor.size)
        if getattr(self.processor, "do_center_crop", False):
            size = dict(self.processor.crop_size)
        side = next((size[name] for name in ("height", "longest_edge", "shortest_edge") if size.get(name)), 0)
        said = f"progressive ends at {last} pixels, and evaluation is at {side}: let it end there too"
        return said if last < side else ""

    def length(self, feature: dict[str, Any]) -> int:
        return 1

    def count(self, batch: dict[str, Any]) -> int:
        return len(batch["pixel_values"])

    def sized(self, batch: dict[str, Any], native: Any) -> dict[str, Any]:
        """The batch, which says that positions are to be interpolated where its images are not of the native size."""
        if "interpolate_pos_encoding" not in self.takes:
            return batch
        native = (native, native) if isinstance(native, int) else tuple(native or ())
        return batch | {"interpolate_pos_encoding": tuple(batch["pixel_values"].shape[-2:]) != native}

    def try_sizes(self, model: Any, native: Any) -> None:
        """One forward of an empty image at each size that is asked for: a model may have only its own."""
        if not (self.config.image_size or self.config.progressive):
            return
        first = next(model.parameters())
        if first.device.type == "meta":
            return
        channels = getattr(model.config, "num_channels", 3)
        for size in sorted({self.config.image_size, *self.config.progressive} - {0}):
            batch = self.feed({"pixel_values": torch.zeros(1, channels, size, size, device=first.device)})
            try:
                with text.evaluating(model), torch.no_grad():
                    model(**self.sized(batch, native))
            except (ValueError, RuntimeError) as error:
                given = f"images of {size} pixels: {type(model).__name__}: {' '.join(str(error).split())[:200]}"
                do = f"leave image_size and progressive out, or use its own size ({native})"
                fail(SettingsError, given, "a size that the model takes", do, error)


def problem(splits: Any, split: str, place: int, column: str, what: str, fix: str, stops: bool = True) -> tasks.Problem:
    """A row's problem, by its file and number there."""
    rows = splits[split]
    row = rows["row"][place] if "row" in rows.column_names else place + 1
    file = getattr(splits, "sources", {}).get(split, split)
    return tasks.Problem(file, row, column, what, fix, stops, place, split)


@contextlib.contextmanager
def judging(trainer: Any) -> Iterator[torch.device]:
    """Evaluation by a loop of a task's own: in the precision of training, whether or not there was any."""
    with text.evaluating(trainer.model), torch.no_grad(), trainer.accelerator.autocast():
        yield next(trainer.model.parameters()).device


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch there, with the tensors inside its lists."""
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch.to(device) if torch.is_tensor(batch) else batch


# ---- images


def set_size(processor: Any, side: int) -> None:
    """Images of ``side`` × ``side`` pixels; a centre crop keeps its share of the image."""
    size, crop = dict(processor.size), getattr(processor, "crop_size", None)
    if crop and getattr(processor, "do_center_crop", False):
        old = dict(crop).get("height") or dict(crop).get("shortest_edge")
        edge = size.get("shortest_edge") or size.get("height") or old
        grown = max(side, round(edge * side / old))
        keys = ("shortest_edge",) if size.get("shortest_edge") else ("height", "width")
        processor.size = type(processor.size)(**dict.fromkeys(keys, grown))
        processor.crop_size = type(crop)(height=side, width=side)
    else:
        processor.size = type(processor.size)(height=side, width=side)


def scaled(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, side, side)."""
    if tuple(pixels.shape[-2:]) == (side, side):
        return pixels
    return F.interpolate(pixels.float(), (side, side), mode="bicubic", antialias=True).to(pixels.dtype)


def crop_of(width: int, height: int, least: float) -> tuple[int, int, int, int]:
    """A box of ``least`` … 1 of an image's area, 3/4 … 4/3 of its form, drawn from torch's generator."""
    area, form, x, y = torch.rand(4).tolist()
    share = least + (1 - least) * area
    bend = (3 / 4) ** (1 - 2 * form)
    w = max(1, min(width, round(width * (share * bend) ** 0.5)))
    h = max(1, min(height, round(height * (share / bend) ** 0.5)))
    left, top = round(x * (width - w)), round(y * (height - h))
    return left, top, left + w, top + h


def thumbnail(image: Image, side: int = 128) -> str:
    """A small PNG as base64, for reports."""
    from PIL import Image as Picture

    size = (round(image.width * side / max(image.size)) or 1, round(image.height * side / max(image.size)) or 1)
    file = io.BytesIO()
    image.resize(size, Picture.Resampling.BICUBIC).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


# ---- sound


def rate_of(processor: Any, config: Config) -> int:
    """Samples a second that the model was trained on."""
    found = getattr(processor, "feature_extractor", processor)
    rate = getattr(found, "sampling_rate", None)
    if not rate:
        given = f"model: {config.model}, whose processor is a {type(processor).__name__}"
        fail(UnsupportedError, given, "a model with a feature extractor of sound", "take a model for sound")
    return rate


def recordings(rows: Sequence[dict[str, Any]], rate: int, most: float) -> list[Any]:
    """Each row's sound, mono, at ``rate``, its first ``most`` seconds; a blip is filled up with silence."""
    import numpy as np

    from peft_fast.recipes.data import load_audio

    sounds = [load_audio(row["audio"], rate, most) for row in rows]
    least = int(LEAST_SECONDS * rate)
    return [np.pad(sound, (0, max(0, least - len(sound)))) for sound in sounds]


def features_of(processor: Any, sounds: list[Any]) -> dict[str, Any]:
    """What a feature extractor makes of them, padded to one length: the longest, or what the model always takes."""
    found = getattr(processor, "feature_extractor", processor)
    always = hasattr(found, "n_samples") or hasattr(found, "max_length")  # Whisper's 30 seconds, AST's 1024 frames
    padding = "max_length" if always else True
    return dict(found(sounds, sampling_rate=found.sampling_rate, padding=padding, return_tensors="pt"))


def duration(value: Any) -> float:
    """The length of a recording in seconds, without decoding it; 0 of one that the checks will refuse."""
    from peft_fast.recipes.data import audio_seconds

    try:
        return audio_seconds(value)
    except (OSError, RuntimeError, ValueError):  # soundfile's own error is a RuntimeError
        return 0.0


def seconds(rows: Dataset) -> list[float]:
    """The length of each row's recording."""
    return [duration(value) for value in rows["audio"]]


def name_of(value: Any, row: int) -> str:
    """A file as the report names it."""
    path = value.get("path") if isinstance(value, dict) else value
    return Path(path).name if path else f"row {row + 1}"


def heard(batch: dict[str, Any], processor: Any) -> float:
    """Seconds of sound in a batch; silence that fills it up is left out."""
    found = getattr(processor, "feature_extractor", processor)
    if "input_features" not in batch:
        values = batch["input_values"]
        if values.dim() == 2:  # (B, samples): padding is exactly zero
            mask = batch.get("attention_mask")
            return float((values != 0).sum() if mask is None else mask.sum()) / found.sampling_rate
        frames = values  # (B, frames, bins)
    else:
        frames = batch["input_features"].transpose(1, 2)  # (B, bins, frames) of Whisper
    full = (frames != frames[:, -1:, :]).any(-1)
    last = full.long() * torch.arange(1, full.shape[1] + 1, device=full.device)
    shift = getattr(found, "hop_length", 160) / found.sampling_rate
    return float(last.amax(1).clamp(min=1).sum()) * shift
