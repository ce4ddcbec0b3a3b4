// y = scale·(W[ids] + s·A[:, ids]ᵀ·Bᵀ) on the CPU; shapes and dtypes as in peft_fast/ops/lora_embedding.py.
#pragma once
#include <tuple>

#include "common/tensor.h"

namespace peft_fast {

// ids (M,) int32 or int64, w (V, D), a (r, V), b (D, r), scale (2,) float32 = that of the base and that of the adapter
// -> y (M, D) in w's dtype = round(scale₀·w[ids]) + scaling·scale₁·h·bᵀ, h (M, r) float32 = a[:, ids]ᵀ
std::tuple<Tensor, Tensor> lora_embedding(const Tensor& ids, const Tensor& w, const Tensor& a, const Tensor& b,
                                          const std::optional<Tensor>& scale, double scaling);

// g (M, D) -> da (r, V), zero for the token `padding` (-1 = none), db (D, r); empty where needs (a, b) is false
std::tuple<Tensor, Tensor> lora_embedding_backward(const Tensor& g, const Tensor& ids, const Tensor& a,
                                                   const Tensor& b, const Tensor& h,
                                                   const std::optional<Tensor>& scale, double scaling,
                                                   int64_t padding, const std::vector<bool>& needs);

}  // namespace peft_fast
