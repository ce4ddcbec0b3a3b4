// y = x·Wᵀ + bias + Σ s·drop(x)·Aᵀ·Bᵀ on the CPU; shapes and dtypes as in peft_fast/ops/lora_linear.py.
#pragma once
#include <tuple>

#include "common/tensor.h"

namespace peft_fast {

// x (..., K), w (N, K) or (K, N) if transposed, bias (N,), a (R, K), b (N, R), seed (n,) int64 for n adapters whose
// ranks sum to R -> y (..., N) in x's dtype, h (M, R) float32 = s·drop(x)·Aᵀ. packed: pack_weight(w, ..., false).
// A w of (N, 0) gives the adapters' part alone, here and in the backward.
std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                                       const Tensor& a, const Tensor& b, const std::optional<Tensor>& seed,
                                       const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
                                       const std::vector<double>& ps, bool transposed,
                                       const std::optional<Tensor>& packed);

// g (..., N) -> dx (..., K), da (R, K), db (N, R), dbias (N,) float32; empty where needs (x, w, bias, a, b) is false;
// wide_dx: dx in float32 whatever x is
std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& g, const Tensor& x, const Tensor& w, const Tensor& a, const Tensor& b, const Tensor& h,
    const std::optional<Tensor>& seed, const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
    const std::vector<double>& ps, bool transposed, const std::vector<bool>& needs, bool wide_dx,
    const std::optional<Tensor>& packed);

// the frozen weight in the order the tiles read it, for activations of like_bf16's dtype; for_dx: as backward reads it
Tensor pack_weight(const Tensor& w, bool transposed, bool for_dx, bool like_bf16);

// a 64-bit digest of every byte of w: a packed copy is valid while it stays the same
int64_t weight_digest(const Tensor& w);

// seed () int64 -> bool (M, K), true = kept
Tensor dropout_mask(const Tensor& seed, int64_t M, int64_t K, double p);

}  // namespace peft_fast
