// The device names that csrc/cuda/device.cuh asks for, on the host: one block at a time, its threads as fibers which
// run one after the other from one barrier or warp operation to the next. PEFT_FAST_SHIM_ORDER=reversed runs them
// from the last to the first, so that a missing barrier gives other numbers.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define SHARED_MEMORY(type, name) type* const name = reinterpret_cast<type*>(shim::block().shared.get())
#define threadIdx (shim::block().fibers[shim::block().current].index)
#define blockIdx (shim::block().at)
#define gridDim (shim::block().grid)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

namespace shim {

constexpr int MULTIPROCESSORS = 3;  // few blocks already fill it, and an odd number divides nothing
struct Index {
  uint32_t x, y;
};

struct Fiber {
  ucontext_t context;  // only to start: swapcontext asks the kernel for the signal mask, which costs most of a test
  jmp_buf here;
  bool started = false;
  std::unique_ptr<char[]> stack;
  Index index;
  int waits = 0;  // barriers of the block, then of the warp, this thread has come to
  int meets = 0;
  bool done = false;
};

struct Slot {  // what a warp's lanes show each other
  uint32_t words[32][16];
};

struct Block {
  Index at{}, grid{};
  std::vector<Fiber> fibers;
  std::vector<Slot> slots;
  // (one more than asked for would be found by the poison around it)
  std::unique_ptr<uint16_t[]> shared;
  size_t current = 0;
  jmp_buf scheduler;
  std::function<void()> body;
};

// (an exception cannot leave a fiber)
[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "csrc/cuda on the host: %s\n", what);
  std::abort();
}

inline Block& block() {
  static Block b;
  return b;
}

inline void yield() {
  if (!_setjmp(block().fibers[block().current].here)) _longjmp(block().scheduler, 1);
}

// from the scheduler into a fiber, until it yields or ends
inline void resume(Fiber& fiber) {
  if (_setjmp(block().scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

inline bool behind(size_t begin, size_t end, int Fiber::*count, int mine) {
  for (size_t i = begin; i < end; ++i) {
    const Fiber& other = block().fibers[i];
    // a barrier that some threads have left the kernel without is undefined on a device
    if (other.done && other.*count < mine) fail("a thread ended before a barrier of its fellows");
    if (other.*count < mine) return true;
  }
  return false;
}

inline void sync_block() {
  const int mine = ++block().fibers[block().current].waits;
  while (behind(0, block().fibers.size(), &Fiber::waits, mine)) yield();
}

inline void sync_warp() {
  const size_t begin = block().current / 32 * 32;
  const int mine = ++block().fibers[block().current].meets;
  while (behind(begin, begin + 32, &Fiber::meets, mine)) yield();
}

inline int lane() { return int(block().current % 32); }

// every lane shows `n` words; then visit(slot) reads what all of them showed
template <class Visit>
void exchange(const uint32_t* words, int n, Visit visit) {
  Slot& slot = block().slots[block().current / 32];
  std::memcpy(slot.words[lane()], words, size_t(n) * 4);
  sync_warp();
  visit(slot);
  sync_warp();
}

inline void trampoline() {
  Block& b = block();
  b.body();
  b.fibers[b.current].done = true;
  _longjmp(b.scheduler, 1);
}

inline void run(uint32_t gx, uint32_t gy, int threads, size_t shared, std::function<void()> body) {
  constexpr size_t STACK = 128 * 1024, GUARD = 64;
  const char* order = std::getenv("PEFT_FAST_SHIM_ORDER");
  const bool reversed = order && !std::strcmp(order, "reversed");
  if (shared > 99 * 1024) fail("more shared memory than sm_86 has");
  Block& b = block();
  b.body = std::move(body);
  b.grid = {gx, gy};
  b.slots.resize(threads / 32);
  if (b.fibers.empty()) {
    b.fibers.resize(threads);
    for (Fiber& fiber : b.fibers) fiber.stack.reset(new char[STACK]);
  }
  const size_t halves = shared / 2;
  for (uint32_t y = 0; y < gy; ++y)
    for (uint32_t x = 0; x < gx; ++x) {
      b.at = {x, y};
      // shared memory starts as NaN in every dtype
      b.shared.reset(new uint16_t[halves + GUARD]);  // on 16 bytes, as operator new is
      for (size_t i = 0; i < halves + GUARD; ++i) b.shared[i] = 0xFFFF;
      for (int i = 0; i < threads; ++i) {
        Fiber& fiber = b.fibers[i];
        fiber.index = {uint32_t(i), 0};
        fiber.waits = fiber.meets = 0;
        fiber.done = fiber.started = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, trampoline, 0);
      }
      for (bool left = true; left;) {
        left = false;
        for (int i = 0; i < threads; ++i) {
          b.current = size_t(reversed ? threads - 1 - i : i);
          Fiber& fiber = b.fibers[b.current];
          if (fiber.done) continue;
          resume(fiber);
          left = left || !fiber.done;
        }
      }
      for (size_t i = halves; i < halves + GUARD; ++i)
        if (b.shared[i] != 0xFFFF) fail("written past the end of shared memory");
    }
}

}  // namespace shim

inline void __syncthreads() { shim::sync_block(); }

inline float __shfl_xor_sync(uint32_t, float value, int mask) {
  uint32_t bits;
  float result = 0;
  std::memcpy(&bits, &value, 4);
  shim::exchange(&bits, 1, [&](const shim::Slot& slot) { std::memcpy(&result, slot.words[shim::lane() ^ mask], 4); });
  return result;
}

namespace peft_fast::cuda {

// c (16, 8) += a (16, 16)·b (16, 8) on the fragments of PTX's mma.m16n8k16, products exact, sums in float32
template <class T>
void warp_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  shim::exchange(words, 6, [&](const shim::Slot& slot) {
    const int g = shim::lane() / 4, t = shim::lane() % 4;
    for (int e = 0; e < 4; ++e) {
      const int row = g + 8 * (e / 2), col = 2 * t + e % 2;
      for (int k = 0; k < 16; ++k) {
        const uint32_t left = slot.words[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
        const uint32_t right = slot.words[col * 4 + k % 8 / 2][4 + k / 8];
        c[e] += T::widen(uint16_t(left >> 16 * (k % 2))) * T::widen(uint16_t(right >> 16 * (k % 2)));
      }
    }
  });
}

struct Bf16 {
  static constexpr Dtype dtype = BF16;
  static float widen(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
  }
  static uint16_t round(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if (f != f) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
  static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { warp_mma<Bf16>(c, a, b0, b1); }
};

struct Half {
  static constexpr Dtype dtype = F16;
  static float widen(uint16_t bits) {
    _Float16 h;
    std::memcpy(&h, &bits, 2);
    return float(h);
  }
  static uint16_t round(float f) {
    const _Float16 h = _Float16(f);
    uint16_t bits;
    std::memcpy(&bits, &h, 2);
    return bits;
  }
  static void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { warp_mma<Half>(c, a, b0, b1); }
};

inline void ldmatrix_trans(uint32_t (&r)[4], const uint16_t* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) shim::fail("ldmatrix of a row that is not on 16 bytes");
  uint32_t words[2];
  std::memcpy(words, &row, 8);
  shim::exchange(words, 2, [&](const shim::Slot& slot) {
    const int g = shim::lane() / 4, t = shim::lane() % 4;
    for (int i = 0; i < 4; ++i) {
      uint16_t both[2];
      for (int h = 0; h < 2; ++h) {
        const uint16_t* from;
        std::memcpy(&from, slot.words[8 * i + 2 * t + h], 8);
        both[h] = from[g];
      }
      r[i] = uint32_t(both[0]) | uint32_t(both[1]) << 16;
    }
  });
}

}  // namespace peft_fast::cuda
