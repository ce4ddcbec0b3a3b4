"""doctor's part about GPUs: which there are, whether the kernels run and are right on the first, what `tune` found."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
from pathlib import Path

PCI = Path("/sys/bus/pci/devices")
NVIDIA, DISPLAY = "0x10de", "0x03"
BACKENDS = ("triton", "cuda")
# relative to the definition's result: a kernel that is wrong, not one that rounds; `bench --gate-only` is the fine test
ALLOWED = 0.02


def machine() -> dict:
    """The GPUs that the driver shows, the NVIDIA cards in the machine, what torch can do with them and why not."""
    import torch

    return {
        "gpus": _driver_shows(),
        "gpu_cards": _cards(),
        "torch_cuda": torch.version.cuda or torch.version.hip,
        "torch_sees_gpu": torch.cuda.is_available(),
        "torch_why_not": _why_not(),
    }


def _driver_shows() -> list[str]:
    """name, driver, memory of each NVIDIA GPU the driver shows; empty without one."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _cards() -> int:
    """NVIDIA GPUs on the bus, with or without a driver."""

    def read(file: Path) -> str:
        try:
            return file.read_text()
        except OSError:
            return ""

    return sum(
        read(card / "vendor").startswith(NVIDIA) and read(card / "class").startswith(DISPLAY) for card in PCI.glob("*")
    )


def _why_not() -> str:
    """What torch says when it is asked for the GPU that it does not see; empty for a CPU build."""
    import torch

    if torch.cuda.is_available() or not (torch.version.cuda or torch.version.hip):
        return ""
    try:
        torch.cuda.init()
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0].rstrip(".")
    return "no GPU is visible"


def facts() -> dict:
    """Devices, CUDA's version, the self-test of each plan, and the tuning file; empty where torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    report = {
        "devices": [_device(i) for i in range(torch.cuda.device_count())],
        "version": torch.version.cuda or torch.version.hip,
        "self_test": self_test(torch.device("cuda")),
        "tuned": 0,
        "ignored": "",
    }
    if importlib.util.find_spec("triton"):
        from peft_fast.backends.triton import tuning

        report |= {"tuned": len(tuning.load(0)), "ignored": tuning.why_ignored(0)}
    return report


def _device(index: int) -> str:
    """One GPU in a line; with the reason, where none of the kernels run on it."""
    import torch

    from peft_fast.backends import triton

    found = torch.cuda.get_device_properties(index)
    shown = f"{found.name}, compute capability {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB"
    why = triton.device_reason(index)
    return f"{shown}; no Triton kernels: {why}" if why else shown


def self_test(device, backends: tuple[str, ...] = BACKENDS) -> list[dict]:
    """Forward and backward of one small layer in each live plan against the definition.

    A row a plan: its name, why it failed, and in `refused` why it is not for this GPU.
    """
    from peft_fast import dispatch

    live = [name for name, live, _ in dispatch.backends() if live and name in backends]
    plans = [(name, plan) for name in live for plan in dispatch.BACKEND_PLANS[name]]
    rows = []
    for name, plan in plans:
        watch = dispatch.Watch()
        why = _wrong(device, name, plan)
        rows.append({"name": f"{name}, {plan}", "why": why, "refused": "" if why else watch.refused()})
    return rows


def _wrong(device, backend: str, plan: str) -> str:
    """What is wrong with a backend's plan on this device; empty when it agrees with the definition."""
    import torch

    from peft_fast import dispatch

    try:
        watch = dispatch.Watch()
        ours, exact = _results(device, backend, plan), _results(device, "reference", None)
        # a kernel that does not compile leaves the call to torch, which is right, and a note
        if why := watch.failed():
            return why
        for name, a, b in zip(("y", "dx", "dA", "dB"), ours, exact, strict=True):
            error = ((a.double() - b.double()).norm() / b.double().norm()).item()
            if not error <= ALLOWED:
                return f"{name} is off by {error:.2g}"
    except Exception as error:  # doctor reports whatever there is to report
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    finally:
        if device.type == "cuda" and torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):  # a kernel may have broken the device
                torch.cuda.empty_cache()
    return ""


def _results(device, backend: str, plan: str | None) -> tuple:
    """y, dx, dA, dB of a layer of 70 tokens, 192 → 136, r = 16 with dropout, the same for every backend."""
    import torch

    from peft_fast.ops import Adapter, lora_linear

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int):
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    x, W, g = draw(70, 192).requires_grad_(), draw(136, 192), draw(70, 136)
    A, B = draw(16, 192).requires_grad_(), draw(136, 16).requires_grad_()
    with torch.random.fork_rng(devices=[0] if device.type == "cuda" else []):
        torch.manual_seed(1)
        y = lora_linear(x, W, None, [Adapter(A, B, 0.5, 0.1)], backend=backend, plan=plan)
        return y.detach(), *torch.autograd.grad(y, (x, A, B), g)


def to_do(report: dict) -> list[str]:
    """One sentence for each thing that keeps this machine's GPU from its best."""
    from peft_fast import dispatch

    machine, kernels = report["machine"], report["gpu_kernels"]
    if not machine["torch_sees_gpu"]:
        return _unseen(machine)
    if not kernels:
        return []
    off = {row["name"]: row["why"] for row in report["backends"] if not row["live"] and row["name"] in BACKENDS}
    live = [row["name"] for row in report["backends"] if row["live"] and row["name"] in BACKENDS]
    todo = []
    if not live:
        why = "; ".join(f"{name}: {reason}" for name, reason in off.items())
        todo.append(f"on the GPU torch's own GEMMs do all the work ({why})")
    for test in kernels["self_test"]:
        if test["why"]:
            what = f"{test['name']} failed its self-test ({test['why']})"
            backend = test["name"].partition(",")[0]
            if backend == dispatch.AUTO["cuda"]:
                todo.append(f"{what}: set PEFT_FAST_BACKEND=torch until it passes")
            else:
                todo.append(f"{what}: do not ask for {backend} by name until it passes; nothing else uses it")
    if kernels["ignored"]:
        todo.append(
            f"the tuning result is not used, because {kernels['ignored']}: run `python -m peft_fast tune` again"
        )
    elif "triton" in live and not kernels["tuned"]:
        todo.append("the GPU kernels run with the shipped tiles: `python -m peft_fast tune` may find faster ones")
    return todo


def _unseen(machine: dict) -> list[str]:
    """Why torch does not see a GPU that is there."""
    if machine["gpus"] and machine["torch_cuda"]:
        what = f"there is a GPU, but torch's CUDA {machine['torch_cuda']} cannot use it"
        why = f" ({machine['torch_why_not']})" if machine["torch_why_not"] else ""
        return [f"{what}{why}: update the driver, or install a torch for an older CUDA"]
    if machine["gpus"]:
        return ["there is a GPU, but this torch cannot use it: install a CUDA build of torch"]
    if machine["gpu_cards"]:
        do = "install NVIDIA's driver, or, in a container, start it with access to the GPU"
        return [f"there is an NVIDIA card, but no driver for it here: {do}"]
    return []


def table(kernels: dict) -> list[tuple]:
    """doctor's table (title, header, rows), or none where there is no GPU."""
    if not kernels:
        return []
    tuned = f"{kernels['tuned']} choices from `tune`" if kernels["tuned"] else "as shipped"
    rows = [("device", device) for device in kernels["devices"]]
    rows += [(test["name"], _verdict(test)) for test in kernels["self_test"]]
    rows += [("tiles and plans", kernels["ignored"] or tuned)]
    return [("GPU, as torch sees it", ("", ""), rows)]


def _verdict(test: dict) -> str:
    if test["why"]:
        return f"failed: {test['why']}"
    return f"not for this GPU: {test['refused']}" if test["refused"] else "agrees"
