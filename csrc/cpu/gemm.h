// y = Σ_segments a·b, tiled over an engine, with the epilogue run while a tile is in the first-level cache.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/engine.h"

namespace peft_fast {

// one low-rank term: a (M, k) · b (k, N); with a mask, its product is kept where the mask's bit is set and scaled
struct LowRank {
  Source a, b;
  int64_t k;
  Source mask{};  // mask.mask null = none
  float mask_scale = 1.0f;
};

// y (M, N) = a (M, K) · b (K, N) + Σ low-rank terms; `packed` = pack_weight's output for b, or null
void gemm(const Engine&, int64_t M, int64_t N, int64_t K, const Source& a, const Source& b,
          const std::vector<LowRank>& low, const Target& y, const void* packed = nullptr);

// y (m, N) = a (m, M) · b (M, N), m small and M long (tokens): one pass over b, deterministic for any thread count
void gemm_tokens(const Engine&, int64_t m, int64_t N, int64_t M, const Source& a, const Source& b, const Target& y);

// all panels of b (K, N), as gemm reads them
int64_t packed_bytes(const Engine&, int64_t K, int64_t N);
void pack(const Engine&, int64_t K, int64_t N, const Source& b, void* out);

}  // namespace peft_fast
