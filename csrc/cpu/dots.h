// Few tokens times a weight as it lies in memory: each element of it is read once and used for all of them.
//
// dots takes a weight whose k lies together, four rows of it at a time; sums one whose n does, as Conv1D's, a few
// vectors of columns at a time. Nothing is packed but x, so that the weight's way from memory is all there is to pay.
#pragma once
#include <algorithm>
#include <type_traits>

#include "cpu/lanes.h"

namespace peft_fast {
namespace {

constexpr int64_t CHAIN = 256;  // terms summed one after another before they join c, as in tiles.h

// the first n lanes, zero beyond
template <int V, class T>
typename Lanes<V>::vec load_part(const T* p, int64_t n) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  if constexpr (V == 16) {
    const auto mask = __mmask16((1u << n) - 1);
    if constexpr (sizeof(T) == 4) return (typename Lanes<V>::vec)_mm512_maskz_loadu_ps(mask, p);
    else return (typename Lanes<V>::vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16);
  }
#endif
  T line[V] = {};
  std::memcpy(line, p, n * sizeof(T));
  return Lanes<V>::load(line);
}

template <int V>
float sum(typename Lanes<V>::vec v) {
#if defined(__AVX512F__)
  if constexpr (V == 16) return _mm512_reduce_add_ps((__m512)v);
#endif
  float line[V];
  Lanes<V>::store(line, v);
  for (int n = V / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) line[i] += line[i + n];
  return line[0];
}

// the sum of each of four vectors, every one in the order that sum() has
template <int V>
void sum_four(const typename Lanes<V>::vec* v, float* out) {
#if defined(__AVX512F__)
  if constexpr (V == 16) {
    const auto a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
    // from here on four lanes each, as they came
    __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4E));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xB1));
    const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(first, all)));
    return;
  }
#endif
  for (int i = 0; i < 4; ++i) out[i] = sum<V>(v[i]);
}

#if defined(__AVX512F__)
// the sum of each of sixteen vectors, every one in the order that sum() has
inline __m512 sum_sixteen(const Lanes<16>::vec* v) {
  __m512 quads[4];  // in each 128 bits of the q-th, four lanes of vector 4q + i
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const auto a = (__m512)v[4 * q], b = (__m512)v[4 * q + 1], c = (__m512)v[4 * q + 2], d = (__m512)v[4 * q + 3];
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
    quads[q] = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
  }
  const auto fold = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  const __m512 low = fold(quads[0], quads[1]), high = fold(quads[2], quads[3]);
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xEE));
  const __m512i turned = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_ps(turned, all);
}
#endif

// one vector's worth of w·x: w widened on the way in, x float32
template <int V, class T>
struct WideDot {
  using W = T;
  using X = float;
  using vec = typename Lanes<V>::vec;
  static constexpr int step = V;
  static vec load(const T* p) { return Lanes<V>::load(p); }
  static vec part(const T* p, int64_t n) { return load_part<V>(p, n); }
  static vec x(const float* p) { return Lanes<V>::load(p); }
  static void add(vec& acc, vec w, vec x) { acc += w * x; }
};

#if defined(__AVX512BF16__)
// the same by bfloat16 pairs
struct HalfDot {
  using W = uint16_t;
  using X = uint16_t;
  using vec = Lanes<16>::vec;
  static constexpr int step = 32;
  static vec load(const uint16_t* p) { return (vec)_mm512_loadu_si512(p); }
  static vec part(const uint16_t* p, int64_t n) { return (vec)_mm512_maskz_loadu_epi16((1u << n) - 1, p); }
  static vec x(const uint16_t* p) { return load(p); }
  static void add(vec& acc, vec w, vec x) { acc = (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x); }
};
#endif

// c (TM, RW) = or += x (TM, k)·wᵀ (RW, k); a row's sum does not depend on RW. AHEAD: asks for the next RW rows, which
// the processor does not guess where rows are short, and which would else wait until all tokens had these
template <class D, int V, int RW, int TM, bool AHEAD>
void dots_tile(const typename D::W* w, int64_t row, const typename D::X* x, int64_t ldx, int64_t k, float* c,
               int64_t ldc, bool add) {
  using vec = typename D::vec;
  constexpr int U = TM == 1 ? 2 : 1;  // chains that hide the latency
  vec acc[RW][TM][U] = {};
  int64_t p = 0;
  for (; p + U * D::step <= k; p += U * D::step) {
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
      vec xs[TM];
#pragma GCC unroll 4
      for (int t = 0; t < TM; ++t) xs[t] = D::x(x + t * ldx + p + u * D::step);
#pragma GCC unroll 8
      for (int i = 0; i < RW; ++i) {
        const vec ws = D::load(w + i * row + p + u * D::step);
        if (AHEAD) __builtin_prefetch(w + (RW + i) * row + p + u * D::step, 0, 2);
#pragma GCC unroll 4
        for (int t = 0; t < TM; ++t) D::add(acc[i][t][u], ws, xs[t]);
      }
    }
  }
  for (; p < k; p += D::step) {
#pragma GCC unroll 8
    for (int i = 0; i < RW; ++i) {
      const vec ws = p + D::step <= k ? D::load(w + i * row + p) : D::part(w + i * row + p, k - p);
#pragma GCC unroll 4
      for (int t = 0; t < TM; ++t) D::add(acc[i][t][0], ws, D::x(x + t * ldx + p));
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < TM; ++t) {
    vec all[RW];
    float s[RW];
#pragma GCC unroll 8
    for (int i = 0; i < RW; ++i) {
      all[i] = acc[i][t][0];
      if constexpr (U == 2) all[i] += acc[i][t][1];
    }
    if constexpr (RW % 4 == 0)
      for (int i = 0; i < RW; i += 4) sum_four<V>(all + i, s + i);
    else
      for (int i = 0; i < RW; ++i) s[i] = sum<V>(all[i]);
    float* to = c + t * ldc;
#pragma GCC unroll 8
    for (int i = 0; i < RW; ++i) to[i] = add ? to[i] + s[i] : s[i];
  }
}

template <class D, int V, int TM, bool AHEAD = false>
void dots_rows(const typename D::W* w, int64_t row, int64_t n, const typename D::X* x, int64_t ldx, int64_t k,
               float* c, int64_t ldc, bool add) {
  constexpr int RW = V == 16 ? 4 : TM == 1 ? 4 : 2;
  int64_t i = 0;
  if constexpr (V == 16 && TM == 1 && !AHEAD)  // rows that the processor guesses: more of them at a time, 3 % faster
    for (; i + 8 <= n; i += 8) dots_tile<D, V, 8, TM, false>(w + i * row, row, x, ldx, k, c + i, ldc, add);
  if constexpr (V == 16 && TM == 2 && AHEAD && sizeof(*w) == 4)  // a token and a probe: the second costs nothing then
    for (; i + 8 <= n; i += 8) dots_tile<D, V, 8, TM, AHEAD>(w + i * row, row, x, ldx, k, c + i, ldc, add);
  for (; i + RW <= n; i += RW) dots_tile<D, V, RW, TM, AHEAD>(w + i * row, row, x, ldx, k, c + i, ldc, add);
  for (; i < n; ++i) dots_tile<D, V, 1, TM, false>(w + i * row, row, x, ldx, k, c + i, ldc, add);
}

#if defined(__AVX512F__)
// few k, as those of an adapter's rank: the sums across lanes are most of it, and sixteen of them cost little more than
// four. Rows that are none are those before them once more
template <class D>
void dots_short(const typename D::W* w, int64_t row, int64_t n, const typename D::X* x, int64_t ldx, int64_t k,
                int64_t m, float* c, int64_t ldc, bool add) {
  constexpr int64_t AHEAD = 48;  // rows
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t rows = std::min<int64_t>(16, n - i);
    const auto mask = __mmask16((1u << rows) - 1);
    for (int64_t t = 0; t < m; ++t) {
      Lanes<16>::vec acc[16] = {};
      for (int64_t p = 0; p < k; p += D::step) {
        const auto xs = D::x(x + t * ldx + p);
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j) {
          const auto* at = w + (i + std::min<int64_t>(j, rows - 1)) * row + p;
          if (t == 0) __builtin_prefetch(at + AHEAD * row, 0, 2);
          D::add(acc[j], p + D::step <= k ? D::load(at) : D::part(at, k - p), xs);
        }
      }
      float* to = c + t * ldc + i;
      const __m512 sums = sum_sixteen(acc);
      _mm512_mask_storeu_ps(to, mask, add ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sums) : sums);
    }
  }
}
#endif

template <class D, int V>
void dots_of(const void* w_, int64_t row, int64_t n, const void* x_, int64_t ldx, int64_t k, int64_t m, float* c,
             int64_t ldc, bool add) {
  const auto* w = (const typename D::W*)w_;
  const auto* x = (const typename D::X*)x_;
#if defined(__AVX512F__)
  if (k <= 4 * D::step) return dots_short<D>(w, row, n, x, ldx, k, m, c, ldc, add);
#endif
  // so many rows at a time where tokens or stretches of k take turns: what was read for the first is in the first-level
  // cache for the others, and memory is read along its rows
  const int64_t block = m > 4 || k > CHAIN * D::step ? (m == 1 ? 8 : 4) : n;
  // of float32 rows as long as a page the processor itself reads ahead, and better: 27 GB/s for 25 (bfloat16: 23 for 25)
  const bool guessed = sizeof(*w) == 4 && k * 4 >= 4096;
  for (int64_t i = 0; i < n; i += block) {
    const int64_t rows = std::min(n - i, block);
    for (int64_t k0 = 0; k0 < k || k0 == 0; k0 += CHAIN * D::step) {
      const int64_t kn = std::min<int64_t>(CHAIN * D::step, k - k0);
      const auto* at = w + i * row + k0;
      const auto rows_of = [&](auto some, auto ahead, int64_t t) {
        dots_rows<D, V, some(), ahead()>(at, row, rows, x + t * ldx + k0, ldx, kn, c + t * ldc + i, ldc, add || k0);
      };
      constexpr std::integral_constant<int, 4> four{};
      constexpr std::integral_constant<int, 2> two{};
      constexpr std::integral_constant<int, 1> one{};
      int64_t t = 0;
      for (; t + 4 < m; t += 4) rows_of(four, std::false_type{}, t);
      if (t + 4 == m) rows_of(four, std::true_type{}, t), t += 4;
      for (; t + 2 < m; t += 2) rows_of(two, std::false_type{}, t);
      if (t + 2 == m) rows_of(two, std::true_type{}, t), t += 2;
      if (t == m) continue;
      if (guessed) rows_of(one, std::false_type{}, t);
      else rows_of(one, std::true_type{}, t);
    }
  }
}

template <int V>
void dots(const void* w, bool bf16, int64_t row, int64_t n, const void* x, int64_t ldx, int64_t k, int64_t m, float* c,
          int64_t ldc, bool add) {
  if (bf16) dots_of<WideDot<V, uint16_t>, V>(w, row, n, x, ldx, k, m, c, ldc, add);
  else dots_of<WideDot<V, float>, V>(w, row, n, x, ldx, k, m, c, ldc, add);
}

#if defined(__AVX512BF16__)
inline void dots_half(const void* w, bool, int64_t row, int64_t n, const void* x, int64_t ldx, int64_t k, int64_t m,
                      float* c, int64_t ldc, bool add) {
  dots_of<HalfDot, 16>(w, row, n, x, ldx, k, m, c, ldc, add);
}
#endif

// c (TM, NV·V) = x (TM, k)·w (k, NV·V); n < NV·V columns where PART
template <int V, class T, int NV, int TM, bool PART>
void sums_tile(const T* w, int64_t row, int64_t n, const float* x, int64_t ldx, int64_t k, float* c, int64_t ldc,
               bool add) {
  using L = Lanes<V>;
  using vec = typename L::vec;
  constexpr int64_t AHEAD = 8;  // rows lie too far apart for the hardware to guess
  vec acc[TM][NV] = {};
  for (int64_t p = 0; p < k; ++p, w += row) {
    if (!PART && p + AHEAD < k)
#pragma GCC unroll 16
      for (int j = 0; j < NV * V; j += 64 / sizeof(T)) __builtin_prefetch(w + AHEAD * row + j);
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) {
      vec ws{};
      if (!PART || (j + 1) * V <= n) ws = L::load(w + j * V);
      else if (j * V < n) ws = load_part<V>(w + j * V, n - j * V);
#pragma GCC unroll 4
      for (int t = 0; t < TM; ++t) acc[t][j] += ws * x[t * ldx + p];
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < TM; ++t)
#pragma GCC unroll 16
    for (int j = 0; j < NV; ++j) {
      auto* to = (vec*)(c + t * ldc + j * V);
      *to = add ? *to + acc[t][j] : acc[t][j];
    }
}

template <int V, class T, int TM>
void sums_columns(const T* w, int64_t row, int64_t n, const float* x, int64_t ldx, int64_t k, float* c, int64_t ldc,
                  bool add) {
  constexpr int NV = (V == 16 ? 16 : 8) / TM;
  for (int64_t j = 0; j < n; j += NV * V) {
    auto* tile = n - j < NV * V ? sums_tile<V, T, NV, TM, true> : sums_tile<V, T, NV, TM, false>;
    tile(w + j, row, n - j, x, ldx, k, c + j, ldc, add);
  }
}

// c (m, n) = x (m, k)·w (k, n); c has room for whole tiles of COLUMNS
template <int V, class T>
void sums_of(const T* w, int64_t row, int64_t n, const float* x, int64_t ldx, int64_t k, int64_t m, float* c,
             int64_t ldc) {
  constexpr int64_t COLUMNS = 256;  // with CHAIN rows: what the second-level cache holds for the next tokens
  for (int64_t j = 0; j < n; j += COLUMNS)
    for (int64_t k0 = 0; k0 < k || k0 == 0; k0 += CHAIN) {
      const int64_t kn = std::min(CHAIN, k - k0), cols = std::min(COLUMNS, n - j);
      const T* at = w + k0 * row + j;
      const float* xs = x + k0;
      float* to = c + j;
      int64_t t = 0;
      for (; t + 4 <= m; t += 4) sums_columns<V, T, 4>(at, row, cols, xs + t * ldx, ldx, kn, to + t * ldc, ldc, k0 > 0);
      for (; t + 2 <= m; t += 2) sums_columns<V, T, 2>(at, row, cols, xs + t * ldx, ldx, kn, to + t * ldc, ldc, k0 > 0);
      if (t < m) sums_columns<V, T, 1>(at, row, cols, xs + t * ldx, ldx, kn, to + t * ldc, ldc, k0 > 0);
    }
}

template <int V>
void sums(const void* w, bool bf16, int64_t row, int64_t n, const float* x, int64_t ldx, int64_t k, int64_t m, float* c,
          int64_t ldc) {
  if (bf16) sums_of<V>((const uint16_t*)w, row, n, x, ldx, k, m, c, ldc);
  else sums_of<V>((const float*)w, row, n, x, ldx, k, m, c, ldc);
}

using Dots = void (*)(const void*, bool, int64_t, int64_t, const void*, int64_t, int64_t, int64_t, float*, int64_t, bool);

template <int V, bool HALF>
constexpr Dots dots_with() {
#if defined(__AVX512BF16__)
  if (HALF) return dots_half;
#endif
  return dots<V>;
}

}  // namespace
}  // namespace peft_fast
