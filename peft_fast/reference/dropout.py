"""keep(m, k) = word(seed, m, k) >= round(65536·p), the mask every backend regenerates.

Random words come from Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011; 7 rounds pass BigCrush): key = the two halves of the seed, counter = (16·group + lane, m low, m high, 0).
The 16 counters of a group serve 128 columns with 16 bits each: k = 128·group + 32·word + 2·lane + half, an order
in which one vector comparison gives the bits of 32 neighbouring columns.
"""

from __future__ import annotations

import torch

ROUNDS = 7
MUL0, MUL1 = 0xD2511F53, 0xCD9E8D57
KEY0, KEY1 = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF


def _mulhilo(constant: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # a 32x32-bit product overflows int64's sign bit; the constant's halves keep every partial product below 2**48
    low = (constant & 0xFFFF) * word
    mid = (constant >> 16) * word + (low >> 16)
    return mid >> 16, ((mid & 0xFFFF) << 16) | (low & 0xFFFF)


def keep_mask(seed: torch.Tensor, M: int, K: int, p: float) -> torch.Tensor:
    """seed () int64 -> bool (M, K), True where the element is kept; probability 1 - p to within 2**-17."""
    seed = seed.reshape(())
    key0, key1 = seed & LOW, (seed >> 32) & LOW
    groups = (K + 127) // 128
    counters = torch.arange(16 * groups, device=seed.device)
    rows = torch.arange(M, device=seed.device).unsqueeze(1)
    c0, c1, c2, c3 = torch.broadcast_tensors(counters, rows & LOW, rows >> 32, torch.zeros_like(rows))
    for i in range(ROUNDS):
        hi0, lo0 = _mulhilo(MUL0, c0)
        hi1, lo1 = _mulhilo(MUL1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ ((key0 + i * KEY0) & LOW), lo1, hi0 ^ c3 ^ ((key1 + i * KEY1) & LOW), lo0
    words = torch.stack((c0, c1, c2, c3)).view(4, M, groups, 16)  # (word, row, group, lane)
    halves = torch.stack((words & 0xFFFF, words >> 16), -1).permute(1, 2, 0, 3, 4)
    return halves.reshape(M, 128 * groups)[:, :K] >= threshold(p)


def threshold(p: float) -> int:
    """Words below this 16-bit threshold are dropped."""
    return round(p * 65536)
