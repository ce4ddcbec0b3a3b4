"""Batches that depend on their place alone: on the seed, the epoch, and the rows in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from peft_fast.recipes.config import TEXT, Config
from peft_fast.recipes.tasks import Task


class Order(Sampler):
    """The rows of an epoch, shuffled, or in batches of like length: of (seed, epoch) alone."""

    def __init__(self, task: Task, features: Any, config: Config) -> None:
        self.count, self.seed, self.epoch = len(features or ()), config.seed, 0
        self.step = config.batch_size * config.gradient_accumulation
        grouped = config.group_by_length and config.task in TEXT and features is not None
        self.lengths = [task.length(feature) for feature in features] if grouped else None

    def set_epoch(self, epoch: int) -> None:
        """Accelerate's loader tells it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(number(self.seed, self.epoch))
        if self.lengths is None:
            yield from torch.randperm(self.count, generator=generator).tolist()
        else:
            yield from get_length_grouped_indices(self.lengths, self.step, generator=generator)


class Collator:
    """A task's collate, whose draws depend on the batch alone."""

    def __init__(self, task: Task, seed: int, order: Order | None = None) -> None:
        self.task, self.seed, self.order = task, seed, order

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        epoch = self.order.epoch if self.order else -1
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed: that would seed the GPU's too, which nobody puts back
            torch.default_generator.manual_seed(number(self.seed, epoch, features[0].get("row", 0)))
            return self.task.collate(features)


def number(*parts: object) -> int:
    """A seed from whatever it shall depend on."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")
