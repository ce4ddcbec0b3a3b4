// y[b] += s·x[b]·Aᵀ·Bᵀ + s·b_B with the adapter of row b; shapes and dtypes as in peft_fast/ops/lora_mixed.py.
#pragma once
#include "common/tensor.h"

namespace peft_fast {

// y (b, T, N) contiguous, x (b, T, K) or ids (b, T); of each adapter a (r, K), b (N, r), bias (N,). order: rows of the
// batch, those of the first adapter, counts[0] of them, then the second's; the others keep their bits
void lora_mixed(const Tensor& y, const Tensor& x, const std::vector<Tensor>& as, const std::vector<Tensor>& bs,
                const std::vector<std::optional<Tensor>>& biases, const std::vector<int64_t>& order,
                const std::vector<int64_t>& counts, const std::vector<double>& scalings);

}  // namespace peft_fast
