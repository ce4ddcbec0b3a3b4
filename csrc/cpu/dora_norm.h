// ‖W + s·B·A‖ of each row on the CPU, by Gram's identity; shapes and dtypes as in peft_fast/ops/dora_norm.py.
#pragma once
#include "common/tensor.h"

namespace peft_fast {

// w (N, K), or (K, N) if transposed, a (r, K), b (N, r) -> (N,) float32
Tensor dora_norm(const Tensor& w, const Tensor& a, const Tensor& b, double scaling, bool transposed);

}  // namespace peft_fast
