// Products tiled over an engine, with the epilogue run while a tile is in the first-level cache.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/engine.h"

namespace peft_fast {

// a (M, k)
struct Left {
  Source a;
  int64_t k;
};

// b (k, N), k that of its left operand; b.data null = these columns have no such product.
// packed = pack's output for b, or null
struct Right {
  Source b;
  const void* packed = nullptr;
};

// one low-rank term: a (M, k) · b (k, N); with a mask, its product is kept where the mask's bit is set and scaled
struct LowRank {
  Source a, b;
  int64_t k;
  Source mask{};  // mask.mask null = none
  float mask_scale = 1.0f;
};

// what becomes of a tile instead of a copy to a Target, while all of it is in the caches: c (m, n) of a product with one
// right operand, low (m, n) of its only low-rank term, and the right operand's packed columns [j0, j0 + width), whole
class Epilogue {
 public:
  virtual void tile(const float* c, int64_t ldc, const float* low, int64_t ldl, int m, int n, int width, int64_t i0,
                    int64_t j0, const void* panel) const = 0;

 protected:
  ~Epilogue() = default;
};

// N columns: y (M, N) = Σ left · right + Σ low-rank terms
struct Columns {
  int64_t N;
  std::vector<Right> rights;  // one for each left operand
  std::vector<LowRank> low;
  Target y;
  const Epilogue* last = nullptr;
};

// columns that share their left operands: each block of those is packed once for all
struct Product {
  std::vector<Left> lefts;
  std::vector<Columns> columns;
};

// `before`: a skinny product whose results are read by the other's low-rank terms; a block of its rows is computed just
// ahead of that block of `main`, while their common left operand is in the caches. Null = none
void gemm(const Engine&, int64_t M, const Product& main, const Product* before = nullptr);

// m rows: y (m, N) = a (m, M) · b (M, N), b seen through `mask` where that has one
struct Tall {
  Source a;
  int64_t m;
  Target y;
  Source mask{};
};

// products with one right operand: b is read once for all
struct Tokens {
  Source b;
  int64_t N;
  std::vector<Tall> talls;
};

// m small and M long (tokens): one pass over each b, deterministic for any thread count
void gemm_tokens(const Engine&, int64_t M, const std::vector<Tokens>& all);

// all panels of b (K, N), as gemm reads them
int64_t packed_bytes(const Engine&, int64_t K, int64_t N);
void pack(const Engine&, int64_t K, int64_t N, const Source& b, void* out);

}  // namespace peft_fast
