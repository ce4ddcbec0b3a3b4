#include "cpu/lora_embedding.h"

#include <algorithm>
#include <cstring>

#include "cpu/gemm.h"
#include "cpu/scratch.h"

namespace peft_fast {
namespace {

std::vector<int64_t> tokens(const Tensor& ids, int64_t V) {
  const bool wide = ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(ids.dim() == 1 && (wide || ids.scalar_type() == ScalarType::Int),
                  "given: ids that are no vector of integers\nneeded: int32 or int64 (M,)\n"
                  "do: call peft_fast.ops.lora_embedding");
  std::vector<int64_t> all(ids.size(0));
  for (size_t m = 0; m < all.size(); ++m) {
    const int64_t at = int64_t(m) * ids.stride(0);
    all[m] = wide ? ((const int64_t*)ids.const_data_ptr())[at] : ((const int32_t*)ids.const_data_ptr())[at];
    STD_TORCH_CHECK(all[m] >= 0 && all[m] < V, "index out of range: token ", all[m], " of a vocabulary of ", V);
  }
  return all;
}

struct Scales {
  float base = 1, adapter = 1;
  Scales(const std::optional<Tensor>& scale, double scaling) {
    if (scale) {
      STD_TORCH_CHECK(scale->numel() == 2 && scale->scalar_type() == ScalarType::Float && scale->is_contiguous(),
                      "given: another scale\nneeded: float32 (2,)\ndo: call peft_fast.ops.lora_embedding");
      const auto* two = (const float*)scale->const_data_ptr();
      base = two[0], adapter = two[1];
    }
    adapter *= float(scaling);
  }
};

// tokens in the order of their id, and where each id's begin
struct Segments {
  std::vector<uint64_t> order;  // id << 32 | token
  std::vector<size_t> begin;

  Segments(const std::vector<int64_t>& ids, int64_t padding) {
    for (size_t m = 0; m < ids.size(); ++m)
      if (ids[m] != padding) order.push_back(uint64_t(ids[m]) << 32 | m);
    std::sort(order.begin(), order.end());
    for (size_t i = 0; i < order.size(); ++i)
      if (i == 0 || order[i] >> 32 != order[i - 1] >> 32) begin.push_back(i);
    begin.push_back(order.size());
  }
};

// da (r, V) at each id: the sum of the rows of d (M, r) with this id, in the order of the tokens; elsewhere zero
void scatter(const Engine& e, const Segments& s, const float* d, const Tensor& da) {
  const int64_t r = da.size(0), V = da.size(1), size = is_bf16(da) ? 2 : 4;
  char* to = (char*)da.mutable_data_ptr();
  torch::stable::parallel_for(0, r, 1, [&](int64_t j0, int64_t j1) {
    std::memset(to + j0 * V * size, 0, (j1 - j0) * V * size);
  });
  torch::stable::parallel_for(0, int64_t(s.begin.size()) - 1, 64, [&](int64_t s0, int64_t s1) {
    std::vector<float> sum(r);
    for (int64_t i = s0; i < s1; ++i) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (size_t m = s.begin[i]; m < s.begin[i + 1]; ++m) {
        const float* row = d + int64_t(s.order[m] & 0xFFFFFFFFu) * r;
        for (int64_t j = 0; j < r; ++j) sum[j] += row[j];
      }
      const Target column{to + int64_t(s.order[s.begin[i]] >> 32) * size, is_bf16(da), 0, V};
      for (int64_t j = 0; j < r; j += e.nr)
        e.finish(sum.data() + j, e.nr, 1, int(std::min<int64_t>(e.nr, r - j)), 0, j, column);
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> lora_embedding(const Tensor& ids_, const Tensor& w, const Tensor& a, const Tensor& b,
                                          const std::optional<Tensor>& scale, double scaling) {
  const Engine& e = engine(false);  // adapters keep the float32 arithmetic that PEFT's have here
  check_float(w, "W");
  check_float(a, "A");
  check_float(b, "B");
  STD_TORCH_CHECK(w.dim() == 2 && a.dim() == 2 && b.dim() == 2 && a.size(1) == w.size(0) && b.size(0) == w.size(1) &&
                      b.size(1) == a.size(0),
                  "given: shapes that do not fit\nneeded: W (V, D), A (r, V), B (D, r)\n"
                  "do: call peft_fast.ops.lora_embedding, which names the one that is wrong");
  const std::vector<int64_t> ids = tokens(ids_, w.size(0));
  const Tensor w_rows = w.stride(1) == 1 || w.size(1) <= 1 ? w : torch::stable::contiguous(w);
  const Source gathered = turned(rows_of(a));
  const Scales scales(scale, scaling);
  const int64_t M = int64_t(ids.size()), D = w.size(1), r = a.size(0), size = is_bf16(w) ? 2 : 4;
  Tensor y = empty_like(w, {M, D}), h = empty_like(w, {M, r}, ScalarType::Float);
  Scratch panels(packed_bytes(e, r, D));
  pack(e, r, D, turned(rows_of(b)), panels.data());
  constexpr int64_t GROUP = 16;  // panels whose columns, and whose part of bᵀ, stay in the first-level cache
  const int64_t width = GROUP * e.nr, low_row = padded_row(e, r), block = 4 * e.mr;
  const char* w_data = (const char*)w_rows.const_data_ptr();
  char* y_data = (char*)y.mutable_data_ptr();
  float* h_data = (float*)h.mutable_data_ptr();
  torch::stable::parallel_for(0, ceil_div(M, block), 1, [&](int64_t b0, int64_t b1) {
    Scratch own((block * low_row + e.mr * width) * 4);
    float* low = (float*)own.data();
    float* c = low + block * low_row;
    const Session session(e);
    for (int64_t m0 = b0 * block; m0 < std::min(M, b1 * block); m0 += block) {
      const int64_t m1 = std::min(M, m0 + block);
      for (int64_t m = m0; m < m1; ++m) e.rows(gathered, ids[m], 1, 0, r, h_data + m * r, r);
      e.rows({h_data, false, r, 1}, m0, m1 - m0, 0, r, low, low_row);
      for (int64_t j0 = 0; j0 < D; j0 += width) {
        const int64_t n = std::min(width, D - j0);
        for (int64_t i = m0; i < m1; i += e.mr) {
          const int mi = int(std::min<int64_t>(e.mr, m1 - i));
          for (int64_t j = 0; j < n; j += e.nr) {
            const Segment all{e.padded(r), low + (i - m0) * low_row, low_row,
                              panels.data() + (j0 + j) * e.padded(r) * e.element()};
            e.tile(&all, 1, c + j, width, mi, e.width(std::min<int64_t>(e.nr, n - j)), false);
          }
          for (int64_t m = i; m < i + mi; ++m)
            e.add_row(w_data + (ids[m] * w_rows.stride(0) + j0) * size, is_bf16(w), scales.base, c + (m - i) * width,
                      scales.adapter, n, y_data + (m * D + j0) * size);
        }
      }
    }
  });
  return {y, h};
}

std::tuple<Tensor, Tensor> lora_embedding_backward(const Tensor& g_, const Tensor& ids_, const Tensor& a,
                                                   const Tensor& b, const Tensor& h,
                                                   const std::optional<Tensor>& scale, double scaling,
                                                   int64_t padding, const std::vector<bool>& needs) {
  const Engine& e = engine(false);
  const Matrix g = matrix(g_, "the output's gradient");
  check_float(a, "A");
  check_float(b, "B");
  const int64_t M = g.rows, D = g.cols, r = a.size(0), V = a.size(1);
  const std::vector<int64_t> ids = tokens(ids_, V);
  STD_TORCH_CHECK(needs.size() == 2 && int64_t(ids.size()) == M && b.size(0) == D && b.size(1) == r && h.dim() == 2 &&
                      h.size(0) == M && h.size(1) == r && h.scalar_type() == ScalarType::Float,
                  "given: tensors that do not fit the forward\nneeded: g (M, D) of y, and the forward's own ids, A, B "
                  "and H\ndo: call peft_fast.ops.lora_embedding and let autograd run the backward");
  const Scales scales(scale, scaling);
  Tensor da = empty_like(a, {needs[0] ? r : 0, V}), db = empty_like(b, {needs[1] ? D : 0, r});
  if (needs[0]) {
    Tensor d = empty_like(a, {M, r}, ScalarType::Float);
    Target out = target(d, r, 1);
    out.scale = scales.adapter;
    gemm(e, M, {{{g.source, D}}, {{r, {{rows_of(b)}}, {}, out}}});
    scatter(e, Segments(ids, padding), (const float*)d.const_data_ptr(), da);
  }
  if (needs[1]) {
    // dBᵀ = s·Hᵀ·G
    Target out = target(db, 1, r);
    out.scale = scales.adapter;
    gemm_tokens(e, M, {{g.source, D, {{turned(rows_of(h)), r, out}}}});
  }
  return {da, db};
}

}  // namespace peft_fast
