// A cluster of Hopper's blocks on the host: fibers in random order, and what the hardware does on its own (loads,
// stores, products) at some random later time, as late as it may. Written from the PTX manual, not from the kernel:
// swizzle, descriptions of operands, phases of barriers.
//
// What the hardware would leave undefined is an error here: sums touched during a product, a barrier arrived at too
// often, everyone waiting, data stored that no fence has published.
#pragma once
#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/launch.cuh"

namespace hopper_shim {

// not a multiple of 1024: the kernel has to align what it is given
constexpr uint32_t FIRST_BYTE = 16;
constexpr int BLOCKS = 2, MOST_SHARED = 227 * 1024;

struct Map {
  uint16_t* data = nullptr;
  int64_t rows = 0, cols = 0, ld = 0;
  int box_rows = 0;
};

struct Barrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
};

struct Meeting {
  int64_t came = 0;
};

// one product of a warpgroup: executed once all 128 threads have asked for it
struct Product {
  uint64_t a, b;
  int columns;
  bool add, turned, bf16;
  int asked = 0;
};

struct Warpgroup {
  std::deque<Product> products;
  int64_t first = 0, done = 0;              // number of the deque's front; how many were executed
  std::array<int64_t, 128> asked{};         // by thread
  std::array<std::deque<int64_t>, 128> groups;  // by thread: products up to here belong to a committed group
  std::array<std::array<float, 128>, 128> sums;
  std::array<bool, 128> running{}, fenced{};
};

struct Store {
  const Map* map;
  uint32_t from;
  int32_t column, row;
  bool done = false, awaited = false;
};

struct Thread {
  std::vector<std::pair<uint32_t, uint16_t>> unpublished;  // address, element: not yet seen by Hopper's own units
  std::vector<Store> stores;
  std::deque<size_t> groups;  // stores before this index belong to a committed group
  std::function<bool()> ready;
};

struct Load {
  const Map* map;
  int block;
  uint32_t to, barrier;
  int32_t column, row;
};

struct Cluster {
  std::array<std::vector<uint16_t>, BLOCKS> shared;
  std::array<std::map<uint32_t, Barrier>, BLOCKS> barriers;
  std::array<std::array<Meeting, 16>, BLOCKS> named;
  Meeting all;
  std::vector<Thread> threads;
  std::vector<Warpgroup> warpgroups;
  std::vector<Load> loads;
  int block_threads = 0;
  bool moved = false;
};

struct Settings {
  uint32_t seed = 0;
  double eagerness = 0.5;  // how likely a thing that may happen does so in a round
  int multiprocessors = 4;
};

inline Cluster& cluster() {
  static Cluster c;
  return c;
}
inline Settings& settings() {
  static Settings s;
  return s;
}
inline std::string& fault() {
  static std::string f;
  return f;
}
inline std::mt19937& dice() {
  static std::mt19937 d;
  return d;
}
inline bool likely(double p) { return std::uniform_real_distribution<>()(dice()) < p; }

// (an exception cannot leave a fiber: it stays where it is, and the scheduler throws)
[[noreturn]] inline void give_up(const std::string& what) {
  if (fault().empty()) fault() = what;
  for (;;) shim::yield();
}

inline int me() { return int(shim::block().current); }
inline int block_of_me() { return me() / cluster().block_threads; }

// (asked by the scheduler: switching to a fiber that has to wait on costs far more)
template <class Ready>
void wait_until(const Ready& ready) {
  cluster().moved = true;
  cluster().threads[me()].ready = std::cref(ready);
  while (!ready()) shim::yield();
  cluster().threads[me()].ready = nullptr;
  cluster().moved = true;
}

inline void meet(Meeting& meeting, int64_t expected) {
  const int64_t turn = meeting.came++ / expected;
  wait_until([&] { return meeting.came >= (turn + 1) * expected; });
}

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline uint16_t& shared_at(int block, uint32_t address) {
  auto& bytes = cluster().shared[block];
  if (address < FIRST_BYTE || address % 2 || address / 2 >= bytes.size())
    give_up("an address outside of shared memory");
  return bytes[address / 2];
}

inline Barrier& barrier_at(int block, uint32_t address) {
  const auto found = cluster().barriers[block].find(address);
  if (found == cluster().barriers[block].end()) give_up("a barrier that was not initialised");
  return found->second;
}

inline void settle(Barrier& barrier) {
  if (barrier.pending < 0) give_up("a barrier arrived at too often");
  if (barrier.bytes < -(1 << 20) || barrier.bytes >= 1 << 20) give_up("more bytes than a barrier can count");
  if (barrier.pending == 0 && barrier.bytes == 0) barrier.pending = barrier.arrivals, ++barrier.phase;
}

inline void execute(const Load& load) {
  const Map& map = *load.map;
  if (load.to % 1024) give_up("a swizzled box that is not on 1024 bytes");
  for (int r = 0; r < map.box_rows; ++r)
    for (int c = 0; c < 64; ++c) {
      const int64_t row = int64_t(load.row) + r, column = int64_t(load.column) + c;
      const bool inside = row >= 0 && row < map.rows && column >= 0 && column < map.cols;
      shared_at(load.block, swizzled(load.to + r * 128 + c * 2)) = inside ? map.data[row * map.ld + column] : 0;
    }
  Barrier& barrier = barrier_at(load.block, load.barrier);
  barrier.bytes -= map.box_rows * 128;
  settle(barrier);
}

inline void execute(Store& store, int block) {
  const Map& map = *store.map;
  for (int r = 0; r < map.box_rows; ++r)
    for (int c = 0; c < 64; ++c) {
      const int64_t row = int64_t(store.row) + r, column = int64_t(store.column) + c;
      if (row < 0 || row >= map.rows || column < 0 || column >= map.cols) continue;
      map.data[row * map.ld + column] = shared_at(block, swizzled(store.from + r * 128 + c * 2));
    }
  store.done = true;
}

// element (i, k) of an operand with `description`, i along M or N
inline uint16_t element(int block, uint64_t description, bool turned, int i, int k) {
  const uint32_t start = uint32_t(description & 0x3FFF) << 4, leading = uint32_t(description >> 16 & 0x3FFF) << 4,
                 stride = uint32_t(description >> 32 & 0x3FFF) << 4;
  const uint32_t linear = turned ? i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128
                                 : i / 8 * stride + i % 8 * 128 + k * 2;
  return shared_at(block, swizzled(start + linear));
}

inline float widen(uint16_t bits, bool bf16) {
  return bf16 ? peft_fast::cuda::Bf16::widen(bits) : peft_fast::cuda::Half::widen(bits);
}

inline void execute(Warpgroup& group, int block, const Product& product) {
  static float a[64][16], b[16][256];
  for (const uint64_t description : {product.a, product.b})
    if (description >> 62 != 1 || (description >> 49 & 7) != 0)
      give_up("an operand that is not swizzled by 128 bytes");
  for (int i = 0; i < 64; ++i)
    for (int k = 0; k < 16; ++k) a[i][k] = widen(element(block, product.a, false, i, k), product.bf16);
  for (int j = 0; j < product.columns; ++j)
    for (int k = 0; k < 16; ++k) b[k][j] = widen(element(block, product.b, product.turned, j, k), product.bf16);
  static float c[64][256];
  std::fill(&c[0][0], &c[0][0] + 64 * 256, 0.0f);
  for (int i = 0; i < 64; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < product.columns; ++j) c[i][j] += a[i][k] * b[k][j];
  for (int t = 0; t < 128; ++t)
    for (int e = 0; e < product.columns / 2; ++e) {
      const int row = t / 32 * 16 + t % 32 / 4 + 8 * (e / 2 % 2), column = e / 4 * 8 + t % 4 * 2 + e % 2;
      group.sums[t][e] = product.add ? group.sums[t][e] + c[row][column] : c[row][column];
    }
}

// what Hopper's units do on their own
inline void units() {
  Cluster& c = cluster();
  std::shuffle(c.loads.begin(), c.loads.end(), dice());
  std::vector<Load> later;
  for (const Load& load : c.loads) {
    if (likely(settings().eagerness)) execute(load), c.moved = true;
    else later.push_back(load);
  }
  c.loads = std::move(later);
  for (size_t g = 0; g < c.warpgroups.size(); ++g) {
    Warpgroup& group = c.warpgroups[g];
    while (!group.products.empty() && group.products.front().asked == 128 && likely(settings().eagerness)) {
      execute(group, int(g) * 128 / c.block_threads, group.products.front());
      group.products.pop_front();
      ++group.first, ++group.done;
      c.moved = true;
    }
  }
  for (size_t t = 0; t < c.threads.size(); ++t)
    for (Store& store : c.threads[t].stores)
      if (!store.done && likely(settings().eagerness / 4)) execute(store, int(t) / c.block_threads), c.moved = true;
}

inline bool idle() {
  const Cluster& c = cluster();
  const auto quiet = [](const Warpgroup& g) { return g.products.empty() || g.products.front().asked < 128; };
  return c.loads.empty() && std::all_of(c.warpgroups.begin(), c.warpgroups.end(), quiet);
}

inline void start(int threads, size_t shared, int clusters) {
  shim::Block& b = shim::block();
  Cluster& c = cluster();
  c = Cluster{};
  c.block_threads = threads;
  // NaN in every dtype
  for (auto& bytes : c.shared) bytes.assign((FIRST_BYTE + shared) / 2, 0xFFFF);
  c.threads.resize(size_t(threads) * BLOCKS);
  c.warpgroups.resize(size_t(threads) * BLOCKS / 128);
  b.fibers.resize(size_t(threads) * BLOCKS);
  b.slots.resize(size_t(threads) * BLOCKS / 32);
  b.grid = {uint32_t(clusters) * BLOCKS, 1};
  for (int i = 0; i < threads * BLOCKS; ++i) {
    shim::Fiber& fiber = b.fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[64 * 1024]);
    fiber.index = {uint32_t(i % threads), 0};
    fiber.waits = fiber.meets = 0;
    fiber.done = fiber.started = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = 64 * 1024;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, shim::trampoline, 0);
  }
}

inline void run_cluster(int index) {
  shim::Block& b = shim::block();
  // (the kernels of other tests run a block of their own size)
  const std::shared_ptr<void> leave(nullptr, [](void*) { shim::block().fibers.clear(); });
  Cluster& c = cluster();
  // some warps are slow throughout
  std::vector<double> pace(b.fibers.size() / 32);
  for (double& p : pace) p = likely(0.3) ? 0.1 : 0.8;
  std::vector<size_t> warps(pace.size());
  for (size_t w = 0; w < warps.size(); ++w) warps[w] = w;
  int still = 0;
  for (bool left = true; left;) {
    left = false;
    c.moved = false;
    std::shuffle(warps.begin(), warps.end(), dice());
    for (const size_t warp : warps) {
      const bool runs = still > 20 || likely(pace[warp]);
      for (size_t i = 32 * warp; i < 32 * (warp + 1); ++i) {
        shim::Fiber& fiber = b.fibers[i];
        if (fiber.done) continue;
        left = true;
        if (!runs || (c.threads[i].ready && !c.threads[i].ready())) continue;
        b.current = i;
        b.at = {uint32_t(index * BLOCKS) + uint32_t(int(i) / c.block_threads), 0};
        shim::resume(fiber);
        if (fiber.done) c.moved = true;
        if (!fault().empty()) throw std::runtime_error(fault());
      }
    }
    units();
    if (!fault().empty()) throw std::runtime_error(fault());
    still = c.moved || !idle() ? 0 : still + 1;
    if (still > 40) throw std::runtime_error("everyone waits");
  }
  for (const Thread& thread : c.threads)
    for (const Store& store : thread.stores)
      if (!store.awaited) throw std::runtime_error("a store that nobody waited for");
  for (const Warpgroup& group : c.warpgroups)
    if (!group.products.empty()) throw std::runtime_error("a product that nobody waited for");
  if (!c.loads.empty()) throw std::runtime_error("a load that nobody waited for");
}

}  // namespace hopper_shim
