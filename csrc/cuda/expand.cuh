// H·Bᵀ + bias, and mask∘(D·A)/(1 − p): written ahead of the base GEMM, which adds into it.
#pragma once
#include "cuda/launch.cuh"

namespace peft_fast::cuda {

constexpr int EXPAND_LD = CHUNK + 20;

// keep bits of the warp's 16 tokens × GROUP columns: bit 8·word + 2·i + h of a token's word is column
// 32·word + 8·t + 2·i + h
__device__ inline void keep_bits(uint32_t (&bits)[2], uint64_t seed, uint32_t threshold, int64_t m0, int64_t c0) {
  const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    bits[half] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t w[4];
      philox(w, seed, uint32_t(c0 / GROUP * 16 + 4 * t + i), uint64_t(m0 + g + 8 * half));
#pragma unroll
      for (int word = 0; word < 4; ++word) bits[half] |= kept(w[word], threshold) << (8 * word + 2 * i);
    }
  }
}

// four neighbouring elements of a token, zero from `valid` on
__device__ inline void load4(uint32_t& low, uint32_t& high, const uint16_t* from, int valid, bool aligned) {
  if (aligned && valid >= 4) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    low = v.x, high = v.y;
    return;
  }
  low = pair(0 < valid ? from[0] : uint16_t(0), 1 < valid ? from[1] : uint16_t(0));
  high = pair(2 < valid ? from[2] : uint16_t(0), 3 < valid ? from[3] : uint16_t(0));
}

template <class T>
__global__ void __launch_bounds__(THREADS, 2) expand_kernel(const __grid_constant__ Expand job) {
  SHARED_MEMORY(uint16_t, q);  // (GROUP, CHUNK): a column's ranks next to each other
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int64_t c0 = int64_t(blockIdx.x) * GROUP, M = job.p.M;
  const Operand turned{job.q.data, job.q.col, job.q.row, job.q.dtype};
  const int64_t left = job.C - c0;
  bool staged = false;
  // the bound is the block's own, since its warps meet at barriers
  for (int64_t block = int64_t(blockIdx.y) * ROWS; block < M; block += int64_t(gridDim.y) * ROWS) {
    const int64_t m0 = block + warp_id() * 16;
    uint32_t bits[2] = {~0u, ~0u};
    int adapter = -1;
    // two words at a time: the sums of four leave too few registers
#pragma unroll 1
    for (int first = 0; first < 4; first += 2) {
      float sum[2][4][4];
#pragma unroll
      for (int word = 0; word < 2; ++word)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int64_t c = c0 + 32 * (first + word) + 8 * t + 2 * i + h;
            const bool has = job.bias.data && c < job.C;
            sum[word][i][h] = sum[word][i][2 + h] =
                has ? load_any(job.bias.data, job.bias.dtype, c * job.bias.col) : 0.0f;
          }
      for (int index = 0; index < job.chunks.n; ++index) {
        const Chunk chunk = job.chunks.at[index];
        if (!staged) {
          __syncthreads();  // the chunk before this one has been used
          stage<T>(q, EXPAND_LD, turned, c0, chunk.begin, GROUP, (chunk.count + 15) / 16 * 16,
                   int(left < GROUP ? left : GROUP), chunk.count);
          __syncthreads();
          staged = job.chunks.n == 1;
        }
        if (chunk.adapter != adapter) {
          adapter = chunk.adapter;
          bits[0] = bits[1] = ~0u;
          if (chunk.threshold) keep_bits(bits, uint64_t(job.seeds[adapter]), chunk.threshold, m0, c0);
        }
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          float acc[4][4] = {};
#pragma unroll 1
          for (int k = 0; k < chunk.count; k += 16) {
            uint32_t a[4];
            const int64_t at = (m0 + g) * job.p.ld + chunk.begin + k + 4 * t;
            const int valid = chunk.count - k - 4 * t;
            const uint16_t* const row = static_cast<const uint16_t*>(job.p.data) + at;
            const bool aligned = job.p.aligned && chunk.begin % 4 == 0;
            load4(a[0], a[2], row, m0 + g < M ? valid : 0, aligned);
            load4(a[1], a[3], row + 8 * job.p.ld, m0 + g + 8 < M ? valid : 0, aligned);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int column = 32 * (first + word) + g / 2 * 8 + 2 * i + g % 2;
              const uint2 b = *reinterpret_cast<const uint2*>(q + column * EXPAND_LD + k + 4 * t);
              T::mma(acc[i], a, b.x, b.y);
            }
          }
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e)
              if (bits[e / 2] >> (8 * (first + word) + 2 * i + e % 2) & 1) sum[word][i][e] += acc[i][e] * chunk.scale;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          const int64_t m = m0 + g + 8 * half, c = c0 + 32 * (first + word) + 8 * t;
          uint16_t* const to = static_cast<uint16_t*>(job.out) + m * job.ld + c;
          uint32_t v[4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            v[i] = pair(T::round(sum[word][i][2 * half]), T::round(sum[word][i][2 * half + 1]));
          if (m >= M) continue;
          if (job.aligned && c + 8 <= job.C) {
            *reinterpret_cast<uint4*>(to) = make_uint4(v[0], v[1], v[2], v[3]);
            continue;
          }
#pragma unroll
          for (int i = 0; i < 8; ++i)
            if (c + i < job.C) to[i] = uint16_t(v[i / 2] >> 16 * (i % 2));
        }
    }
  }
}

template <class T>
void launch_expand(const Expand& job, Stream stream) {
  launch(expand_kernel<T>, ceil_div(job.C, GROUP), std::min(ceil_div(job.p.M, ROWS), GRID_Y),
         size_t(GROUP) * EXPAND_LD * 2, stream, job);
}

}  // namespace peft_fast::cuda
