// What the operators need to know of a stable-ABI tensor.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "cpu/engine.h"

namespace peft_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_bf16(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }

inline void check_float(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(
      is_bf16(t) || t.scalar_type() == ScalarType::Float, "given: ", name,
      " of another dtype\nneeded: float32 or bfloat16\ndo: call peft_fast.ops.lora_linear, which picks a backend");
}

// rows × last dimension as one matrix; copies only where the leading dimensions do not collapse into one stride
struct Matrix {
  Tensor tensor;  // keeps the memory alive
  Source source;
  int64_t rows, cols;
};

inline Matrix matrix(const Tensor& t, const char* name) {
  check_float(t, name);
  const int64_t dim = t.dim();
  STD_TORCH_CHECK(dim >= 1, "given: ", name, " without dimensions\nneeded: at least one\ndo: reshape it");
  const int64_t cols = t.size(dim - 1);
  int64_t rows = 1, row = cols;
  bool collapses = cols <= 1 || t.stride(dim - 1) == 1;
  for (int64_t i = dim - 2; i >= 0; --i) {
    if (t.size(i) == 1) continue;  // its stride means nothing
    if (rows == 1) row = t.stride(i);
    else collapses = collapses && t.stride(i) == rows * row;
    rows *= t.size(i);
  }
  Tensor kept = collapses ? t : torch::stable::contiguous(t);
  return {kept, {kept.const_data_ptr(), is_bf16(t), collapses ? row : cols, 1}, rows, cols};
}

// a base weight in any two strides, no copy; transposed swaps what is a row; half: for bfloat16 arithmetic
inline Source weight(const Tensor& t, bool transposed, bool half) {
  check_float(t, "W");
  Source s = transposed ? Source{t.const_data_ptr(), is_bf16(t), t.stride(1), t.stride(0)}
                        : Source{t.const_data_ptr(), is_bf16(t), t.stride(0), t.stride(1)};
  s.round = half && !s.bf16;  // a float32 weight under autocast is a rounded one
  return s;
}

inline Source turned(Source s) {
  std::swap(s.row, s.col);
  return s;
}

// a small matrix as it lies in memory, and what of it begins at a row or column
inline Source rows_of(const Tensor& t) { return {t.const_data_ptr(), is_bf16(t), t.stride(0), t.stride(1)}; }

inline Source from_row(Source s, int64_t r0) {
  s.data = (const char*)s.data + r0 * s.row * (s.bf16 ? 2 : 4);
  return s;
}

inline Source from_col(Source s, int64_t c0) { return turned(from_row(turned(s), c0)); }

// a fresh result; element (i, j) at i * row + j * col
inline Target target(const Tensor& t, int64_t row, int64_t col) {
  return {t.mutable_data_ptr(), is_bf16(t), row, col};
}

inline Tensor empty_like(const Tensor& like, const std::vector<int64_t>& size, std::optional<ScalarType> dtype = {}) {
  return torch::stable::new_empty(like, size, dtype);
}

inline std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> size(t.sizes().begin(), t.sizes().end());
  size.back() = last;
  return size;
}

}  // namespace peft_fast
