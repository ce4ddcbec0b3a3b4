// H = s·drop(x)·Aᵀ, and D = s·dy·B: one pass over the tokens, no barrier after the operand has been staged.
#pragma once
#include "cuda/launch.cuh"

namespace peft_fast::cuda {

// rows 64 bytes off a multiple of 128: the eight lanes of one phase of a 16-byte load meet no bank twice
template <int NT>
constexpr int shrink_ld = int(most_range(8 * NT)) + 32;

template <class T, int NT, bool MASKED>
__global__ void __launch_bounds__(THREADS, 2) shrink_kernel(const __grid_constant__ Shrink job) {
  SHARED_MEMORY(uint16_t, op);
  const Chunk chunk = job.chunks.at[blockIdx.x % job.chunks.n];
  const int64_t split = blockIdx.x / job.chunks.n, c0 = split * job.range;
  const int cols = int(job.x.C - c0 < job.range ? job.x.C - c0 : job.range);
  stage<T>(op, shrink_ld<NT>, job.op, chunk.begin, c0, 8 * NT, (cols + GROUP - 1) / GROUP * GROUP, chunk.count, cols);
  __syncthreads();
  const uint64_t seed = MASKED && chunk.threshold ? uint64_t(job.seeds[chunk.adapter]) : 0;
  for (int64_t m0 = int64_t(blockIdx.y) * ROWS + warp_id() * 16; m0 < job.x.M; m0 += int64_t(gridDim.y) * ROWS) {
    float acc[NT][4] = {};
    for (int c = 0; c < cols; c += GROUP) {
      Tile tile;
      tile.load(job.x, m0, c0 + c, job.x.M - m0, cols - c);
      if (MASKED && chunk.threshold) tile.drop(seed, chunk.threshold, m0, c0 + c);
      tile.times<T, NT, shrink_ld<NT>>(acc, op + c, chunk.count);
    }
    store_rows<NT>(acc, job.out, split, chunk, m0, job.x.M);
  }
}

template <class T>
void launch_shrink(const Shrink& job, Stream stream) {
  bool masked = false;
  for (int i = 0; i < job.chunks.n; ++i) masked |= job.chunks.at[i].threshold > 0;
  const int tiles = job.chunks.widest <= 16 ? 2 : 8;
  const auto kernel = tiles == 2 ? (masked ? shrink_kernel<T, 2, true> : shrink_kernel<T, 2, false>)
                                 : (masked ? shrink_kernel<T, 8, true> : shrink_kernel<T, 8, false>);
  launch(kernel, ceil_div(job.x.C, job.range) * job.chunks.n, std::min(ceil_div(job.x.M, ROWS), GRID_Y),
         size_t(8 * tiles) * (tiles == 2 ? shrink_ld<2> : shrink_ld<8>) * 2, stream, job);
}

}  // namespace peft_fast::cuda
