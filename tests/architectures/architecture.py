"""One architecture: a real class of transformers with a small config, and what must be found in it by its source."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

VOCAB = 67
ROWS, TOKENS = 2, 9


class Architecture(NamedTuple):
    """What is built, called, and to be found; `*` in a path stands for one part of a name, as a layer's number."""

    name: str
    cls: str  # of transformers
    config: dict
    inputs: Callable[[], dict]
    groups: tuple[str, ...] = ()  # "parent: child child": layers of one parent that are called with one tensor
    blocks: tuple[str, ...] = ()  # "module: what it computes"
    embeddings: tuple[str, ...] = ()  # of tokens
    slow: tuple[str, ...] = ()  # LoRA layers that stay with PEFT
    skip: tuple[str, ...] = ()  # linear layers whose forward nobody calls
    experts: tuple[str, ...] = ()  # linear layers as targets become the experts' parameters, which know no dropout
    learns: int = 1  # optimizer steps until its groups stand
    reentrant: bool = True  # its inputs can be made to require a gradient, without which no old checkpoint works

    def build(self, dropout: float = 0.0, seed: int = 0) -> nn.Module:
        """The model, random weights; every dropout probability of its config is ``dropout``."""
        torch.manual_seed(seed)
        cls = getattr(transformers, self.cls)
        config = cls.config_class(**self.config)
        _set_dropout(config, dropout)
        model = cls(config)
        if getattr(config, "num_experts_per_tok", None):
            model.set_experts_implementation("eager")  # torch's grouped product knows no float64
        return model

    def adapted(
        self, dropout: float = 0.0, lora_dropout: float = 0.0, dtype: torch.dtype = torch.float32, **options
    ) -> nn.Module:
        """The model under LoRA with B ≠ 0 on every linear layer but the output head, and on the embeddings of tokens.

        The base is of ``dtype``, the adapters are float32; ``options`` are LoraConfig's.
        """
        model = self.build(dropout).to(dtype)
        head = model.get_output_embeddings()
        skip = self.skip + (self.experts if lora_dropout else ())
        targets = [
            name
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not head and not _any(skip, name)
        ]
        defaults = dict(r=3, lora_alpha=6, target_modules=[*targets, *self.embeddings], init_lora_weights=False)
        return get_peft_model(model, LoraConfig(**{**defaults, "lora_dropout": lora_dropout, **options}))

    def expected_groups(self, model: nn.Module) -> set[tuple[str, ...]]:
        """The groups' layers by their full names, in the order in which they are called."""
        found = set()
        for group in self.groups:
            parent, _, children = group.partition(": ")
            found |= {tuple(f"{path}.{child}" for child in children.split()) for path in _paths(model, parent)}
        return found

    def expected_blocks(self, model: nn.Module) -> set[str]:
        """The blocks' modules by their full names."""
        return {path for block in self.blocks for path in _paths(model, block.partition(": ")[0])}

    def expected_slow(self, model: nn.Module) -> set[str]:
        """Full names of LoRA layers that stay with PEFT."""
        adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
        return {name for name in adapted if _any(self.slow, name.removeprefix("base_model.model."))}


def _set_dropout(config, p: float) -> None:
    """Every float of a config, and of the configs inside, that is a dropout probability; layers are never skipped."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _set_dropout(value, p)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0 if "layerdrop" in name else p)


def _any(patterns: tuple[str, ...], name: str) -> bool:
    return any(_matches(pattern, name) for pattern in patterns)


def _matches(pattern: str, name: str) -> bool:
    return pattern.count(".") == name.count(".") and fnmatch.fnmatchcase(name, pattern)


def _paths(model: nn.Module, pattern: str) -> list[str]:
    """Names of a PEFT model's modules that fit a pattern written for the model inside."""
    prefix = "base_model.model"
    pattern = f"{prefix}.{pattern}" if pattern else prefix
    found = [name for name, _ in model.named_modules() if _matches(pattern, name)]
    assert found, f"no module is called {pattern}"
    return found


def ids(rows: int = ROWS, tokens: int = TOKENS) -> Tensor:
    """(rows, tokens) token numbers, none of them special."""
    return torch.randint(5, VOCAB, (rows, tokens))


def mask() -> Tensor:
    """(ROWS, TOKENS) attention mask whose last row is padded by three."""
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[-1, -3:] = 0
    return mask


def spoken() -> dict:
    """Language modelling, causal or masked, with padding."""
    tokens, seen = ids(), mask()
    return {"input_ids": tokens, "attention_mask": seen, "labels": tokens.masked_fill(seen == 0, -100)}


def classified() -> dict:
    """Sequence classification with padding."""
    return {"input_ids": ids(), "attention_mask": mask(), "labels": torch.tensor([0, 1])}


def translated() -> dict:
    """An encoder's tokens with padding, and a decoder's labels."""
    return {"input_ids": ids(), "attention_mask": mask(), "labels": ids(ROWS, 6)}


def pictures() -> dict:
    """Image classification."""
    return {"pixel_values": torch.randn(ROWS, 3, 16, 16), "labels": torch.tensor([0, 1])}


def pairs() -> dict:
    """Contrast of pictures with texts."""
    return {"pixel_values": torch.randn(ROWS, 3, 16, 16), "input_ids": ids(), "return_loss": True}
