// The names of csrc/cuda/hopper_ptx.cuh, acting on the model of the hardware in hopper_hardware.h.
#pragma once
#include "hopper_hardware.h"

#define __cluster_dims__(...)
#define DYNAMIC_SHARED(name) const uint32_t name = hopper_shim::FIRST_BYTE

inline void __syncwarp() { shim::sync_warp(); }

namespace peft_fast::cuda {

namespace hs = hopper_shim;
using TensorMap = hs::Map;

inline uint32_t cluster_rank() { return uint32_t(hs::block_of_me()); }
inline void cluster_sync() { hs::meet(hs::cluster().all, hs::cluster().block_threads * hs::BLOCKS); }
inline void prefetch_map(const TensorMap*) {}
inline void barrier_init_fence() {}
template <int>
void give_registers() {}
template <int>
void take_registers() {}

inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  if (barrier % 8) hs::give_up("a barrier that is not on 8 bytes");
  hs::shared_at(hs::block_of_me(), barrier + 6);
  hs::cluster().barriers[hs::block_of_me()][barrier] = {int(arrivals), int(arrivals), 0, 0};
}

inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  hs::Barrier& b = hs::barrier_at(hs::block_of_me(), barrier);
  b.bytes += bytes, --b.pending;
  hs::settle(b);
}

inline void barrier_arrive(uint32_t barrier, uint32_t rank) {
  hs::Barrier& b = hs::barrier_at(int(rank), barrier);
  --b.pending;
  hs::settle(b);
}

inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  hs::Barrier& b = hs::barrier_at(hs::block_of_me(), barrier);
  hs::wait_until([&] { return b.phase % 2 != parity; });
}

inline void tma_load_all(uint32_t to, const TensorMap* map, uint32_t barrier, int32_t column, int32_t row,
                         uint16_t blocks) {
  for (int block = 0; block < hs::BLOCKS; ++block)
    if (blocks >> block & 1) hs::cluster().loads.push_back({map, block, to, barrier, column, row});
}

inline void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int32_t column, int32_t row) {
  tma_load_all(to, map, barrier, column, row, uint16_t(1 << hs::block_of_me()));
}

inline void tma_store(const TensorMap* map, uint32_t from, int32_t column, int32_t row) {
  hs::cluster().threads[hs::me()].stores.push_back({map, from, column, row});
}

inline void store_commit() {
  hs::Thread& thread = hs::cluster().threads[hs::me()];
  thread.groups.push_back(thread.stores.size());
}

template <int N>
void store_wait_read() {
  hs::Thread& thread = hs::cluster().threads[hs::me()];
  if (thread.groups.size() <= N) return;
  const size_t until = thread.groups[thread.groups.size() - 1 - N];
  for (size_t i = 0; i < until; ++i) {
    if (!thread.stores[i].done) hs::execute(thread.stores[i], hs::block_of_me());
    thread.stores[i].awaited = true;
  }
}

inline void store_wait_all() { store_wait_read<0>(); }

inline void fence_async() {
  hs::Thread& thread = hs::cluster().threads[hs::me()];
  for (const auto& [address, value] : thread.unpublished) hs::shared_at(hs::block_of_me(), address) = value;
  thread.unpublished.clear();
}

inline void warpgroup_sync(int barrier) {
  if (barrier < 1 || barrier > 15) hs::give_up("no such barrier");
  hs::meet(hs::cluster().named[hs::block_of_me()][barrier], 128);
}

inline void stmatrix(uint32_t to, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  const uint32_t words[4] = {r0, r1, r2, r3};
  if (to % 16) hs::give_up("stmatrix to a row that is not on 16 bytes");
  shim::exchange(words, 4, [&](const shim::Slot& slot) {
    const int row = shim::lane() % 8, matrix = shim::lane() / 8;
    for (int t = 0; t < 4; ++t)
      for (int h = 0; h < 2; ++h)
        hs::cluster().threads[hs::me()].unpublished.push_back(
            {to + 4 * t + 2 * h, uint16_t(slot.words[4 * row + t][matrix] >> 16 * h)});
  });
}

inline void wgmma_fence() { hs::cluster().warpgroups[hs::me() / 128].fenced[hs::me() % 128] = true; }

template <class T, bool TURNED, int N>
void wgmma(float (&c)[N], uint64_t a, uint64_t b, int add) {
  hs::Warpgroup& group = hs::cluster().warpgroups[hs::me() / 128];
  const int t = hs::me() % 128;
  if (!group.fenced[t]) hs::give_up("a product without wgmma.fence");
  uint32_t poison = 0x7FC0BEEF;
  for (int e = 0; e < N; ++e) {
    if (group.running[t] && std::memcmp(&c[e], &poison, 4)) hs::give_up("sums touched while a product runs");
    if (!group.running[t]) group.sums[t][e] = c[e];
    std::memcpy(&c[e], &poison, 4);
  }
  group.running[t] = true;
  const size_t at = size_t(group.asked[t]++ - group.first);
  if (at == group.products.size()) group.products.push_back({a, b, 2 * N, add != 0, TURNED, T::dtype == BF16});
  hs::Product& product = group.products[at];
  if (product.a != a || product.b != b || product.add != (add != 0)) hs::give_up("a warpgroup that does not agree");
  ++product.asked;
}

inline void wgmma_commit() {
  hs::Warpgroup& group = hs::cluster().warpgroups[hs::me() / 128];
  group.groups[hs::me() % 128].push_back(group.asked[hs::me() % 128]);
}

template <int N>
void wgmma_wait() {
  hs::Warpgroup& group = hs::cluster().warpgroups[hs::me() / 128];
  std::deque<int64_t>& groups = group.groups[hs::me() % 128];
  if (groups.size() <= N) return;
  const int64_t until = groups[groups.size() - 1 - N];
  hs::wait_until([&] { return group.done >= until; });
  while (groups.size() > N) groups.pop_front();
}

template <int N>
void wgmma_finish(float (&c)[N]) {
  wgmma_wait<0>();
  hs::Warpgroup& group = hs::cluster().warpgroups[hs::me() / 128];
  const int t = hs::me() % 128;
  if (group.asked[t] != group.done) hs::give_up("a product that was not committed");
  const uint32_t poison = 0x7FC0BEEF;
  for (int e = 0; e < N; ++e) {
    if (group.running[t] && std::memcmp(&c[e], &poison, 4)) hs::give_up("sums touched while a product runs");
    if (group.running[t]) c[e] = group.sums[t][e];
  }
  group.running[t] = group.fenced[t] = false;
}

inline bool can_describe() { return true; }

inline bool describe(TensorMap& map, Dtype, const void* data, int64_t rows, int64_t cols, int64_t ld, int box_rows) {
  if (reinterpret_cast<uintptr_t>(data) % 16 || ld % 8 || rows < 1 || cols < 1 || box_rows > 256) return false;
  map = {static_cast<uint16_t*>(const_cast<void*>(data)), rows, cols, ld, box_rows};
  return true;
}

template <class Job>
void launch_clusters(void (*kernel)(Job), int64_t blocks, int threads, size_t shared, Stream, const Job& job) {
  if (blocks % hs::BLOCKS || shared > hs::MOST_SHARED) throw std::runtime_error("a grid that cannot be launched");
  const int clusters = int(blocks / hs::BLOCKS);
  hs::fault().clear();
  hs::dice().seed(hs::settings().seed);
  // (tensor maps are known by their addresses)
  static Job kept;
  kept = job;
  for (int index = 0; index < clusters; ++index) {
    hs::start(threads, shared, clusters);
    shim::block().body = [&] { kernel(kept); };
    hs::run_cluster(index);
  }
}

}  // namespace peft_fast::cuda
