// y = x·Wᵀ + bias + Σ s·(x·Aᵀ·Bᵀ + b_B) for few tokens on the CPU; shapes and dtypes as in peft_fast/ops/lora_decode.py.
#pragma once
#include "common/tensor.h"

namespace peft_fast {

// x (..., K), w (N, K) or (K, N) if transposed, bias (N,), and of each adapter a (r, K), b (N, r), low_bias (N,)
// -> y (..., N) in x's dtype, rounded once. order: the rows of x (its first dimension), those of the first adapter,
// counts[0] of them, then the second's, ..., and last those of none; empty: every adapter has all tokens
Tensor lora_decode(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, const std::vector<Tensor>& as,
                   const std::vector<Tensor>& bs, const std::vector<std::optional<Tensor>>& low_biases,
                   const std::vector<double>& scalings, bool transposed, const std::vector<int64_t>& order,
                   const std::vector<int64_t>& counts);

// the same of one adapter with DoRA's m (N,) and norm (N,), float32 -> y = m/norm∘(x·Wᵀ + s·x·Aᵀ·Bᵀ) + bias, and of a
// probe (K,), float32, what it gives before m, norm and bias: (N,) in float32, empty without one
std::tuple<Tensor, Tensor> dora_decode(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                                       const Tensor& a, const Tensor& b, double scaling, const Tensor& m,
                                       const Tensor& norm, const std::optional<Tensor>& probe, bool transposed);

// is every element of these matrices zero?
bool all_zero(const std::vector<Tensor>& ts);

}  // namespace peft_fast
