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
from .shapes import ALONE, OPS

KERNELS = ("triton", "cuda")
SINGLE = ("lora_decode", *ALONE, "nf4")  # ops tried by themselves: one that breaks is no plan's fault
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
    found = [plan for plan in watched(given.device, given.without.split(",")) if given.plan in ("", " ".join(plan))]
    alone = given.plan and given.device != "cpu"
    plans, single = ([plan for plan in found if (plan[1] in SINGLE) == one] for one in (False, True))
    calls = [*itertools.product(("lora_linear",), CALLS, ("bf16", "fp32"), plans)]
    calls += itertools.product(OPS, CALLS[1:2], ("bf16", "fp32"), plans)
    calls += [(op, CALLS[1], dtype, (backend, op)) for backend, op in single for dtype in ("bf16", "fp32")]
    if alone:  # first, and in the dtype that is measured: a process that compiles slowly may be ended at any time
        large = [*itertools.product(("lora_linear",), LARGE, ("bf16",), plans)]
        large += [*itertools.product(OPS[:1], LARGE[1:], ("bf16",), plans)]
        calls = [*large, *((op, LARGE[0], "bf16", (backend, op)) for backend, op in single), *calls]
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
    """Live plans with kernels of ours, and each op that has one; torch's own GEMMs only where there is nothing else."""
    live = live_plans(device)
    ours = dict.fromkeys(backend for backend, _ in live if backend in KERNELS)
    found = [plan for plan in live if plan[0] in KERNELS] or live
    found += [(backend, op) for backend in ours for op in SINGLE if has(backend, op)]
    return [plan for plan in found if " ".join(plan) not in without]


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
    if leaves:
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

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def leaf(*shape: int) -> torch.Tensor:
        leaves.append(draw(*shape).requires_grad_())
        return leaves[-1]

    def sibling(n: int, k: int) -> ops.Sibling:
        adapters = [ops.Adapter(leaf(r, k), leaf(n, r), 2.0, p) for r, p in zip(ranks, ps, strict=True)]
        return ops.Sibling(draw(n, k), draw(n), adapters)

    if op in ("lora_embedding", *SINGLE):
        return _single(op, dtype, device, m, k, n, ranks[0], draw, leaf), leaves
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


def _single(
    op: str, dtype: torch.dtype, device: str, m: int, k: int, n: int, r: int, draw: Callable, leaf: Callable
) -> Callable[[str, str], Sequence[torch.Tensor]]:
    """The ops that have one plan, of which some are for inference: those take no gradients."""
    from peft_fast import ops
    from peft_fast.ops.nf4 import Packed

    Adapter = ops.Adapter
    if op == "lora_embedding":
        ids, W, adapter = torch.randint(k, (m,), device=device), draw(k, n), Adapter(leaf(r, k), leaf(n, r), 2.0)
        return lambda backend, _: [ops.lora_embedding(ids, W, [adapter], backend=backend)]
    if op == "lora_decode":
        x, W, adapter = draw(min(m, 32), k + 8)[:, :k], draw(n, k), Adapter(draw(r, k), draw(n, r), 2.0)
        return lambda backend, _: [ops.lora_decode(x, W, draw(n), [adapter], backend=backend)]
    if op == "lora_mixed":
        x, base, owners = draw(3, m, k), draw(3, m, n), (1, -1, 0)
        adapters = [Adapter(draw(i, k), draw(n, i), 2.0) for i in (r, r + 3)]
        return lambda backend, _: [ops.lora_mixed(x, base, adapters, owners, backend=backend)]
    if op == "nf4":
        size = n * k
        data = torch.randint(256, ((size + 1) // 2,), dtype=torch.uint8, device=device)
        absmax, code = (torch.rand(many, device=device) for many in ((size + 63) // 64, 16))
        W = Packed(data, absmax, code, 64, (n, k))
        return lambda backend, _: [ops.dequantize(W, dtype, backend=backend)]
    if op == "dora_linear":
        x, W, adapter, magnitude = leaf(m, k), draw(n, k), Adapter(leaf(r, k), leaf(n, r), 2.0, 0.1), leaf(n)
        return lambda backend, _: [ops.dora_linear(x, W, draw(n), adapter, magnitude, backend=backend)]
    experts = 3
    routing = ops.route_experts(torch.randint(experts, (m, 2), device=device), experts)
    x, W, adapter = leaf(m, k), draw(experts, n, k), Adapter(leaf(r * experts, k), leaf(n, r * experts), 2.0)
    return lambda backend, _: [ops.lora_experts(x, W, routing, None, [adapter], tokens=True, backend=backend)]


if __name__ == "__main__":
    sys.exit(main())
