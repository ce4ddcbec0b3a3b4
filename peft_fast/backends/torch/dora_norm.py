"""dora_norm through Gram's identity: ‖W + s·B·A‖² = ‖W‖² + 2s·Σ(W·Aᵀ)∘B + s²·Σ(B·A·Aᵀ)∘B, so nobody builds B·A.

‖W‖² is summed in the pass that W·Aᵀ makes over W anyway: a copy kept from the last call would be valid only after
reading all of W again, as PEFT merges into ``weight.data``, which no version counts.
"""

from __future__ import annotations

import torch

from peft_fast.backends import operators

# a module, not its names: whoever imports it first imports this one halfway
from peft_fast.backends.torch import lora_linear as vendor

BLOCK = 1 << 18  # elements of W that are widened, multiplied and squared while they are in a cache
WORST = 2.0  # (‖W‖² + rounding of the product) / ‖W + s·B·A‖² up to which float32 is enough


def norm(W, A, B, scaling, transposed):
    """W (N, K) or (K, N), A (r, K), B (N, r) -> (N,) in float32, float64 for float64."""
    if operators.traced(W):
        return torch.ops.peft_fast.torch_dora_norm(W, A, B, scaling, transposed)
    return _norm(W, A, B, scaling, transposed)


def _norm(W, A, B, scaling, transposed):
    with torch.no_grad(), vendor.no_autocast(W.device.type):
        wide = torch.promote_types(torch.promote_types(W.dtype, A.dtype), torch.float32)
        A, B = A.detach(), B.detach()
        squares, product = (_columns if transposed else _rows)(W.detach(), _factor(A, wide))
        return finish(squares, product, W.detach(), A, B, scaling, transposed).to(wide)


def finish(squares, product, W, A, B, scaling, transposed):
    """‖W‖² (N,), W·Aᵀ (N, r) -> ‖W + s·B·A‖ (N,) in float64, where that nearly vanishes beside W straight from it."""
    a, b = A.double(), B.double()
    gram = a @ a.t()
    squares, product = squares.double(), product.double()
    whole = squares + 2 * scaling * (product * b).sum(1) + scaling**2 * ((b @ gram) * b).sum(1)
    # W·Aᵀ is off by about eps·‖W‖·‖A‖ in each element, and those errors are independent
    rounding = 2 * abs(scaling) * (squares * (b.square() @ gram.diagonal())).sqrt()
    near = (squares + rounding > WORST * whole).nonzero().squeeze(1)
    out = whole.clamp_min_(0).sqrt_()
    step = max(1, BLOCK // max(1, A.shape[1]))
    for rows in near.split(step):
        some = (W[:, rows].t() if transposed else W[rows]).double()
        out[rows] = torch.linalg.vector_norm(some.addmm(b[rows], a, alpha=scaling), dim=1)
    return out


def _factor(A, wide):
    # TF32 keeps too few digits of a sum that may cancel
    tf32 = A.is_cuda and wide == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return A.to(torch.float64 if tf32 else wide)


def _rows(W, A):
    """W (N, K), A (r, K) -> ‖W‖² of each row (N,), W·Aᵀ (N, r)."""
    squares, product = W.new_empty(W.shape[0], dtype=torch.float64), A.new_empty(W.shape[0], A.shape[0])
    step = _step(W, W.shape[1])
    for n in range(0, W.shape[0], step):
        block = W[n : n + step].to(A.dtype)
        torch.mm(block, A.t(), out=product[n : n + step])
        squares[n : n + step] = torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).square_()
    return squares, product


def _columns(W, A):
    """W (K, N), A (r, K) -> ‖W‖² of each column (N,), W·Aᵀ (N, r)."""
    squares = W.new_zeros(W.shape[1], dtype=torch.float64)
    product = W.new_zeros(A.shape[0], W.shape[1], dtype=torch.float64)
    step = _step(W, W.shape[1])
    for k in range(0, W.shape[0], step):
        block = W[k : k + step].to(A.dtype)
        product += A[:, k : k + step] @ block
        squares += torch.linalg.vector_norm(block, dim=0, dtype=torch.float64).square_()
    return squares, product.t()


def _step(W, width):
    """Rows of W at a time; a GPU is better served by all."""
    return max(1, W.shape[0] if W.is_cuda else BLOCK // max(1, width))


def _fake(W, A, B, scaling, transposed):
    dtype = torch.promote_types(torch.promote_types(W.dtype, A.dtype), torch.float32)
    return W.new_empty(B.shape[0], dtype=dtype)


operators.define(
    "torch_dora_norm", "(Tensor W, Tensor A, Tensor B, float scaling, bool transposed) -> Tensor", _norm, _fake
)
