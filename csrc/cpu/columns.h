// What DoRA needs beside products: sums of squares of a weight, a scale for each column with the sums over the tokens
// that its gradient is made of, and the part of a product that dropout takes away, a few rows of a panel a token.
#pragma once
#include "cpu/dots.h"

namespace peft_fast {
namespace {

// Σ w² of n neighbours
template <int V, class T>
double square_line(const T* w, int64_t n) {
  using L = Lanes<V>;
  double total = 0;
  for (int64_t i = 0; i < n;) {
    const int64_t end = std::min(n, i + 64 * V);  // so many terms in float32
    typename L::vec acc[4] = {};
    for (; i + 4 * V <= end; i += 4 * V)
      for (int j = 0; j < 4; ++j) {
        const auto v = L::load(w + i + j * V);
        acc[j] += v * v;
      }
    for (; i < end; i += V) {
      const auto v = i + V <= end ? L::load(w + i) : load_part<V>(w + i, end - i);
      acc[0] += v * v;
    }
    i = end;
    total += sum<V>((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
  return total;
}

template <int V>
double square(const void* w, bool bf16, int64_t n) {
  return bf16 ? square_line<V>((const uint16_t*)w, n) : square_line<V>((const float*)w, n);
}

// sums (n) += w², of n neighbours
template <int V, class T>
void add_squares_line(const T* w, int64_t n, float* sums) {
  using L = Lanes<V>;
  int64_t j = 0;
  for (; j + V <= n; j += V) {
    const auto v = L::load(w + j);
    L::store(sums + j, L::load(sums + j) + v * v);
  }
  for (; j < n; ++j) {
    const float v = load_part<V>(w + j, 1)[0];
    sums[j] += v * v;
  }
}

template <int V>
void add_squares(const void* w, bool bf16, int64_t n, float* sums) {
  if (bf16) add_squares_line<V>((const uint16_t*)w, n, sums);
  else add_squares_line<V>((const float*)w, n, sums);
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

// y = u + bias + more∘z and z = keep·(u − gone), n neighbours
template <int V, class Y, class Z>
void mix_line(const float* u, const float* gone, float keep, const float* more, const float* bias, int64_t n, Y* y,
              Z* z) {
  by_vector<V>(n, [&](int64_t j, int k) {
    const auto own = load_some<V>(u + j, k), dropped = keep * (own - load_some<V>(gone + j, k));
    auto out = own + load_some<V>(more + j, k) * dropped;
    if (bias) out += load_some<V>(bias + j, k);
    store_part<V>(y + j, out, k);
    if (z) store_part<V>(z + j, dropped, k);
  });
}

template <int V>
void mix(const float* u, const float* gone, float keep, const float* more, const float* bias, int64_t n, bool y_bf16,
         void* y, bool z_bf16, void* z) {
  if (!y_bf16) mix_line<V>(u, gone, keep, more, bias, n, (float*)y, (float*)z);
  else if (z_bf16) mix_line<V>(u, gone, keep, more, bias, n, (uint16_t*)y, (uint16_t*)z);
  else mix_line<V>(u, gone, keep, more, bias, n, (uint16_t*)y, (float*)z);
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

// out (width) += Σ x[i] · row at[i] of a float32 panel, `width` of 1 or 2 vectors
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
    L::store(out + j * V, L::load(out + j * V) + ((acc[0][j] + acc[1][j]) + (acc[2][j] + acc[3][j])));
}

template <int V>
void spread(const float* panel, int width, const int32_t* at, const float* x, int64_t count, float* out) {
  if (width == V) spread_of<V, 1>(panel, at, x, count, out);
  else spread_of<V, 2>(panel, at, x, count, out);
}

// out[i] += Σ over `panels` of two vectors' width, `stride` floats apart, of g · row at[i]
template <int V>
void collect(const float* panel, int64_t stride, int panels, const int32_t* at, int64_t count, const float* g,
             float* out) {
  using L = Lanes<V>;
  for (int64_t i = 0; i < count; ++i) {
    const float* row = panel + int64_t(at[i]) * 2 * V;
    typename L::vec acc[4] = {};
    for (int p = 0; p < panels; ++p, row += stride)
      for (int j = 0; j < 2; ++j) acc[2 * (p & 1) + j] += L::load(row + j * V) * L::load(g + (2 * p + j) * V);
    out[i] += sum<V>((acc[0] + acc[1]) + (acc[2] + acc[3]));
  }
}

template <int V>
constexpr ColumnOps column_ops{square<V>, add_squares<V>, mix<V>, scale<V>, spread<V>, collect<V>};

}  // namespace
}  // namespace peft_fast
