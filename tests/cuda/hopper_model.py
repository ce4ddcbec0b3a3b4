"""csrc/cuda/hopper.cu on the host: compiled around tests/cuda/hopper_shim.h, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import shlex
import subprocess
from pathlib import Path

import torch

from peft_fast import build

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Gemm(ctypes.Structure):
    """csrc/cuda/hopper.h's HopperGemm."""

    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("turned", ctypes.c_bool),
        *[(name, ctypes.c_int64) for name in "MNKR"],
        *[(name, ctypes.c_void_p) for name in ("left", "right", "low_left", "low_right")],
        *[(name, ctypes.c_int64) for name in ("left_ld", "right_ld", "low_left_ld", "low_right_ld")],
        ("bias", ctypes.c_void_p),
        ("bias_dtype", ctypes.c_int32),
        ("seed", ctypes.c_void_p),
        ("p", ctypes.c_double),
        ("out", ctypes.c_void_p),
        ("out_ld", ctypes.c_int64),
    ]


def compiled(folder: Path, csrc: Path = CSRC) -> ctypes.CDLL:
    """The model as a library in ``folder``, of the kernel in ``csrc``."""
    library = folder / "libhopper.so"
    flags = "-std=c++20 -O2 -fPIC -shared -fvisibility=hidden".split()
    source = HERE / "hopper_shim.cpp"
    command = [
        *shlex.split(build.find_compiler()[0]),
        *flags,
        f"-I{csrc}",
        f"-I{HERE}",
        str(source),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return loaded(library)


@functools.cache
def loaded(library: Path) -> ctypes.CDLL:
    """The library with its signatures."""
    model = ctypes.CDLL(str(library))
    model.hopper.restype = ctypes.c_char_p
    model.hopper.argtypes = [ctypes.POINTER(Gemm), ctypes.c_int, ctypes.c_uint32, ctypes.c_double]
    model.operand_at.restype = ctypes.c_uint64
    model.is_wide.restype = ctypes.c_bool
    model.is_wide.argtypes = [ctypes.c_int64] * 3
    model.origins.argtypes = [ctypes.c_bool, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32)]
    return model


def gemm(
    model, left, right, low=None, bias=None, seed=None, p=0.0, turned=False, out=None, order=0, eagerness=0.5, sms=4
):
    """left (M, K), right (N, K) or turned (K, N), low = H (M, R), B (N, R) or turned (R, N) -> out (M, N), fault."""
    (M, K), N = left.shape, right.shape[1] if turned else right.shape[0]
    if out is None:
        out = torch.full((M, N), float("nan"), dtype=left.dtype)
    low_left, low_right = low or (None, None)
    job = Gemm(dtype=DTYPES[left.dtype], turned=turned, M=M, N=N, K=K, p=p)
    for name, tensor in (
        ("left", left),
        ("right", right),
        ("low_left", low_left),
        ("low_right", low_right),
        ("out", out),
    ):
        if tensor is not None:
            setattr(job, name, tensor.data_ptr())
            setattr(job, name + "_ld", tensor.stride(0))
    if low:
        job.R = low_left.shape[1]
    if bias is not None:
        job.bias, job.bias_dtype = bias.data_ptr(), DTYPES[bias.dtype]
    if seed is not None:
        job.seed = seed.data_ptr()
    fault = model.hopper(ctypes.byref(job), sms, order, eagerness).decode()
    return out, fault


def operands(M, N, K, R, dtype, turned, seed=0):
    """left, right, (low_left, low_right) | None"""
    torch.manual_seed(seed)
    right = (K, N) if turned else (N, K)
    low = (torch.randn(M, R).to(dtype), torch.randn(*((R, N) if turned else (N, R))).to(dtype)) if R else None
    return torch.randn(M, K).to(dtype), torch.randn(*right).to(dtype), low


def truth(left, right, low=None, bias=None, keep=None, p=0.0, turned=False):
    """float64 out, and the sum of magnitudes that float32 rounds."""

    def product(a, b):
        b = b.double() if turned else b.double().t()
        return a.double() @ b, a.double().abs() @ b.abs()

    out, size = product(left, right)
    if low:
        small, small_size = product(*low)
        out = out + (small if keep is None else torch.where(keep, small / (1 - p), 0.0))
        size = size + small_size / (1 - p)
    return (out, size) if bias is None else (out + bias.double(), size + bias.double().abs())


def check(got, want, size):
    # one rounding at the store, and float32 sums
    allowed = want.abs() * torch.finfo(got.dtype).eps / 2 * 1.001 + size * 1e-6
    assert ((got.double() - want).abs() <= allowed).all()
