#include "cpu/nf4.h"

#include <algorithm>

#include "cpu/scratch.h"

namespace peft_fast {
namespace {

constexpr int64_t TASK = 1 << 16;  // values: fewer are not worth another thread

void check_fits(bool fits) {
  STD_TORCH_CHECK(fits, "given: codes and scales that do not fit\nneeded: contiguous ⌈N·K/2⌉ bytes and 16 values, or N·K "
                        "int8, or whole planes of uint8 with a float32 zero for each block, and a float32 scale for "
                        "each\ndo: call peft_fast.ops.dequantize");
}

const float* floats(const Tensor& t, int64_t n) {
  check_fits(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == n);
  return (const float*)t.const_data_ptr();
}

// n values in planes: how many bits they have says how many bytes there are
Codes planes_of(const Tensor& data, const Tensor& scales, const std::optional<Tensor>& meaning, const Tensor& zeros,
                int64_t block, int64_t n, bool round) {
  const int64_t plane = data.numel(), planes = plane ? n / plane : 1;
  check_fits(!meaning && data.is_contiguous() && data.scalar_type() == ScalarType::Byte && block > 0);
  check_fits(planes * plane == n && (planes == 1 || planes == 2 || planes == 4 || planes == 8) && plane % block == 0);
  return {int(8 / planes), data.const_data_ptr(), floats(scales, n / block), nullptr, nullptr, block,
          floats(zeros, n / block), plane, round};
}

}  // namespace

Codes codes_of(const Tensor& data, const Tensor& scales, const std::optional<Tensor>& meaning,
               const std::optional<Tensor>& zeros, int64_t block, int64_t N, int64_t K, bool bf16) {
  const int64_t n = N * K, bits = meaning ? 4 : 8;
  if (zeros && zeros->scalar_type() == ScalarType::Float)
    return planes_of(data, scales, meaning, *zeros, block, n, bf16);
  check_fits(data.is_contiguous() && block > 0 && data.element_size() == 1 && data.numel() >= ceil_div(n * bits, 8));
  const int64_t blocks = ceil_div(n, block);
  if (zeros) check_fits(zeros->scalar_type() == ScalarType::Char && zeros->is_contiguous() && zeros->numel() == blocks);
  return {int(bits), data.const_data_ptr(), floats(scales, blocks), meaning ? floats(*meaning, 16) : nullptr,
          zeros ? (const int8_t*)zeros->const_data_ptr() : nullptr, block};
}

Tensor nf4(const Tensor& data, const Tensor& scales, const Tensor& code, int64_t block, int64_t N, int64_t K,
           bool bf16) {
  const Engine& e = engine(bf16);
  const Codes codes = codes_of(data, scales, code, std::nullopt, block, N, K, bf16);
  Tensor out = empty_like(scales, {N, K}, bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  char* to = (char*)out.mutable_data_ptr();
  torch::stable::parallel_for(0, ceil_div(N * K, TASK), 1, [&](int64_t t0, int64_t t1) {
    const int64_t first = t0 * TASK, last = std::min(N * K, t1 * TASK);
    e.decode(codes, first, last - first, bf16, to + first * (bf16 ? 2 : 4));
  });
  return out;
}

Tensor nf4_scales(const Tensor& absmax, const Tensor& code, const Tensor& outer, const Tensor& offset, int64_t block) {
  const int64_t n = absmax.numel();
  check_fits(absmax.scalar_type() == ScalarType::Byte && absmax.is_contiguous() && block > 0);
  const float *values = floats(code, 256), *scales = floats(outer, ceil_div(n, block)), add = *floats(offset, 1);
  const auto* from = (const uint8_t*)absmax.const_data_ptr();
  Tensor out = empty_like(outer, {n});
  auto* to = (float*)out.mutable_data_ptr();
  torch::stable::parallel_for(0, n, TASK, [&](int64_t j0, int64_t j1) {
    for (int64_t j = j0; j < j1; ++j) to[j] = values[from[j]] * scales[j / block];
    // through memory: a processor that multiplies and adds at once would round once
    asm volatile("" ::: "memory");
    for (int64_t j = j0; j < j1; ++j) to[j] += add;
  });
  return out;
}

}  // namespace peft_fast
