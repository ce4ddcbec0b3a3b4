"""Implementations of each op: a folder a backend, which has the ops it has a file for, named as the op."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

BACKENDS = ("torch", "cpu", "triton", "cuda")
OPS = (
    "lora_linear",
    "lora_group",
    "lora_mlp",
    "lora_decode",
    "lora_embedding",
    "lora_mixed",
    "dora_norm",
    "dora_linear",
    "dora_decode",
    "dora_embedding",
    "lora_experts",
    "nf4",
    "lora_add",
    "lora_quantized",
)
_ops = {
    backend: {op for op in OPS if importlib.util.find_spec(f"peft_fast.backends.{backend}.{op}")}
    for backend in BACKENDS
} | {"reference": set(OPS)}


def has(backend: str, op: str) -> bool:
    """Does the backend have this op, and the one it is made of?"""
    return op in _ops[backend] and (op != "lora_mlp" or "lora_group" in _ops[backend])


def modules(op: str) -> dict[str, ModuleType]:
    """backend -> its module of an op; these import neither Triton nor CUDA before their first call."""
    return {name: importlib.import_module(f"peft_fast.backends.{name}.{op}") for name in BACKENDS if has(name, op)}


# the ops import their backends: they must be the first, whoever is imported first
import peft_fast.ops  # noqa: E402, F401
