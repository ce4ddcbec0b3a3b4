"""What a backend needs to run lora_linear beside tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Spec(NamedTuple):
    """What the kernels need beside tensors: adapter i owns ranks[i] rows of A and columns of B."""

    ranks: list[int]
    scalings: list[float]
    ps: list[float]
    dx_dtype: torch.dtype  # of x as the caller gave it, before autocast
    transposed: bool
    exact: bool
    backend: str
    plan: str
