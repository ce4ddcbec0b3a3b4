// Copies between memory and packed operands, and the epilogue: plain loops that each isa_*.cpp compiles
// with its own flags (everything here has internal linkage on purpose).
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

#include "cpu/lanes.h"

namespace peft_fast {
namespace {

inline float from_bf16(uint16_t h) {
  uint32_t bits = uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// round to nearest even; a NaN stays a NaN
inline uint16_t to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);
}

template <class To>
inline To convert(float f);
template <>
inline float convert<float>(float f) { return f; }
template <>
inline uint16_t convert<uint16_t>(float f) { return to_bf16(f); }
inline float widen(float f) { return f; }
inline float widen(uint16_t h) { return from_bf16(h); }

inline bool bit(const uint8_t* bits, int64_t j) { return (bits[j >> 3] >> (j & 7)) & 1; }

// n neighbouring elements, same type on both sides, those without their bit set to zero; j0 is a multiple of 8
template <class T>
inline void copy_masked(const T* in, int64_t n, const uint8_t* bits, int64_t j0, T* out) {
  int64_t j = 0;
#if defined(__AVX512BW__)
  constexpr int L = 64 / sizeof(T);
  for (; j + L <= n; j += L) {
    uint64_t m = 0;
    std::memcpy(&m, bits + ((j0 + j) >> 3), L / 8);
    if constexpr (sizeof(T) == 2) {
      _mm512_storeu_epi16(out + j, _mm512_maskz_loadu_epi16(__mmask32(m), in + j));
    } else {
      _mm512_storeu_ps(out + j, _mm512_maskz_loadu_ps(__mmask16(m), in + j));
    }
  }
#endif
  for (; j < n; ++j) out[j] = bit(bits, j0 + j) ? in[j] : T(0);
}

// n elements, `step` apart in the source, as packed elements; j0, the column of the first, is a multiple of 8
template <class From, class To>
inline void copy_line(const From* in, int64_t step, int64_t n, bool round, const uint8_t* bits, int64_t j0, To* out) {
  if constexpr (std::is_same_v<From, To>) {
    if (step == 1 && !round) {
      if (bits) copy_masked(in, n, bits, j0, out);
      else std::memcpy(out, in, n * sizeof(To));
      return;
    }
  }
  if (round) {
    for (int64_t j = 0; j < n; ++j) out[j] = convert<To>(from_bf16(to_bf16(widen(in[j * step]))));
  } else if (step == 1) {
    for (int64_t j = 0; j < n; ++j) out[j] = convert<To>(widen(in[j]));
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = convert<To>(widen(in[j * step]));
  }
  if (bits) copy_masked(out, n, bits, j0, out);
}

template <class To>
inline void copy_row(const Source& s, int64_t i, int64_t j, int64_t n, To* out) {
  const uint8_t* bits = s.mask ? s.mask + i * s.mask_row : nullptr;
  const int64_t at = i * s.row + j * s.col;
  // rounding twice is rounding once: a bfloat16 destination rounds by itself
  if (s.bf16) copy_line((const uint16_t*)s.data + at, s.col, n, false, bits, j, out);
  else copy_line((const float*)s.data + at, s.col, n, s.round && sizeof(To) == 4, bits, j, out);
}

template <class To, int KPAD>
void rows(const Source& s, int64_t i0, int64_t m, int64_t k0, int64_t k, void* out, int64_t ld) {
  const int64_t padded = (k + KPAD - 1) / KPAD * KPAD;
  for (int64_t i = 0; i < m; ++i) {
    To* line = (To*)out + i * ld;
    copy_row(s, i0 + i, k0, k, line);
    for (int64_t j = k; j < padded; ++j) line[j] = To(0);
  }
}

#if defined(__AVX512F__)
// 16 lines of 16 dwords, `ld` dwords apart -> transposed, 16 dwords at out + i * step
inline void transpose16(const uint32_t* in, int64_t ld, uint32_t* out, int64_t step) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + i * ld);
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + i * step, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 8) * step, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD));
    _mm512_storeu_si512(out + (i + 4) * step, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_si512(out + (i + 12) * step, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD));
  }
}
#endif

// `lines` lines of `n` dwords -> out[j * step + i]
inline void transpose(const uint32_t* in, int64_t ld, int64_t lines, int64_t n, uint32_t* out, int64_t step) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= lines; i += 16) {
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) {
      // sixteen streams at once: more than the hardware follows into cold memory
      for (int l = 0; l < 16; ++l) __builtin_prefetch(in + (i + l) * ld + j + 96);
      transpose16(in + i * ld + j, ld, out + j * step + i, step);
    }
    for (; j < n; ++j)
      for (int l = 0; l < 16; ++l) out[j * step + i + l] = in[(i + l) * ld + j];
  }
#endif
  for (; i < lines; ++i)
    for (int64_t j = 0; j < n; ++j) out[j * step + i] = in[i * ld + j];
}

// two lines of n bfloat16 -> n pairs; elements without their bit are zero (bits null = keep all), j0 a multiple of 32
inline void interleave(const uint16_t* a, const uint16_t* b, int64_t n, const uint8_t* a_bits, const uint8_t* b_bits,
                       int64_t j0, uint32_t* out) {
  int64_t j = 0;
#if defined(__AVX512BW__)
  for (; j + 32 <= n; j += 32) {
    __mmask32 am = ~__mmask32(0), bm = am;
    if (a_bits) {
      std::memcpy(&am, a_bits + ((j0 + j) >> 3), 4);
      std::memcpy(&bm, b_bits + ((j0 + j) >> 3), 4);
    }
    const __m512i av = _mm512_maskz_loadu_epi16(am, a + j), bv = _mm512_maskz_loadu_epi16(bm, b + j);
    for (int half = 0; half < 2; ++half) {
      const __m512i lo = _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(av, 1) : _mm512_castsi512_si256(av));
      const __m512i hi = _mm512_cvtepu16_epi32(half ? _mm512_extracti64x4_epi64(bv, 1) : _mm512_castsi512_si256(bv));
      _mm512_storeu_si512(out + j + 16 * half, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
    }
  }
#endif
  for (; j < n; ++j) {
    const uint32_t lo = a_bits && !bit(a_bits, j0 + j) ? 0 : a[j], hi = b_bits && !bit(b_bits, j0 + j) ? 0 : b[j];
    out[j] = lo | hi << 16;
  }
}

// the next panel's part of a row: rows lie too far apart for the hardware to guess
inline void prefetch_next(const void* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)at + i, 0, 2);
}

// rows of BYTES each, `row` bytes apart -> one after another. Inlined moves of a known size: a call for every 128 bytes
// took up to a third of a small layer's time whenever the core's other thread was busy
template <int BYTES>
inline void copy_rows(const char* in, int64_t row, int64_t count, char* out) {
  for (; count > 0; --count, in += row, out += BYTES) {
    prefetch_next(in + BYTES, BYTES);
    std::memcpy(out, in, BYTES);
  }
}

#if defined(__AVX512BW__)
// the same for bfloat16: two rows of WIDTH elements -> WIDTH pairs
template <int WIDTH>
inline void pair_rows(const uint16_t* in, int64_t row, int64_t pairs, uint32_t* out) {
  for (; pairs > 0; --pairs, in += 2 * row, out += WIDTH) {
    prefetch_next(in + WIDTH, WIDTH * 2);
    prefetch_next(in + row + WIDTH, WIDTH * 2);
#pragma GCC unroll 2
    for (int j = 0; j < WIDTH; j += 16) {
      const __m512i lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(in + j)));
      const __m512i hi = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(in + row + j)));
      _mm512_storeu_si512(out + j, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
    }
  }
}

// 32 columns of `pairs` pairs of bfloat16 rows as two tiles of 16 pairs each, elements without their bit zero (bits
// null = keep all); 16 pairs from one tile to the next
inline void pair_tiles(const uint16_t* in, int64_t row, int64_t pairs, const uint8_t* bits, int64_t mask_row,
                       uint32_t* out) {
  static constexpr auto order = [] {
    std::array<uint16_t, 32> at{};
    for (int i = 0; i < 32; ++i) at[i] = uint16_t(i / 2 + i % 2 * 32);
    return at;
  }();
  const __m512i first = _mm512_loadu_si512(order.data()), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  __mmask32 a_bits = ~__mmask32(0), b_bits = a_bits;
  for (; pairs > 0; --pairs, in += 2 * row, out += 16) {
    prefetch_next(in + 32, 64);
    prefetch_next(in + row + 32, 64);
    if (bits) {
      std::memcpy(&a_bits, bits, 4);
      std::memcpy(&b_bits, bits + mask_row, 4);
      bits += 2 * mask_row;
    }
    const __m512i a = _mm512_maskz_loadu_epi16(a_bits, in), b = _mm512_maskz_loadu_epi16(b_bits, in + row);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, first, b));
    _mm512_storeu_si512(out + 256, _mm512_permutex2var_epi16(a, second, b));
  }
}
#endif

constexpr int PANEL_K = 256;  // rows of a B operand staged at a time

// panel layout: float32 [k][width]; bfloat16 [k/2][width][2], or with TILES [k/32][width/16][16][16][2]
template <class To, int KPAD, bool TILES>
void panel(const Source& s, int64_t k0, int64_t k, int64_t j0, int64_t n, int width, void* out) {
  alignas(64) static thread_local To stage[PANEL_K * 64];
  constexpr int PAIR = sizeof(To) == 2 ? 2 : 1;
  const int64_t padded = (k + KPAD - 1) / KPAD * KPAD;
  const int group = TILES ? 16 : width;           // columns that lie together
  const int64_t depth = TILES ? 32 : PANEL_K;     // rows between two groups of the same columns
  if (n < width || k < padded) std::memset(out, 0, padded * width * sizeof(To));
  const bool plain = s.bf16 == (PAIR == 2) && s.col == 1 && !s.round;
  for (int64_t kk = 0; kk < k; kk += depth) {
    const int64_t kn = std::min(depth, k - kk);
#if defined(__AVX512BW__)
    if constexpr (TILES)
      if (plain && n == 32 && kn % 2 == 0) {
        const int64_t i = k0 + kk;
        pair_tiles((const uint16_t*)s.data + i * s.row + j0, s.row, kn / 2,
                   s.mask ? s.mask + i * s.mask_row + j0 / 8 : nullptr, s.mask_row, (uint32_t*)((To*)out + kk * width));
        continue;
      }
#endif
    for (int64_t g = 0; g < n; g += group) {
      const int64_t gn = std::min<int64_t>(group, n - g);
      uint32_t* to = (uint32_t*)((To*)out + kk * width + (TILES ? g * 32 : 0));
      if (s.row == 1 && s.col != 1) {
        // k contiguous: stage `gn` lines of kn elements, then turn them; an odd last element pairs with zero
        const int64_t even = (kn + PAIR - 1) / PAIR * PAIR;
        const Source turned{s.data, s.bf16, s.col, s.row, s.round};
        const bool direct = s.bf16 == (PAIR == 2) && !s.round && even == kn && (s.col % PAIR) == 0 &&
                            ((k0 + kk) % PAIR) == 0 && ((uintptr_t)s.data % 4) == 0;
        if (direct) {
          const To* in = (const To*)s.data + (j0 + g) * s.col + k0 + kk;
          transpose((const uint32_t*)in, s.col / PAIR, gn, kn / PAIR, to, group);
        } else {
          for (int64_t j = 0; j < gn; ++j) {
            copy_row(turned, j0 + g + j, k0 + kk, kn, stage + j * even);
            if (even != kn) stage[j * even + kn] = To(0);
          }
          transpose((const uint32_t*)stage, even / PAIR, gn, even / PAIR, to, group);
        }
      } else if (PAIR == 1 && plain && !s.mask && gn == group && (gn == 32 || gn == 16)) {
        const char* in = (const char*)((const To*)s.data + (k0 + kk) * s.row + j0 + g);
        const int64_t row = s.row * int64_t(sizeof(To));
        if (gn == 32) copy_rows<32 * sizeof(To)>(in, row, kn, (char*)to);
        else copy_rows<16 * sizeof(To)>(in, row, kn, (char*)to);
      } else if constexpr (PAIR == 1) {
        for (int64_t i = 0; i < kn; ++i) {
          if (plain) prefetch_next((const To*)s.data + (k0 + kk + i) * s.row + j0 + g + group, group * sizeof(To));
          copy_row(s, k0 + kk + i, j0 + g, gn, (To*)to + i * group);
        }
      } else {
        int64_t i = 0;
#if defined(__AVX512BW__)
        if (plain && !s.mask && gn == group && (gn == 32 || gn == 16)) {
          const uint16_t* in = (const uint16_t*)s.data + (k0 + kk) * s.row + j0 + g;
          if (gn == 32) pair_rows<32>(in, s.row, kn / 2, to);
          else pair_rows<16>(in, s.row, kn / 2, to);
          i = kn / 2 * 2;
        }
#endif
        for (; i < kn; i += 2) {
          const int64_t row = k0 + kk + i, col = j0 + g;
          if (plain && i + 1 < kn) {
            const uint16_t* a = (const uint16_t*)s.data + row * s.row + col;
            const uint8_t* bits = s.mask ? s.mask + row * s.mask_row : nullptr;
            prefetch_next(a + group, group * sizeof(To));
            prefetch_next(a + s.row + group, group * sizeof(To));
            interleave(a, a + s.row, gn, bits, bits ? bits + s.mask_row : nullptr, col, to + i / 2 * group);
            continue;
          }
          copy_row(s, row, col, gn, stage);
          if (i + 1 < kn) copy_row(s, row + 1, col, gn, stage + 64);
          else std::memset(stage + 64, 0, gn * sizeof(To));
          interleave((const uint16_t*)stage, (const uint16_t*)stage + 64, gn, nullptr, nullptr, 0, to + i / 2 * group);
        }
      }
    }
  }
}

void add_masked(float* c, int64_t ldc, const float* z, int64_t ldz, int m, int n, const Source& mask, int64_t i0,
                int64_t j0, float scale) {
  for (int i = 0; i < m; ++i) {
    const uint8_t* bits = mask.mask + (i0 + i) * mask.mask_row;
    float* to = c + i * ldc;
    const float* from = z + i * ldz;
    int j = 0;
#if defined(__AVX512F__)
    for (; j + 16 <= n; j += 16) {
      uint16_t m16;
      std::memcpy(&m16, bits + ((j0 + j) >> 3), 2);
      const __m512 cv = _mm512_loadu_ps(to + j);
      _mm512_storeu_ps(to + j, _mm512_mask3_fmadd_ps(_mm512_loadu_ps(from + j), _mm512_set1_ps(scale), cv, m16));
    }
#endif
    for (; j < n; ++j)
      if (bit(bits, j0 + j)) to[j] += scale * from[j];
  }
}

template <class To>
inline void finish_line(const float* c, int n, const float* column_scale, float scale, const float* bias, To* out,
                        int64_t step) {
  int first = 0;
#if defined(__AVX512F__)
  using L = Lanes<16>;
  if (step == 1)
    for (; first + 16 <= n; first += 16) {
      auto v = L::load(c + first) * scale;
      if (column_scale) v *= L::load(column_scale + first);
      if (bias) v += L::load(bias + first);
      L::store(out + first, v);
    }
  if (first == n) return;
#endif
  alignas(64) float line[64];
  const float* from = c;
  if (scale != 1.0f || column_scale || bias) {
    for (int j = first; j < n; ++j) line[j] = c[j] * scale;
    if (column_scale)
      for (int j = first; j < n; ++j) line[j] *= column_scale[j];
    if (bias)
      for (int j = first; j < n; ++j) line[j] += bias[j];
    from = line;
  }
  if (step == 1) {
    for (int j = first; j < n; ++j) out[j] = convert<To>(from[j]);
  } else {
    for (int j = first; j < n; ++j) out[j * step] = convert<To>(from[j]);
  }
}

void finish(const float* c, int64_t ldc, int m, int n, int64_t i0, int64_t j0, const Target& t) {
  const float* cs = t.column_scale ? t.column_scale + j0 : nullptr;
  const float* bias = t.bias ? t.bias + j0 : nullptr;
  for (int i = 0; i < m; ++i) {
    const int64_t at = (i0 + i) * t.row + j0 * t.col;
    if (t.raw && t.raw_bf16) finish_line(c + i * ldc, n, nullptr, t.scale, nullptr, (uint16_t*)t.raw + at, t.col);
    else if (t.raw) finish_line(c + i * ldc, n, nullptr, t.scale, nullptr, (float*)t.raw + at, t.col);
    if (t.bf16) finish_line(c + i * ldc, n, cs, t.scale, bias, (uint16_t*)t.data + at, t.col);
    else finish_line(c + i * ldc, n, cs, t.scale, bias, (float*)t.data + at, t.col);
  }
}

}  // namespace
}  // namespace peft_fast
