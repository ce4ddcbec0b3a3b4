"""The dropout mask as a function of a seed: drawn from torch's generator, regenerated in backward, never saved."""

from __future__ import annotations

import torch

from peft_fast import native
from peft_fast.backends import triton
from peft_fast.errors import SettingsError, fail
from peft_fast.reference import dropout as reference


def draw_seed(n: int, device: torch.device | str | None = None) -> torch.Tensor:
    """int64 (n,), one seed per adapter, from torch's default generator of ``device``."""
    return torch.randint(0, 2**63 - 1, (n,), dtype=torch.int64, device=device)


def native_mask(device: torch.device) -> bool:
    """Is the mask drawn by a kernel there? Else by the definition, which costs more than PEFT's saved mask."""
    if device.type == "cuda":
        return not triton.refuses_device(device)
    return device.type == "cpu" and native.load()


def dropout_mask(seed: torch.Tensor, M: int, K: int, p: float) -> torch.Tensor:
    """seed () int64 -> bool (M, K), True = kept; depends on (seed, row, column, p) alone."""
    if not 0 <= p <= 1:
        fail(SettingsError, f"p={p}", "a dropout probability from 0 to 1", "pass the p of the dropout module")
    if native_mask(seed.device):
        if seed.device.type == "cuda":
            return torch.ops.peft_fast.triton_dropout_mask(seed, M, K, p)
        return torch.ops.peft_fast.dropout_mask(seed, M, K, p)
    return reference.keep_mask(seed, M, K, p)


def dropped(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """x (M, K) -> mask∘x/(1 − p) in x's dtype."""
    if p >= 1:
        return torch.zeros_like(x)
    return torch.where(dropout_mask(seed, *x.shape, p), x * (1 / (1 - p)), 0)
