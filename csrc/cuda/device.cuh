// What the kernels ask of the device: 16-byte loads, conversions, mma and ldmatrix of a warp, dropout words.
#pragma once
#include "cuda/skinny.h"

#if defined(PEFT_FAST_HOST_SHIM)
#include "shim.h"  // the same names, for one block at a time on the host: tests/cuda
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define SHARED_MEMORY(type, name)                              \
  extern __shared__ __align__(16) unsigned char shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(shared_bytes)
#endif

namespace peft_fast::cuda {

#if !defined(PEFT_FAST_HOST_SHIM)
struct Bf16 {
  static constexpr Dtype dtype = BF16;
  __device__ static float widen(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
  __device__ static uint16_t round(float f) { return __bfloat16_as_ushort(__float2bfloat16_rn(f)); }
  // c (16, 8) += a (16, 16)·b (16, 8)
  __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct Half {
  static constexpr Dtype dtype = F16;
  __device__ static float widen(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
  __device__ static uint16_t round(float f) { return __half_as_ushort(__float2half_rn(f)); }
  __device__ static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// four 8×8 matrices, transposed; lane 8·i + j gives the address of row j of matrix i
__device__ inline void ldmatrix_trans(uint32_t (&r)[4], const uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}
#endif

__device__ inline int lane_id() { return threadIdx.x % 32; }
__device__ inline int warp_id() { return threadIdx.x / 32; }

__device__ inline float load_any(const void* data, int32_t dtype, int64_t i) {
  if (dtype == F32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == BF16 ? Bf16::widen(bits) : Half::widen(bits);
}

__device__ inline void store_any(void* data, int32_t dtype, int64_t i, float value) {
  if (dtype == F32) static_cast<float*>(data)[i] = value;
  else static_cast<uint16_t*>(data)[i] = dtype == BF16 ? Bf16::round(value) : Half::round(value);
}

__device__ inline uint32_t pair(uint16_t low, uint16_t high) { return uint32_t(low) | uint32_t(high) << 16; }

// eight neighbouring 16-bit elements, zero from `valid` on
__device__ inline void load8(uint32_t (&out)[4], const uint16_t* from, int valid, bool aligned) {
  if (aligned && valid >= 8) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    out[i] = pair(2 * i < valid ? from[2 * i] : uint16_t(0), 2 * i + 1 < valid ? from[2 * i + 1] : uint16_t(0));
}

// eight elements of an operand, `step` apart, rounded to T; zero from `valid` on
template <class T>
__device__ inline void load8_any(uint16_t (&out)[8], const Operand& op, int64_t at, int64_t step, int valid) {
  const bool whole = step == 1 && valid >= 8;
  if (whole && op.dtype == F32) {
    const float* from = static_cast<const float*>(op.data) + at;
    if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      const float4 a = reinterpret_cast<const float4*>(from)[0], b = reinterpret_cast<const float4*>(from)[1];
      const float f[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = T::round(f[i]);
      return;
    }
  } else if (whole && op.dtype == T::dtype) {
    const uint16_t* from = static_cast<const uint16_t*>(op.data) + at;
    if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
      uint32_t v[4];
      load8(v, from, 8, true);
#pragma unroll
      for (int i = 0; i < 8; ++i) out[i] = uint16_t(v[i / 2] >> 16 * (i % 2));
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = i < valid ? T::round(load_any(op.data, op.dtype, at + i * step)) : uint16_t(0);
}

// to[i * ld + j] = op(i0 + i, j0 + j) for i < rows, j < cols (multiples of 8), zero where i >= valid_rows or
// j >= valid_cols; the block reads along the operand's own contiguous direction
template <class T>
__device__ void stage(uint16_t* to, int ld, const Operand& op, int64_t i0, int64_t j0, int rows, int cols,
                      int valid_rows, int valid_cols) {
  const bool along = op.col == 1 || op.row != 1;
  const int units = rows * cols / 8, inner = along ? cols / 8 : cols;
#pragma unroll 2
  for (int unit = threadIdx.x; unit < units; unit += THREADS) {
    const int a = unit / inner, b = unit % inner;
    const int i = along ? a : 8 * a, j = along ? 8 * b : b;
    const bool none = i >= valid_rows || j >= valid_cols;
    const int valid = none ? 0 : along ? valid_cols - j : valid_rows - i;
    uint16_t v[8];
    load8_any<T>(v, op, (i0 + i) * op.row + (j0 + j) * op.col, along ? op.col : op.row, valid);
#pragma unroll
    for (int e = 0; e < 8; ++e) to[along ? i * ld + j + e : (i + e) * ld + j] = v[e];
  }
}

// the four random words of (seed, token, counter): peft_fast/reference/dropout.py
__device__ inline void philox(uint32_t (&w)[4], uint64_t seed, uint32_t counter, uint64_t row) {
  uint32_t c0 = counter, c1 = uint32_t(row), c2 = uint32_t(row >> 32), c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int i = 0; i < 7; ++i) {
    const uint32_t hi0 = __umulhi(0xD2511F53u, c0), lo0 = 0xD2511F53u * c0;
    const uint32_t hi1 = __umulhi(0xCD9E8D57u, c2), lo1 = 0xCD9E8D57u * c2;
    c0 = hi1 ^ c1 ^ k0, c1 = lo1, c2 = hi0 ^ c3 ^ k1, c3 = lo0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  w[0] = c0, w[1] = c1, w[2] = c2, w[3] = c3;
}

// bit h set: column 2·lane + h of the word's 32 is kept
__device__ inline uint32_t kept(uint32_t word, uint32_t threshold) {
  return uint32_t((word & 0xFFFF) >= threshold) | uint32_t((word >> 16) >= threshold) << 1;
}

__device__ inline uint32_t spread(uint32_t two_bits) {
  return (two_bits & 1 ? 0xFFFFu : 0u) | (two_bits & 2 ? 0xFFFF0000u : 0u);
}

// A warp's 16 tokens × GROUP columns in registers: lane 4·g + t has tokens g and g + 8, of each word of 32 columns
// the eight from 8·t on. In this order every load has 16 bytes, a lane's columns are those of its own four Philox
// counters, and four neighbours (two registers) are the k slots {2t, 2t+1, 2t+8, 2t+9} of an mma whose other operand
// is read in the same order.
struct Tile {
  uint32_t r[2][4][4];  // token half, word, pair of columns

  // from (m0, c0) on, where `rows` tokens and `cols` columns are left
  __device__ void load(const Tokens& x, int64_t m0, int64_t c0, int64_t rows, int cols) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    const uint16_t* const first = static_cast<const uint16_t*>(x.data) + (m0 + g) * x.ld + c0 + 8 * t;
    // one branch for all of a whole tile, else the loads would wait for each other
    if (x.aligned && rows >= 16 && cols >= GROUP) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int word = 0; word < 4; ++word) load8(r[half][word], first + half * 8 * x.ld + 32 * word, 8, true);
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int word = 0; word < 4; ++word)
        load8(r[half][word], first + half * 8 * x.ld + 32 * word, g + 8 * half < rows ? cols - 32 * word - 8 * t : 0,
              x.aligned);
  }

  __device__ void drop(uint64_t seed, uint32_t threshold, int64_t m0, int64_t c0) {
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t w[4];
        philox(w, seed, uint32_t(c0 / GROUP * 16 + 4 * t + i), uint64_t(m0 + g + 8 * half));
#pragma unroll
        for (int word = 0; word < 4; ++word) r[half][word][i] &= spread(kept(w[word], threshold));
      }
  }

  // acc (16, 8·NT) += tile·opᵀ, op (8·NT, GROUP) in shared memory, rows LD apart
  template <class T, int NT, int LD>
  __device__ void times(float (&acc)[NT][4], const uint16_t* op, int count) const {
    const uint16_t* const first = op + lane_id() / 4 * LD + lane_id() % 4 * 8;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const uint32_t a[2][4] = {{r[0][word][0], r[1][word][0], r[0][word][1], r[1][word][1]},
                                {r[0][word][2], r[1][word][2], r[0][word][3], r[1][word][3]}};
#pragma unroll
      for (int n = 0; n < NT; ++n)
        if (8 * n < count) {
          const uint4 b = *reinterpret_cast<const uint4*>(first + 8 * n * LD + 32 * word);
          T::mma(acc[n], a[0], b.x, b.y);
          T::mma(acc[n], a[1], b.z, b.w);
        }
    }
  }
};

// sums (16, 8·NT) of the warp's tokens from m0 on -> out (M, R)
template <int NT>
__device__ inline void store_rows(const float (&acc)[NT][4], const Sums& out, int64_t split, const Chunk& chunk,
                                  int64_t m0, int64_t rows_end) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  // running addresses: one for each element would not fit beside the sums
  const int64_t at = split * out.split + (m0 + g) * out.row + (chunk.begin + 2 * t) * out.col;
  const int rows = int(rows_end - m0 < 16 ? rows_end - m0 : 16) - g, cols = chunk.count - 2 * t;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (8 * half >= rows) break;
    int64_t to = at + half * 8 * out.row;
#pragma unroll
    for (int n = 0; n < NT; ++n, to += 8 * out.col) {
      if (8 * n < cols) store_any(out.data, out.dtype, to, acc[n][2 * half] * chunk.scale);
      if (8 * n + 1 < cols) store_any(out.data, out.dtype, to + out.col, acc[n][2 * half + 1] * chunk.scale);
    }
  }
}

}  // namespace peft_fast::cuda
