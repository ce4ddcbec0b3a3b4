#include "cpu/lora_linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/dropout.h"
#include "cpu/gemm.h"

namespace peft_fast {
namespace {

Target target(const Tensor& t, int64_t row, int64_t col) { return {t.mutable_data_ptr(), is_bf16(t), row, col}; }

Source rows_of(const Tensor& t) { return {t.const_data_ptr(), is_bf16(t), t.stride(0), t.stride(1)}; }

// rows [r0, r0 + n) of a matrix
Source from_row(Source s, int64_t r0) {
  s.data = (const char*)s.data + r0 * s.row * (s.bf16 ? 2 : 4);
  return s;
}
Source from_col(Source s, int64_t c0) {
  s.data = (const char*)s.data + c0 * s.col * (s.bf16 ? 2 : 4);
  return s;
}

// the adapters side by side: adapter i owns columns [begin, begin + rank) of H and D
struct Adapters {
  struct One {
    int64_t begin, rank;
    float scaling, keep_scale;
    MaskBits mask;
  };
  std::vector<One> all;
  int64_t R = 0;
  bool masked = false;

  Adapters(const Engine& e, const std::optional<Tensor>& seed, const std::vector<int64_t>& ranks,
           const std::vector<double>& scalings, const std::vector<double>& ps, int64_t M, int64_t K) {
    STD_TORCH_CHECK(ranks.size() == scalings.size() && ranks.size() == ps.size(),
                    "given: ranks, scalings and ps of different lengths\nneeded: one of each per adapter\n"
                    "do: call peft_fast.ops.lora_linear");
    for (size_t i = 0; i < ranks.size(); ++i) {
      One one{R, ranks[i], float(scalings[i]), ps[i] < 1 ? float(1 / (1 - ps[i])) : 0.0f, {}};
      if (ps[i] > 0) {
        STD_TORCH_CHECK(seed && seed->numel() == int64_t(ranks.size()) &&
                            seed->scalar_type() == ScalarType::Long && seed->is_contiguous(),
                        "given: dropout without seeds\nneeded: int64, one per adapter\ndo: draw_seed(n)");
        one.mask = MaskBits(e, uint64_t(((const int64_t*)seed->const_data_ptr())[i]), M, K, ps[i]);
        masked = true;
      }
      R += ranks[i];
      all.push_back(std::move(one));
    }
  }

  // out (M, R) = s·drop(x)·cols: one pass for all adapters without dropout, one per adapter with it
  void shrink(const Engine& e, int64_t M, int64_t K, const Source& x, const Source& cols, bool drop, const Tensor& out) {
    std::vector<float> scale(R);
    for (const One& one : all)
      for (int64_t j = 0; j < one.rank; ++j)
        scale[one.begin + j] = one.scaling * (drop && one.mask ? one.keep_scale : 1.0f);
    Target t = target(out, R, 1);
    if (!drop || !masked) {
      t.column_scale = scale.data();
      return gemm(e, M, R, K, x, cols, {}, t);
    }
    for (const One& one : all) {
      Target part = t;
      part.data = (float*)t.data + one.begin;
      part.column_scale = scale.data() + one.begin;
      gemm(e, M, one.rank, K, one.mask ? one.mask.over(x) : x, from_col(cols, one.begin), {}, part);
    }
  }
};

const void* packed_data(const std::optional<Tensor>& packed, const Engine& e, int64_t K, int64_t N) {
  if (!packed) return nullptr;
  STD_TORCH_CHECK(packed->numel() == packed_bytes(e, K, N),
                  "given: a packed weight of another size or instruction set\nneeded: pack_weight of this weight\n"
                  "do: clear the cache, peft_fast.ops.packing.clear()");
  return packed->const_data_ptr();
}

Source base(const Tensor& w, bool transposed, bool half) {
  check_float(w, "W");
  Source s = weight(w, transposed);
  s.round = half && !s.bf16;  // a float32 weight under autocast is a rounded one
  return s;
}

Tensor empty_like(const Tensor& like, const std::vector<int64_t>& size, std::optional<ScalarType> dtype = {}) {
  return torch::stable::new_empty(like, size, dtype);
}

std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> size(t.sizes().begin(), t.sizes().end());
  size.back() = last;
  return size;
}

}  // namespace

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x_, const Tensor& w, const std::optional<Tensor>& bias,
                                       const Tensor& a, const Tensor& b, const std::optional<Tensor>& seed,
                                       const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
                                       const std::vector<double>& ps, bool transposed,
                                       const std::optional<Tensor>& packed) {
  const Matrix x = matrix(x_, "x");
  const Engine& e = engine(x.source.bf16);
  const int64_t M = x.rows, K = x.cols, N = w.size(transposed ? 1 : 0);
  check_float(a, "A");
  check_float(b, "B");
  Adapters adapters(e, seed, ranks, scalings, ps, M, K);
  const int64_t R = adapters.R;
  STD_TORCH_CHECK(w.size(transposed ? 0 : 1) == K && a.size(0) == R && b.size(1) == R && b.size(0) == N &&
                      (R == 0 || a.size(1) == K),
                  "given: shapes that do not fit\nneeded: x (..., K), W (N, K), A (R, K), B (N, R)\n"
                  "do: call peft_fast.ops.lora_linear, which names the one that is wrong");
  Tensor y = empty_like(x_, with_last(x_, N)), h = empty_like(x_, {M, R}, ScalarType::Float);
  std::vector<LowRank> low;
  if (R > 0) {
    adapters.shrink(e, M, K, x.source, turned(rows_of(a)), true, h);
    low.push_back({rows_of(h), turned(rows_of(b)), R});
  }
  Target out = target(y, N, 1);
  std::vector<float> wide;
  if (bias) {
    check_float(*bias, "bias");
    STD_TORCH_CHECK(bias->numel() == N, "given: a bias of another length\nneeded: (N,)\ndo: pass the bias of W's layer");
    Tensor dense = torch::stable::contiguous(*bias);
    wide.resize(N);
    engine(false).rows({dense.const_data_ptr(), is_bf16(dense), N, 1}, 0, 1, 0, N, wide.data(), N);
    out.bias = wide.data();
  }
  gemm(e, M, N, K, x.source, turned(base(w, transposed, x.source.bf16)), low, out, packed_data(packed, e, K, N));
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& g_, const Tensor& x_, const Tensor& w, const Tensor& a, const Tensor& b, const Tensor& h,
    const std::optional<Tensor>& seed, const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
    const std::vector<double>& ps, bool transposed, const std::vector<bool>& needs, bool wide_dx,
    const std::optional<Tensor>& packed) {
  const Matrix g = matrix(g_, "the output's gradient"), x = matrix(x_, "x");
  const Engine& e = engine(x.source.bf16);
  const int64_t M = x.rows, K = x.cols, N = g.cols;
  check_float(a, "A");
  check_float(b, "B");
  Adapters adapters(e, seed, ranks, scalings, ps, M, K);
  const int64_t R = adapters.R;
  STD_TORCH_CHECK(needs.size() == 5 && g.rows == M && w.size(transposed ? 1 : 0) == N &&
                      w.size(transposed ? 0 : 1) == K && g.source.bf16 == x.source.bf16 && a.size(0) == R &&
                      (R == 0 || a.size(1) == K) && b.size(0) == N && b.size(1) == R && h.dim() == 2 &&
                      h.size(0) == M && h.size(1) == R && h.scalar_type() == ScalarType::Float,
                  "given: tensors that do not fit the forward\nneeded: g (..., N) of y, and the forward's own x, W, A, "
                  "B and H\ndo: call peft_fast.ops.lora_linear and let autograd run the backward");
  const bool want_dx = needs[0], want_dbias = needs[2], want_da = needs[3] && R > 0, want_db = needs[4] && R > 0;
  const std::vector<int64_t> none{0};
  Tensor dx = empty_like(x_, want_dx ? std::vector<int64_t>(x_.sizes().begin(), x_.sizes().end()) : none,
                         wide_dx ? ScalarType::Float : x_.scalar_type());
  Tensor da = empty_like(a, needs[3] ? std::vector<int64_t>{R, a.size(1)} : none);
  Tensor db = empty_like(b, needs[4] ? std::vector<int64_t>{b.size(0), R} : none);
  Tensor dbias = empty_like(x_, {want_dbias ? N : 0}, ScalarType::Float);
  Tensor d = empty_like(x_, {M, want_dx || want_da ? R : 0}, ScalarType::Float);
  if (d.numel() > 0) adapters.shrink(e, M, N, g.source, rows_of(b), false, d);
  if (want_dx) {
    std::vector<LowRank> low;
    for (const Adapters::One& one : adapters.all) {
      LowRank term{from_col(rows_of(d), one.begin), from_row(rows_of(a), one.begin), one.rank};
      if (one.mask) term.mask = one.mask.over({}), term.mask_scale = one.keep_scale;
      low.push_back(term);
    }
    gemm(e, M, K, N, g.source, base(w, transposed, x.source.bf16), low, target(dx, K, 1),
         packed_data(packed, e, N, K));
  }
  if (want_da) {
    // dA = Dᵀ·drop(x): with no dropout every adapter in one pass over x
    const Target out = target(da, K, 1);
    if (!adapters.masked) gemm_tokens(e, R, K, M, turned(rows_of(d)), x.source, out);
    else
      for (const Adapters::One& one : adapters.all) {
        Target part = out;
        part.data = (char*)out.data + one.begin * K * (out.bf16 ? 2 : 4);
        part.scale = one.mask ? one.keep_scale : 1.0f;
        gemm_tokens(e, one.rank, K, M, turned(from_col(rows_of(d), one.begin)),
                    one.mask ? one.mask.over(x.source) : x.source, part);
      }
  }
  // dBᵀ = Hᵀ·G
  if (want_db) gemm_tokens(e, R, N, M, turned(rows_of(h)), g.source, target(db, 1, R));
  if (want_dbias) {
    const float one = 1.0f;
    gemm_tokens(e, 1, N, M, {&one, false, 0, 0}, g.source, target(dbias, N, 1));
  }
  return {dx, da, db, dbias};
}

Tensor pack_weight(const Tensor& w, bool transposed, bool for_dx, bool like_bf16) {
  const Engine& e = engine(like_bf16);
  const int64_t N = w.size(transposed ? 1 : 0), K = w.size(transposed ? 0 : 1);
  const Source s = base(w, transposed, like_bf16);
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
