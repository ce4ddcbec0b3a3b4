// One row of h = act(gate)·up, dropped, and of its backward: float32 inside, one rounding at the store. Templates that
// each isa_*.cpp compiles with its own flags; exp, erf and tanh come from one 2^t, accurate to a few ulp.
#pragma once
#include <utility>

#include "cpu/lanes.h"

namespace peft_fast {
namespace {

// act(z) and its derivative; SLOPE false leaves the derivative out
template <Activation KIND, int V, bool SLOPE>
inline void act(typename Lanes<V>::vec z, typename Lanes<V>::vec& f, typename Lanes<V>::vec& d) {
  using L = Lanes<V>;
  using vec = typename L::vec;
  if constexpr (KIND == Activation::relu || KIND == Activation::relu2) {
    const vec r = z < 0.0f ? vec{} : z;  // a NaN stays
    f = KIND == Activation::relu ? r : r * r;
    if (SLOPE) d = KIND == Activation::relu ? (z <= 0.0f ? vec{} : vec{} + 1.0f) : r + r;
  } else if constexpr (KIND == Activation::gelu) {
    // z·Φ(z), Φ(-|z|) = φ(z)·√(2π)·t·P(t) with t = 1/(1 + 0.49·|z|/√2); P fitted to ½·e^(x²)·erfc(x) on [0, 10] to
    // 2e-8, 1.1e-7 together with its float32 arithmetic
    const vec t = 1.0f / (1.0f + 0.3464823365f * L::abs(z));
    vec p = vec{} - 2.864521928e-02f;
    p = p * t + 1.450650394e-01f;
    p = p * t - 2.668536007e-01f;
    p = p * t + 1.789821833e-01f;
    p = p * t - 3.323540837e-02f;
    p = p * t + 1.098789051e-01f;
    p = p * t + 1.180320978e-01f;
    p = p * t + 1.385628879e-01f;
    p = p * t + 1.382130980e-01f;
    const vec bell = L::exp2(z * (z * -0.7213475204f)), tail = bell * (p * t);
    const vec below = z < 0.0f ? tail : 1.0f - tail;
    f = z * below;
    if (SLOPE) d = below + z * (bell * 0.3989422804f);
  } else {
    // z·σ(v(z)); tanh-GELU is one of them, for ½·(1 + tanh u) = σ(2u). `power` is -v·log2(e)
    vec power, slope;
    if constexpr (KIND == Activation::silu) {
      power = z * -1.4426950409f, slope = vec{} + 1.0f;
    } else if constexpr (KIND == Activation::quick_gelu) {
      power = z * -2.4554669596f, slope = vec{} + 1.702f;
    } else {
      const vec square = z * z;
      power = z * (-2.3022081985f - 0.1029432396f * square);
      slope = 1.5957691216f + 0.2140644488f * L::below(square, 1e30f);
    }
    const vec e = L::exp2(power), s = 1.0f / (1.0f + e);
    f = z * s;
    if (SLOPE) {
      // σ·(1 − σ) = e/(1 + e)², which loses nothing; far out it is zero, and what it is multiplied with must be finite
      const vec bell = L::below(e, 1e30f) * s * s;
      d = s + bell * slope * z;
    }
  }
}

// V elements at each pointer, the mask's at j
template <Activation KIND, int V, class T, bool GATED>
inline void act_forward(const ActLine& a, int64_t j, const T* gate, const T* up, T* h) {
  using L = Lanes<V>;
  typename L::vec f, unused;
  act<KIND, V, false>(L::load(GATED ? gate : up), f, unused);
  if (GATED) f *= L::load(up);
  if (a.bits) f = L::keep(f * a.keep_scale, a.bits, j);
  L::store(h, f);
}

// h too where there is room for it
template <Activation KIND, int V, class T, bool GATED>
inline void act_backward(const ActLine& a, int64_t j, const T* gate, const T* up, const T* dh, T* dgate, T* dup, T* h) {
  using L = Lanes<V>;
  typename L::vec f, d, g = L::load(dh);
  act<KIND, V, true>(L::load(GATED ? gate : up), f, d);
  if (a.bits) g = L::keep(g * a.keep_scale, a.bits, j);
  if (GATED) {
    const typename L::vec factor = L::load(up);
    L::store(dgate, g * factor * d);
    L::store(dup, g * f);
    f *= factor;
  } else {
    L::store(dup, g * d);
  }
  if (h) L::store(h, a.bits ? L::keep(f * a.keep_scale, a.bits, j) : f);
}

template <Activation KIND, int V, class T, bool GATED, bool BACKWARD>
void act_line(const ActLine& a) {
  const T *gate = (const T*)a.gate, *up = (const T*)a.up, *dh = (const T*)a.dh;
  T *h = (T*)a.h, *dgate = (T*)a.dgate, *dup = (T*)a.dup;
  int64_t j = 0;
  for (; j + V <= a.n; j += V) {
    if constexpr (BACKWARD)
      act_backward<KIND, V, T, GATED>(a, j, gate + j, up + j, dh + j, dgate + j, dup + j, h ? h + j : nullptr);
    else act_forward<KIND, V, T, GATED>(a, j, gate + j, up + j, h + j);
  }
  if (j == a.n) return;
  // the rest of a row in a vector's room
  const size_t bytes = (a.n - j) * sizeof(T);
  T in[3][V] = {}, out[3][V];
  if (GATED) std::memcpy(in[0], gate + j, bytes);
  std::memcpy(in[1], up + j, bytes);
  if constexpr (BACKWARD) {
    std::memcpy(in[2], dh + j, bytes);
    act_backward<KIND, V, T, GATED>(a, j, in[0], in[1], in[2], out[0], out[1], out[2]);
    if (GATED) std::memcpy(dgate + j, out[0], bytes);
    std::memcpy(dup + j, out[1], bytes);
  } else {
    act_forward<KIND, V, T, GATED>(a, j, in[0], in[1], out[2]);
  }
  if (h) std::memcpy(h + j, out[2], bytes);
}

using ActOf = void (*)(const ActLine&);

template <int V, bool BACKWARD, int... I>
inline ActOf act_of(const ActLine& a, std::integer_sequence<int, I...>) {
  static constexpr ActOf table[][4] = {{act_line<Activation(I), V, float, false, BACKWARD>,
                                        act_line<Activation(I), V, float, true, BACKWARD>,
                                        act_line<Activation(I), V, uint16_t, false, BACKWARD>,
                                        act_line<Activation(I), V, uint16_t, true, BACKWARD>}...};
  return table[int(a.kind)][2 * a.bf16 + (a.gate != nullptr)];
}

template <int V, bool BACKWARD>
void activate(const ActLine& a) {
  act_of<V, BACKWARD>(a, std::make_integer_sequence<int, int(Activation::count)>{})(a);
}

}  // namespace
}  // namespace peft_fast
