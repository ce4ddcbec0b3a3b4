#include "cpu/lora_experts.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "cpu/gemm.h"
#include "cpu/scratch.h"

namespace peft_fast {
namespace {

// one expert's matrix of a stack (E, rows, cols), in any strides
Source of(const Tensor& t, int64_t e) {
  return {(const char*)t.const_data_ptr() + e * t.stride(0) * (is_bf16(t) ? 2 : 4), is_bf16(t), t.stride(1), t.stride(2)};
}

// what both passes know: whose rows are whose, and the sizes
struct Experts {
  const Engine& engine;
  Matrix x;
  const int64_t* order;
  std::vector<int64_t> begins{0};
  std::vector<float> scaling;  // of each column of H
  int64_t S, k, E, K, N, R;
  bool transposed;

  Experts(const Tensor& x_, const Tensor& w, const Tensor& a, const Tensor& b, const Tensor& order_,
          const Tensor& counts, int64_t k_, const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
          bool transposed_)
      : engine(peft_fast::engine(is_bf16(x_))), x(matrix(x_, "x")), order((const int64_t*)order_.const_data_ptr()),
        S(order_.numel()), k(k_), E(counts.numel()), K(x.cols), transposed(transposed_) {
    check_float(w, "W");
    check_float(a, "A");
    check_float(b, "B");
    STD_TORCH_CHECK(w.dim() == 3 && a.dim() == 3 && b.dim() == 3 && x_.dim() == 2 && ranks.size() == scalings.size() &&
                        is_bf16(w) == is_bf16(x_),
                    "given: stacks of other dimensions or dtypes\nneeded: W, A and B of (E, ., .), W in x's dtype\n"
                    "do: call peft_fast.ops.lora_experts, which names the one that is wrong");
    N = w.size(transposed ? 2 : 1);
    R = a.size(1);
    for (size_t i = 0; i < ranks.size(); ++i) scaling.resize(scaling.size() + ranks[i], float(scalings[i]));
    STD_TORCH_CHECK(order_.is_contiguous() && counts.is_contiguous() && order_.scalar_type() == ScalarType::Long &&
                        counts.scalar_type() == ScalarType::Long && w.size(0) == E && a.size(0) == E &&
                        b.size(0) == E && w.size(transposed ? 1 : 2) == K && a.size(2) == K && b.size(1) == N &&
                        b.size(2) == R && int64_t(scaling.size()) == R,
                    "given: shapes that do not fit\nneeded: x (., K), W (E, N, K), A (E, R, K), B (E, N, R)\n"
                    "do: call peft_fast.ops.lora_experts, which names the one that is wrong");
    const auto* n = (const int64_t*)counts.const_data_ptr();
    bool fits = x.rows == S || k > 0;
    for (int64_t e = 0; e < E; ++e) fits = fits && n[e] >= 0, begins.push_back(begins.back() + n[e]);
    for (int64_t s = 0; s < S && k > 0; ++s) fits = fits && order[s] >= 0 && order[s] / k < x.rows;
    STD_TORCH_CHECK(fits && begins.back() == S,
                    "given: a routing of other rows\nneeded: counts that sum to the rows, each a row of x\n"
                    "do: pass route_experts(...) of these tokens");
  }

  Source weight_of(const Tensor& w, int64_t e) const { return transposed ? turned(of(w, e)) : of(w, e); }  // (N, K)

  // f(expert, first row, rows) for each that has rows: an expert a task where there are enough of them
  template <class F>
  void each(const F& f) const {
    std::vector<int64_t> busy;
    int64_t most = 0;
    for (int64_t e = 0; e < E; ++e)
      if (rows(e) > 0) busy.push_back(e), most = std::max(most, rows(e));
    // the longest first, so that no thread begins with one when all others are done
    std::stable_sort(busy.begin(), busy.end(), [&](int64_t l, int64_t r) { return rows(l) > rows(r); });
    auto run = [&](int64_t e) { f(e, begins[e], rows(e)); };
    const int64_t threads = torch::stable::get_num_threads();
    if (int64_t(busy.size()) < threads || most * threads > 2 * S) {
      for (int64_t e : busy) run(e);
      return;
    }
    std::atomic<size_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (size_t i; (i = next++) < busy.size();) run(busy[i]);
    });
  }
  int64_t rows(int64_t e) const { return begins[e + 1] - begins[e]; }
  int64_t gathered_bytes(int64_t m) const { return k > 0 ? m * K * (x.source.bf16 ? 2 : 4) + 64 : 64; }

  // rows [s0, s0 + m) of x as the experts read them
  Source gather(int64_t s0, int64_t m, char* out) const {
    if (k == 0) return from_row(x.source, s0);
    const int64_t size = x.source.bf16 ? 2 : 4;
    const auto* from = (const char*)x.source.data;
    for (int64_t i = 0; i < m; ++i)
      std::memcpy(out + i * K * size, from + order[s0 + i] / k * x.source.row * size, K * size);
    return {out, x.source.bf16, K, 1};
  }

  // out (m, R) = s · left · right
  Product shrink(const Source& left, int64_t depth, const Source& right, float* out) const {
    Columns c{R, {{right}}, {}, {out, false, R, 1}};
    c.y.column_scale = scaling.data();
    return {{{left, depth}}, {c}};
  }
};

// expert e's part of a stack that is to be filled, as a target
Target part(const Tensor& t, int64_t e, int64_t row, int64_t col) {
  Target to = target(t, row, col);
  to.data = (char*)to.data + e * t.size(1) * t.size(2) * (to.bf16 ? 2 : 4);
  return to;
}

void clear(const Tensor& t, int64_t e, int64_t count) {
  const int64_t size = is_bf16(t) ? 2 : 4;
  std::memset((char*)t.mutable_data_ptr() + e * count * size, 0, count * size);
}

}  // namespace

std::tuple<Tensor, Tensor> lora_experts(const Tensor& x_, const Tensor& w, const std::optional<Tensor>& bias,
                                        const Tensor& a, const Tensor& b, const Tensor& order, const Tensor& counts,
                                        int64_t k, const std::vector<int64_t>& ranks,
                                        const std::vector<double>& scalings, bool transposed) {
  const Experts x(x_, w, a, b, order, counts, k, ranks, scalings, transposed);
  const int64_t K = x.K, N = x.N, R = x.R;
  Tensor y = empty_like(x_, {x.S, N}), h = empty_like(x_, {x.S, R}, ScalarType::Float);
  std::vector<float> wide;
  if (bias) {
    check_float(*bias, "bias");
    STD_TORCH_CHECK(bias->numel() == x.E * N, "given: biases of another size\nneeded: (E, N)\ndo: pass the stack's own");
    const Tensor dense = torch::stable::contiguous(*bias);
    wide.resize(x.E * N);
    engine(false).rows({dense.const_data_ptr(), is_bf16(dense), x.E * N, 1}, 0, 1, 0, x.E * N, wide.data(), x.E * N);
  }
  auto* const h_data = (float*)h.mutable_data_ptr();
  auto* const y_data = (char*)y.mutable_data_ptr();
  const int64_t size = is_bf16(y) ? 2 : 4;
  x.each([&](int64_t e, int64_t s0, int64_t m) {
    Scratch own(x.gathered_bytes(m));
    const Source rows = x.gather(s0, m, own.data());
    float* const low = h_data + s0 * R;
    Columns c{N, {{turned(x.weight_of(w, e))}}, {{{low, false, R, 1}, turned(of(b, e)), R}},
              {y_data + s0 * N * size, is_bf16(y), N, 1}};
    if (bias) c.y.bias = wide.data() + e * N;
    const Product skinny = x.shrink(rows, K, turned(of(a, e)), low);
    gemm(x.engine, m, {{{rows, K}}, {c}}, &skinny);
  });
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_experts_backward(
    const Tensor& g_, const Tensor& x_, const Tensor& w, const Tensor& a, const Tensor& b, const Tensor& h,
    const Tensor& order, const Tensor& counts, int64_t k, const std::vector<int64_t>& ranks,
    const std::vector<double>& scalings, bool transposed, const std::vector<bool>& needs) {
  STD_TORCH_CHECK(needs.size() == 4, "given: needs of another length\nneeded: x, A, B, bias\n"
                                     "do: call peft_fast.ops.lora_experts and let autograd run the backward");
  const Experts x(x_, w, a, b, order, counts, k, ranks, scalings, transposed);
  const Matrix g = matrix(g_, "the output's gradient");
  const int64_t K = x.K, N = x.N, R = x.R;
  STD_TORCH_CHECK(g.rows == x.S && g.cols == N && g.source.bf16 == x.x.source.bf16 && h.is_contiguous() &&
                      h.numel() == x.S * R && h.scalar_type() == ScalarType::Float,
                  "given: a gradient or an H that does not fit the forward\nneeded: g (S, N) in x's dtype, H (S, R)\n"
                  "do: call peft_fast.ops.lora_experts and let autograd run the backward");
  auto sized = [&](bool need, std::vector<int64_t> size) { return need ? size : std::vector<int64_t>{0}; };
  Tensor dx = empty_like(x_, sized(needs[0], {x.S, K}));
  Tensor da = empty_like(a, sized(needs[1], {x.E, R, K})), db = empty_like(b, sized(needs[2], {x.E, N, R}));
  Tensor dbias = empty_like(x_, sized(needs[3], {x.E, N}), ScalarType::Float);
  for (int64_t e = 0; e < x.E; ++e) {
    if (x.rows(e) > 0) continue;
    if (needs[1]) clear(da, e, R * K);
    if (needs[2]) clear(db, e, N * R);
    if (needs[3]) clear(dbias, e, N);
  }
  const float one = 1.0f;
  x.each([&](int64_t e, int64_t s0, int64_t m) {
    const int64_t d_bytes = round_up(m * R * 4, 64);
    Scratch own(d_bytes + x.gathered_bytes(m));
    auto* const d = (float*)own.data();
    const Source ge = from_row(g.source, s0), low{d, false, R, 1};
    const Product skinny = x.shrink(ge, N, of(b, e), d);
    if (needs[0]) {
      Target to = target(dx, K, 1);
      to.data = (char*)to.data + s0 * K * (to.bf16 ? 2 : 4);
      gemm(x.engine, m, {{{ge, N}}, {{K, {{x.weight_of(w, e)}}, {{low, of(a, e), R}}, to}}}, &skinny);
    } else if (needs[1]) {
      gemm(x.engine, m, skinny);
    }
    std::vector<Tokens> tokens{{ge, N, {}}};
    const Source he{(const float*)h.const_data_ptr() + s0 * R, false, R, 1};
    if (needs[2]) tokens[0].talls.push_back({turned(he), R, part(db, e, 1, R)});
    if (needs[3]) {
      Target to = target(dbias, N, 1);
      to.data = (float*)to.data + e * N;
      tokens[0].talls.push_back({{&one, false, 0, 0}, 1, to});
    }
    if (needs[1]) tokens.push_back({x.gather(s0, m, own.data() + d_bytes), K, {{turned(low), R, part(da, e, K, 1)}}});
    gemm_tokens(x.engine, m, tokens);
  });
  return {dx, da, db, dbias};
}

}  // namespace peft_fast
