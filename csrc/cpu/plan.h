// How the products of gemm.cpp are cut: k in passes and layers, columns in panels and chunks.
#pragma once
#include <algorithm>

#include "cpu/gemm.h"
#include "cpu/scratch.h"

namespace peft_fast {

constexpr int64_t CHUNK_PANELS = 16;  // of packed B at the least: every chunk packs A anew

// rows [r0, r0 + K) of panels [p0, p1) of b, which has N columns; the first at `out`, each `stride` bytes further
void pack_panels(const Engine& e, int64_t r0, int64_t K, int64_t N, const Source& b, int64_t p0, int64_t p1, char* out,
                 int64_t stride);

// a stretch of a left operand's k, and where it begins in a packed row of A
struct Strip {
  size_t left;
  int64_t k0, k, at;
};

// panels [p0, p1) of one Columns, the first of them panel q0 of its chunk, with what is packed of it at `data`
struct Cut {
  size_t column;
  int64_t p0, p1, q0, data;
};

// columns whose panels are packed together, so that they stay in the last-level cache
struct Chunk {
  std::vector<Cut> cuts;
  int64_t panels = 0, bytes = 0;

  // f(cut, first, last) for what lies in panels [q0, q1)
  template <class F>
  void each(int64_t q0, int64_t q1, const F& f) const {
    for (const Cut& cut : cuts) {
      const int64_t first = cut.p0 + std::max<int64_t>(q0 - cut.q0, 0);
      const int64_t last = std::min(cut.p1, cut.p0 + q1 - cut.q0);
      if (first < last) f(cut, first, last);
    }
  }
};

// how a product runs: its k in passes, whose packed rows of A lie side by side, and its columns in panels. One that is
// too deep for a chunk of enough columns runs in layers: B is packed for a few passes at a time, over all rows
class Plan {
 public:
  struct Part {  // of one Columns
    int64_t panels, bytes;  // bytes: packed here of a panel, in the layer that has most
    int64_t low_a;          // where its terms begin in a packed row of low-rank left operands
    size_t first, last;     // passes
  };
  struct Packed {  // of one Columns in one layer: where in a panel which k of each right operand begins
    std::vector<int64_t> k0, k, at;
    int64_t low_b, bytes;
  };
  struct Layer {
    size_t begin, end;  // passes
    std::vector<Packed> packed;

    bool holds(size_t pass) const { return begin <= pass && pass < end; }
  };
  const Engine& e;
  const Product& product;
  std::vector<std::vector<Strip>> passes;
  std::vector<Part> parts;
  std::vector<Layer> layers;
  int64_t row, low_row;  // elements

  // in layers whose chunks of CHUNK_PANELS take about `most` bytes
  Plan(const Engine&, const Product&, int64_t most);

  // chunks of one size, about `most` bytes or so many panels
  std::vector<Chunk> chunks(int64_t most, int64_t panels = CHUNK_PANELS) const;

  // panels [q0, q1) of a chunk, as far as they do not come packed
  void pack(const Layer& layer, const Chunk& chunk, int64_t q0, int64_t q1, char* data) const;

  // what a task needs of scratch for blocks of mc rows × `panels`
  struct Work {
    char *a, *low_a;
    float *z, *one;  // a low-rank product before its mask, c of the tiles of a panel that takes one pass
    float* c;        // those that take several, c_row floats a row
    int64_t c_row;
  };
  int64_t a_bytes(int64_t mc) const { return round_up(mc * row * e.element(), 64); }
  int64_t low_bytes(int64_t mc) const { return round_up(mc * low_row * e.element(), 64); }
  int64_t one_bytes(int64_t mc) const { return std::max<int64_t>(64 * 64, row > e.depth ? mc * e.nr : 0) * 4; }
  int64_t c_bytes(int64_t mc, int64_t panels) const { return passes.size() > 1 ? mc * panels * e.nr * 4 : 0; }

  // a tile (m, n) whose product is whole: its low-rank terms that are masked, or the epilogue's, and its way out
  void finish(const Columns& c, int64_t p, std::vector<Segment>& apart, const char* panel, const Packed& packed,
              const Work& w, float* to, int64_t ldc, int m, int n, int width, int64_t i0) const;

  // rows [i0, i0 + m) of panels [q0, q1); a_ready: w.a holds the left operands already
  void run(const Layer& layer, const Chunk& chunk, const char* data, int64_t i0, int64_t m, int64_t q0, int64_t q1,
           const Work& w, bool a_ready) const;

  bool in_layers() const { return layers.size() > 1; }

  bool same_lefts(const Plan& other) const {
    const auto &a = product.lefts, &b = other.product.lefts;
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Left& l, const Left& r) {
      return l.a.data == r.a.data && l.a.mask == r.a.mask && l.k == r.k;
    });
  }

 private:
  // passes [begin, end) of the columns in parts
  Layer layer(size_t begin, size_t end) const;
};

}  // namespace peft_fast
