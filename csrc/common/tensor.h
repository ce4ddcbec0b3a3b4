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

// a weight in any two strides, no copy; transposed swaps what is a row
inline Source weight(const Tensor& t, bool transposed) {
  return transposed ? Source{t.const_data_ptr(), is_bf16(t), t.stride(1), t.stride(0)}
                    : Source{t.const_data_ptr(), is_bf16(t), t.stride(0), t.stride(1)};
}

inline Source turned(Source s) {
  std::swap(s.row, s.col);
  return s;
}

}  // namespace peft_fast
