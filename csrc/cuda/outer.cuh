// dA = Dᵀ·drop(x) and dB = dyᵀ·H, summed over tokens; shrink_outer gives D = s·dy·B from the same read of dy.
#pragma once
#include "cuda/launch.cuh"

namespace peft_fast::cuda {

constexpr int OUTER_LDX = GROUP + 8;  // rows 16 bytes off a multiple of 128, for ldmatrix
template <int NT>
constexpr int outer_ldd = 8 * NT + 8;
template <int GROUPS>
constexpr int outer_ldo = GROUPS * GROUP + 32;

template <class T, int NT, bool MASKED, bool WITH_D, int GROUPS>
__global__ void __launch_bounds__(THREADS, 2) outer_kernel(const __grid_constant__ Outer job) {
  SHARED_MEMORY(uint16_t, xs);                      // (ROWS, GROUP)
  uint16_t* const ds = xs + ROWS * OUTER_LDX;       // (ROWS, 8·NT)
  uint16_t* const op = ds + ROWS * outer_ldd<NT>;   // (8·NT, GROUP·groups)
  const int lane = lane_id(), warp = warp_id(), g = lane / 4, t = lane % 4;
  const Chunk& chunk = job.chunks.at[blockIdx.x % job.chunks.n];
  const int64_t block = blockIdx.x / job.chunks.n, c0 = block * job.groups * GROUP;
  const int64_t first = int64_t(blockIdx.y) * job.rows;
  const int rows = int(job.x.M - first < job.rows ? job.x.M - first : job.rows);
  const uint64_t seed = MASKED && chunk.threshold ? uint64_t(job.seeds[chunk.adapter]) : 0;
  const int cols = int(job.x.C - c0 < job.groups * GROUP ? job.x.C - c0 : job.groups * GROUP);
  if (WITH_D) {
    stage<T>(op, outer_ldo<GROUPS>, job.op, chunk.begin, c0, 8 * NT, job.groups * GROUP, chunk.count, cols);
    __syncthreads();
  }
  float acc[GROUPS][NT][4] = {};
  for (int m = 0; m < rows; m += ROWS) {
    const int64_t m0 = first + m;
    float low[NT][4] = {};
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      if (group * GROUP >= cols) continue;
      Tile tile;
      tile.load(job.x, m0 + warp * 16, c0 + group * GROUP, rows - m - warp * 16, cols - group * GROUP);
      if (MASKED && chunk.threshold) tile.drop(seed, chunk.threshold, m0 + warp * 16, c0 + group * GROUP);
      if (WITH_D) tile.template times<T, NT, outer_ldo<GROUPS>>(low, op + group * GROUP, chunk.count);
      __syncthreads();  // every warp is done with the tile before this one
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int word = 0; word < 4; ++word)
          *reinterpret_cast<uint4*>(xs + (warp * 16 + g + 8 * half) * OUTER_LDX + 32 * word + 8 * t) =
              make_uint4(tile.r[half][word][0], tile.r[half][word][1], tile.r[half][word][2], tile.r[half][word][3]);
      if (group == 0)
        for (int unit = threadIdx.x; unit < ROWS * NT; unit += THREADS) {
          const int row = unit / NT, r = unit % NT * 8;
          uint32_t v[4];
          load8(v, static_cast<const uint16_t*>(job.d.data) + (m0 + row) * job.d.ld + chunk.begin + r,
                m + row < rows ? chunk.count - r : 0, job.d.aligned && chunk.begin % 8 == 0);
          *reinterpret_cast<uint4*>(ds + unit / NT * outer_ldd<NT> + r) = make_uint4(v[0], v[1], v[2], v[3]);
        }
      __syncthreads();
      // the warp's 16 columns × all ranks, over the block's tokens
#pragma unroll 2
      for (int k = 0; k < ROWS; k += 16) {
        uint32_t a[4];
        ldmatrix_trans(a, xs + (k + lane % 8 + lane / 16 * 8) * OUTER_LDX + warp * 16 + lane / 8 % 2 * 8);
#pragma unroll
        for (int n = 0; n < NT; n += 2)
          if (8 * n < chunk.count) {
            uint32_t b[4];
            ldmatrix_trans(b, ds + (k + lane % 8 + lane / 8 % 2 * 8) * outer_ldd<NT> + (n + lane / 16) * 8);
            T::mma(acc[group][n], a, b[0], b[1]);
            T::mma(acc[group][n + 1], a, b[2], b[3]);
          }
      }
    }
    if (WITH_D) store_rows<NT>(low, job.out_d, block, chunk, m0 + warp * 16, first + rows);
  }
  const float scale = WITH_D ? chunk.outer_scale : chunk.scale;
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int c = group * GROUP + warp * 16 + g + 8 * half;
      if (c >= cols) break;
      int64_t to = blockIdx.y * job.out.split + (chunk.begin + 2 * t) * job.out.row + (c0 + c) * job.out.col;
#pragma unroll
      for (int n = 0; n < NT; ++n, to += 8 * job.out.row)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (8 * n + 2 * t + e < chunk.count)
            store_any(job.out.data, job.out.dtype, to + e * job.out.row, acc[group][n][2 * half + e] * scale);
    }
  }
}

template <class T, int NT, bool MASKED, bool WITH_D, int GROUPS>
void launch_outer_as(const Outer& job, Stream stream) {
  const size_t halves = size_t(ROWS) * OUTER_LDX + ROWS * outer_ldd<NT> + (WITH_D ? 8 * NT * outer_ldo<GROUPS> : 0);
  launch(outer_kernel<T, NT, MASKED, WITH_D, GROUPS>, ceil_div(job.x.C, job.groups * GROUP) * job.chunks.n,
         ceil_div(job.x.M, job.rows), halves * 2, stream, job);
}

template <class T>
void launch_outer(const Outer& job, Stream stream) {
  bool masked = false;
  for (int i = 0; i < job.chunks.n; ++i) masked |= job.chunks.at[i].threshold > 0;
  if (job.chunks.widest <= 16) {
    masked ? launch_outer_as<T, 2, true, false, 1>(job, stream) : launch_outer_as<T, 2, false, false, 1>(job, stream);
  } else {
    masked ? launch_outer_as<T, 8, true, false, 1>(job, stream) : launch_outer_as<T, 8, false, false, 1>(job, stream);
  }
}

template <class T>
void launch_shrink_outer(const Outer& job, Stream stream) {
  launch_outer_as<T, 2, false, true, MOST_GROUPS>(job, stream);
}

}  // namespace peft_fast::cuda
