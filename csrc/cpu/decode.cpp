#include "cpu/decode.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "cpu/few_tokens.h"

namespace peft_fast {
namespace {

void check_fits(bool fits) {
  STD_TORCH_CHECK(fits, "given: shapes that do not fit\nneeded: x (..., K), W (N, K), A (r, K), B (N, r), biases (N,)\n"
                        "do: call peft_fast.ops.lora_decode, which names the one that is wrong");
}

// a matrix (rows, k), a copy kept if its k are no neighbours
FewTokens::Rows rows(const Tensor& t, const char* name, int64_t rows, int64_t k, std::vector<Tensor>& kept) {
  check_float(t, name);
  check_fits(t.dim() == 2 && t.size(0) == rows && t.size(1) == k);
  kept.push_back(k <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t));
  return {kept.back().const_data_ptr(), is_bf16(t), kept.back().stride(0)};
}

FewTokens::Line line(const std::optional<Tensor>& t, const char* name, int64_t N) {
  if (!t) return {};
  check_float(*t, name);
  check_fits(t->dim() == 1 && t->size(0) == N);
  return {t->const_data_ptr(), is_bf16(*t), t->stride(0)};
}

// f of each element's bits, the sign shifted out, until one is false
template <class F>
bool every(const Source& s, int64_t rows, int64_t cols, const F& f) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t at = i * s.row + j * s.col;
      const uint32_t bits = s.bf16 ? uint32_t(((const uint16_t*)s.data)[at]) << 16 : ((const uint32_t*)s.data)[at];
      if (!f(bits << 1)) return false;
    }
  return true;
}

// a weight whose neighbours along k or n lie together: a copy if they do not
Tensor readable(const Tensor& w, bool transposed) {
  const Source given = weight(w, transposed, false);
  return w.size(0) <= 1 || w.size(1) <= 1 || given.row == 1 || given.col == 1 ? w : torch::stable::contiguous(w);
}

bool zero(const Tensor& t) {
  check_float(t, "B");
  check_fits(t.dim() == 2);
  return every(rows_of(t), t.size(0), t.size(1), [](uint32_t bits) { return bits == 0; });
}

bool finite(const Source& s, int64_t rows, int64_t cols) {
  return every(s, rows, cols, [](uint32_t bits) { return bits < 0xff000000u; });
}

bool finite(const Tensor& t) {
  check_float(t, "A");
  check_fits(t.dim() == 2);
  return finite(rows_of(t), t.size(0), t.size(1));
}

// the product that torch's own layer makes
Tensor base_alone(const Tensor& x, int64_t M, const Tensor& w, const std::optional<Tensor>& bias, bool transposed) {
  // Conv1D makes a matrix of x, and multiplies it with w
  const bool flat = transposed && x.dim() != 2;
  const Tensor left = flat ? torch::stable::reshape(x, {M, x.size(x.dim() - 1)}) : x;
  const Tensor right = transposed ? torch::stable::transpose(w, 0, 1) : w;
  std::array<StableIValue, 3> stack{torch::stable::detail::from(left), torch::stable::detail::from(right),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor y = torch::stable::detail::to<Tensor>(stack[0]);
  return flat ? torch::stable::reshape(y, with_last(x, right.size(0))) : y;
}

}  // namespace

bool all_zero(const std::vector<Tensor>& ts) { return std::all_of(ts.begin(), ts.end(), zero); }

Tensor lora_decode(const Tensor& x_, const Tensor& w, const std::optional<Tensor>& bias, const std::vector<Tensor>& as,
                   const std::vector<Tensor>& bs, const std::vector<std::optional<Tensor>>& low_biases,
                   const std::vector<double>& scalings, bool transposed, const std::vector<int64_t>& order,
                   const std::vector<int64_t>& counts) {
  const Matrix x = matrix(x_, "x");
  check_float(w, "W");
  const int64_t M = x.rows, K = x.cols;
  const size_t n_low = as.size();
  check_fits(w.dim() == 2 && w.size(transposed ? 0 : 1) == K && bs.size() == n_low && low_biases.size() == n_low &&
             scalings.size() == n_low && (order.empty() || (counts.size() == n_low && x_.dim() >= 2)));
  const int64_t N = w.size(transposed ? 1 : 0);
  // adapters that were not trained add nothing: who compares such a layer with its base asks for closer than sums in
  // another order are, and gets the base's bits
  bool fresh = order.empty() && is_bf16(w) == is_bf16(x_) && (!bias || is_bf16(*bias) == is_bf16(x_));
  for (size_t i = 0; i < n_low && fresh; ++i)
    fresh = zero(bs[i]) && !low_biases[i] && std::isfinite(scalings[i]) && finite(as[i]);
  if (fresh && finite(x.source, M, K)) return base_alone(x_, M, w, bias, transposed);
  Tensor y = empty_like(x_, with_last(x_, N));
  if (M == 0 || N == 0) return y;

  const Tensor dense = readable(w, transposed);
  const Source base = weight(dense, transposed, false);
  std::vector<bool> seen(order.size());
  for (int64_t row : order) {
    check_fits(row >= 0 && row < x_.size(0) && int64_t(order.size()) == x_.size(0) && !seen[row]);
    seen[row] = true;
  }
  std::vector<Tensor> kept;
  std::vector<FewTokens::Low> lows;
  int64_t left = M;
  for (size_t i = 0; i < n_low; ++i) {
    check_fits(as[i].dim() == 2);
    const int64_t r = as[i].size(0), tokens = order.empty() ? 0 : counts[i] * (M / int64_t(order.size()));
    check_fits(tokens >= 0 && (left -= tokens) >= 0);
    lows.push_back({rows(as[i], "A", r, K, kept), rows(bs[i], "B", N, r, kept), line(low_biases[i], "bias of B", N), r,
                    scalings[i], tokens});
  }
  few_tokens({M, K, N, {x.source.data, x.source.bf16, x.source.row}, base.data, base.bf16, base.row, base.col,
              line(bias, "bias", N), lows.data(), int64_t(lows.size()), y.mutable_data_ptr(),
              order.empty() ? nullptr : order.data(), int64_t(order.size())});
  return y;
}

std::tuple<Tensor, Tensor> dora_decode(const Tensor& x_, const Tensor& w, const std::optional<Tensor>& bias,
                                       const Tensor& a, const Tensor& b, double scaling, const Tensor& m,
                                       const Tensor& norm_, const std::optional<Tensor>& probe_, bool transposed) {
  const Matrix x = matrix(x_, "x");
  check_float(w, "W");
  const int64_t M = x.rows, K = x.cols;
  check_fits(w.dim() == 2 && w.size(transposed ? 0 : 1) == K && a.dim() == 2);
  const int64_t N = w.size(transposed ? 1 : 0), r = a.size(0);
  const auto floats = [](const Tensor& t, int64_t n) {
    check_fits(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.size(0) == n);
    return torch::stable::contiguous(t);
  };
  const Tensor norm = floats(norm_, N), probe = probe_ ? floats(*probe_, K) : norm;
  Tensor y = empty_like(x_, with_last(x_, N)), check = empty_like(w, {probe_ ? N : 0}, ScalarType::Float);
  if (N == 0 || (M == 0 && !probe_)) return {y, check};
  const Tensor dense = readable(w, transposed);
  const Source base = weight(dense, transposed, false);
  std::vector<Tensor> kept;
  const FewTokens::Low low{rows(a, "A", r, K, kept), rows(b, "B", N, r, kept), {}, r, scaling, 0};
  FewTokens few{M, K, N, {x.source.data, x.source.bf16, x.source.row}, base.data, base.bf16, base.row, base.col,
                line(bias, "bias", N), &low, 1, y.mutable_data_ptr(), nullptr, 0};
  few.norm = (const float*)norm.const_data_ptr(), few.m = line(m, "m", N);
  if (probe_) few.probe = (const float*)probe.const_data_ptr(), few.check = (float*)check.mutable_data_ptr();
  few_tokens(few);
  return {y, check};
}

}  // namespace peft_fast
