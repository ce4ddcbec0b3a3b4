"""Boxes and classes of the objects in an image: each query answers with one box, its class or none.

The boxes of rows, of evaluation and of answers are in pixels of the original image.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peft_fast.errors import UnsupportedError, fail
from peft_fast.recipes.tasks import Column, Problem, classes, loading, media

if TYPE_CHECKING:
    from datasets import Dataset

OBJECTS = ("objects", "annotations", "annotation", "bboxes", "bbox", "targets")
PLACES = ("bbox", "bboxes", "boxes", "box")
KINDS = ("category", "categories", "label", "labels", "class", "classes", "name", "names", "category_id")
SLACK = 1.5  # pixels a box may reach over the edge: rounding
LEAST = 0.6  # share of an image that augmentation keeps
SHOWN = 12
MOST = 100  # answers to an image that count, as COCO's rules have it


class Task(media.Pictured):
    columns = (Column("image", "image", media.IMAGES), Column("boxes", "boxes", OBJECTS))
    auto = "AutoModelForObjectDetection"
    metric = "map"
    judged_by = {"loss": False, "map": True, "map_50": True, "map_75": True}

    # ---- rows

    def learn(self, splits: dict[str, Dataset]) -> None:
        counted: Counter[str] = Counter()
        for value in splits["train"]["boxes"]:
            with contextlib.suppress(ValueError):
                counted.update(self.objects(value)[1])
        self.facts["labels"] = classes.ordered(counted)
        self.facts["counts"] = [counted[name] for name in self.facts["labels"]]

    def objects(self, value: Any) -> tuple[np.ndarray, list[str]]:
        """(N, 4) boxes as left, top, width, height, and their classes; ValueError says what is wrong."""
        boxes, kinds = _listed(value)
        if len(boxes) != len(kinds):
            raise ValueError(f"{len(boxes)} boxes and {len(kinds)} classes")
        try:
            found = np.asarray(boxes, dtype=np.float64).reshape(len(boxes), 4)
        except (TypeError, ValueError):
            raise ValueError("a box that is not four numbers") from None
        if self.config.box_format == "xyxy":
            found = np.concatenate([found[:, :2], found[:, 2:] - found[:, :2]], 1)
        return found, [classes.name_of(kind) for kind in kinds]

    def check(self, splits: dict[str, Dataset]) -> Iterator[Problem]:
        """Boxes inside their image, larger than nothing, of classes that the training rows have."""
        known, queries = set(self.facts["labels"]), self._queries()
        if not known:
            yield media.problem(splits, "train", 0, "boxes", "no box in any training row", "Give rows with objects")
            return
        for split, rows in splits.items():
            for place, value in enumerate(rows["boxes"]):
                try:
                    boxes, kinds = self.objects(value)
                except ValueError as error:
                    yield media.problem(splits, split, place, "boxes", str(error), "Give a box and a class per object")
                    continue
                for what, fix in self._wrong(rows[place]["image"], boxes, kinds, known):
                    yield media.problem(splits, split, place, "boxes", what, fix)
                if queries and len(boxes) > queries:
                    what = f"{len(boxes)} objects, of which the model can answer {queries}"
                    yield media.problem(splits, split, place, "boxes", what, "The others are not learnt", stops=False)

    def _wrong(self, image: Any, boxes: np.ndarray, kinds: list[str], known: set[str]) -> Iterator[tuple[str, str]]:
        try:
            width, height = _size(image)
        except OSError:
            return  # said by the check of images
        other = "xywh" if self.config.box_format == "xyxy" else "xyxy"
        for box, kind in zip(boxes.tolist(), kinds, strict=True):
            x, y, w, h = box
            written = [round(v, 2) for v in (box if other == "xyxy" else (x, y, x + w, y + h))]
            hint = f"correct it, or set box_format: {other} if that is how the boxes are written"
            if not np.isfinite(box).all() or w <= 0 or h <= 0:
                yield f"box {written} has no area", hint.capitalize()
            elif x < -SLACK or y < -SLACK or x + w > width + SLACK or y + h > height + SLACK:
                yield f"box {written} reaches out of the image of {width} × {height}", hint.capitalize()
            if kind not in known:
                yield f"class {kind!r}, which no training row has", "Correct it, or give training rows of that class"

    def _queries(self) -> int:
        found = loading.load_config(self.config)
        return getattr(found, "num_detection_tokens", None) or getattr(found, "num_queries", None) or 0

    # ---- model

    def load_processor(self) -> None:
        super().load_processor()
        if not hasattr(self.processor, "post_process_object_detection"):
            given = f"model: {self.config.model}, whose processor is a {type(self.processor).__name__}"
            fail(UnsupportedError, given, "a model with an image processor for boxes", "take YOLOS, DETR or their kin")

    def load_model(self, dtype: torch.dtype) -> Any:
        names = self.facts["labels"]
        model = self.load(
            dtype, id2label=dict(enumerate(names)), label2id={name: place for place, name in enumerate(names)}
        )
        self.try_sizes(model, None)
        return model

    # ---- features

    def encode(self, rows: Dataset, split: str) -> Dataset:
        """Files stay files: an image is read when its batch is made."""
        features = self.place(rows.select_columns([n for n in ("image", "boxes") if n in rows.column_names]))
        return features.add_column("change", [split == "train" and self.config.augment] * len(rows))

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        from peft_fast.recipes.data import load_image

        images, targets = [], []
        for feature in features:
            image, target = load_image(feature["image"]), None
            if feature.get("boxes") is not None:
                boxes, kinds = self.objects(feature["boxes"])
                if feature["change"]:
                    image, boxes, kinds = augmented(image, boxes, kinds)
                target = self._target(len(targets), boxes, kinds)
            images.append(image)
            targets.append(target)
        known = targets if None not in targets else None
        made = self.processor(images, annotations=known, return_tensors="pt")
        batch = {name: made[name] for name in ("pixel_values", "pixel_mask") if name in made}
        batch = self.sized(self.feed(batch), None)
        if known:
            batch["labels"] = [{name: torch.as_tensor(value) for name, value in one.items()} for one in made["labels"]]
        return batch

    def _target(self, number: int, boxes: np.ndarray, kinds: list[str]) -> dict[str, Any]:
        places = {name: place for place, name in enumerate(self.facts["labels"])}
        entries = [
            {"bbox": box, "category_id": classes.index(kind, places, "boxes"), "area": box[2] * box[3], "iscrowd": 0}
            for box, kind in zip(boxes.tolist(), kinds, strict=True)
        ]
        return {"image_id": number, "annotations": entries}

    def resize(self, batch: dict[str, Any], size: int) -> dict[str, Any]:
        """The longer side to ``size`` pixels; boxes are shares of the image already."""
        height, width = batch["pixel_values"].shape[-2:]
        new = max(1, round(height * size / max(height, width))), max(1, round(width * size / max(height, width)))
        pixels, interpolate = batch["pixel_values"], torch.nn.functional.interpolate
        made = {"pixel_values": interpolate(pixels.float(), new, mode="bicubic", antialias=True).to(pixels.dtype)}
        if "pixel_mask" in batch:
            made["pixel_mask"] = interpolate(batch["pixel_mask"][:, None].float(), new)[:, 0].long()
        return self.sized(batch | made, None)

    # ---- judging

    def evaluation_loop(self, trainer: Any, loader: Any, prefix: str) -> Any:
        """Answers in pixels, whatever the batches were padded to."""
        from transformers.trainer_utils import EvalLoopOutput

        total, seen, answers = 0.0, 0, []
        with media.judging(trainer) as device:
            for batch in loader:
                sizes = self.sizes_of(loader.dataset, len(answers), batch)
                batch = media.to_device(dict(batch), device)
                output = trainer.model(**self.inputs(batch))
                count = len(batch["pixel_values"])
                total, seen = total + float(output["loss"]) * count, seen + count
                answers += self.answers(output, sizes)
        truth = [self.objects(value) for value in loader.dataset["boxes"]]
        found = {"loss": total / max(1, seen)} | self._judge(truth, answers)
        metrics = {f"{prefix}_{name}": value for name, value in found.items()}
        return EvalLoopOutput(answers, truth, metrics, len(answers))

    def sizes_of(self, features: Any, start: int, batch: dict[str, Any]) -> torch.Tensor:
        """(B, 2) height and width that a whole padded batch has in pixels of each original image."""
        count = len(batch["pixel_values"])
        sizes = [_size(image)[::-1] for image in features[start : start + count]["image"]]
        return _scaled_sizes(torch.tensor(sizes), batch)

    def answers(self, output: Any, sizes: torch.Tensor) -> list[dict[str, np.ndarray]]:
        """boxes (N, 4) as left, top, width, height, labels (N,) and scores (N,) of each image, the surest first."""
        for name in ("logits", "pred_boxes"):
            output[name] = output[name].float().cpu()
        found = []
        for one in self.processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes):
            order = one["scores"].argsort(descending=True, stable=True)[:MOST]
            boxes = one["boxes"][order]
            boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
            found.append({"boxes": boxes.numpy(), "labels": one["labels"][order].numpy(),
                          "scores": one["scores"][order].numpy()})  # fmt: skip
        return found

    def _judge(self, truth: list[tuple[np.ndarray, list[str]]], answers: list[dict[str, Any]]) -> dict[str, float]:
        stats, self.by_class = average_precision(truth, answers, self.facts["labels"])
        return {"map": stats[0], "map_50": stats[1], "map_75": stats[2]}

    def show(self, output: Any, features: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        from peft_fast.recipes.data import load_image

        names, pictures = self.facts["labels"], []
        _, by_class = average_precision(output.label_ids, output.predictions, names)
        truth = Counter(kind for _, kinds in output.label_ids for kind in kinds)
        lines = [[name, round(value, 4), truth[name]] for name, value in zip(names, by_class, strict=True)]
        head = ["class", "mAP", "objects"]
        found = [{"kind": "table", "title": "By class", "head": head, "rows": lines}]
        for place in range(min(SHOWN, len(output.predictions))):
            image, (boxes, kinds) = load_image(rows[features[place]["row"]]["image"]), output.label_ids[place]
            kept = self._certain(output.predictions[place])
            drawn = drawing(image, [*boxes.tolist()], [*(one["box"] for one in kept)])
            said = ", ".join(f"{one['label']} {one['score']:.0%}" for one in kept) or "nothing"
            pictures.append({"png": drawn, "caption": f"{', '.join(kinds) or 'nothing'}; answered {said}"})
        title = "Truth (green) and answers (red)"
        return [*found, {"kind": "images", "title": title, "images": pictures}]

    def _certain(self, answer: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        names = self.facts["labels"]
        rows = zip(answer["boxes"].tolist(), answer["labels"].tolist(), answer["scores"].tolist(), strict=True)
        return [
            {"label": names[label], "score": round(score, 4), "box": [round(v, 1) for v in box]}
            for box, label, score in rows
            if score >= self.config.min_score
        ]

    # ---- use

    def predict(self, model: Any, rows: Dataset) -> list[dict[str, Any]]:
        features, found = self.encode(rows.select_columns(["image"]), "predict"), []
        for _, batch, output in self.forward(model, features):
            for answer in self.answers(output, self.sizes_of(features, len(found), batch)):
                kept = self._certain(answer)
                if self.config.box_format == "xyxy":
                    for one in kept:
                        x, y, w, h = one["box"]
                        one["box"] = [x, y, round(x + w, 1), round(y + h, 1)]
                found.append({"objects": kept})
        return found


def _listed(value: Any) -> tuple[list, list]:
    """Boxes and classes of {bbox: [...], category: [...]}, or of a list of {bbox, category}."""
    if value is None:
        return [], []
    if isinstance(value, dict):
        boxes, kinds = (next((value[key] for key in keys if key in value), None) for keys in (PLACES, KINDS))
        if boxes is None or kinds is None:
            raise ValueError(f"{', '.join(value)}, where bbox and category are needed")
        return list(boxes), list(kinds)
    pairs = [_listed({key: [part] for key, part in one.items()}) for one in value]
    return [box for boxes, _ in pairs for box in boxes], [kind for _, kinds in pairs for kind in kinds]


def _size(image: Any) -> tuple[int, int]:
    """Width and height as `load_image` gives it: turned as its EXIF entry says."""
    from PIL import Image

    if isinstance(image, dict):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]
    with Image.open(image) as opened:
        turned = opened.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        return opened.size[::-1] if turned else opened.size


def _scaled_sizes(sizes: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    """Original (height, width) grown by what padding added: answers are shares of the padded image."""
    mask = batch.get("pixel_mask")
    if mask is None:
        return sizes.float()
    filled = torch.stack([mask[:, :, 0].sum(1), mask[:, 0, :].sum(1)], 1).cpu().float()
    return sizes.float() * torch.tensor(mask.shape[1:]).float() / filled


def augmented(image: Any, boxes: np.ndarray, kinds: list[str]) -> tuple[Any, np.ndarray, list[str]]:
    """A random part of the image, mirrored half of the time; objects whose middle is cut off are gone."""
    from PIL import ImageOps

    left, top, right, low = media.crop_of(*image.size, LEAST)
    image = image.crop((left, top, right, low))
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    middle = (corners[:, :2] + corners[:, 2:]) / 2
    kept = ((middle >= (left, top)) & (middle < (right, low))).all(1)
    corners = np.clip(corners[kept], (left, top) * 2, (right, low) * 2) - np.array((left, top) * 2)
    if torch.rand(1).item() < 0.5:
        image = ImageOps.mirror(image)
        corners[:, [0, 2]] = image.width - corners[:, [2, 0]]
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    return image, boxes, [kind for kind, keep in zip(kinds, kept, strict=True) if keep]


def average_precision(
    truth: list[tuple[np.ndarray, list[str]]], answers: list[dict[str, Any]], names: Sequence[str]
) -> tuple[list[float], list[float]]:
    """COCO's (mAP, mAP50, mAP75), each 0 … 1, and the mAP of each class; 0 where a class has no object."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    places, objects, found = {name: place for place, name in enumerate(names)}, [], []
    for image, (boxes, kinds) in enumerate(truth):
        for box, kind in zip(boxes.tolist(), kinds, strict=True):
            about = {"id": len(objects) + 1, "image_id": image, "category_id": places[kind], "iscrowd": 0}
            objects.append({**about, "bbox": box, "area": box[2] * box[3]})
    for image, answer in enumerate(answers):
        for box, label, score in zip(answer["boxes"], answer["labels"], answer["scores"], strict=True):
            found.append([image, *map(float, box), float(score), int(label)])
    if not objects or not found:
        return [0.0, 0.0, 0.0], [0.0] * len(names)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        known = COCO()
        images = [{"id": image} for image in range(len(truth))]
        kinds = [{"id": place, "name": name} for name, place in places.items()]
        known.dataset = {"images": images, "annotations": objects, "categories": kinds, "info": {}}
        known.createIndex()
        judge = COCOeval(known, known.loadRes(np.asarray(found)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    # (thresholds, recalls, classes, areas, most): -1 where a class has no object
    precision = judge.eval["precision"][:, :, :, 0, -1]
    by_class = [float(part[part > -1].mean()) if (part > -1).any() else 0.0 for part in np.moveaxis(precision, 2, 0)]
    return [max(0.0, float(value)) for value in judge.stats[:3]], by_class


def drawing(image: Any, truth: list[list[float]], answers: list[list[float]], side: int = 192) -> str:
    """The image with boxes as base64."""
    from PIL import ImageDraw

    scale = side / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    paint = ImageDraw.Draw(image)
    for boxes, colour in ((truth, (20, 140, 60)), (answers, (210, 40, 40))):
        for x, y, w, h in boxes:
            corners = [scale * v for v in (x, y, x + max(0, w), y + max(0, h))]
            paint.rectangle(corners, outline=colour, width=2)
    return media.thumbnail(image, side)
