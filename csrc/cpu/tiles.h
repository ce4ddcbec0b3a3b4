// Register tiles: c (m, width) = or += Σ a (m, k) · panel (k, width), for vectors of V floats.
//
// 2·MR accumulators fill the register file; every step of k broadcasts MR elements of A and loads two vectors of B,
// so loads stay below multiply-adds. The last rows of a block take a shorter instance of the same template.
#pragma once
#include <array>
#include <utility>

#include "cpu/activation.h"
#include "cpu/codes.h"
#include "cpu/columns.h"
#include "cpu/copies.h"
#include "cpu/dots.h"
#include "cpu/philox.h"

namespace peft_fast {
namespace {

// arithmetic of one step: float32 multiply-add, one k at a time
template <int V>
struct F32Step {
  using element = float;
  static constexpr int pair = 1;
  // terms summed one after another before they join c: the error of a float32 sum grows with the length of its chain
  static constexpr int64_t chain = 256;
  using vec = typename Vector<float, V>::type;
  static vec load_b(const float* b) { return *(const vec*)b; }
  // by integers: x + 0 is no x where x is -0, so that the addition would be made, in the units that multiply
  static vec broadcast(const float* a) {
    uint32_t bits;
    std::memcpy(&bits, a, 4);
    return (vec)(typename Vector<uint32_t, V>::type{} + bits);
  }
  static void step(vec& acc, vec a, vec b) { acc += a * b; }
};

#if defined(__AVX512BF16__)
// bfloat16 dot product, two k at a time, float32 accumulation
struct Bf16Step {
  using element = uint16_t;
  static constexpr int pair = 2;
  static constexpr int64_t chain = 4096;  // operands are rounded far more coarsely than their sum
  using vec = Vector<float, 16>::type;
  static vec load_b(const uint16_t* b) { return (vec)_mm512_loadu_si512(b); }
  static vec broadcast(const uint16_t* a) {
    int32_t two;
    std::memcpy(&two, a, 4);
    return (vec)_mm512_set1_epi32(two);
  }
  static void step(vec& acc, vec a, vec b) {
    acc = (vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <class S, int V, int MR, int NV>
void tile_of(const Segment* segment, int count, float* c, int64_t ldc, bool add) {
  using vec = typename S::vec;
  using element = typename S::element;
  vec acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] = vec{};
  auto flush = [&] {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        vec* to = (vec*)(c + i * ldc + j * V);
        *to = add ? *to + acc[i][j] : acc[i][j];
        acc[i][j] = vec{};
      }
    add = true;
  };
  int64_t room = S::chain;
  for (; count > 0; --count, ++segment) {
    const element* a = (const element*)segment->a;
    const element* b = (const element*)segment->b;
    const int64_t lda = segment->lda;
    for (int64_t left = segment->k; left > 0;) {
      const int64_t k = std::min(left, room);
      for (int64_t p = 0; p < k; p += S::pair) {
        vec bv[NV];
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) bv[j] = S::load_b(b + j * V * S::pair);
        // the panel streams from the second-level cache: ask for it a few steps ahead
        __builtin_prefetch((const char*)b + 1024);
        if (NV == 2) __builtin_prefetch((const char*)b + 1024 + 64);
        b += NV * V * S::pair;
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
          const vec av = S::broadcast(a + i * lda + p);
#pragma GCC unroll 2
          for (int j = 0; j < NV; ++j) S::step(acc[i][j], av, bv[j]);
        }
      }
      a += k;
      left -= k;
      room -= k;
      if (room == 0) {
        flush();
        room = S::chain;
      }
    }
  }
  if (room < S::chain || !add) flush();
}

using TileOf = void (*)(const Segment*, int, float*, int64_t, bool);

template <class S, int V, int NV, int... I>
constexpr std::array<TileOf, sizeof...(I)> tiles_of(std::integer_sequence<int, I...>) {
  return {tile_of<S, V, I + 1, NV>...};
}

template <class S, int V, int MR>
void tile(const Segment* segments, int count, float* c, int64_t ldc, int m, int width, bool add) {
  static constexpr auto one = tiles_of<S, V, 1>(std::make_integer_sequence<int, MR>{});
  static constexpr auto two = tiles_of<S, V, 2>(std::make_integer_sequence<int, MR>{});
  (width == V ? one : two)[m - 1](segments, count, c, ldc, add);
}

template <class S, int V, int MR>
constexpr Engine engine_of(const char* isa) {
  using E = typename S::element;
  return {isa,       sizeof(E) == 2, MR, 2 * V, S::pair, 1, rows<E, S::pair>, panel<E, S::pair, false>, tile<S, V, MR>,
          add_masked, finish,        mask_row, activate<V, false>, activate<V, true>, add_row<V>,
          dots_with<V, sizeof(E) == 2>(), sums<V>, &column_ops<V>, decode<V>};
}

}  // namespace
}  // namespace peft_fast
