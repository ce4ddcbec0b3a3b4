// Products whose inner dimension is the tokens: dA, dB and dbias.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#include "cpu/gemm.h"
#include "cpu/scratch.h"

namespace peft_fast {

void gemm_tokens(const Engine& e, int64_t M, const std::vector<Tokens>& all) {
  // rows that see b through one mask share its panels and the tiles
  struct Stack {
    const Tokens* tokens;
    size_t begin, end;  // of its talls
    int64_t m, mr, rows, panel;
  };
  constexpr int64_t DEPTH = 256;  // tokens at a time: the panel is read back from the first-level cache
  const int64_t size = e.element(), a_row = padded_row(e, DEPTH);
  std::vector<Stack> stacks;
  int64_t panels = 0;
  for (const Tokens& t : all) {
    const int64_t panel = panels;
    panels += ceil_div(t.N, e.nr);
    for (size_t i = 0; i < t.talls.size();) {
      Stack s{&t, i, i, 0, 0, 0, panel};
      while (s.end < t.talls.size() && t.talls[s.end].mask.mask == t.talls[i].mask.mask) s.m += t.talls[s.end++].m;
      i = s.end;
      if (s.m == 0) continue;
      s.mr = round_up(ceil_div(s.m, ceil_div(s.m, e.mr)), e.row_step);
      s.rows = round_up(s.m, s.mr);
      stacks.push_back(s);
    }
  }
  if (stacks.empty()) return;
  torch::stable::parallel_for(0, panels, 1, [&](int64_t p0, int64_t p1) {
    // panels [first, last) of a stack's b are this task's
    auto range = [&](const Stack& s) {
      const int64_t first = std::max<int64_t>(p0 - s.panel, 0);
      return std::pair(first, std::max(first, std::min(p1 - s.panel, ceil_div(s.tokens->N, e.nr))));
    };
    int64_t a_rows = 0, c_floats = 0;
    for (const Stack& s : stacks) {
      const auto [first, last] = range(s);
      a_rows = std::max(a_rows, s.rows);
      c_floats += s.rows * (last - first) * e.nr;
    }
    Scratch own(a_rows * a_row * size + DEPTH * e.nr * size + c_floats * 4);
    char* a_block = own.data();
    char* panel = a_block + a_rows * a_row * size;
    float* const c_all = (float*)(panel + DEPTH * e.nr * size);
    const Session session(e);
    for (int64_t k0 = 0; k0 < M || k0 == 0; k0 += DEPTH) {
      const int64_t kn = std::min(DEPTH, M - k0), k = e.padded(kn);
      float* c = c_all;
      for (const Stack& s : stacks) {
        const auto [first, last] = range(s);
        if (first == last) continue;
        const int64_t c_row = (last - first) * e.nr;
        int64_t at = 0;
        for (size_t i = s.begin; i < s.end; at += s.tokens->talls[i++].m)
          e.rows(s.tokens->talls[i].a, 0, s.tokens->talls[i].m, k0, kn, a_block + at * a_row * size, a_row);
        Source b = s.tokens->b;
        b.mask = s.tokens->talls[s.begin].mask.mask;
        b.mask_row = s.tokens->talls[s.begin].mask.mask_row;
        for (int64_t p = first; p < last; ++p) {
          const int64_t j0 = p * e.nr, n = std::min<int64_t>(e.nr, s.tokens->N - j0);
          const int width = e.width(n);
          e.panel(b, k0, kn, j0, n, width, panel);
          for (int64_t i = 0; i < s.m; i += s.mr) {
            const int mi = int(std::min(s.mr, s.m - i));
            const Segment part{k, a_block + i * a_row * size, a_row, panel};
            e.tile(&part, 1, c + i * c_row + (p - first) * e.nr, c_row, mi, width, k0 > 0);
          }
        }
        c += s.rows * c_row;
      }
    }
    const float* c = c_all;
    for (const Stack& s : stacks) {
      const auto [first, last] = range(s);
      const int64_t c_row = (last - first) * e.nr;
      int64_t at = 0;
      for (size_t i = s.begin; i < s.end; at += s.tokens->talls[i++].m)
        for (int64_t p = first; p < last; ++p) {
          const int64_t j0 = p * e.nr;
          const int n = int(std::min<int64_t>(e.nr, s.tokens->N - j0));
          const Tall& tall = s.tokens->talls[i];
          e.finish(c + at * c_row + (p - first) * e.nr, c_row, int(tall.m), n, 0, j0, tall.y);
        }
      c += s.rows * c_row;
    }
  });
}

}  // namespace peft_fast
