// lora_linear with a frozen W in 4 or 8 bits, of which no dense copy is ever made: its panels are decoded where they are
// packed. Shapes and dtypes as in peft_fast/ops/lora_quantized.py.
#pragma once
#include <tuple>

#include "common/tensor.h"

namespace peft_fast {

// w: no more than the shape (N, K) and x's dtype; codes, scales, meaning, zeros and block: as for codes_of in nf4.h; the rest
// and the results: as for lora_linear
std::tuple<Tensor, Tensor> lora_quantized(
    const Tensor& x, const Tensor& w, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& meaning,
    const std::optional<Tensor>& zeros, int64_t block, const std::optional<Tensor>& bias, const Tensor& a,
    const Tensor& b, const std::optional<Tensor>& seed, const std::vector<int64_t>& ranks,
    const std::vector<double>& scalings, const std::vector<double>& ps);

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_quantized_backward(
    const Tensor& g, const Tensor& x, const Tensor& w, const Tensor& codes, const Tensor& scales,
    const std::optional<Tensor>& meaning, const std::optional<Tensor>& zeros, int64_t block, const Tensor& a,
    const Tensor& b, const Tensor& h, const std::optional<Tensor>& seed, const std::vector<int64_t>& ranks,
    const std::vector<double>& scalings, const std::vector<double>& ps, const std::vector<bool>& needs, bool wide_dx);

}  // namespace peft_fast
