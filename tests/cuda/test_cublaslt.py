"""The GEMM that adds through cuBLASLt: layouts, cached choices and refusals, with loops in cuBLASLt's place."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from peft_fast import native
from tests.cuda import model

pytestmark = [
    pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler named c++"),
    pytest.mark.skipif(not native.load(), reason="needs the extension"),
]

CODE = """
import ctypes, sys, torch
from peft_fast import native
fake = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
native.load(); torch.ops.load_library(sys.argv[2])
add = torch.ops.peft_fast.gemm_add_
torch.manual_seed(0)

def small(*shape):
    return torch.randint(-3, 4, shape).float()

def views(t):
    wide = torch.full((t.shape[0] + 3, t.shape[1] + 5), float("nan"))
    wide[1:-2, 2:-3] = t
    tall = torch.full((t.shape[1] + 2, t.shape[0] + 4), float("nan"))
    tall[1:-1, 3:-1] = t.t()
    return [t, t.t().contiguous().t(), wide[1:-2, 2:-3], tall[1:-1, 3:-1].t()]

done = 0
for M, K, N in ((1, 1, 1), (5, 7, 3), (1, 9, 4), (6, 1, 5), (7, 8, 1), (16, 24, 8)):
    a, b, c = small(M, K), small(K, N), small(M, N)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for left in views(a.to(dtype).float()):
            for right in views(b):
                for into in views(c)[::2]:
                    out = torch.empty_strided(into.shape, into.stride(), dtype=dtype).copy_(into)
                    # (torch.to keeps dense strides only; a view of a wider buffer is made again in the dtype)
                    x, w = (torch.empty_strided(t.shape, t.stride(), dtype=dtype).copy_(t) for t in (left, right))
                    assert add(out, x, w, False), (M, K, N, left.stride(), right.stride(), into.stride())
                    assert torch.equal(out.float(), (c + a @ b).to(dtype).float()), (M, K, N, dtype)
                    done += 1
assert fake.fake_calls() == done
a, b, c = small(4, 8), small(8, 12), small(4, 12)
kept, heuristics = c.clone(), fake.fake_heuristics()
assert add(kept, a, b, False) and add(kept, a, b, False) and torch.equal(kept, c + 2 * (a @ b))
assert fake.fake_heuristics() <= heuristics + 1  # one choice serves every call like it
assert add(kept, a, b, True) and fake.fake_heuristics() <= heuristics + 2
kept, before = c.clone(), fake.fake_calls()
assert not add(kept, small(1, 8).expand(4, 8), b, False) and not add(kept, small(4, 16)[:, ::2], b, False)
assert fake.fake_calls() == before and torch.equal(kept, c)  # what no leading dimension describes is left to torch
assert add(torch.empty(0, 3), torch.empty(0, 5), torch.empty(5, 3), False)
assert add(kept, torch.empty(4, 0), torch.empty(0, 12), False) and torch.equal(kept, c)
fake.fake_fail_at(fake.fake_calls())
assert not add(kept, a, b, False) and torch.equal(kept, c)
before = fake.fake_calls()
assert not add(kept, a, b, False) and fake.fake_calls() == before  # a choice that failed is not tried again
print("ok", done)
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cublaslt")
    return str(model.fake_cublaslt(folder)), str(model.compiled(folder / "libmodel.so"))


def test_adds_in_every_layout(libraries):
    done = subprocess.run([sys.executable, "-c", CODE, *libraries], text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith("ok"), done.stdout + done.stderr


def test_without_the_library_torch_adds(libraries):
    code = """
import sys, torch
from peft_fast import native
native.load(); torch.ops.load_library(sys.argv[1])
out = torch.ones(2, 3)
print(torch.ops.peft_fast.gemm_add_(out, torch.ones(2, 4), torch.ones(4, 3), False), out.sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code, libraries[1]], text=True, capture_output=True)
    assert done.stdout.split() == ["False", "6.0"], done.stdout + done.stderr
