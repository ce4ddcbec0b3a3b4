// The same three products for float32 tokens, by FMA: a warp takes four tokens, a lane four columns of a group.
#pragma once
#include "cuda/launch.cuh"

namespace peft_fast::cuda {

constexpr int OCTET = 8;  // ranks at a time

// a lane's columns of a group: two words' pairs of one Philox counter
struct LaneColumns {
  int counter, word;
  __device__ LaneColumns() : counter(lane_id() % 16), word(lane_id() / 16 * 2) {}
  __device__ int at(int i) const { return 32 * (word + i / 2) + 2 * counter + i % 2; }
  __device__ void keep(bool (&k)[4], uint64_t seed, uint32_t threshold, int64_t m, int64_t c0) const {
    uint32_t w[4];
    philox(w, seed, uint32_t(c0 / GROUP * 16 + counter), uint64_t(m));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t both = word ? w[2 + i / 2] : w[i / 2];
      k[i] = (i % 2 ? both >> 16 : both & 0xFFFF) >= threshold;
    }
  }
};

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, step);
  return v;
}

static __global__ void __launch_bounds__(THREADS) shrink_f32_kernel(const __grid_constant__ Shrink job) {
  const int octets = (job.chunks.widest + OCTET - 1) / OCTET;
  const Chunk chunk = job.chunks.at[blockIdx.x / octets % job.chunks.n];
  const int r0 = blockIdx.x % octets * OCTET;
  const int64_t split = blockIdx.x / octets / job.chunks.n, c0 = split * job.range;
  if (r0 >= chunk.count) return;
  const int64_t end = c0 + job.range < job.x.C ? c0 + job.range : job.x.C;
  const uint64_t seed = chunk.threshold ? uint64_t(job.seeds[chunk.adapter]) : 0;
  const LaneColumns lane;
  for (int64_t m0 = (int64_t(blockIdx.y) * WARPS + warp_id()) * 4; m0 < job.x.M; m0 += int64_t(gridDim.y) * WARPS * 4) {
    float acc[4][OCTET] = {};
    for (int64_t c = c0; c < end; c += GROUP) {
      float x[4][4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        bool keep[4] = {true, true, true, true};
        if (chunk.threshold) lane.keep(keep, seed, chunk.threshold, m0 + j, c);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool has = keep[i] && m0 + j < job.x.M && c + lane.at(i) < end;
          x[j][i] = has ? static_cast<const float*>(job.x.data)[(m0 + j) * job.x.ld + c + lane.at(i)] : 0.0f;
        }
      }
#pragma unroll
      for (int r = 0; r < OCTET; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t at = (chunk.begin + r0 + r) * job.op.row + (c + lane.at(i)) * job.op.col;
          const bool has = r0 + r < chunk.count && c + lane.at(i) < end;
          const float a = has ? load_any(job.op.data, job.op.dtype, at) : 0.0f;
#pragma unroll
          for (int j = 0; j < 4; ++j) acc[j][r] = fmaf(x[j][i], a, acc[j][r]);
        }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int r = 0; r < OCTET; ++r) {
        const float sum = warp_sum(acc[j][r]);
        if (lane_id() == 0 && m0 + j < job.x.M && r0 + r < chunk.count)
          store_any(job.out.data, job.out.dtype,
                    split * job.out.split + (m0 + j) * job.out.row + (chunk.begin + r0 + r) * job.out.col,
                    sum * chunk.scale);
      }
  }
}

static __global__ void __launch_bounds__(THREADS) outer_f32_kernel(const __grid_constant__ Outer job) {
  SHARED_MEMORY(float, sums);  // (WARPS, OCTET, GROUP)
  const int octets = (job.chunks.widest + OCTET - 1) / OCTET;
  const Chunk chunk = job.chunks.at[blockIdx.x / octets % job.chunks.n];
  const int r0 = blockIdx.x % octets * OCTET;
  if (r0 >= chunk.count) return;
  const int64_t c0 = int64_t(blockIdx.x) / octets / job.chunks.n * GROUP;
  const int64_t first = int64_t(blockIdx.y) * job.rows;
  const int64_t end = first + job.rows < job.x.M ? first + job.rows : job.x.M;
  const uint64_t seed = chunk.threshold ? uint64_t(job.seeds[chunk.adapter]) : 0;
  const LaneColumns lane;
  float acc[OCTET][4] = {};
  for (int64_t m = first + warp_id(); m < end; m += WARPS) {
    bool keep[4] = {true, true, true, true};
    if (chunk.threshold) lane.keep(keep, seed, chunk.threshold, m, c0);
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      x[i] = keep[i] && c0 + lane.at(i) < job.x.C
                 ? static_cast<const float*>(job.x.data)[m * job.x.ld + c0 + lane.at(i)] : 0.0f;
#pragma unroll
    for (int r = 0; r < OCTET; ++r) {
      const float d = r0 + r < chunk.count
                          ? static_cast<const float*>(job.d.data)[m * job.d.ld + chunk.begin + r0 + r] : 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[r][i] = fmaf(d, x[i], acc[r][i]);
    }
  }
#pragma unroll
  for (int r = 0; r < OCTET; ++r)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[(warp_id() * OCTET + r) * GROUP + lane.at(i)] = acc[r][i];
  __syncthreads();
  for (int unit = threadIdx.x; unit < OCTET * GROUP; unit += THREADS) {
    const int r = unit / GROUP, c = unit % GROUP;
    if (r0 + r >= chunk.count || c0 + c >= job.x.C) continue;
    float sum = 0.0f;
    for (int warp = 0; warp < WARPS; ++warp) sum += sums[(warp * OCTET + r) * GROUP + c];
    store_any(job.out.data, job.out.dtype,
              blockIdx.y * job.out.split + (chunk.begin + r0 + r) * job.out.row + (c0 + c) * job.out.col,
              sum * chunk.scale);
  }
}

static __global__ void __launch_bounds__(THREADS) expand_f32_kernel(const __grid_constant__ Expand job) {
  const int64_t c0 = int64_t(blockIdx.x) * GROUP, M = job.p.M;
  const LaneColumns lane;
  for (int64_t m0 = (int64_t(blockIdx.y) * WARPS + warp_id()) * 4; m0 < M; m0 += int64_t(gridDim.y) * WARPS * 4) {
    float sum[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t c = c0 + lane.at(i);
      const float bias = job.bias.data && c < job.C ? load_any(job.bias.data, job.bias.dtype, c * job.bias.col) : 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j][i] = bias;
    }
    for (int index = 0; index < job.chunks.n; ++index) {
      const Chunk chunk = job.chunks.at[index];
      float acc[4][4] = {};
      for (int r = chunk.begin; r < chunk.begin + chunk.count; ++r) {
        float q[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t c = c0 + lane.at(i);
          q[i] = c < job.C ? load_any(job.q.data, job.q.dtype, r * job.q.row + c * job.q.col) : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float p = m0 + j < M ? static_cast<const float*>(job.p.data)[(m0 + j) * job.p.ld + r] : 0.0f;
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[j][i] = fmaf(p, q[i], acc[j][i]);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        bool keep[4] = {true, true, true, true};
        if (chunk.threshold) lane.keep(keep, uint64_t(job.seeds[chunk.adapter]), chunk.threshold, m0 + j, c0);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (keep[i]) sum[j][i] += acc[j][i] * chunk.scale;
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (m0 + j < M && c0 + lane.at(i) < job.C)
          static_cast<float*>(job.out)[(m0 + j) * job.ld + c0 + lane.at(i)] = sum[j][i];
  }
}

}  // namespace peft_fast::cuda
