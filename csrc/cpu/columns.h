// What DoRA needs beside products: sums of squares of a weight, a scale for each column with the sums over the tokens
// that its gradient is made of, and the part of a product that dropout takes away, a few rows of a panel a token.
#pragma once
#include <cmath>

#include "cpu/copies.h"
#include "cpu/dots.h"

namespace peft_fast {
namespace {

constexpr int MOST_PANELS = 16;  // that collect takes at once

// n neighbours as float32 -> out, which has room for whole vectors; the result is the sum of their squares
template <int V, class T>
double widen_line(const T* w, int64_t n, float* out) {
  using L = Lanes<V>;
  double total = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t end = std::min(n, i + 64 * V);  // so many terms in float32
    typename L::vec acc[4] = {};
    for (; i + 4 * V <= end; i += 4 * V)
      for (int j = 0; j < 4; ++j) {
        const auto v = L::load(w + i + j * V);
        L::store(out + i + j * V, v);
        acc[j] += v * v;
      }
    for (; i < end; i += V) {
      const auto v = i + V <= end ? L::load(w + i) : load_part<V>(w + i, end - i);
      L::store(out + i, v);
      acc[0] += v * v;
    }
    i = end;
    total += sum<V>((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
  return total;
}

template <int V>
double widen(const void* w, bool bf16, int64_t n, float* out) {
  return bf16 ? widen_line<V>((const uint16_t*)w, n, out) : widen_line<V>((const float*)w, n, out);
}

// sums (width) of the squares in each column of a float32 panel (k, width)
template <int V>
void panel_squares(const float* panel, int64_t k, int width, float* sums) {
  using L = Lanes<V>;
  for (int j = 0; j < width; j += V) {
    typename L::vec acc[4] = {};
    int64_t i = 0;
    for (; i + 4 <= k; i += 4)
      for (int l = 0; l < 4; ++l) {
        const auto v = L::load(panel + (i + l) * width + j);
        acc[l] += v * v;
      }
    for (; i < k; ++i) {
      const auto v = L::load(panel + i * width + j);
      acc[0] += v * v;
    }
    L::store(sums + j, (acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
}

// Σ a·b of n neighbours, every product and sum in float64
template <int V>
double dot(const float* a, const float* b, int64_t n) {
  using L = Lanes<V>;
  using wide = typename Vector<double, V>::type;
  wide acc{};
  int64_t i = 0;
  for (; i + V <= n; i += V)
    acc += __builtin_convertvector(L::load(a + i), wide) * __builtin_convertvector(L::load(b + i), wide);
  double total = 0;
  for (int j = 0; j < V; ++j) total += acc[j];
  for (; i < n; ++i) total += double(a[i]) * b[i];
  return total;
}

// f over n neighbours, V at a time; what is read and written of the last ones lies in lines of V
template <int V, class F>
void by_vector(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + V <= n; j += V) f(j, V);
  if (j < n) f(j, int(n - j));
}

template <int V, class T>
void store_part(T* to, typename Lanes<V>::vec v, int n) {
  if (n == V) return Lanes<V>::store(to, v);
  T line[V];
  Lanes<V>::store(line, v);
  std::memcpy(to, line, n * sizeof(T));
}

template <int V, class T>
typename Lanes<V>::vec load_some(const T* from, int n) {
  return n == V ? Lanes<V>::load(from) : load_part<V>(from, n);
}

// y = u + bias + (c−1)∘q + c∘low and z = q + low with q = keep·left, n neighbours
template <int V, class Y, class Z>
void mix_line(const float* u, const float* left, const float* low, float keep, const float* c, const float* bias,
              int64_t n, Y* y, Z* z) {
  by_vector<V>(n, [&](int64_t j, int k) {
    const auto own = load_some<V>(u + j, k), q = keep * load_some<V>(left + j, k);
    const auto adapter = load_some<V>(low + j, k), by = load_some<V>(c + j, k);
    auto out = own + (by - 1.0f) * q + by * adapter;  // in this order c = 1 leaves u as it is
    if (bias) out += load_some<V>(bias + j, k);
    store_part<V>(y + j, out, k);
    if (z) store_part<V>(z + j, q + adapter, k);
  });
}

template <int V>
void mix(const float* u, const float* left, const float* low, float keep, const float* c, const float* bias, int64_t n,
         bool y_bf16, void* y, bool z_bf16, void* z) {
  if (!y_bf16) mix_line<V>(u, left, low, keep, c, bias, n, (float*)y, (float*)z);
  else if (z_bf16) mix_line<V>(u, left, low, keep, c, bias, n, (uint16_t*)y, (uint16_t*)z);
  else mix_line<V>(u, left, low, keep, c, bias, n, (uint16_t*)y, (float*)z);
}

// out = c + low where the bit of its column is set, n neighbours
template <int V, class T>
void put_line(const float* c, const float* low, int64_t n, const uint8_t* bits, int64_t j0, T* out) {
  by_vector<V>(n, [&](int64_t j, int k) {
    const auto sum = load_some<V>(c + j, k) + load_some<V>(low + j, k);
    store_part<V>(out + j, Lanes<V>::keep(sum, bits, j0 + j, load_some<V>(out + j, k)), k);
  });
}

template <int V>
void put(const float* c, const float* low, int64_t n, const uint8_t* bits, int64_t j0, bool bf16, void* out) {
  if (bf16) put_line<V>(c, low, n, bits, j0, (uint16_t*)out);
  else put_line<V>(c, low, n, bits, j0, (float*)out);
}

// out = by∘g, of (n) dm += g∘z, db += g; each may be null, z with dm
template <int V, class G, class Z>
void scale_line(const G* g, const Z* z, const float* by, int64_t n, G* out, float* dm, float* db) {
  using L = Lanes<V>;
  by_vector<V>(n, [&](int64_t j, int k) {
    const auto v = load_some<V>(g + j, k);
    if (out) store_part<V>(out + j, v * load_some<V>(by + j, k), k);
    if (dm) L::store(dm + j, L::load(dm + j) + v * load_some<V>(z + j, k));
    if (db) L::store(db + j, L::load(db + j) + v);
  });
}

template <int V>
void scale(const void* g, bool g_bf16, const void* z, bool z_bf16, const float* by, int64_t n, void* out, float* dm,
           float* db) {
  if (!g_bf16) scale_line<V>((const float*)g, (const float*)z, by, n, (float*)out, dm, db);
  else if (z_bf16) scale_line<V>((const uint16_t*)g, (const uint16_t*)z, by, n, (uint16_t*)out, dm, db);
  else scale_line<V>((const uint16_t*)g, (const float*)z, by, n, (uint16_t*)out, dm, db);
}

// rows [k0, k0 + k) × columns [j0, j0 + n) of Wᵀ (K, N) as lines of `ld` bfloat16, the first 2·V of each written: what
// collect reads when it computes in bfloat16, half as many bytes as a float32 panel
template <int V>
void lines(const Source& s, int64_t k0, int64_t k, int64_t j0, int64_t n, uint16_t* out, int64_t ld) {
  constexpr int WIDTH = 2 * V;
  if (s.bf16 && s.col == 1) {
    for (int64_t i = 0; i < k; ++i) {
      const uint16_t* in = (const uint16_t*)s.data + (k0 + i) * s.row + j0;
      prefetch_next(in + WIDTH, 2 * WIDTH);
      if (n == WIDTH) std::memcpy(out + i * ld, in, 2 * WIDTH);
      else std::memset(out + i * ld, 0, 2 * WIDTH), std::memcpy(out + i * ld, in, 2 * n);
    }
    return;
  }
  constexpr int64_t DEPTH = 256;
  alignas(64) static thread_local uint16_t stage[WIDTH * DEPTH];
  alignas(64) static thread_local uint32_t pairs[DEPTH / 2 * WIDTH];
  if (n < WIDTH) std::memset(pairs, 0, sizeof pairs);
  const Source turned{s.data, s.bf16, s.col, s.row, s.round};
  for (int64_t kk = 0; kk < k; kk += DEPTH) {
    const int64_t kn = std::min(DEPTH, k - kk), even = (kn + 1) / 2 * 2;
    const bool direct = s.bf16 && s.row == 1 && even == kn && s.col % 2 == 0 && (k0 + kk) % 2 == 0 &&
                        (uintptr_t)s.data % 4 == 0;
    if (direct) {
      transpose((const uint32_t*)((const uint16_t*)s.data + j0 * s.col + k0 + kk), s.col / 2, n, kn / 2, pairs, WIDTH);
    } else {
      for (int64_t j = 0; j < n; ++j) {
        copy_row(turned, j0 + j, k0 + kk, kn, stage + j * even);
        if (even != kn) stage[j * even + kn] = 0;
      }
      transpose((const uint32_t*)stage, even / 2, n, even / 2, pairs, WIDTH);
    }
    for (int64_t q = 0; q < kn; q += 2) {
      const uint32_t* from = pairs + q / 2 * WIDTH;
      uint16_t *low = out + (kk + q) * ld, *high = q + 1 < kn ? low + ld : stage;
      for (int j = 0; j < WIDTH; ++j) low[j] = uint16_t(from[j]), high[j] = uint16_t(from[j] >> 16);
    }
  }
}

// out (width) −= Σ x[i] · row at[i] of a float32 panel, `width` of 1 or 2 vectors
template <int V, int NV>
void spread_of(const float* panel, const int32_t* at, const float* x, int64_t count, float* out) {
  using L = Lanes<V>;
  typename L::vec acc[4][NV] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (int l = 0; l < 4; ++l)
      for (int j = 0; j < NV; ++j) acc[l][j] += x[i + l] * L::load(panel + int64_t(at[i + l]) * NV * V + j * V);
  for (; i < count; ++i)
    for (int j = 0; j < NV; ++j) acc[0][j] += x[i] * L::load(panel + int64_t(at[i]) * NV * V + j * V);
  for (int j = 0; j < NV; ++j)
    L::store(out + j * V, L::load(out + j * V) - ((acc[0][j] + acc[1][j]) + (acc[2][j] + acc[3][j])));
}

// the same of a panel in the layout of copies.h, of pairs or TILES of them: a row has its neighbour's elements between
// its own, which meet a zero
template <int V, int NV>
void spread_pairs(const uint16_t* panel, bool tiles, const int32_t* at, const uint16_t* x, int64_t count, float* out) {
  // dwords of a pair's first column, and from a vector of columns to the next
  auto first = [&](int64_t k) { return tiles ? (k / 32 * NV * 16 + k % 32 / 2) * 16 : k / 2 * NV * V; };
  const int64_t step = tiles ? 256 : V;
  const auto* pairs = (const uint32_t*)panel;
#if defined(__AVX512BF16__)
  if constexpr (V == 16) {
    __m512 acc[4][NV] = {};
    auto add = [&](int l, int64_t i) {
      const uint32_t* row = pairs + first(at[i]);
      const auto xs = (__m512bh)_mm512_set1_epi32(int32_t(uint32_t(x[i]) << (at[i] & 1) * 16));
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j)
        acc[l][j] = _mm512_dpbf16_ps(acc[l][j], (__m512bh)_mm512_loadu_si512(row + j * step), xs);
    };
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) add(0, i), add(1, i + 1), add(2, i + 2), add(3, i + 3);
    for (; i < count; ++i) add(0, i);
    using L = Lanes<V>;
    for (int j = 0; j < NV; ++j)
      L::store(out + j * V, L::load(out + j * V) - (typename L::vec)((acc[0][j] + acc[1][j]) + (acc[2][j] + acc[3][j])));
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < NV * V; ++j)
      out[j] -= from_bf16(x[i]) * from_bf16(uint16_t(pairs[first(at[i]) + j / V * step + j % V] >> (at[i] & 1) * 16));
}

// the same of whatever panel an engine packs, told by its kpad; x in the engine's elements
template <int V>
void spread(const void* panel, int kpad, int width, const int32_t* at, const void* x, int64_t count, float* out) {
  if (kpad > 1 && width == V) spread_pairs<V, 1>((const uint16_t*)panel, kpad > 2, at, (const uint16_t*)x, count, out);
  else if (kpad > 1) spread_pairs<V, 2>((const uint16_t*)panel, kpad > 2, at, (const uint16_t*)x, count, out);
  else if (width == V) spread_of<V, 1>((const float*)panel, at, (const float*)x, count, out);
  else spread_of<V, 2>((const float*)panel, at, (const float*)x, count, out);
}

// out[i] += Σ over `panels` of two vectors' width, `stride` elements apart, of g · row at[i], rows `ld` elements apart
template <int V, class T>
void collect_of(const T* panel, int64_t stride, int64_t ld, int panels, const int32_t* at, int64_t count, const float* g,
                float* out) {
  using L = Lanes<V>;
  for (int64_t i = 0; i < count; ++i) {
    const T* row = panel + int64_t(at[i]) * ld;
    typename L::vec acc[4] = {};
    for (int p = 0; p < panels; ++p, row += stride)
      for (int j = 0; j < 2; ++j) acc[2 * (p & 1) + j] += L::load(row + j * V) * L::load(g + (2 * p + j) * V);
    out[i] += sum<V>((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
}

#if defined(__AVX512BF16__)
// the same of neighbouring lines by bfloat16 pairs, four rows at a time: g is loaded and the sums are added up once
template <int ROWS>
void collect_rows(const uint16_t* panel, int64_t ld, int panels, const int32_t* at, const uint16_t* g, float* out) {
  __m512 acc[ROWS] = {};
  const uint16_t* row[ROWS];
  for (int i = 0; i < ROWS; ++i) row[i] = panel + int64_t(at[i]) * ld;
  for (int p = 0; p < panels; ++p) {
    const auto gs = (__m512bh)_mm512_loadu_si512(g + 32 * p);
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
      acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)_mm512_loadu_si512(row[i] + 32 * p), gs);
  }
  if constexpr (ROWS == 4) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(acc[0], acc[1]), _mm512_unpackhi_ps(acc[0], acc[1]));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(acc[2], acc[3]), _mm512_unpackhi_ps(acc[2], acc[3]));
    const auto ad = (__m512d)a, bd = (__m512d)b;
    const __m512 c = _mm512_add_ps((__m512)_mm512_unpacklo_pd(ad, bd), (__m512)_mm512_unpackhi_pd(ad, bd));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    const __m128 all = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), all));
  } else {
    for (int i = 0; i < ROWS; ++i) out[i] += _mm512_reduce_add_ps(acc[i]);
  }
}
#endif

// g float32, or where `halves` bfloat16 as are the lines
template <int V>
void collect(const void* panel, bool halves, int64_t stride, int64_t ld, int panels, const int32_t* at, int64_t count,
             const void* g, float* out) {
  if (!halves) return collect_of<V>((const float*)panel, stride, ld, panels, at, count, (const float*)g, out);
#if defined(__AVX512BF16__)
  if constexpr (V == 16) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4)
      collect_rows<4>((const uint16_t*)panel, ld, panels, at + i, (const uint16_t*)g, out + i);
    for (; i < count; ++i) collect_rows<1>((const uint16_t*)panel, ld, panels, at + i, (const uint16_t*)g, out + i);
    return;
  }
#endif
  float wide[2 * V * MOST_PANELS];
  for (int j = 0; j < 2 * V * panels; ++j) wide[j] = from_bf16(((const uint16_t*)g)[j]);
  collect_of<V>((const uint16_t*)panel, 2 * V, ld, panels, at, count, wide, out);
}

// of one row: whole = ‖w + s·Σ b·a‖² by Gram's identity, r (r, r) = a·aᵀ, p = w·aᵀ; the result says that it is what is
// left of larger terms, so that float32 products are too coarse for it
inline bool norm_row(const double* gram, int64_t r, const float* b, const float* p, double squares, double s,
                     double* scratch, double* whole) {
  double cross = 0, quadratic = 0, diagonal = 0;
  std::fill(scratch, scratch + r, 0.0);
  for (int64_t i = 0; i < r; ++i) {
    const double bi = b[i];
    cross += bi * p[i];
    diagonal += bi * bi * gram[i * r + i];
    for (int64_t j = 0; j < r; ++j) scratch[j] += bi * gram[i * r + j];
  }
  for (int64_t i = 0; i < r; ++i) quadratic += scratch[i] * b[i];
  *whole = squares + 2 * s * cross + s * s * quadratic;
  // w·aᵀ is off by about eps·‖w‖·‖a‖ in each element, and those errors are independent
  const double rounding = 2 * std::abs(s) * std::sqrt(squares * diagonal);
  constexpr double WORST = 2;  // (‖w‖² + rounding) / whole up to which float32 is enough
  return squares + rounding > WORST * *whole;
}

// line (n) += f·a
inline void add_wide(double f, const float* a, int64_t n, double* line) {
  for (int64_t i = 0; i < n; ++i) line[i] += f * a[i];
}

template <int V>
constexpr ColumnOps column_ops{widen<V>, panel_squares<V>, dot<V>, mix<V>, put<V>, scale<V>, lines<V>, spread<V>,
                               collect<V>, norm_row, add_wide};

}  // namespace
}  // namespace peft_fast
