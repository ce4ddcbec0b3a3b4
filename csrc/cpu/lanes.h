// V floats at a time, in whatever vectors the including isa_*.cpp has; bfloat16 is widened on the way in and rounded
// once on the way out.
#pragma once
// gcc 12 warns of its own intrinsics
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <cstring>

#include "cpu/engine.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace peft_fast {
namespace {

template <class T, int V>
struct Vector {
  typedef T type __attribute__((vector_size(V * sizeof(T)), aligned(sizeof(T)), may_alias));
};

template <int V>
struct Lanes {
  using vec = typename Vector<float, V>::type;
  using words = typename Vector<uint32_t, V>::type;
  using halves = typename Vector<uint16_t, V>::type;

  static vec load(const float* p) { return *(const vec*)p; }
  static vec load(const uint16_t* p) {
    // gcc splits this conversion in two
#if defined(__AVX512F__)
    if constexpr (V == 16) return (vec)((words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#endif
#if defined(__AVX2__)
    if constexpr (V == 8) return (vec)((words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#endif
    return (vec)(__builtin_convertvector(*(const halves*)p, words) << 16);
  }
  static void store(float* p, vec v) { *(vec*)p = v; }
  static void store(uint16_t* p, vec v) {
#if defined(__AVX512BF16__)
    if constexpr (V == 16) {
      _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
      return;
    }
#endif
    // round to nearest even; a NaN stays a NaN
    const words bits = (words)v;
    const words rounded = v == v ? (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u;
#if defined(__AVX2__)
    // gcc narrows this one by way of memory
    if constexpr (V == 8) {
      const __m256i wide = (__m256i)rounded;
      const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
      _mm_storeu_si128((__m128i*)p, packed);
      return;
    }
#endif
    *(halves*)p = __builtin_convertvector(rounded, halves);
  }

  template <class T>
  static vec rounded(vec v) {
    T line[V];
    store(line, v);
    return load(line);
  }

  // v where the bit of its lane is set, else what else there is; j is a multiple of V, and of 4
  static vec keep(vec v, const uint8_t* bits, int64_t j, vec other = vec{}) {
    uint32_t word = 0;
    std::memcpy(&word, bits + (j >> 3), (V + 7) / 8);
    words lane{};
    for (int i = 0; i < V; ++i) lane[i] = 1u << i;
    return ((words{} + (word >> (j & 7))) & lane) != 0 ? v : other;
  }

  // 2^t to 1.2 ulp = 2^floor(t) times a polynomial on [0, 1], fitted to 8e-8; 0 below -127, infinite from 128 on
  static vec exp2(vec t) {
#if defined(__AVX512DQ__)
    if constexpr (V == 16)
      return (vec)_mm512_scalef_ps((__m512)power((vec)_mm512_reduce_ps((__m512)t, 1)), (__m512)t);
#endif
    t = below(above(t, -126.9f), 128.0f);  // from -127.5 on the exponent would be negative
    constexpr float magic = 12582912.0f;  // adding 1.5·2^23 rounds to an integer, which the low bits then hold
    const vec shifted = (t - 0.5f) + magic;
    return power(t - (shifted - magic)) * (vec)(((words)shifted + 127u) << 23);
  }
  static vec power(vec f) {
    vec p = vec{} + 1.867130981e-03f;
    p = p * f + 9.017027915e-03f;
    p = p * f + 5.579991639e-02f;
    p = p * f + 2.401644439e-01f;
    p = p * f + 6.931512952e-01f;
    return p * f + 1.0f;
  }
  // x with a smallest and a largest value; a NaN stays
  static vec above(vec x, float least) {
#if defined(__AVX2__)
    if constexpr (V == 8) return (vec)_mm256_max_ps(_mm256_set1_ps(least), (__m256)x);
#endif
    return x < least ? vec{} + least : x;
  }
  static vec below(vec x, float most) {
#if defined(__AVX512F__)
    if constexpr (V == 16) return (vec)_mm512_min_ps(_mm512_set1_ps(most), (__m512)x);
#endif
#if defined(__AVX2__)
    if constexpr (V == 8) return (vec)_mm256_min_ps(_mm256_set1_ps(most), (__m256)x);
#endif
    return x > most ? vec{} + most : x;
  }
  static vec abs(vec x) { return (vec)((words)x & 0x7FFFFFFFu); }
};

// n neighbouring elements: y = w_scale·w, rounded to w's type, + c_scale·c; c is read to the next multiple of V
template <int V, class T>
void add_line(const T* w, float w_scale, const float* c, float c_scale, int64_t n, T* y) {
  using L = Lanes<V>;
  auto add = [&](const T* w, const float* c, T* y) {
    L::store(y, L::template rounded<T>(L::load(w) * w_scale) + L::load(c) * c_scale);
  };
  int64_t j = 0;
  for (; j + V <= n; j += V) add(w + j, c + j, y + j);
  if (j == n) return;
  T in[V] = {}, out[V];
  std::memcpy(in, w + j, (n - j) * sizeof(T));
  add(in, c + j, out);
  std::memcpy(y + j, out, (n - j) * sizeof(T));
}

template <int V>
void add_row(const void* w, bool bf16, float w_scale, const float* c, float c_scale, int64_t n, void* y) {
  if (bf16) add_line<V>((const uint16_t*)w, w_scale, c, c_scale, n, (uint16_t*)y);
  else add_line<V>((const float*)w, w_scale, c, c_scale, n, (float*)y);
}

}  // namespace
}  // namespace peft_fast
