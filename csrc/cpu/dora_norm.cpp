#include "cpu/dora_norm.h"

#include <algorithm>
#include <cmath>

#include "cpu/gemm.h"
#include "cpu/scratch.h"

namespace peft_fast {
namespace {

constexpr int64_t DEPTH = 256;  // of W's k at a time: widened, squared and multiplied while it is in a cache

// W as it lies and A, both read once: each(n, ‖w‖², w·aᵀ (r,)) of every row, from several threads
template <class F>
void over_rows(const Engine& e, const Source& w, int64_t N, int64_t K, const Source& a, int64_t r, const F& each) {
  const int64_t panels = ceil_div(r, e.nr), bytes = K * e.nr * 4, ld = padded_row(e, DEPTH), ldc = panels * e.nr;
  const int64_t block = 4 * e.mr, size = w.bf16 ? 2 : 4;
  Scratch packed(panels * bytes);
  pack(e, K, r, turned(a), packed.data());
  torch::stable::parallel_for(0, ceil_div(N, block), 1, [&](int64_t b0, int64_t b1) {
    Scratch own(block * (ld + ldc) * 4);
    float *lines = (float*)own.data(), *c = lines + block * ld;
    std::vector<double> squares(block);
    for (int64_t n0 = b0 * block; n0 < std::min(N, b1 * block); n0 += block) {
      const int64_t m = std::min(block, N - n0);
      std::fill(squares.begin(), squares.end(), 0.0);
      for (int64_t k0 = 0; k0 < K || k0 == 0; k0 += DEPTH) {
        const int64_t k = std::min(DEPTH, K - k0);
        const char* at = (const char*)w.data + (n0 * w.row + k0) * size;
        for (int64_t i = 0; i < m; ++i, at += w.row * size) squares[i] += e.columns->widen(at, w.bf16, k, lines + i * ld);
        for (int64_t p = 0; p < panels; ++p) {
          const int width = e.width(std::min<int64_t>(e.nr, r - p * e.nr));
          for (int64_t i = 0; i < m; i += e.mr) {
            const Segment part{k, lines + i * ld, ld, packed.data() + p * bytes + k0 * width * 4};
            e.tile(&part, 1, c + i * ldc + p * e.nr, ldc, int(std::min<int64_t>(e.mr, m - i)), width, k0 > 0);
          }
        }
      }
      for (int64_t i = 0; i < m; ++i) each(n0 + i, squares[i], c + i * ldc);
    }
  });
}

// the same of W (K, N)
template <class F>
void over_columns(const Engine& e, const Source& w, int64_t N, int64_t K, const Source& a, int64_t r, const F& each) {
  constexpr int64_t GROUP = 4;  // panels that share the lines and pages of W's rows
  const int64_t ld = padded_row(e, K), rows = round_up(r, e.mr), span = GROUP * e.nr;
  Scratch wide(rows * ld * 4);
  e.rows(a, 0, r, 0, K, wide.data(), ld);
  torch::stable::parallel_for(0, ceil_div(N, span), 1, [&](int64_t g0, int64_t g1) {
    Scratch own((DEPTH + GROUP * rows) * e.nr * 4);
    float *panel = (float*)own.data(), *c = panel + DEPTH * e.nr;
    std::vector<float> sums(e.nr), line(r);
    std::vector<double> squares(span);
    for (int64_t j0 = g0 * span; j0 < std::min(N, g1 * span); j0 += span) {
      const int64_t count = ceil_div(std::min(span, N - j0), e.nr);
      std::fill(squares.begin(), squares.end(), 0.0);
      for (int64_t k0 = 0; k0 < K || k0 == 0; k0 += DEPTH) {
        const int64_t k = std::min(DEPTH, K - k0);
        for (int64_t q = 0; q < count; ++q) {
          const int64_t j = j0 + q * e.nr, n = std::min<int64_t>(e.nr, N - j);
          const int width = e.width(n);
          e.panel(w, k0, k, j, n, width, panel);
          e.columns->panel_squares(panel, k, width, sums.data());
          for (int64_t i = 0; i < n; ++i) squares[q * e.nr + i] += sums[i];
          for (int64_t i = 0; i < r; i += e.mr) {
            const Segment part{k, (const float*)wide.data() + i * ld + k0, ld, panel};
            e.tile(&part, 1, c + (q * rows + i) * e.nr, e.nr, int(std::min<int64_t>(e.mr, r - i)), width, k0 > 0);
          }
        }
      }
      for (int64_t j = 0; j < std::min(span, N - j0); ++j) {
        for (int64_t i = 0; i < r; ++i) line[i] = c[(j / e.nr * rows + i) * e.nr + j % e.nr];
        each(j0 + j, squares[j], line.data());
      }
    }
  });
}

// a·aᵀ (r, r)
std::vector<double> gram_of(const Engine& e, const Source& a, int64_t r, int64_t K) {
  Scratch wide(r * K * 4);
  float* lines = (float*)wide.data();
  e.rows(a, 0, r, 0, K, lines, K);
  std::vector<double> gram(r * r);
  auto row = [&](int64_t i) {
    for (int64_t j = 0; j <= i; ++j)
      gram[i * r + j] = gram[j * r + i] = e.columns->dot(lines + i * K, lines + j * K, K);
  };
  // a short row and a long one: as much for every thread
  torch::stable::parallel_for(0, ceil_div(r, 2), std::max<int64_t>(1, 65536 / std::max<int64_t>(1, r * K)),
                              [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) {
      row(i);
      if (r - 1 - i > i) row(r - 1 - i);
    }
  });
  return gram;
}

}  // namespace

Tensor dora_norm(const Tensor& w, const Tensor& a, const Tensor& b, double scaling, bool transposed) {
  check_float(w, "W");
  check_float(a, "A");
  check_float(b, "B");
  const int64_t N = w.size(transposed ? 1 : 0), K = w.size(transposed ? 0 : 1), r = a.size(0);
  STD_TORCH_CHECK(w.dim() == 2 && a.dim() == 2 && a.size(1) == K && b.dim() == 2 && b.size(0) == N && b.size(1) == r,
                  "given: shapes that do not fit\nneeded: W (N, K) or (K, N), A (r, K), B (N, r)\n"
                  "do: call peft_fast.ops.dora_norm");
  const Engine& e = engine(false);  // A keeps its digits
  const Tensor dense = w.stride(1) == 1 || w.size(1) <= 1 ? w : torch::stable::contiguous(w);
  const Source rows = rows_of(dense);
  Tensor norm = empty_like(w, {N}, ScalarType::Float);
  auto* out = (float*)norm.mutable_data_ptr();
  const std::vector<double> gram = gram_of(e, rows_of(a), r, K);
  std::vector<uint8_t> near(N);
  auto each = [&](int64_t n, double squares, const float* product) {
    static thread_local std::vector<float> line;
    static thread_local std::vector<double> scratch;
    line.resize(std::max<size_t>(line.size(), r));
    scratch.resize(std::max<size_t>(scratch.size(), r));
    double whole;
    e.rows(rows_of(b), n, 1, 0, r, line.data(), r);
    near[n] = e.columns->norm_row(gram.data(), r, line.data(), product, squares, scaling, scratch.data(), &whole);
    out[n] = float(std::sqrt(whole < 0 ? 0 : whole));
  };
  if (transposed) over_columns(e, rows, N, K, rows_of(a), r, each);
  else over_rows(e, rows, N, K, rows_of(a), r, each);
  std::vector<int64_t> again;
  for (int64_t n = 0; n < N; ++n)
    if (near[n]) again.push_back(n);
  if (again.empty()) return norm;
  // what nearly vanishes beside W: straight from the sum, in float64
  std::vector<float> wide(r * K);
  e.rows(rows_of(a), 0, r, 0, K, wide.data(), K);
  const Source across = transposed ? turned(rows) : rows;
  torch::stable::parallel_for(0, int64_t(again.size()), 1, [&](int64_t i0, int64_t i1) {
    std::vector<float> line(std::max(K, r));
    std::vector<double> sum(K);
    for (int64_t i = i0; i < i1; ++i) {
      const int64_t n = again[i];
      e.rows(across, n, 1, 0, K, line.data(), K);
      for (int64_t k = 0; k < K; ++k) sum[k] = line[k];
      e.rows(rows_of(b), n, 1, 0, r, line.data(), r);
      for (int64_t j = 0; j < r; ++j) e.columns->add_wide(scaling * line[j], wide.data() + j * K, K, sum.data());
      double total = 0;
      for (double v : sum) total += v * v;
      out[n] = float(std::sqrt(total));
    }
  });
  return norm;
}

}  // namespace peft_fast
