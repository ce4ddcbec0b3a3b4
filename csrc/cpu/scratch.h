// What the products of gemm.cpp and gemm_tokens.cpp have in common: scratch, sessions, the stride of packed rows.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/engine.h"

namespace peft_fast {

constexpr int64_t KEPT_BYTES = 32 << 20;  // of scratch a thread keeps between calls, per nesting depth

// scratch that is kept per thread and nesting depth: fresh pages for every call would cost more than the copies
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    Slot& slot = slots()[depth()++];
    if (bytes > slot.size) {
      slot.data.reset();
      slot.size = 0;
      slot.data.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      if (!slot.data) {
        --depth();
        throw std::bad_alloc();
      }
      slot.size = bytes;
    }
    data_ = (char*)slot.data.get();
  }
  ~Scratch() {
    // a rare giant is not kept for the life of the thread
    Slot& slot = slots()[--depth()];
    if (slot.size > KEPT_BYTES) slot.data.reset(), slot.size = 0;
  }
  Scratch(const Scratch&) = delete;
  char* data() const { return data_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  struct Slot {
    std::unique_ptr<void, Free> data;
    int64_t size = 0;
  };
  static Slot* slots() {
    static thread_local Slot s[8];
    return s;
  }
  static int& depth() {
    static thread_local int d = 0;
    return d;
  }
  char* data_;
};

// the tiles of one task run inside one of these
class Session {
 public:
  explicit Session(const Engine& e) : e_(e) {
    if (e_.enter) e_.enter(saved_);
  }
  ~Session() {
    if (e_.leave) e_.leave(saved_);
  }
  Session(const Session&) = delete;

 private:
  const Engine& e_;
  alignas(64) char saved_[64];
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// elements a row of A takes: an odd number of cache lines, so that the rows of a tile fall into different sets
inline int64_t padded_row(const Engine& e, int64_t k) {
  const int64_t line = 64 / e.element();
  const int64_t lines = ceil_div(e.padded(k), line);
  return (lines | 1) * line;
}

}  // namespace peft_fast
