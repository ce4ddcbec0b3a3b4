#include "cpu/dora_linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/dropout.h"
#include "cpu/gemm.h"
#include "cpu/lora_group.h"
#include "cpu/scratch.h"

namespace peft_fast {
namespace {

// dropped, up to which its rows of W cost less than the product of all: by vectors, and where tiles multiply
constexpr double MOST_LISTED = 0.15, TILES_LISTED = 0.01;

// what dropout takes from x (M, K): of row m, entries [begin[m], begin[m + 1]), in the order of their columns
struct Dropped {
  std::vector<int64_t> begin;
  std::vector<int32_t> at;
  std::vector<char> x;  // in the engine's elements

  Dropped(const Engine& e, const MaskBits& bits, const Source& from, int64_t M, int64_t K, bool values) : begin(M + 1) {
    const Source mask = bits.over({});
    // f(column) of what is gone from row m
    auto each = [&](int64_t m, auto f) {
      const uint8_t* row = mask.mask + m * mask.mask_row;
      for (int64_t k = 0; k < K; k += 64) {
        uint64_t gone = 0;
        std::memcpy(&gone, row + k / 8, 8);  // rows of a mask are whole groups of 16 bytes
        gone = ~gone;
        if (K - k < 64) gone &= (uint64_t(1) << (K - k)) - 1;
        for (; gone; gone &= gone - 1) f(k + __builtin_ctzll(gone));
      }
    };
    torch::stable::parallel_for(0, M, 64, [&](int64_t m0, int64_t m1) {
      for (int64_t m = m0; m < m1; ++m) each(m, [&](int64_t) { ++begin[m + 1]; });
    });
    for (int64_t m = 0; m < M; ++m) begin[m + 1] += begin[m];
    const int64_t size = e.element();
    at.resize(begin[M]);
    if (values) x.resize(begin[M] * size);
    torch::stable::parallel_for(0, M, 64, [&](int64_t m0, int64_t m1) {
      std::vector<char> line(values ? e.padded(K) * size : 0);
      for (int64_t m = m0; m < m1; ++m) {
        int64_t i = begin[m];
        each(m, [&](int64_t k) { at[i++] = int32_t(k); });
        if (!values) continue;
        e.rows(from, m, 1, 0, K, line.data(), e.padded(K));
        for (i = begin[m]; i < begin[m + 1]; ++i) std::memcpy(x.data() + i * size, line.data() + at[i] * size, size);
      }
    });
  }
};

struct Call {
  const Engine& e;
  const Engine& wide;  // whose panels are float32
  bool bf16;           // is x
  int64_t M, K, N, r;
  Source w;  // (N, K)
  float scaling, keep_scale;
  double p;
  MaskBits mask;

  Call(bool half, int64_t tokens, const Tensor& w_, const Tensor& a, const Tensor& b, const Tensor& c,
       const std::optional<Tensor>& seed, double s, double p_, bool transposed)
      : e(engine(half)), wide(engine(false)), bf16(half), M(tokens), K(w_.size(transposed ? 0 : 1)),
        N(w_.size(transposed ? 1 : 0)), r(a.size(0)), w(weight(w_, transposed, bf16)), scaling(float(s)),
        keep_scale(p_ < 1 ? float(1 / (1 - p_)) : 0.0f), p(p_) {
    check_float(a, "A");
    check_float(b, "B");
    STD_TORCH_CHECK(a.size(1) == K && b.size(0) == N && b.size(1) == r && c.numel() == N && c.is_contiguous() &&
                        c.scalar_type() == ScalarType::Float && p >= 0 && p <= 1,
                    "given: shapes that do not fit\nneeded: W (N, K), A (r, K), B (N, r), c (N,) float32, p <= 1\n"
                    "do: call peft_fast.ops.dora_linear, which names the one that is wrong");
    if (p == 0) return;
    STD_TORCH_CHECK(seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                    "given: dropout without a seed\nneeded: int64 (1,)\ndo: draw_seed(1)");
    mask = MaskBits(e, uint64_t(*(const int64_t*)seed->const_data_ptr()), M, K, p);
  }

  bool drops() const { return bool(mask); }
  bool lists() const { return p <= (e.enter ? TILES_LISTED : MOST_LISTED); }
  int64_t panels() const { return ceil_div(N, wide.nr); }

  // rows [k0, k0 + k) of Wᵀ, columns of panel p: lines of bfloat16, `ld` apart, or a float32 panel
  void panel(int64_t p, int64_t k0, int64_t k, char* out, int64_t ld) const {
    const int64_t j = p * wide.nr, n = std::min<int64_t>(wide.nr, N - j);
    if (bf16) wide.columns->lines(turned(w), k0, k, j, n, (uint16_t*)out, ld);
    else wide.panel(turned(w), k0, k, j, n, wide.nr, out);
  }
};

Target to(const Tensor& t, int64_t row, int64_t col, float scale) {
  Target out = target(t, row, col);
  out.scale = scale;
  return out;
}

// h (M, r) = s·drop(x)·Aᵀ, x seen through its mask
Product shrink(const Call& call, const Source& seen, const Tensor& a, const Tensor& h) {
  const float scale = call.scaling * (call.drops() ? call.keep_scale : 1.0f);
  return {{{seen, call.K}}, {{call.r, {{turned(rows_of(a))}}, {}, to(h, call.r, 1, scale)}}};
}

// y = u + bias + (c−1)∘q + c∘low and z = q + low, with u = x·Wᵀ, q = dropped x·Wᵀ, low = h·Bᵀ
struct Mix {
  const Call& call;
  const float *c, *bias;
  char *y, *z;  // z null = not wanted
  bool y_bf16, z_bf16;

  // row i from column j on; q times 1−p
  void row(int64_t i, int64_t j, const float* u, const float* q, const float* low, int n) const {
    const int64_t at = i * call.N + j;
    call.e.columns->mix(u, q, low, call.keep_scale, c + j, bias ? bias + j : nullptr, n, y_bf16,
                        y + at * (y_bf16 ? 2 : 4), z_bf16, z ? z + at * (z_bf16 ? 2 : 4) : nullptr);
  }
};

// of tiles u: q is u without the product of what dropout took away, a few rows of a panel a token
class Listed final : public Epilogue {
 public:
  Listed(const Mix& mix, const Source& x)
      : mix_(mix), gone_(mix.call.e, mix.call.mask, x, mix.call.M, mix.call.K, true) {}

  void tile(const float* u, int64_t ldu, const float* low, int64_t ldl, int m, int n, int width, int64_t i0, int64_t j0,
            const void* panel) const override {
    const Engine& e = mix_.call.e;
    for (int i = 0; i < m; ++i, u += ldu, low += ldl) {
      alignas(64) float left[64];
      std::memcpy(left, u, width * sizeof(float));
      const int64_t first = gone_.begin[i0 + i];
      e.columns->spread(panel, e.kpad, width, gone_.at.data() + first, gone_.x.data() + first * e.element(),
                        gone_.begin[i0 + i + 1] - first, left);
      mix_.row(i0 + i, j0, u, left, low, n);
    }
  }

 private:
  const Mix& mix_;
  const Dropped gone_;
};

// of tiles q of the tokens from m0 on; u (tokens, N) is there already
class Twice final : public Epilogue {
 public:
  Twice(const Mix& mix, const float* u, int64_t m0) : mix_(mix), u_(u), m0_(m0) {}

  void tile(const float* q, int64_t ldq, const float* low, int64_t ldl, int m, int n, int, int64_t i0, int64_t j0,
            const void*) const override {
    for (int i = 0; i < m; ++i, q += ldq, low += ldl)
      mix_.row(m0_ + i0 + i, j0, u_ + (i0 + i) * mix_.call.N + j0, q, low, n);
  }

 private:
  const Mix& mix_;
  const float* u_;
  int64_t m0_;
};

// dx where it was not dropped
class Kept final : public Epilogue {
 public:
  Kept(const Call& call, const Tensor& dx)
      : call_(call), bits_(call.mask.over({})), bf16_(is_bf16(dx)), dx_((char*)dx.mutable_data_ptr()) {}

  void tile(const float* c, int64_t ldc, const float* low, int64_t ldl, int m, int n, int, int64_t i0, int64_t j0,
            const void*) const override {
    for (int i = 0; i < m; ++i, c += ldc, low += ldl)
      call_.e.columns->put(c, low, n, bits_.mask + (i0 + i) * bits_.mask_row, j0, bf16_,
                           dx_ + ((i0 + i) * call_.K + j0) * (bf16_ ? 2 : 4));
  }

 private:
  const Call& call_;
  const Source bits_;
  bool bf16_;
  char* dx_;
};

// c∘B in float32: it is rounded once, as it is packed
std::vector<float> scaled_rows(const Tensor& b, const float* c) {
  const int64_t N = b.size(0), r = b.size(1);
  std::vector<float> out(N * r);
  torch::stable::parallel_for(0, N, 512, [&](int64_t n0, int64_t n1) {
    engine(false).rows(rows_of(b), n0, n1 - n0, 0, r, out.data() + n0 * r, r);
    for (int64_t n = n0; n < n1; ++n)
      for (int64_t i = 0; i < r; ++i) out[n * r + i] *= c[n];
  });
  return out;
}

// W as gemm reads it: given so, or packed into `own` for the two products that read it, unless it is too large to keep
const void* packed_once(const Call& call, const Source& w, int64_t k, int64_t n, const void* given,
                        std::optional<Scratch>& own) {
  const int64_t bytes = packed_bytes(call.e, k, n);
  if (given || bytes > KEPT_BYTES) return given;
  own.emplace(bytes);
  pack(call.e, k, n, w, own->data());
  return own->data();
}

// dx at what dropout took away: g·W without the adapter, an element at a time
void fill_dropped(const Call& call, const Source& g, const Tensor& dx) {
  constexpr int64_t DEPTH = 256, GROUP = 16;  // rows of Wᵀ × panels of it, at the most: the second-level cache
  const Engine& e = call.wide;
  const Dropped gone(call.e, call.mask, {}, call.M, call.K, false);
  const bool dx_bf16 = is_bf16(dx);
  const int64_t size = call.bf16 ? 2 : 4, group = call.bf16 ? GROUP : GROUP / 2;
  // as many blocks for every thread
  const int64_t parts = round_up(ceil_div(call.K, DEPTH), torch::stable::get_num_threads());
  const int64_t depth = round_up(ceil_div(call.K, parts), 32);
  // lines lie side by side, float32 panels one after another
  const int64_t ld = call.bf16 ? group * e.nr : e.nr, stride = call.bf16 ? e.nr : depth * e.nr;
  torch::stable::parallel_for(0, ceil_div(call.K, depth), 1, [&](int64_t c0, int64_t c1) {
    Scratch own(group * (depth + 1) * e.nr * size);
    char *panels = own.data(), *line = panels + group * depth * e.nr * size;
    for (int64_t c = c0; c < c1; ++c) {
      const int64_t k0 = c * depth, k = std::min(depth, call.K - k0);
      std::vector<int64_t> begin{0};
      std::vector<int32_t> at;
      for (int64_t m = 0; m < call.M; ++m) {
        const auto row = gone.at.begin() + gone.begin[m], end = gone.at.begin() + gone.begin[m + 1];
        for (auto it = std::lower_bound(row, end, int32_t(k0)); it != end && *it < k0 + k; ++it)
          at.push_back(int32_t(*it - k0));
        begin.push_back(int64_t(at.size()));
      }
      std::vector<float> dots(at.size());
      for (int64_t q = 0; q < call.panels(); q += group) {
        const int64_t count = std::min(group, call.panels() - q), j = q * e.nr, n = std::min(count * e.nr, call.N - j);
        for (int64_t p = 0; p < count; ++p) call.panel(q + p, k0, k, panels + p * stride * size, ld);
        std::memset(line, 0, count * e.nr * size);
        for (int64_t m = 0; m < call.M; ++m) {
          if (begin[m] == begin[m + 1]) continue;
          const char* row = (const char*)g.data + (m * g.row + j) * size;
          if (n < count * e.nr) row = (const char*)std::memcpy(line, row, n * size);
          e.columns->collect(panels, call.bf16, stride, ld, int(count), at.data() + begin[m], begin[m + 1] - begin[m],
                             row, dots.data() + begin[m]);
        }
      }
      for (int64_t m = 0; m < call.M; ++m)
        for (int64_t i = begin[m]; i < begin[m + 1]; ++i)
          e.finish(&dots[i], 1, 1, 1, m, k0 + at[i], {dx.mutable_data_ptr(), dx_bf16, call.K, 1});
    }
  });
}

// both products in full, as many tokens at a time as u may take memory for
void forward_twice(const Mix& mix, const Matrix& x, const Tensor& a, const Tensor& b, const Tensor& h,
                   const void* packed) {
  constexpr int64_t BYTES = 16 << 20, LEAST = 256;
  const Call& call = mix.call;
  const int64_t M = call.M, N = call.N, K = call.K;
  const int64_t span = std::min(M, std::max(LEAST, BYTES / std::max<int64_t>(1, N * 4)));
  std::optional<Scratch> own;
  const Right right{turned(call.w), packed_once(call, turned(call.w), K, N, packed, own)};
  Scratch memory(span * N * 4);
  auto* u = (float*)memory.data();
  for (int64_t m0 = 0; m0 < M; m0 += span) {
    const int64_t m = std::min(span, M - m0);
    const Source all = from_row(x.source, m0), low = from_row(rows_of(h), m0);
    gemm(call.e, m, {{{all, K}}, {{N, {right}, {}, {u, false, N, 1}}}});
    Source seen = call.mask.over(all);
    seen.mask += m0 * seen.mask_row;
    const Twice last(mix, u, m0);
    Product skinny = shrink(call, seen, a, h);
    skinny.columns[0].y.data = const_cast<void*>(low.data);
    const Columns columns{N, {right}, {{low, turned(rows_of(b)), call.r}}, {mix.y, mix.y_bf16, N, 1}, &last};
    gemm(call.e, m, {{{seen, K}}, {columns}}, &skinny);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> dora_linear(const Tensor& x_, const Tensor& w, const std::optional<Tensor>& bias,
                                               const Tensor& a, const Tensor& b, const Tensor& c,
                                               const std::optional<Tensor>& seed, double scaling, double p,
                                               bool transposed, bool keep, const std::optional<Tensor>& packed) {
  const Matrix x = matrix(x_, "x");
  const Call call(x.source.bf16, x.rows, w, a, b, c, seed, scaling, p, transposed);
  STD_TORCH_CHECK(x.cols == call.K, "given: x of another width\nneeded: x (..., K)\ndo: call peft_fast.ops.dora_linear");
  Tensor h = empty_like(x_, {call.M, call.r}, ScalarType::Float), y = empty_like(x_, with_last(x_, call.N));
  // engines that multiply in float32 keep what they would lose
  const ScalarType kept = call.e.half ? x_.scalar_type() : ScalarType::Float;
  Tensor z = empty_like(x_, {keep ? call.M : 0, call.N}, kept);
  std::vector<float> wide_bias;
  if (bias) wide_bias = widened(*bias, call.N);
  const Mix mix{call, (const float*)c.const_data_ptr(), bias ? wide_bias.data() : nullptr, (char*)y.mutable_data_ptr(),
                keep ? (char*)z.mutable_data_ptr() : nullptr, is_bf16(y), is_bf16(z)};
  const void* ready = packed_data(packed, call.e, call.K, call.N);
  if (!call.lists()) {
    forward_twice(mix, x, a, b, h, ready);
    return {y, h, z};
  }
  Columns columns{call.N, {{turned(call.w), ready}}, {{rows_of(h), turned(rows_of(b)), call.r}}, target(y, call.N, 1)};
  columns.y.column_scale = mix.c;
  columns.y.bias = mix.bias;
  columns.y.raw = mix.z;
  columns.y.raw_bf16 = mix.z_bf16;
  std::optional<Listed> listed;
  if (call.drops()) columns.last = &listed.emplace(mix, x.source);
  const Product skinny = shrink(call, call.drops() ? call.mask.over(x.source) : x.source, a, h);
  gemm(call.e, call.M, {{{x.source, call.K}}, {columns}}, &skinny);
  return {y, h, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dora_linear_backward(
    const Tensor& g_, const Tensor& x_, const Tensor& w, const Tensor& a, const Tensor& b, const Tensor& c,
    const Tensor& h, const Tensor& z, const std::optional<Tensor>& seed, double scaling, double p, bool transposed,
    const std::vector<bool>& needs, bool wide_dx, const std::optional<Tensor>& packed) {
  STD_TORCH_CHECK(needs.size() == 5, "given: needs of another length\nneeded: x, bias, A, B, m\n"
                                     "do: call peft_fast.ops.dora_linear and let autograd run the backward");
  const auto [dx_, dbias_, da_, db_, dm_] = std::tuple(bool(needs[0]), bool(needs[1]), bool(needs[2]), bool(needs[3]),
                                                       bool(needs[4]));
  const Matrix g = matrix(g_, "the output's gradient"), x = matrix(x_, "x");
  const Call call(x.source.bf16, x.rows, w, a, b, c, seed, scaling, p, transposed);
  const int64_t M = call.M, N = call.N, K = call.K, r = call.r;
  STD_TORCH_CHECK(g.rows == M && g.cols == N && g.source.bf16 == x.source.bf16 && x.cols == K && h.size(0) == M &&
                      h.size(1) == r && h.scalar_type() == ScalarType::Float && (!dm_ || z.numel() == M * N),
                  "given: tensors that do not fit the forward\nneeded: g (..., N) of y, and the forward's own x, H and Z\n"
                  "do: call peft_fast.ops.dora_linear and let autograd run the backward");
  Tensor dx = empty_like(x_, dx_ ? std::vector<int64_t>(x_.sizes().begin(), x_.sizes().end()) : std::vector<int64_t>{0},
                         wide_dx ? ScalarType::Float : x_.scalar_type());
  Tensor da = empty_like(a, {da_ ? r : 0, K}), db = empty_like(b, {db_ ? N : 0, r});
  Tensor dm = empty_like(x_, {dm_ ? N : 0}, ScalarType::Float), dbias = empty_like(x_, {dbias_ ? N : 0}, ScalarType::Float);
  const auto* factors = (const float*)c.const_data_ptr();

  // one pass over g: what of it goes through the base, and the sums over the tokens
  std::vector<float> by(factors, factors + N);
  if (call.drops())
    for (float& v : by) v = 1 + (v - 1) * call.keep_scale;
  const int64_t size = x.source.bf16 ? 2 : 4, z_size = dm_ && is_bf16(z) ? 2 : 4;
  Scratch memory(dx_ ? M * N * size : 0);
  char* through = dx_ ? memory.data() : nullptr;
  constexpr int64_t STRIPE = 512, DEPTH = 64;
  if (dx_ || dm_ || dbias_)
    torch::stable::parallel_for(0, ceil_div(N, STRIPE), 1, [&](int64_t s0, int64_t s1) {
      std::vector<float> sums(2 * STRIPE);
      std::vector<double> totals(2 * STRIPE);
      for (int64_t s = s0; s < s1; ++s) {
        const int64_t j = s * STRIPE, n = std::min(STRIPE, N - j);
        std::fill(totals.begin(), totals.end(), 0.0);
        for (int64_t m0 = 0; m0 < M; m0 += DEPTH) {
          std::fill(sums.begin(), sums.end(), 0.0f);
          for (int64_t m = m0; m < std::min(M, m0 + DEPTH); ++m)
            call.wide.columns->scale((const char*)g.source.data + (m * g.source.row + j) * size, x.source.bf16,
                                     dm_ ? (const char*)z.const_data_ptr() + (m * N + j) * z_size : nullptr,
                                     z_size == 2, by.data() + j, n,
                                     through ? through + (m * N + j) * size : nullptr,
                                     dm_ ? sums.data() : nullptr, dbias_ ? sums.data() + STRIPE : nullptr);
          for (int64_t i = 0; i < 2 * STRIPE; ++i) totals[i] += sums[i];
        }
        for (int64_t i = 0; i < n; ++i) {
          if (dm_) ((float*)dm.mutable_data_ptr())[j + i] = float(totals[i]);
          if (dbias_) ((float*)dbias.mutable_data_ptr())[j + i] = float(totals[STRIPE + i]);
        }
      }
    });

  Tensor d = empty_like(x_, {dx_ || da_ ? M : 0, r}, ScalarType::Float);
  const float kept = call.drops() ? call.keep_scale : 1.0f;
  const Source all{through, x.source.bf16, N, 1};
  // c∘g is there where the base reads it; rounded no more than c∘B would be
  const bool scaled = dx_ && !call.drops() && call.e.half == x.source.bf16;
  std::vector<float> b_c;
  if (!scaled) b_c = scaled_rows(b, factors);
  const Source right_b = scaled ? rows_of(b) : Source{b_c.data(), false, r, 1};
  const Product skinny{{{scaled ? all : g.source, N}}, {{r, {{right_b}}, {}, to(d, r, 1, call.scaling * kept)}}};
  if (dx_) {
    Right right{call.w, packed_data(packed, call.e, N, K)};
    Columns columns{K, {right}, {{rows_of(d), rows_of(a), r}}, target(dx, K, 1)};
    if (!call.lists()) {
      std::optional<Scratch> own;
      right.packed = packed_once(call, call.w, N, K, right.packed, own);
      gemm(call.e, M, {{{g.source, N}}, {{K, {right}, {}, columns.y}}}, &skinny);
      const Kept last(call, dx);
      columns.rights = {right};
      columns.last = &last;
      gemm(call.e, M, {{{all, N}}, {columns}});
    } else {
      gemm(call.e, M, {{{all, N}}, {columns}}, &skinny);
      if (call.drops()) fill_dropped(call, g.source, dx);
    }
  } else if (da_) {
    gemm(call.e, M, skinny);
  }
  std::vector<Tokens> tokens;
  if (db_) {
    Tall tall{turned(rows_of(h)), r, target(db, 1, r)};
    tall.y.column_scale = factors;
    tokens.push_back({g.source, N, {tall}});
  }
  if (da_) {
    const Source seen = call.drops() ? call.mask.over({}) : Source{};
    tokens.push_back({x.source, K, {{turned(rows_of(d)), r, target(da, K, 1), seen}}});
  }
  gemm_tokens(call.e, M, tokens);
  return {dx, da, db, dbias, dm};
}

}  // namespace peft_fast
