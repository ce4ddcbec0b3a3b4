// out = left·right + mask∘(low_left·low_right)/(1 − p) + bias on Hopper: one kernel for the whole adapted layer.
//
// A cluster of two blocks takes 256 × BN of out, each block 128 rows of it, and both share the columns of `right`:
// each loads half and the tensor memory accelerator writes it to both. One thread of a block loads, two warpgroups
// multiply 64 rows each. The R columns of the adapter are the first steps of the sum, where the accumulator holds
// nothing else, so that the mask is applied to it alone. The bits of a tile's mask are drawn during the tile before,
// while the tensor cores are busy.
#pragma once
#include <type_traits>

#include "cuda/hopper.h"
#if defined(PEFT_FAST_HOST_SHIM)
#include "hopper_shim.h"  // the same names on the host: tests/cuda
#else
#include "cuda/hopper_ptx.cuh"
#endif

namespace peft_fast::cuda {

constexpr int CLUSTER = 2, CONSUMERS = 2;
constexpr int BM = 64 * CONSUMERS, BK = 64;  // of one block and one step
constexpr int WIDE = 256, NARROW = 128;      // BN
constexpr int HOPPER_THREADS = 128 * (1 + CONSUMERS);
constexpr int LEFT_BYTES = BM * BK * 2, RING_BYTES = 192 * 1024;
constexpr int OUT_BYTES = 64 * 64 * 2, OUT_BUFFERS = 2;  // a warpgroup stores 64 columns at a time
constexpr int OUT_AT = RING_BYTES, BARRIERS_AT = OUT_AT + CONSUMERS * OUT_BUFFERS * OUT_BYTES;
constexpr int MOST_STAGES = 8, SWIZZLE_BYTES = 1024;  // a swizzled box is aligned to that
constexpr int HOPPER_SHARED = BARRIERS_AT + 2 * MOST_STAGES * 8 + SWIZZLE_BYTES;
constexpr int ROW_GROUP = 8;  // rows of tiles that go through the columns together, for the sake of L2
static_assert(HOPPER_SHARED <= 227 * 1024, "more shared memory than a block of sm_90 can have");

template <int BN>
struct Ring {
  static constexpr int RIGHT_BYTES = BN * BK * 2, STAGE_BYTES = LEFT_BYTES + RIGHT_BYTES;
  static constexpr int STAGES = RING_BYTES / STAGE_BYTES;
  static_assert(STAGES <= MOST_STAGES);

  uint32_t stage = 0, parity = 0;  // parity: of how often the ring was gone round

  __device__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  __device__ uint32_t previous() const { return stage == 0 ? STAGES - 1 : stage - 1; }
};

struct HopperJob {
  TensorMap left, right, low_left, low_right, out;
  const void* bias;
  const int64_t* seed;
  float scale;
  uint32_t threshold;
  int32_t bias_dtype, M, N, R, low_steps, base_steps, tiles_m, tiles_n;
};

struct Single {
  static constexpr Dtype dtype = F32;
};

struct Origin {
  int32_t row, column;
};

// where a cluster's tile begins: ROW_GROUP tiles down, then the next ones to the right
template <int BN>
__device__ Origin origin_of(int32_t tile, int32_t tiles_m, int32_t tiles_n) {
  const int32_t group = tile / (ROW_GROUP * tiles_n) * ROW_GROUP, inside = tile % (ROW_GROUP * tiles_n);
  const int32_t height = tiles_m - group < ROW_GROUP ? tiles_m - group : ROW_GROUP;
  return {(group + inside % height) * BM * CLUSTER, inside / height * BN};
}

// wgmma's description of an operand in boxes of 128 bytes × any rows, swizzled: `leading` is from 64 columns of a
// turned operand to the next 64 (else not read); eight rows are 1024 bytes
__device__ inline uint64_t operand_at(uint32_t address, uint32_t leading) {
  constexpr uint64_t SWIZZLE_128 = uint64_t(1) << 62, EIGHT_ROWS = uint64_t(1024 >> 4) << 32;
  return SWIZZLE_128 | EIGHT_ROWS | uint64_t(leading >> 4) << 16 | (address >> 4 & 0x3FFF);
}

__device__ inline uint32_t full_at(uint32_t shared, uint32_t stage) { return shared + BARRIERS_AT + 8 * stage; }
__device__ inline uint32_t empty_at(uint32_t shared, uint32_t stage) { return full_at(shared, MOST_STAGES + stage); }

template <bool TURNED, int BN>
__device__ void load_tiles(const HopperJob& job, uint32_t shared, uint32_t rank) {
  constexpr uint16_t BOTH = (1 << CLUSTER) - 1;
  constexpr uint32_t SHARE = Ring<BN>::RIGHT_BYTES / CLUSTER, BOX = 64 * BK * 2;
  const int32_t tiles = job.tiles_m * job.tiles_n, steps = job.low_steps + job.base_steps;
  Ring<BN> turn;
  for (int32_t tile = blockIdx.x / CLUSTER; tile < tiles; tile += gridDim.x / CLUSTER) {
    const Origin at = origin_of<BN>(tile, job.tiles_m, job.tiles_n);
    const int32_t row = at.row + int32_t(rank) * BM, column = at.column + int32_t(rank) * (BN / CLUSTER);
    for (int32_t step = 0; step < steps; ++step, turn.next()) {
      const bool low = step < job.low_steps;
      const int32_t k = BK * (low ? step : step - job.low_steps);
      const TensorMap *left = low ? &job.low_left : &job.left, *right = low ? &job.low_right : &job.right;
      const uint32_t to = shared + turn.stage * turn.STAGE_BYTES, share = to + LEFT_BYTES + rank * SHARE;
      const uint32_t full = full_at(shared, turn.stage);
      barrier_wait(empty_at(shared, turn.stage), turn.parity ^ 1);
      barrier_expect(full, turn.STAGE_BYTES);
      tma_load(to, left, full, k, row);
      if (!TURNED) {
        tma_load_all(share, right, full, k, column, BOTH);
      } else {
#pragma unroll
        for (int i = 0; i < BN / CLUSTER / 64; ++i)
          tma_load_all(share + i * BOX, right, full, column + 64 * i, k, BOTH);
      }
    }
  }
}

// Which of the thread's BN / 2 sums are kept. Thread 4·g + t of a warp holds rows g and g + 8, of every eight columns
// 2t and 2t + 1: exactly the columns of its own 4 Philox counters of a row and 128 columns.
template <int BN>
struct TileMask {
  static constexpr int GROUPS = BN / GROUP, DRAWS = 8 * GROUPS;

  uint32_t bits[DRAWS / 4];  // draw c: bits 8·c … 8·c + 7, two for each word

  // draw c: row half, then 128 columns, then which eight of each word's 32 columns
  __device__ void draw(uint64_t seed, uint32_t threshold, int32_t row, int32_t column, int c) {
    uint32_t w[4];
    philox(w, seed, uint32_t(column / GROUP + c / 4 % GROUPS) * 16 + c % 4 * 4 + lane_id() % 4,
           uint32_t(row + c / (4 * GROUPS) * 8));
    const uint32_t eight = kept(w[0], threshold) | kept(w[1], threshold) << 2 | kept(w[2], threshold) << 4 |
                           kept(w[3], threshold) << 6;
#pragma unroll
    for (int i = 0; i < DRAWS / 4; ++i) bits[i] = bits[i] >> 8 | (i + 1 < DRAWS / 4 ? bits[i + 1] : eight) << 24;
  }

  __device__ void apply(float (&sum)[BN / 2], float scale) const {
#pragma unroll
    for (int c = 0; c < DRAWS; ++c)
#pragma unroll
      for (int b = 0; b < 8; ++b) {
        const int octet = c / 4 % GROUPS * 16 + b / 2 * 4 + c % 4;
        float& s = sum[4 * octet + c / (4 * GROUPS) * 2 + b % 2];
        s = bits[c / 4] >> (c % 4 * 8 + b) & 1 ? s * scale : 0.0f;
      }
  }
};

// bias of type B from the thread's first column on
template <class B, int SUMS>
__device__ void add_bias(float (&sum)[SUMS], const void* bias, int32_t columns) {
#pragma unroll
  for (int i = 0; i < SUMS / 2; ++i) {
    const int at = i / 2 * 8 + i % 2;
    const float b = at < columns ? load_any(bias, B::dtype, at) : 0.0f;
    sum[i / 2 * 4 + i % 2] += b;
    sum[i / 2 * 4 + i % 2 + 2] += b;
  }
}

// a warpgroup's 64 rows of sums -> out, 64 columns at a time
template <class T, int SUMS>
__device__ void store_tile(const HopperJob& job, const float (&sum)[SUMS], uint32_t shared, int group, int32_t row,
                           int32_t column) {
  const int warp = warp_id() % 4, lane = lane_id();
  const bool leader = threadIdx.x % 128 == 0;
#pragma unroll
  for (int part = 0; part < SUMS / 32; ++part) {
    const uint32_t buffer = shared + OUT_AT + (group * OUT_BUFFERS + part % OUT_BUFFERS) * OUT_BYTES;
    if (leader) store_wait_read<OUT_BUFFERS - 1>();
    warpgroup_sync(1 + group);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int first = 4 * (8 * part + 2 * i);
      uint32_t r[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) r[e] = pair(T::round(sum[first + 2 * e]), T::round(sum[first + 2 * e + 1]));
      const int to = 16 * warp + lane % 16, unit = 2 * i + lane / 16;
      stmatrix(buffer + to * 128 + ((unit ^ to % 8) << 4), r[0], r[1], r[2], r[3]);
    }
    fence_async();
    warpgroup_sync(1 + group);
    if (leader) {
      if (row < job.M && column + 64 * part < job.N) tma_store(&job.out, buffer, column + 64 * part, row);
      store_commit();
    }
  }
}

template <class T, bool TURNED, bool MASKED, int BN>
__device__ void multiply_tiles(const HopperJob& job, uint32_t shared, uint32_t rank, int group) {
  // from 16 of the sum to the next, and between the 64 columns of a turned operand, in the units of a description
  constexpr uint64_t LEFT_STEP = 16 * 2 >> 4, RIGHT_STEP = (TURNED ? 16 * 128 : 16 * 2) >> 4;
  constexpr uint32_t LEADING = TURNED ? 64 * BK * 2 : 16;
  const int lane = lane_id();
  const int32_t tiles = job.tiles_m * job.tiles_n, clusters = gridDim.x / CLUSTER;
  const int32_t first_row = int32_t(rank) * BM + 64 * group, own_row = first_row + warp_id() % 4 * 16 + lane / 4;
  const uint64_t seed = MASKED ? uint64_t(*job.seed) : 0;
  constexpr int DRAWS = TileMask<BN>::DRAWS;
  float sum[BN / 2];
  TileMask<BN> mask{};
  Ring<BN> turn;
  bool owes = false;  // a stage that was read but not given back
  int adds = 0;

  const auto give_back = [&] {
    if (owes && lane < CLUSTER) barrier_arrive(empty_at(shared, turn.previous()), lane);
  };
  // slices of 16, as many as the type says: in one straight run, or the compiler would wait between them
  const auto step = [&](auto slices, const auto& meanwhile) {
    barrier_wait(full_at(shared, turn.stage), turn.parity);
    const uint32_t stage = shared + turn.stage * turn.STAGE_BYTES;
    const uint64_t left = operand_at(stage + group * 64 * BK * 2, 16), right = operand_at(stage + LEFT_BYTES, LEADING);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < slices.value; ++i) {
      wgmma<T, TURNED>(sum, left + i * LEFT_STEP, right + i * RIGHT_STEP, adds);
      adds = 1;
    }
    wgmma_commit();
    meanwhile();
    wgmma_wait<1>();
    give_back();
    owes = true;
    turn.next();
  };
  const auto finish = [&] {
    wgmma_finish(sum);
    give_back();
    owes = false;
  };
  const auto nothing = [] {};
  constexpr std::integral_constant<int, BK / 16> whole;

  int32_t tile = blockIdx.x / CLUSTER;
  if (MASKED && tile < tiles) {
    const Origin at = origin_of<BN>(tile, job.tiles_m, job.tiles_n);
#pragma unroll 1
    for (int c = 0; c < DRAWS; ++c) mask.draw(seed, job.threshold, at.row + own_row, at.column, c);
  }
#pragma unroll 1
  for (; tile < tiles; tile += clusters) {
    const Origin at = origin_of<BN>(tile, job.tiles_m, job.tiles_n);
    adds = 0;
#pragma unroll 1
    for (int32_t i = 0; i < job.low_steps; ++i) {
      const int32_t left = job.R - BK * i;
      if (left <= 16) step(std::integral_constant<int, 1>(), nothing);
      else if (left <= 32) step(std::integral_constant<int, 2>(), nothing);
      else step(whole, nothing);
    }
    int32_t i = 0;
    if constexpr (MASKED) {
      finish();
      mask.apply(sum, job.scale);
      const int32_t after = tile + clusters < tiles ? tile + clusters : tile;
      const Origin then = origin_of<BN>(after, job.tiles_m, job.tiles_n);
      const auto draw = [&](int c) { mask.draw(seed, job.threshold, then.row + own_row, then.column, c); };
#pragma unroll 1
      for (; i < job.base_steps && i < DRAWS; ++i) step(whole, [&] { draw(i); });
#pragma unroll 1
      for (int c = i; c < DRAWS; ++c) draw(c);
    }
#pragma unroll 1
    for (; i < job.base_steps; ++i) step(whole, nothing);
    finish();
    if (!MASKED && job.bias) {
      const int32_t column = at.column + lane % 4 * 2, size = job.bias_dtype == F32 ? 4 : 2;
      const void* const bias = static_cast<const char*>(job.bias) + int64_t(column) * size;
      if (job.bias_dtype == F32) add_bias<Single>(sum, bias, job.N - column);
      else add_bias<T>(sum, bias, job.N - column);
    }
    store_tile<T>(job, sum, shared, group, at.row + first_row, at.column);
  }
  if (threadIdx.x % 128 == 0) store_wait_all();
}

template <class T, bool TURNED, bool MASKED, int BN>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(HOPPER_THREADS, 1)
    hopper_kernel(const __grid_constant__ HopperJob job) {
  DYNAMIC_SHARED(raw);
  const uint32_t shared = (raw + SWIZZLE_BYTES - 1) / SWIZZLE_BYTES * SWIZZLE_BYTES;
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < Ring<BN>::STAGES; ++stage) {
      barrier_init(full_at(shared, stage), 1);
      barrier_init(empty_at(shared, stage), CLUSTER * CONSUMERS * 4);  // a warp of either block each
    }
    barrier_init_fence();
    prefetch_map(&job.left);
    prefetch_map(&job.right);
  }
  cluster_sync();
  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x == 0) load_tiles<TURNED, BN>(job, shared, rank);
    __syncwarp();
  } else {
    take_registers<232>();
    multiply_tiles<T, TURNED, MASKED, BN>(job, shared, rank, int(threadIdx.x / 128) - 1);
  }
  // a block must stay as long as the other one writes to its memory or arrives at its barriers
  cluster_sync();
}

template <class T, bool TURNED>
void launch_hopper(const HopperJob& job, bool masked, bool wide, int64_t blocks, Stream stream) {
  const auto plain = wide ? &hopper_kernel<T, TURNED, false, WIDE> : &hopper_kernel<T, TURNED, false, NARROW>;
  const auto mask = wide ? &hopper_kernel<T, TURNED, true, WIDE> : &hopper_kernel<T, TURNED, true, NARROW>;
  launch_clusters(masked ? mask : plain, blocks, HOPPER_THREADS, HOPPER_SHARED, stream, job);
}

}  // namespace peft_fast::cuda
