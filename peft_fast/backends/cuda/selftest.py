"""Small problems whose every product is exact, run once per device, dtype and plan before the kernels are trusted.

`python -m peft_fast.backends.cuda` runs them in a process of its own: a kernel that breaks the device breaks nothing
else.
"""

from __future__ import annotations

import torch

from peft_fast.backends.triton import first_line
from peft_fast.errors import DeviceError, fail
from peft_fast.ops.spec import Spec
from peft_fast.reference.dropout import keep_mask

LAUNCH = "CUDA says"  # csrc/cuda/launch.cuh: a launch that CUDA refused
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# (M, K, N, ranks, dropout of each): whole tiles and ragged ones, ranks that fill a chunk's 16 and its 64
PROBLEMS = (
    (130, 264, 136, (8,), (0.5,)),
    (37, 136, 264, (20, 3), (0.0, 0.5)),
    (5, 37, 29, (3,), (0.0,)),
)
# for the Hopper GEMM, more tiles than it has blocks, and more steps than it has stages: exact where the adapter's
# product is not rounded on its way, which it is in the other plan
HOPPER_PROBLEMS = ((2305, 2312, 1160, (24,), (0.5,)), (2305, 1160, 2312, (24,), (0.0,)))

_found: dict[tuple, str] = {}


def reason(device: torch.device, dtype: torch.dtype, plan: str) -> str:
    """Why the kernels are not trusted here, in a sentence; empty when they are. Runs the problems at the first call."""
    key = device, dtype, plan
    if key not in _found:
        if device.type != "cuda":
            return ""
        if torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured before the kernels' first use, which tests them"
        _found[key] = _reason(device, dtype, plan)
    return _found[key]


def failures() -> list[str]:
    """The reasons found so far."""
    return [why for why in _found.values() if why]


def _reason(device, dtype, plan):
    name = f"the CUDA kernels' self-test on {device} in {NAMES[dtype]}, plan {plan},"
    try:
        hopper = plan == "fused" and dtype != torch.float32 and torch.cuda.get_device_capability(device) == (9, 0)
        problems = PROBLEMS + HOPPER_PROBLEMS if hopper else PROBLEMS
        wrong = [what for sizes in problems for what in mismatches(sizes, device, dtype, plan)]
    except torch.OutOfMemoryError:
        raise
    except torch.AcceleratorError as error:
        given = f"{name} stopped the device ({first_line(error)})"
        fail(DeviceError, given, "a process in which CUDA works", "start again with PEFT_FAST_BACKEND=torch")
    except RuntimeError as error:
        return f"{name} did not run ({first_line(error)})"
    return f"{name} gave wrong values of {', '.join(sorted(set(wrong)))}" if wrong else ""


def mismatches(sizes: tuple, device: torch.device, dtype: torch.dtype, plan: str) -> list[str]:
    """The names of those outputs of one problem that differ from the truth in any bit."""
    from peft_fast.backends.cuda import lora_linear

    M, K, N, ranks, ps = sizes
    scalings = [1.0, 0.5][: len(ranks)]
    generator = torch.Generator().manual_seed(M)

    def small(*shape):
        return torch.randint(-1, 2, shape, generator=generator).to(torch.float64)

    x, W, bias, A, B, g = small(M, K), small(N, K), small(N), small(sum(ranks), K), small(N, sum(ranks)), small(M, N)
    seed = torch.randint(0, 2**63 - 1, (len(ranks),), generator=generator)
    x, W, bias, A, B, g, seed = (t.to(device) for t in (x, W, bias, A, B, g, seed))
    truth = _truth(x, W, bias, A, B, g, seed, ranks, scalings, ps)
    spec = Spec(list(ranks), scalings, list(ps), dtype, False, False, "cuda", plan)
    x, W, bias, A, B, g = (t.to(dtype) for t in (x, W, bias, A, B, g))
    needs = True, False, False, True, True
    with lora_linear.uncounted():
        y, H = lora_linear.run_forward(x, W, bias, A, B, seed, spec)
        dx, _, _, dA, dB = lora_linear.run_backward(g, x, W, bias, A, B, H, seed, spec, needs)
    out = {"y": y, "H": H, "dx": dx, "dA": dA, "dB": dB}
    return [name for name, t in out.items() if not torch.equal(t, truth[name].to(dtype))]


def _truth(x, W, bias, A, B, g, seed, ranks, scalings, ps):
    """The layer and its gradients in float64; whole numbers so small that half precision holds every intermediate."""
    y, dx, H, dA, dB = x @ W.t() + bias, g @ W, [], [], []
    parts = zip(A.split(ranks), B.split(ranks, 1), seed, scalings, ps, strict=True)
    for a, b, s, scaling, p in parts:
        mask = keep_mask(s, *x.shape, p) / (1 - p) if p else torch.ones_like(x)
        h, d = scaling * (x * mask) @ a.t(), scaling * g @ b
        y, dx = y + h @ b.t(), dx + mask * (d @ a)
        H, dA, dB = [*H, h], [*dA, d.t() @ (x * mask)], [*dB, g.t() @ h]
    return {"y": y, "H": torch.cat(H, 1), "dx": dx, "dA": torch.cat(dA), "dB": torch.cat(dB, 1)}
