"""A class of an image: p = softmax(W h + b), h what a vision model makes of its patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from peft_fast.recipes.tasks import Column, media

if TYPE_CHECKING:
    from datasets import Dataset

LABELS = ("labels", "target", "class", "category", "fine_label", "coarse_label")
WORST = 12
LEAST = 0.6  # share of an image that augmentation keeps


class Task(media.Labelled, media.Pictured):
    columns = (Column("image", "image", media.IMAGES), Column("label", "label", LABELS))
    auto = "AutoModelForImageClassification"

    def load_model(self, dtype: torch.dtype) -> Any:
        model = self.load_labelled(dtype)
        self.native = getattr(model.config, "image_size", None)
        self.try_sizes(model, self.native)
        return model

    def see(self, model: Any) -> None:
        super().see(model)
        self.native = getattr(model.config, "image_size", None)

    # ---- features

    def encode(self, rows: Dataset, split: str) -> Dataset:
        """Files stay files: an image is read when its batch is made."""
        features = self.place(rows.select_columns(["image"]))
        features = features.add_column("change", [split == "train" and self.config.augment] * len(rows))
        return features.add_column("labels", self.labels(rows)) if "label" in rows.column_names else features

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        from peft_fast.recipes.data import load_image

        images = [load_image(feature["image"]) for feature in features]
        images = [augmented(image) if f["change"] else image for image, f in zip(images, features, strict=True)]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        batch = self.sized(self.feed({"pixel_values": pixels}), self.native)
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([feature["labels"] for feature in features])
        return batch

    def resize(self, batch: dict[str, Any], size: int) -> dict[str, Any]:
        return self.sized(batch | {"pixel_values": media.scaled(batch["pixel_values"], size)}, self.native)

    # ---- judging

    def show(self, output: Any, features: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        from peft_fast.recipes.data import load_image

        found, wrong = self.judged(output)
        names, pictures = self.facts["labels"], []
        for place, truth, answer, share in wrong[:WORST]:
            caption = f"{names[truth]}, answered {names[answer]} ({share:.0%})"
            image = load_image(rows[features[place]["row"]]["image"])
            pictures.append({"png": media.thumbnail(image), "caption": caption})
        if pictures:
            found.append({"kind": "images", "title": "Most confident mistakes", "images": pictures})
        return found


def augmented(image: Any) -> Any:
    """A random part of the image, mirrored half of the time; drawn from torch's generator."""
    from PIL import Image, ImageOps

    image = image.crop(media.crop_of(*image.size, LEAST)).resize(image.size, Image.Resampling.BILINEAR)
    return ImageOps.mirror(image) if torch.rand(1).item() < 0.5 else image
