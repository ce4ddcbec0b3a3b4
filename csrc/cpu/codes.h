// Values kept in 8 bits or fewer -> float32 or bfloat16: float32 products with the block's scale, rounded once.
//
// A block of 4-bit values has 16 different products: they are made and rounded once, then looked up.
#pragma once
#include <algorithm>

#include "cpu/copies.h"

namespace peft_fast {
namespace {

// what each nibble means in a block; look() takes `bytes` of them, the earlier value of each in the high half, pick()
// 2·bytes with one value each, which is (byte >> right) & mask
template <int V, class T>
struct Meaning {
  static constexpr int bytes = 1;
  T of[16];

  Meaning(const float* code, float scale) {
    for (int i = 0; i < 16; ++i) of[i] = convert<T>(code[i] * scale);
  }
  void look(const uint8_t* from, T* out) const {
    out[0] = of[*from >> 4];
    out[1] = of[*from & 15];
  }
  void pick(const uint8_t* from, int right, int mask, T* out) const {
    out[0] = of[(from[0] >> right) & mask];
    out[1] = of[(from[1] >> right) & mask];
  }
};

#if defined(__AVX512BW__)
// the low bits of a lane choose, whatever is above them
template <>
struct Meaning<16, float> {
  static constexpr int bytes = 8;
  __m512 of;

  Meaning(const float* code, float scale) : of(_mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(scale))) {}
  void look(const uint8_t* from, float* out) const {
    const __m512i v = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)from));
    const __m512i at = _mm512_or_si512(_mm512_srli_epi64(v, 4), _mm512_slli_epi64(v, 32));
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(at, of));
  }
  void pick(const uint8_t* from, int right, int mask, float* out) const {
    const __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
    const __m512i at = _mm512_and_si512(_mm512_srl_epi32(v, _mm_cvtsi32_si128(right)), _mm512_set1_epi32(mask));
    _mm512_storeu_ps(out, _mm512_permutexvar_ps(at, of));
  }
};

template <>
struct Meaning<16, uint16_t> {
  static constexpr int bytes = 16;
  __m512i of;  // all 16 twice: an index into 32 words has five bits

  Meaning(const float* code, float scale) {
    const __m512 f = _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(scale));
    const __m512i bits = _mm512_castps_si512(f), high = _mm512_srli_epi32(bits, 16);
    // as to_bf16, which keeps what is denormal
    const __m512i half = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7FFF));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    const __mmask16 none = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
    of = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, none, quiet)));
  }
  void look(const uint8_t* from, uint16_t* out) const {
    const __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
    const __m512i at = _mm512_or_si512(_mm512_srli_epi32(v, 4), _mm512_slli_epi32(v, 16));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(at, of));
  }
  void pick(const uint8_t* from, int right, int mask, uint16_t* out) const {
    const __m512i v = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
    const __m512i at = _mm512_and_si512(_mm512_srl_epi16(v, _mm_cvtsi32_si128(right)), _mm512_set1_epi16(short(mask)));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(at, of));
  }
};
#elif defined(__AVX2__)
template <>
struct Meaning<8, float> {
  static constexpr int bytes = 4;
  __m256 low, high;

  Meaning(const float* code, float scale)
      : low(_mm256_mul_ps(_mm256_loadu_ps(code), _mm256_set1_ps(scale))),
        high(_mm256_mul_ps(_mm256_loadu_ps(code + 8), _mm256_set1_ps(scale))) {}
  void look(const uint8_t* from, float* out) const {
    int32_t four;
    std::memcpy(&four, from, 4);
    const __m256i v = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    choose(_mm256_or_si256(_mm256_srli_epi64(v, 4), _mm256_slli_epi64(v, 32)), out);
  }
  void pick(const uint8_t* from, int right, int mask, float* out) const {
    const __m256i v = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
    choose(_mm256_and_si256(_mm256_srl_epi32(v, _mm_cvtsi32_si128(right)), _mm256_set1_epi32(mask)), out);
  }
  void choose(__m256i at, float* out) const {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));  // its sign: bit 3 of the nibble
    const __m256 a = _mm256_permutevar8x32_ps(low, at), b = _mm256_permutevar8x32_ps(high, at);
    _mm256_storeu_ps(out, _mm256_blendv_ps(a, b, upper));
  }
};
#endif

template <int V, class T>
void decode_nibbles(const Codes& c, int64_t first, int64_t n, T* out) {
  using Table = Meaning<V, T>;
  const auto* data = (const uint8_t*)c.data;
  int64_t i = first, block = first / c.block;
  for (const int64_t end = first + n; i < end; ++block) {
    const int64_t stop = std::min(end, (block + 1) * c.block);
    const float scale = c.scales[block];
    auto one = [&] {
      const int byte = data[i >> 1];
      *out++ = convert<T>(c.meaning[i & 1 ? byte & 15 : byte >> 4] * scale);
      ++i;
    };
    if (i & 1) one();
    const Table table(c.meaning, scale);
    for (; i + 2 * Table::bytes <= stop; i += 2 * Table::bytes, out += 2 * Table::bytes)
      table.look(data + (i >> 1), out);
    while (i < stop) one();
  }
}

// V int8 as floats
template <int V>
inline typename Lanes<V>::vec widened(const int8_t* p) {
  // gcc goes by way of scalars
#if defined(__AVX512F__)
  if constexpr (V == 16)
    return (typename Lanes<V>::vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#endif
#if defined(__AVX2__)
  if constexpr (V == 8)
    return (typename Lanes<V>::vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#endif
  return __builtin_convertvector(*(const typename Vector<int8_t, V>::type*)p, typename Lanes<V>::vec);
}

template <int V, class T>
void decode_bytes(const Codes& c, int64_t first, int64_t n, T* out) {
  const auto* data = (const int8_t*)c.data;
  int64_t i = first, block = first / c.block;
  for (const int64_t end = first + n; i < end; ++block) {
    const int64_t stop = std::min(end, (block + 1) * c.block);
    const float scale = c.scales[block], zero = c.zeros ? float(c.zeros[block]) : 0.0f;
    for (; i + V <= stop; i += V, out += V) Lanes<V>::store(out, (widened<V>(data + i) - zero) * scale);
    for (; i < stop; ++i) *out++ = convert<T>((float(data[i]) - zero) * scale);
  }
}

template <int V>
inline typename Lanes<V>::vec widened(const uint8_t* p) {
#if defined(__AVX512F__)
  if constexpr (V == 16)
    return (typename Lanes<V>::vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#endif
#if defined(__AVX2__)
  if constexpr (V == 8)
    return (typename Lanes<V>::vec)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#endif
  return __builtin_convertvector(*(const typename Vector<uint8_t, V>::type*)p, typename Lanes<V>::vec);
}

// as to_bf16, which keeps what is denormal; the bits of a bfloat16 in the high half
template <int V>
inline typename Lanes<V>::words halved(typename Lanes<V>::vec v) {
  const auto bits = (typename Lanes<V>::words)v;
  return (v == v ? bits + 0x7FFFu + ((bits >> 16) & 1u) : bits | 0x400000u) & 0xFFFF0000u;
}

template <int V>
inline void put(typename Lanes<V>::vec v, float* out) { Lanes<V>::store(out, v); }
template <int V>
inline void put(typename Lanes<V>::vec v, uint16_t* out) {
  *(typename Lanes<V>::halves*)out = __builtin_convertvector(halved<V>(v) >> 16, typename Lanes<V>::halves);
}

template <int V, class T>
void decode_planes(const Codes& c, int64_t first, int64_t n, T* out) {
  using Table = Meaning<V, T>;
  using vec = typename Lanes<V>::vec;
  constexpr uint8_t each[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  int64_t i = first, block = first / c.block;
  for (const int64_t end = first + n; i < end; ++block) {
    const int64_t stop = std::min(end, (block + 1) * c.block), plane = i / c.plane;
    const uint8_t* from = (const uint8_t*)c.data + (i - plane * c.plane);
    const float scale = c.scales[block], shift = c.shifts[block];
    auto less = [&](const uint8_t* values) {
      const vec v = widened<V>(values) - shift;
      return c.round ? (vec)halved<V>(v) : v;
    };
    if (c.bits == 8) {
      for (; i + V <= stop; i += V, from += V, out += V) put<V>(less(from) * scale, out);
      if (i == stop) continue;
      uint8_t rest[V] = {};
      T line[V];
      std::memcpy(rest, from, stop - i);
      put<V>(less(rest) * scale, line);
      std::memcpy(out, line, (stop - i) * sizeof(T));
      out += stop - i;
      i = stop;
      continue;
    }
    const int right = 8 - c.bits * int(plane + 1), mask = (1 << c.bits) - 1;
    alignas(64) float of[16];
    for (int j = 0; j < 16; j += V) Lanes<V>::store(of + j, less(each + j));
    const Table table(of, scale);
    for (; i + 2 * Table::bytes <= stop; i += 2 * Table::bytes, from += 2 * Table::bytes, out += 2 * Table::bytes)
      table.pick(from, right, mask, out);
    for (; i < stop; ++i) *out++ = convert<T>(of[(*from++ >> right) & mask] * scale);
  }
}

template <int V>
void decode(const Codes& c, int64_t first, int64_t n, bool bf16, void* out) {
  if (c.shifts) bf16 ? decode_planes<V>(c, first, n, (uint16_t*)out) : decode_planes<V>(c, first, n, (float*)out);
  else if (c.bits == 4 && bf16) decode_nibbles<V>(c, first, n, (uint16_t*)out);
  else if (c.bits == 4) decode_nibbles<V>(c, first, n, (float*)out);
  else bf16 ? decode_bytes<V>(c, first, n, (uint16_t*)out) : decode_bytes<V>(c, first, n, (float*)out);
}

}  // namespace
}  // namespace peft_fast
