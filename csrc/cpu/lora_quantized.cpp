#include "cpu/lora_quantized.h"

#include "cpu/lora_group.h"
#include "cpu/nf4.h"

namespace peft_fast {

std::tuple<Tensor, Tensor> lora_quantized(
    const Tensor& x, const Tensor& w, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& meaning,
    const std::optional<Tensor>& zeros, int64_t block, const std::optional<Tensor>& bias, const Tensor& a,
    const Tensor& b, const std::optional<Tensor>& seed, const std::vector<int64_t>& ranks,
    const std::vector<double>& scalings, const std::vector<double>& ps) {
  const Codes values = codes_of(codes, scales, meaning, zeros, block, w.size(0), w.size(1), is_bf16(w));
  auto [ys, h] = group_forward(x, {w}, {bias}, a, {b}, seed, {int64_t(ranks.size())}, ranks, scalings, ps, {false},
                               {std::nullopt}, {&values});
  return {ys[0], h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_quantized_backward(
    const Tensor& g, const Tensor& x, const Tensor& w, const Tensor& codes, const Tensor& scales,
    const std::optional<Tensor>& meaning, const std::optional<Tensor>& zeros, int64_t block, const Tensor& a,
    const Tensor& b, const Tensor& h, const std::optional<Tensor>& seed, const std::vector<int64_t>& ranks,
    const std::vector<double>& scalings, const std::vector<double>& ps, const std::vector<bool>& needs, bool wide_dx) {
  STD_TORCH_CHECK(needs.size() == 4, "given: needs of another length\nneeded: x, bias, A, B\n"
                                     "do: call peft_fast.ops.lora_quantized and let autograd run the backward");
  const Codes values = codes_of(codes, scales, meaning, zeros, block, w.size(0), w.size(1), is_bf16(w));
  auto [dx, da, dbs, dbiases] =
      group_backward({g}, x, {w}, a, {b}, h, seed, {int64_t(ranks.size())}, ranks, scalings, ps, {false}, needs[0],
                     {needs[1]}, needs[2], {needs[3]}, wide_dx, {std::nullopt}, {}, {&values});
  return {dx, da, dbs[0], dbiases[0]};
}

}  // namespace peft_fast
