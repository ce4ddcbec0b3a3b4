"""A few awkward calls of every backend and plan, for compute-sanitizer to watch; it checks no numbers."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from .lora_linear import DTYPES, live_plans

KERNELS = ("triton", "cuda")
COMPILED_AT_FIRST_USE = ("triton",)
WAITS = "waits for the device"
# M, K, N, ranks, p: nothing a tile divides, one and two adapters, one token; rows of 16 bytes, for what needs them
CALLS = (
    (264, 136, 72, (8,), (0.1,)),
    (37, 130, 72, (5,), (0.1,)),
    (1, 64, 136, (16,), (0.0,)),
    (130, 257, 65, (17, 3), (0.0, 0.5)),
)
# more tiles than the device has processors, steps and edges of every pipeline; too slow under the sanitizer
LARGE = ((2305, 2312, 1160, (24,), (0.5,)), (8192, 4096, 4096, (16,), (0.05,)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no further call after this long")
    parser.add_argument("--plan", default="", help="only this one, 'cuda fused', at large sizes too")
    parser.add_argument("--without", default="", help="plans to leave alone, with commas")
    given = parser.parse_args(argv)
    end = time.monotonic() + given.minutes * 60
    plans = [plan for plan in watched(given.device, given.without.split(",")) if given.plan in ("", " ".join(plan))]
    alone = given.plan and given.device != "cpu"
    calls = list(itertools.product(CALLS, ("bf16", "fp32"), plans))
    if alone:  # first, and in the dtype that is measured: a process that compiles slowly may be ended at any time
        calls = [*itertools.product(LARGE, ("bf16",), plans), *calls]
    for number, (call, dtype, (backend, plan)) in enumerate(calls):
        if time.monotonic() > end:
            print(f"the time ended after {number} of {len(calls)} calls")
            break
        says = partial(print, flush=True) if alone else None
        refusal = once(backend, plan, DTYPES[dtype], given.device, *call, says)
        print(f"{backend} {plan} {dtype} M, K, N = {call[:3]}: {refusal or 'ran'}", flush=True)
    return 0


def watched(device: str, without: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Live plans with kernels of ours; torch's own GEMMs only where there is nothing else."""
    live = live_plans(device, without)
    return [plan for plan in live if plan[0] in KERNELS] or live


def once(
    backend: str,
    plan: str,
    dtype: torch.dtype,
    device: str,
    m: int,
    k: int,
    n: int,
    ranks: tuple,
    ps: tuple,
    says: Callable[[str], object] | None = None,
) -> str:
    """One forward and backward; why the backend does not take these tensors, empty when it ran.

    `says` hears WAITS when all that can be waited for is the device.
    """
    from peft_fast import dispatch
    from peft_fast.errors import PeftFastError
    from peft_fast.ops import Adapter, lora_linear

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    # x is a slice of wider rows: what is read past its end is not its own
    x, W, bias = leaf(m, k + 8)[:, :k], leaf(n, k).detach(), leaf(n).detach()
    adapters = [Adapter(leaf(r, k), leaf(n, r), 2.0, p) for r, p in zip(ranks, ps, strict=True)]
    watch = dispatch.Watch()
    if says and backend not in COMPILED_AT_FIRST_USE:
        says(WAITS)  # its self-test does
    try:
        y = lora_linear(x, W, bias, adapters, backend=backend, plan=plan)
    except PeftFastError as error:
        return str(error).splitlines()[1]
    torch.autograd.grad(y, [x, *(t for a in adapters for t in (a.A, a.B))], torch.ones_like(y))
    if says:
        says(WAITS)
    if device != "cpu":
        torch.cuda.synchronize()
    failed, refused = watch.failed(), watch.refused()
    return f"failed: {failed}" if failed else f"not for these tensors: {refused}" if refused else ""


if __name__ == "__main__":
    sys.exit(main())
