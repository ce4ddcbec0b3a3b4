#include "cpu/gemm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

namespace peft_fast {
namespace {

constexpr int64_t CHUNK_BYTES = 4 << 20;   // of packed B at a time: stays in the last-level cache
constexpr int64_t BLOCK_BYTES = 256 << 10; // of A a task works on: stays in the second-level cache
constexpr int64_t K_BYTES = 4096;          // of one row per pass over K: a panel stays in the second-level cache

constexpr int64_t KEPT_BYTES = 32 << 20;   // of scratch a thread keeps between calls, per nesting depth

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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// elements a row of A takes: an odd number of cache lines, so that the rows of a tile fall into different sets
int64_t padded_row(const Engine& e, int64_t k) {
  const int64_t line = 64 / e.element();
  const int64_t lines = ceil_div(e.padded(k), line);
  return (lines | 1) * line;
}

void pack_panels(const Engine& e, int64_t K, int64_t N, const Source& b, int64_t p0, int64_t p1, int64_t first,
                 char* out) {
  const int64_t bytes = e.padded(K) * e.nr * e.element();
  // columns that lie together in memory are read along the rows, a few rows at a time for all panels: a cold weight
  // then streams in, where one panel after another would touch every page of it for a line or two
  constexpr int64_t ROWS = 32;
  const int64_t step = b.col == 1 ? ROWS : std::max<int64_t>(K, 1);
  for (int64_t k0 = 0; k0 < K; k0 += step)
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t j = p * e.nr, n = std::min<int64_t>(e.nr, N - j);
      const int width = e.width(n);
      e.panel(b, k0, std::min(step, K - k0), j, n, width, out + (p - first) * bytes + k0 * width * e.element());
    }
}

}  // namespace

int64_t packed_bytes(const Engine& e, int64_t K, int64_t N) {
  return ceil_div(N, e.nr) * e.nr * e.padded(K) * e.element();
}

void pack(const Engine& e, int64_t K, int64_t N, const Source& b, void* out) {
  torch::stable::parallel_for(0, ceil_div(N, e.nr), 1, [&](int64_t p0, int64_t p1) {
    pack_panels(e, K, N, b, p0, p1, 0, (char*)out);
  });
}

void gemm(const Engine& e, int64_t M, int64_t N, int64_t K, const Source& a, const Source& b,
          const std::vector<LowRank>& low, const Target& y, const void* packed) {
  if (M == 0 || N == 0) return;
  const int64_t size = e.element(), panels = ceil_div(N, e.nr), kp = e.padded(K);
  const int64_t panel_bytes = kp * e.nr * size;
  int64_t r = 0;  // packed depth of all low-rank terms
  for (const LowRank& l : low) r += e.padded(l.k);
  const int64_t low_bytes = r * e.nr * size;
  const int64_t chunk =
      packed ? panels : std::clamp<int64_t>(CHUNK_BYTES / std::max<int64_t>(panel_bytes + low_bytes, 1), 1, panels);

  // K in passes of one depth, a multiple of kpad; the first-level accumulators live in c
  const int64_t passes = std::max<int64_t>(1, ceil_div(kp * size, K_BYTES));
  const int64_t depth = std::max<int64_t>(e.kpad, round_up(ceil_div(kp, passes), std::max(e.kpad, 8)));
  const int64_t row = padded_row(e, depth), low_row = padded_row(e, std::max<int64_t>(r, e.kpad));
  const int64_t threads = torch::stable::get_num_threads();
  int64_t mc = std::max<int64_t>(e.mr, BLOCK_BYTES / (row * size) / e.mr * e.mr);
  // blocks differ by one tile at the most, and every thread gets as many of them
  const int64_t tiles = ceil_div(M, e.mr);
  const int64_t blocks = std::min(round_up(ceil_div(M, mc), threads), tiles);
  mc = ceil_div(tiles, blocks) * e.mr;

  Scratch shared((packed ? 0 : chunk * panel_bytes) + chunk * low_bytes + 64);
  char* b_chunk = shared.data();
  for (int64_t c0 = 0; c0 < panels; c0 += chunk) {
    const int64_t cn = std::min(chunk, panels - c0);
    char* low_chunk = b_chunk + (packed ? 0 : cn * panel_bytes);
    torch::stable::parallel_for(0, cn, 1, [&](int64_t p0, int64_t p1) {
      if (!packed) pack_panels(e, K, N, b, c0 + p0, c0 + p1, c0, b_chunk);
      for (int64_t p = p0; p < p1; ++p) {
        const int64_t j = (c0 + p) * e.nr, n = std::min<int64_t>(e.nr, N - j);
        char* to = low_chunk + p * low_bytes;
        for (const LowRank& l : low) {
          e.panel(l.b, 0, l.k, j, n, e.width(n), to);
          to += e.padded(l.k) * e.nr * size;
        }
      }
    });
    const char* b_panels = packed ? (const char*)packed + c0 * panel_bytes : b_chunk;
    // few rows: cut the columns too, so that every thread has work
    const int64_t cuts = std::min(cn, std::max<int64_t>(1, threads / blocks));
    const int64_t per_cut = ceil_div(cn, cuts);
    torch::stable::parallel_for(0, blocks * cuts, 1, [&](int64_t t0, int64_t t1) {
      const int64_t c_row = per_cut * e.nr;
      const bool split = kp > depth;
      const int64_t a_bytes = round_up(mc * row * size, 64), low_a_bytes = round_up(mc * low_row * size, 64);
      Scratch own(a_bytes + low_a_bytes + 2 * 64 * 64 * 4 + (split ? mc * c_row * 4 : 0));
      char* a_block = own.data();
      char* low_a = a_block + a_bytes;
      float* z = (float*)(low_a + low_a_bytes);  // a low-rank product before its mask
      float* one = z + 64 * 64;                  // c of one tile when K takes one pass
      float* c_block = one + 64 * 64;
      const Session session(e);
      std::vector<Segment> segments, masked;
      for (int64_t t = t0; t < t1; ++t) {
        const int64_t block = t / cuts, i0 = block * tiles / blocks * e.mr;
        const int64_t m = std::min(M, (block + 1) * tiles / blocks * e.mr) - i0;
        const int64_t q0 = t % cuts * per_cut, q1 = std::min(cn, q0 + per_cut);
        int64_t at = 0;
        for (const LowRank& l : low) {
          e.rows(l.a, i0, m, 0, l.k, low_a + at * size, low_row);
          at += e.padded(l.k);
        }
        for (int64_t k0 = 0; k0 < kp || k0 == 0; k0 += depth) {
          const int64_t kn = std::min(depth, K - k0), kn_padded = e.padded(kn);
          const bool last = k0 + depth >= kp;
          e.rows(a, i0, m, k0, kn, a_block, row);
          for (int64_t q = q0; q < q1; ++q) {
            const int64_t j0 = (c0 + q) * e.nr;
            const int n = int(std::min<int64_t>(e.nr, N - j0)), width = e.width(n);
            const char* bp = b_panels + q * panel_bytes + k0 * width * size;
            const char* lp = low_chunk + q * low_bytes;
            for (int64_t i = 0; i < m; i += e.mr) {
              const int mi = int(std::min<int64_t>(e.mr, m - i));
              float* c = split ? c_block + i * c_row + (q - q0) * e.nr : one;
              const int64_t ldc = split ? c_row : e.nr;
              segments.assign(1, {kn_padded, a_block + i * row * size, row, bp});
              int64_t from = 0;
              for (const LowRank& l : low) {
                const int64_t k = e.padded(l.k);
                const Segment term{k, low_a + (i * low_row + from) * size, low_row, lp + from * e.nr * size};
                if (last) (l.mask.mask ? masked : segments).push_back(term);
                from += k;
              }
              e.tile(segments.data(), int(segments.size()), c, ldc, mi, width, k0 > 0);
              if (!last) continue;
              size_t next = 0;
              for (const LowRank& l : low) {
                if (!l.mask.mask) continue;
                e.tile(&masked[next++], 1, z, e.nr, mi, width, false);
                e.add_masked(c, ldc, z, e.nr, mi, n, l.mask, i0 + i, j0, l.mask_scale);
              }
              masked.clear();
              e.finish(c, ldc, mi, n, i0 + i, j0, y);
            }
          }
        }
      }
    });
  }
}

void gemm_tokens(const Engine& e, int64_t m, int64_t N, int64_t M, const Source& a, const Source& b,
                 const Target& y) {
  if (m == 0 || N == 0) return;
  const int64_t size = e.element(), panels = ceil_div(N, e.nr);
  constexpr int64_t DEPTH = 256;  // tokens at a time: the panel is read back from the first-level cache
  const int64_t mr = round_up(ceil_div(m, ceil_div(m, e.mr)), e.row_step), rows = round_up(m, mr);
  const int64_t a_row = padded_row(e, DEPTH);
  torch::stable::parallel_for(0, panels, 1, [&](int64_t p0, int64_t p1) {
    const int64_t c_row = (p1 - p0) * e.nr;
    Scratch own(rows * a_row * size + DEPTH * e.nr * size + rows * c_row * 4);
    char* a_block = own.data();
    char* panel = a_block + rows * a_row * size;
    float* c = (float*)(panel + DEPTH * e.nr * size);
    const Session session(e);
    for (int64_t k0 = 0; k0 < M || k0 == 0; k0 += DEPTH) {
      const int64_t kn = std::min(DEPTH, M - k0), k = e.padded(kn);
      e.rows(a, 0, m, k0, kn, a_block, a_row);
      for (int64_t p = p0; p < p1; ++p) {
        const int64_t j0 = p * e.nr, n = std::min<int64_t>(e.nr, N - j0);
        const int width = e.width(n);
        e.panel(b, k0, kn, j0, n, width, panel);
        for (int64_t i = 0; i < m; i += mr) {
          const int mi = int(std::min(mr, m - i));
          const Segment part{k, a_block + i * a_row * size, a_row, panel};
          e.tile(&part, 1, c + i * c_row + (p - p0) * e.nr, c_row, mi, width, k0 > 0);
        }
      }
    }
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t j0 = p * e.nr;
      const int n = int(std::min<int64_t>(e.nr, N - j0));
      e.finish(c + (p - p0) * e.nr, c_row, int(m), n, 0, j0, y);
    }
  });
}

}  // namespace peft_fast
