// The keep bits of dropout. As copies.h: each isa_*.cpp compiles it with its own flags.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace peft_fast {
namespace {

// Philox4x32-7 (Salmon et al., SC 2011). 16 counters (16·group + lane, row low, row high, 0) serve 128 columns with
// 16 bits each: column 128·group + 32·word + 2·lane + half, so that a vector compare gives 32 neighbouring bits
void mask_row(uint64_t seed, uint64_t row, int64_t K, uint32_t threshold, uint8_t* out) {
  for (int64_t k = 0; k < K; k += 128, out += 16) {
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    uint32_t word[4];
#if defined(__AVX512BW__)
    const __m512i m0 = _mm512_set1_epi64(0xD2511F53u), m1 = _mm512_set1_epi64(0xCD9E8D57u);
    __m512i c0 = _mm512_add_epi32(_mm512_set1_epi32(int(k / 8)),
                                  _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    __m512i c1 = _mm512_set1_epi32(int(uint32_t(row))), c2 = _mm512_set1_epi32(int(uint32_t(row >> 32)));
    __m512i c3 = _mm512_setzero_si512();
#pragma GCC unroll 7
    for (int round = 0; round < 7; ++round) {
      const __m512i e0 = _mm512_mul_epu32(c0, m0), o0 = _mm512_mul_epu32(_mm512_srli_epi64(c0, 32), m0);
      const __m512i e1 = _mm512_mul_epu32(c2, m1), o1 = _mm512_mul_epu32(_mm512_srli_epi64(c2, 32), m1);
      const __m512i hi0 = _mm512_mask_mov_epi32(_mm512_srli_epi64(e0, 32), 0xAAAA, o0);
      const __m512i lo0 = _mm512_mask_mov_epi32(e0, 0xAAAA, _mm512_slli_epi64(o0, 32));
      const __m512i hi1 = _mm512_mask_mov_epi32(_mm512_srli_epi64(e1, 32), 0xAAAA, o1);
      const __m512i lo1 = _mm512_mask_mov_epi32(e1, 0xAAAA, _mm512_slli_epi64(o1, 32));
      c0 = _mm512_ternarylogic_epi32(hi1, c1, _mm512_set1_epi32(int(key0)), 0x96);
      c2 = _mm512_ternarylogic_epi32(hi0, c3, _mm512_set1_epi32(int(key1)), 0x96);
      c1 = lo1;
      c3 = lo0;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    if (threshold > 0xFFFF) {
      word[0] = word[1] = word[2] = word[3] = 0;
    } else {
      const __m512i t = _mm512_set1_epi16(short(threshold));
      word[0] = _mm512_cmpge_epu16_mask(c0, t);
      word[1] = _mm512_cmpge_epu16_mask(c1, t);
      word[2] = _mm512_cmpge_epu16_mask(c2, t);
      word[3] = _mm512_cmpge_epu16_mask(c3, t);
    }
#else
    constexpr int L = 16;
    uint32_t c[4][L];
    for (int l = 0; l < L; ++l) {
      c[0][l] = uint32_t(k / 8 + l);
      c[1][l] = uint32_t(row);
      c[2][l] = uint32_t(row >> 32);
      c[3][l] = 0;
    }
    for (int round = 0; round < 7; ++round) {
      for (int l = 0; l < L; ++l) {
        const uint64_t p0 = uint64_t(c[0][l]) * 0xD2511F53u, p1 = uint64_t(c[2][l]) * 0xCD9E8D57u;
        c[0][l] = uint32_t(p1 >> 32) ^ c[1][l] ^ key0;
        c[2][l] = uint32_t(p0 >> 32) ^ c[3][l] ^ key1;
        c[1][l] = uint32_t(p1);
        c[3][l] = uint32_t(p0);
      }
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    for (int w = 0; w < 4; ++w) {
      word[w] = 0;
      for (int l = 0; l < L; ++l) {
        word[w] |= uint32_t((c[w][l] & 0xFFFF) >= threshold) << (2 * l);
        word[w] |= uint32_t((c[w][l] >> 16) >= threshold) << (2 * l + 1);
      }
    }
#endif
    std::memcpy(out, word, 16);
  }
}

}  // namespace
}  // namespace peft_fast
