// y = x·Wᵀ + bias + (c−1)∘drop(x)·Wᵀ + c∘s·drop(x)·Aᵀ·Bᵀ on the CPU; shapes and dtypes as in
// peft_fast/ops/dora_linear.py, and the norm in c.
#pragma once
#include <tuple>

#include "common/tensor.h"

namespace peft_fast {

// x (..., K), w, bias (N,), a (r, K), b (N, r), c (N,) float32, seed (1,) with p > 0 -> y (..., N) in x's dtype,
// h (M, r) float32 = s·drop(x)·Aᵀ, z (M, N) = drop(x)·Wᵀ + h·Bᵀ where `keep` says so. packed: pack_weight(w, ..., false)
std::tuple<Tensor, Tensor, Tensor> dora_linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                                               const Tensor& a, const Tensor& b, const Tensor& c,
                                               const std::optional<Tensor>& seed, double scaling, double p,
                                               bool transposed, bool keep, const std::optional<Tensor>& packed);

// g (..., N), b (N, r) -> dx (..., K), da (r, K), db (N, r), dbias (N,) and Σ g∘z (N,) float32; empty where
// needs (x, bias, a, b, m) is false; wide_dx: dx in float32. packed: pack_weight(w, ..., true)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dora_linear_backward(
    const Tensor& g, const Tensor& x, const Tensor& w, const Tensor& a, const Tensor& b, const Tensor& c,
    const Tensor& h, const Tensor& z, const std::optional<Tensor>& seed, double scaling, double p, bool transposed,
    const std::vector<bool>& needs, bool wide_dx, const std::optional<Tensor>& packed);

}  // namespace peft_fast
