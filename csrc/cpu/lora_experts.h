// y_e = x_e·W_eᵀ + bias_e + Σ s·x_e·A_eᵀ·B_eᵀ for the rows of each expert: shapes as in peft_fast/ops/lora_experts.py.
#pragma once
#include <tuple>

#include "common/tensor.h"

namespace peft_fast {

// x (T, K) of which row order[s] / k is the s-th, or (S, K) and k = 0; w (E, N, K) or (E, K, N) if transposed, bias
// (E, N), a (E, R, K), b (E, N, R), order (S,) and counts (E,) int64 -> y (S, N) in x's dtype,
// h (S, R) float32 = s·x·Aᵀ
std::tuple<Tensor, Tensor> lora_experts(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                                        const Tensor& a, const Tensor& b, const Tensor& order, const Tensor& counts,
                                        int64_t k, const std::vector<int64_t>& ranks,
                                        const std::vector<double>& scalings, bool transposed);

// the same without gradients, of adapters as PEFT keeps them: a (E·r, K) expert after expert, b (N, r·E) rank after
// rank. Where no expert has more than `few` rows W is read as it lies, else its operands are packed
Tensor lora_experts_infer(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                          const std::vector<Tensor>& as, const std::vector<Tensor>& bs, const Tensor& order,
                          const Tensor& counts, int64_t k, const std::vector<double>& scalings, bool transposed,
                          int64_t few);

// g (S, N) -> dx (S, K) in x's dtype, da, db, dbias (E, N) float32; empty where needs (x, a, b, bias) is false
std::tuple<Tensor, Tensor, Tensor, Tensor> lora_experts_backward(
    const Tensor& g, const Tensor& x, const Tensor& w, const Tensor& a, const Tensor& b, const Tensor& h,
    const Tensor& order, const Tensor& counts, int64_t k, const std::vector<int64_t>& ranks,
    const std::vector<double>& scalings, bool transposed, const std::vector<bool>& needs);

}  // namespace peft_fast
