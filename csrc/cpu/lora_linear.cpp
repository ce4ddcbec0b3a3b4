#include "cpu/lora_linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/dropout.h"
#include "cpu/gemm.h"
#include "cpu/lora_group.h"

namespace peft_fast {

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                                       const Tensor& a, const Tensor& b, const std::optional<Tensor>& seed,
                                       const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
                                       const std::vector<double>& ps, bool transposed,
                                       const std::optional<Tensor>& packed) {
  auto [ys, h] = lora_group(x, {w}, {bias}, a, {b}, seed, {int64_t(ranks.size())}, ranks, scalings, ps, {transposed},
                            {packed});
  return {ys[0], h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& g, const Tensor& x, const Tensor& w, const Tensor& a, const Tensor& b, const Tensor& h,
    const std::optional<Tensor>& seed, const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
    const std::vector<double>& ps, bool transposed, const std::vector<bool>& needs, bool wide_dx,
    const std::optional<Tensor>& packed) {
  STD_TORCH_CHECK(needs.size() == 5, "given: needs of another length\nneeded: x, W, bias, A, B\n"
                                     "do: call peft_fast.ops.lora_linear and let autograd run the backward");
  auto [dx, da, dbs, dbiases] =
      lora_group_backward({g}, x, {w}, a, {b}, h, seed, {int64_t(ranks.size())}, ranks, scalings, ps, {transposed},
                          needs[0], {needs[2]}, needs[3], {needs[4]}, wide_dx, {packed});
  return {dx, da, dbs[0], dbiases[0]};
}

Tensor pack_weight(const Tensor& w, bool transposed, bool for_dx, bool like_bf16) {
  const Engine& e = engine(like_bf16);
  const int64_t N = w.size(transposed ? 1 : 0), K = w.size(transposed ? 0 : 1);
  const Source s = weight(w, transposed, like_bf16);
  Tensor out = empty_like(w, {for_dx ? packed_bytes(e, N, K) : packed_bytes(e, K, N)}, ScalarType::Byte);
  if (for_dx) pack(e, N, K, s, out.mutable_data_ptr());
  else pack(e, K, N, turned(s), out.mutable_data_ptr());
  return out;
}

int64_t weight_digest(const Tensor& w) {
  STD_TORCH_CHECK(w.is_contiguous(), "given: a strided weight\nneeded: a contiguous one\ndo: w.contiguous()");
  const auto* bytes = (const unsigned char*)w.const_data_ptr();
  const int64_t n = w.numel() * int64_t(w.element_size());
  constexpr int64_t PART = 1 << 16;
  const int64_t parts = (n + PART - 1) / PART;
  std::vector<uint64_t> sums(parts);
  torch::stable::parallel_for(0, parts, 8, [&](int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) {
      // eight independent multiply-xor chains keep up with memory
      uint64_t lanes[8] = {1, 2, 3, 4, 5, 6, 7, 8};
      const int64_t end = std::min(n, (p + 1) * PART);
      int64_t i = p * PART;
      for (; i + 64 <= end; i += 64)
        for (int l = 0; l < 8; ++l) {
          uint64_t word;
          std::memcpy(&word, bytes + i + 8 * l, 8);
          lanes[l] = (lanes[l] ^ word) * 0x9FB21C651E98DF25ull;
          lanes[l] ^= lanes[l] >> 32;
        }
      for (; i < end; ++i) lanes[0] = (lanes[0] ^ bytes[i]) * 0x9FB21C651E98DF25ull;
      uint64_t sum = uint64_t(p) * 0xD6E8FEB86659FD93ull;
      for (uint64_t lane : lanes) sum = (sum ^ lane) * 0x9FB21C651E98DF25ull, sum ^= sum >> 29;
      sums[p] = sum;
    }
  });
  uint64_t digest = uint64_t(n);
  for (uint64_t s : sums) digest = (digest ^ s) * 0x9FB21C651E98DF25ull, digest ^= digest >> 31;
  return int64_t(digest);
}

Tensor dropout_mask(const Tensor& seed, int64_t M, int64_t K, double p) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1 && M >= 0 && K >= 0,
                  "given: a seed that is not one int64\nneeded: one element of draw_seed(n)\ndo: pass seed[i]");
  Tensor out = empty_like(seed, {M, K}, ScalarType::Bool);
  const MaskBits bits(engine(false), uint64_t(*(const int64_t*)seed.const_data_ptr()), M, K, p);
  const Source s = bits.over({});
  auto* to = (bool*)out.mutable_data_ptr();
  for (int64_t m = 0; m < M; ++m)
    for (int64_t k = 0; k < K; ++k) to[m * K + k] = s.mask[m * s.mask_row + k / 8] >> (k % 8) & 1;
  return out;
}

}  // namespace peft_fast
