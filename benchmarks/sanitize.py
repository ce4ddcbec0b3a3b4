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

from peft_fast.backends import has

from .lora_linear import DTYPES, live_plans
from .shapes import OPS

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
    calls = [*itertools.product(("lora_linear",), CALLS, ("bf16", "fp32"), plans)]
    calls += itertools.product(OPS, CALLS[1:2], ("bf16", "fp32"), plans)
    if alone:  # first, and in the dtype that is measured: a process that compiles slowly may be ended at any time
        large = [*itertools.product(("lora_linear",), LARGE, ("bf16",), plans)]
        calls = [*large, *itertools.product(OPS[:1], LARGE[1:], ("bf16",), plans), *calls]
    calls = [call for call in calls if has(call[3][0], call[0])]
    for number, (op, call, dtype, (backend, plan)) in enumerate(calls):
        if time.monotonic() > end:
            print(f"the time ended after {number} of {len(calls)} calls")
            break
        says = partial(print, flush=True) if alone else None
        refusal = once(backend, plan, DTYPES[dtype], given.device, *call, says, op)
        print(f"{backend} {plan} {op} {dtype} M, K, N = {call[:3]}: {refusal or 'ran'}", flush=True)
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
    op: str = "lora_linear",
) -> str:
    """One forward and backward of the op; why the backend does not take these tensors, empty when it ran.

    `says` hears WAITS when all that can be waited for is the device.
    """
    from peft_fast import dispatch
    from peft_fast.errors import PeftFastError

    run, leaves = work(op, dtype, device, m, k, n, ranks, ps)
    watch = dispatch.Watch()
    if says and backend not in COMPILED_AT_FIRST_USE:
        says(WAITS)  # its self-test does
    try:
        ys = run(backend, plan)
    except PeftFastError as error:
        return str(error).splitlines()[1]
    torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])
    if says:
        says(WAITS)
    if device != "cpu":
        torch.cuda.synchronize()
    failed, refused = watch.failed(), watch.refused()
    return f"failed: {failed}" if failed else f"not for these tensors: {refused}" if refused else ""


def work(
    op: str, dtype: torch.dtype, device: str, m: int, k: int, n: int, ranks: tuple, ps: tuple
) -> tuple[Callable[[str, str], Sequence[torch.Tensor]], list[torch.Tensor]]:
    """(backend, plan -> the op's results, what takes gradients), around layers of W (N,K)."""
    from peft_fast import ops

    leaves = []

    def leaf(*shape: int) -> torch.Tensor:
        leaves.append(torch.randn(*shape, device=device).to(dtype).requires_grad_())
        return leaves[-1]

    def sibling(n: int, k: int) -> ops.Sibling:
        W, bias = (torch.randn(*shape, device=device).to(dtype) for shape in ((n, k), (n,)))
        return ops.Sibling(
            W, bias, [ops.Adapter(leaf(r, k), leaf(n, r), 2.0, p) for r, p in zip(ranks, ps, strict=True)]
        )

    if op == "lora_embedding":
        ids, W = torch.randint(k, (m,), device=device), torch.randn(k, n, device=device).to(dtype)
        adapter = ops.Adapter(leaf(ranks[0], k), leaf(n, ranks[0]), 2.0)
        return lambda backend, plan: [ops.lora_embedding(ids, W, [adapter], backend=backend)], leaves
    # a slice of wider rows: what is read past its end is not its own
    x = leaf(m, k + 8)[:, :k]
    leaves[0] = x
    one = sibling(n, k)
    if op == "lora_linear":
        return lambda backend, plan: [ops.lora_linear(x, *one[:3], backend=backend, plan=plan)], leaves
    other = sibling(n, k) if op == "lora_mlp" else sibling(2 * n + 8, k)
    if op == "lora_group":
        return lambda backend, plan: ops.lora_group(x, [one, other], backend=backend, plan=plan), leaves
    down, how = sibling(k, n), {"activation": "silu"}
    return lambda backend, plan: [ops.lora_mlp(x, one, down, other, backend=backend, plan=plan, **how)], leaves


if __name__ == "__main__":
    sys.exit(main())
