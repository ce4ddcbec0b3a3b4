"""A task whose head is what is named so, and models of every kind prepared for it: for the tests of methods."""

from __future__ import annotations

import torch
from torch import nn

from peft_fast.recipes import methods
from peft_fast.recipes.config import read
from peft_fast.recipes.tasks import Task
from tests.architectures.zoo import ARCHITECTURES

HEADS = (
    *("classifier", "pre_classifier", "pooler", "score", "qa_outputs", "projector", "class_labels_classifier"),
    *("bbox_predictor", "parameter_projection"),
)
# one of each kind of nesting, with a head of its own and without
SOME = ("BERT", "DistilBERT", "GPT-2", "Llama", "T5", "Whisper", "ViT", "Wav2Vec2", "DETR", "Time series transformer")


class AnyTask(Task):
    """Any class: the head is what is named so."""

    metric, judged_by = "accuracy", {"loss": False, "accuracy": True}

    def head(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_children() if name in HEADS]


def config(**options):
    return read(**{"task": "sequence-classification", "model": "-", "data": "-", "dtype": "fp32", **options})


def prepared(model: nn.Module | str, kind: type[Task] = AnyTask, **options) -> tuple[nn.Module, Task]:
    given = config(**options)
    task = kind(given)
    model = ARCHITECTURES[model].build() if isinstance(model, str) else model
    return methods.prepare(model, task, given), task


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model: nn.Module, name: str) -> torch.Tensor:
    torch.manual_seed(1)
    out = model(**ARCHITECTURES[name].inputs())
    # its own loss needs boxes, and scipy to assign them
    return (out["logits"].sum() + out["pred_boxes"].sum()).float() if name == "DETR" else out.loss
