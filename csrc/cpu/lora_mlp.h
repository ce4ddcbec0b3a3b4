// h = act(gate)·up and its backward on the CPU, the part of lora_mlp between its products: peft_fast/ops/lora_mlp.py.
#pragma once
#include <string>
#include <tuple>

#include "common/tensor.h"

namespace peft_fast {

// gate, up (M, I), or no gate: h = act(up); halves "first" | "second": up (M, 2I) holds both, and that half is the
// activated one -> h (M, I) in up's dtype, dropped with probability p by seed (1,)
Tensor lora_mlp_activate(const std::optional<Tensor>& gate, const Tensor& up, const std::optional<Tensor>& seed,
                         const std::string& activation, const std::string& halves, double p);

// dh (M, I) -> dgate (empty without a gate), dup like up
std::tuple<Tensor, Tensor> lora_mlp_activate_backward(const Tensor& dh, const std::optional<Tensor>& gate,
                                                      const Tensor& up, const std::optional<Tensor>& seed,
                                                      const std::string& activation, const std::string& halves,
                                                      double p);

// lora_linear_backward of down, and the above on its dx, with h computed again in the same pass:
// g (..., N), w, a, b, low (M, R) = down's own, needs (bias, a, b) -> dgate, dup, da, db, dbias
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_mlp_down_backward(
    const Tensor& g, const Tensor& w, const Tensor& a, const Tensor& b, const Tensor& low,
    const std::optional<Tensor>& seed, const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
    const std::vector<double>& ps, bool transposed, const std::vector<bool>& needs,
    const std::optional<Tensor>& packed, const std::optional<Tensor>& gate, const Tensor& up,
    const std::optional<Tensor>& h_seed, const std::string& activation, const std::string& halves, double p);

}  // namespace peft_fast
