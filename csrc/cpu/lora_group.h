// y_i = x·W_iᵀ + bias_i + Σ s·drop(x)·Aᵀ·Bᵀ for siblings i with one x: shapes as in peft_fast/ops/lora_group.py.
#pragma once
#include <functional>
#include <tuple>

#include "common/tensor.h"

namespace peft_fast {

// what pack_weight made of a (K, N) operand, after a look at its size; null where there is nothing
const void* packed_data(const std::optional<Tensor>& packed, const Engine& e, int64_t K, int64_t N);

// a bias (N,) as float32
std::vector<float> widened(const Tensor& bias, int64_t N);

// x (..., K), ws[i] (N_i, K) or (K, N_i) if transposed[i], biases[i] (N_i,), a (R, K) of all adapters, sibling after
// sibling, counts[i] of them its own, bs[i] (N_i, R_i), seed (n,) int64 for n adapters -> y_i (..., N_i) in x's dtype,
// h (M, R) float32 = s·drop(x)·Aᵀ. packed[i]: pack_weight(ws[i], ..., false).
std::tuple<std::vector<Tensor>, Tensor> lora_group(
    const Tensor& x, const std::vector<Tensor>& ws, const std::vector<std::optional<Tensor>>& biases, const Tensor& a,
    const std::vector<Tensor>& bs, const std::optional<Tensor>& seed, const std::vector<int64_t>& counts,
    const std::vector<int64_t>& ranks, const std::vector<double>& scalings, const std::vector<double>& ps,
    const std::vector<bool>& transposed, const std::vector<std::optional<Tensor>>& packed);

// the same; where codes[i] is not null, W_i is in codes and ws[i] no more than its shape and x's dtype
std::tuple<std::vector<Tensor>, Tensor> group_forward(
    const Tensor& x, const std::vector<Tensor>& ws, const std::vector<std::optional<Tensor>>& biases, const Tensor& a,
    const std::vector<Tensor>& bs, const std::optional<Tensor>& seed, const std::vector<int64_t>& counts,
    const std::vector<int64_t>& ranks, const std::vector<double>& scalings, const std::vector<double>& ps,
    const std::vector<bool>& transposed, const std::vector<std::optional<Tensor>>& packed,
    const std::vector<const Codes*>& codes);

// gs[i] (..., N_i) -> dx (..., K), da (R, K), dbs[i] (N_i, R_i), dbiases[i] (N_i,) float32; empty where not needed;
// wide_dx: dx in float32 whatever x is. packed[i]: pack_weight(ws[i], ..., true).
std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> lora_group_backward(
    const std::vector<Tensor>& gs, const Tensor& x, const std::vector<Tensor>& ws, const Tensor& a,
    const std::vector<Tensor>& bs, const Tensor& h, const std::optional<Tensor>& seed,
    const std::vector<int64_t>& counts, const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
    const std::vector<double>& ps, const std::vector<bool>& transposed, bool needs_x,
    const std::vector<bool>& needs_bias, bool needs_a, const std::vector<bool>& needs_b, bool wide_dx,
    const std::vector<std::optional<Tensor>>& packed);

// the same; `between` is called with dx once that is whole and gives the values of x, which dA alone reads: those that
// x itself holds are not read. codes: as for group_forward
std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> group_backward(
    const std::vector<Tensor>& gs, const Tensor& x, const std::vector<Tensor>& ws, const Tensor& a,
    const std::vector<Tensor>& bs, const Tensor& h, const std::optional<Tensor>& seed,
    const std::vector<int64_t>& counts, const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
    const std::vector<double>& ps, const std::vector<bool>& transposed, bool needs_x,
    const std::vector<bool>& needs_bias, bool needs_a, const std::vector<bool>& needs_b, bool wide_dx,
    const std::vector<std::optional<Tensor>>& packed, const std::function<Source(const Tensor& dx)>& between,
    const std::vector<const Codes*>& codes = {});

}  // namespace peft_fast
