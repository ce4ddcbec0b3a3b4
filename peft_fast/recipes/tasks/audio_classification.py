"""A class of a recording: p = softmax(W h + b), h the mean of what an audio encoder makes of its frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from peft_fast.recipes.tasks import Column, loading, media

if TYPE_CHECKING:
    from datasets import Dataset

LABELS = ("labels", "target", "class", "category", "intent_class", "keyword", "emotion", "genre", "language")
WORST = 20


class Task(media.Labelled):
    columns = (Column("audio", "audio", media.SOUNDS), Column("label", "label", LABELS))
    auto = "AutoModelForAudioClassification"
    modality = "audio"
    unit = "seconds"

    def load_processor(self) -> None:
        self.processor = loading.load_processor(self.config, "AutoFeatureExtractor")
        self.rate = media.rate_of(self.processor, self.config)

    def load_model(self, dtype: torch.dtype) -> Any:
        return self.load_labelled(dtype)

    def too_long(self, rows: Dataset) -> tuple[Sequence[float], float]:
        return media.seconds(rows), self.config.max_seconds

    # ---- features

    def encode(self, rows: Dataset, split: str) -> Dataset:
        """Files stay files: a recording is read when its batch is made."""
        features = self.place(rows.select_columns(["audio"]))
        return features.add_column("labels", self.labels(rows)) if "label" in rows.column_names else features

    def collate(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        sounds = media.recordings(features, self.rate, self.config.max_seconds)
        batch = self.feed(media.features_of(self.processor, sounds))
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([feature["labels"] for feature in features])
        return batch

    def length(self, feature: dict[str, Any]) -> int:
        return max(1, round(media.duration(feature["audio"])))

    def count(self, batch: dict[str, Any]) -> int:
        return round(media.heard(batch, self.processor))

    # ---- judging

    def show(self, output: Any, features: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        found, wrong = self.judged(output)
        names, lines = self.facts["labels"], []
        for place, truth, answer, share in wrong[:WORST]:
            name = media.name_of(rows[features[place]["row"]]["audio"], features[place]["row"])
            lines.append([name, names[truth], names[answer], round(share, 4)])
        head = ["recording", "truth", "answer", "probability"]
        return [*found, {"kind": "table", "title": "Most confident mistakes", "head": head, "rows": lines}]
