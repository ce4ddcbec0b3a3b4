#include "cpu/lora_mixed.h"

#include <algorithm>
#include <cstring>

#include "cpu/scratch.h"

namespace peft_fast {
namespace {

constexpr int64_t PAD = 32;                 // Engine::dots reads x up to the next multiple of it
constexpr int64_t COLUMNS = 256;            // of y at a time: its part of Bᵀ stays in the first-level cache
constexpr int64_t BLOCK_BYTES = 256 << 10;  // of tokens at a time: they stay in the second-level cache

void check_fits(bool fits) {
  STD_TORCH_CHECK(fits, "given: shapes that do not fit\nneeded: y (b, T, N), x (b, T, K) or ids (b, T), and of each "
                        "adapter A (r, K), B (N, r), its bias (N,), a scaling and its rows\n"
                        "do: call peft_fast.ops.lora_mixed, which names the one that is wrong");
}

// what the batch has: tokens as vectors, or as numbers of words
struct Input {
  std::optional<Matrix> x;
  std::vector<int64_t> ids;

  explicit Input(const Tensor& t) {
    const bool wide = t.scalar_type() == ScalarType::Long;
    if (!wide && t.scalar_type() != ScalarType::Int) {
      x = matrix(t, "x");
      return;
    }
    const Tensor dense = torch::stable::contiguous(t);
    ids.resize(dense.numel());
    for (size_t m = 0; m < ids.size(); ++m)
      ids[m] = wide ? ((const int64_t*)dense.const_data_ptr())[m] : ((const int32_t*)dense.const_data_ptr())[m];
  }
};

struct Low {
  const Engine& e;
  Tensor a, b;
  float scaling;
  int64_t r, first, count;  // where its rows begin in the order, and how many there are
  int64_t tokens, low_row;  // H: tokens rounded up to whole tiles × low_row, packed
  std::vector<float> bias;  // (N,), scaled
  int64_t at = 0;           // bytes before its H
  int64_t h_bytes() const { return round_up(round_up(tokens, e.mr) * low_row * e.element(), 64); }
};

// tokens [m0, m0 + m) of an adapter: the token of the batch that each is
template <class F>
void each_token(const Low& low, const std::vector<int64_t>& order, int64_t T, int64_t m0, int64_t m, const F& f) {
  for (int64_t i = m0; i < m0 + m; ++i) f(i - m0, order[low.first + i / T] * T + i % T);
}

}  // namespace

void lora_mixed(const Tensor& y, const Tensor& x_, const std::vector<Tensor>& as, const std::vector<Tensor>& bs,
                const std::vector<std::optional<Tensor>>& biases, const std::vector<int64_t>& order,
                const std::vector<int64_t>& counts, const std::vector<double>& scalings) {
  check_float(y, "y");
  check_fits(y.dim() == 3 && y.is_contiguous() && x_.dim() >= 2 && x_.size(0) == y.size(0) && x_.size(1) == y.size(1) &&
             bs.size() == as.size() && biases.size() == as.size() && counts.size() == as.size() &&
             scalings.size() == as.size());
  const int64_t rows = y.size(0), T = y.size(1), N = y.size(2);
  const Input in(x_);
  for (int64_t row : order) check_fits(row >= 0 && row < rows);
  std::vector<Low> lows;
  struct Block {  // tokens [m0, m0 + m) of an adapter
    size_t low;
    int64_t m0, m;
  };
  std::vector<Block> blocks;
  int64_t first = 0, bytes = 0, deepest = 0, most = 1, widest = PAD;
  for (size_t i = 0; i < as.size(); ++i) {
    const Tensor &a = as[i], &b = bs[i];
    check_float(a, "A");
    check_float(b, "B");
    check_fits(a.dim() == 2 && b.dim() == 2 && b.size(0) == N && b.size(1) == a.size(0) && counts[i] >= 0 &&
               first + counts[i] <= int64_t(order.size()) && (!in.x || a.size(1) == in.x->cols));
    const int64_t r = a.size(0), V = a.size(1);
    if (!in.x)
      for (int64_t id : in.ids)
        STD_TORCH_CHECK(id >= 0 && id < V, "index out of range: token ", id, " of a vocabulary of ", V);
    // the adapter's own arithmetic: bfloat16 products where all there is to multiply is that
    const bool half = in.x && in.x->source.bf16 && is_bf16(a) && is_bf16(b);
    const Engine& e = engine(half);
    Low low{e, in.x && V > 1 && a.stride(1) != 1 ? torch::stable::contiguous(a) : a, b, float(scalings[i]), r, first,
            counts[i], counts[i] * T, padded_row(e, r), {}};
    if (biases[i]) {
      check_float(*biases[i], "bias of B");
      check_fits(biases[i]->dim() == 1 && biases[i]->size(0) == N);
      low.bias.resize(N);
      engine(false).rows({biases[i]->const_data_ptr(), is_bf16(*biases[i]), 0, biases[i]->stride(0)}, 0, 1, 0, N,
                         low.bias.data(), N);
      for (float& v : low.bias) v *= low.scaling;
    }
    low.at = bytes;
    bytes += low.h_bytes();
    deepest = std::max(deepest, e.padded(r) * e.element());
    widest = std::max(widest, round_up(r, PAD));
    const int64_t width = in.x ? round_up(in.x->cols, PAD) * e.element() : r * 4;
    const int64_t step = std::clamp<int64_t>(BLOCK_BYTES / std::max<int64_t>(width, 1) / 4 * 4, 4, 256);
    for (int64_t m0 = 0; m0 < low.tokens; m0 += step) {
      blocks.push_back({i, m0, std::min(step, low.tokens - m0)});
      most = std::max(most, blocks.back().m);
    }
    first += counts[i];
    lows.push_back(std::move(low));
  }
  if (blocks.empty() || N == 0) return;

  Scratch shared(bytes + 64);
  // H = s·x·Aᵀ
  const int64_t ld = in.x ? round_up(in.x->cols, PAD) : 0;
  torch::stable::parallel_for(0, int64_t(blocks.size()), 1, [&](int64_t b0, int64_t b1) {
    Scratch own(most * (ld + widest) * 4);
    float* const h = (float*)own.data();
    char* const xs = own.data() + most * widest * 4;
    for (int64_t i = b0; i < b1; ++i) {
      const Block& block = blocks[i];
      const Low& low = lows[block.low];
      const Engine& e = low.e;
      const int64_t size = e.element();
      const Source a = rows_of(low.a);
      if (in.x) {
        const int64_t K = in.x->cols;
        each_token(low, order, T, block.m0, block.m, [&](int64_t m, int64_t token) {
          std::memset(xs + (m * ld + K) * size, 0, (ld - K) * size);
          e.rows(in.x->source, token, 1, 0, K, xs + m * ld * size, ld);
        });
        e.dots(a.data, a.bf16, a.row, low.r, xs, ld, K, block.m, h, widest, false);
      } else {
        each_token(low, order, T, block.m0, block.m, [&](int64_t m, int64_t token) {
          e.rows(turned(a), in.ids[token], 1, 0, low.r, h + m * widest, widest);
        });
      }
      for (int64_t m = 0; m < block.m; ++m)
        for (int64_t j = 0; j < low.r; ++j) h[m * widest + j] *= low.scaling;
      e.rows({h, false, widest, 1}, 0, block.m, 0, low.r, shared.data() + low.at + block.m0 * low.low_row * size,
             low.low_row);
    }
  });

  // y += H·Bᵀ, rounded once
  const int64_t chunks = ceil_div(N, COLUMNS), y_size = is_bf16(y) ? 2 : 4;
  char* const y_data = (char*)y.mutable_data_ptr();
  torch::stable::parallel_for(0, chunks * int64_t(lows.size()), 1, [&](int64_t t0, int64_t t1) {
    constexpr int64_t MOST_MR = 64;
    Scratch own(deepest * COLUMNS + MOST_MR * COLUMNS * 4);
    float* const c = (float*)own.data();
    char* const panels = own.data() + MOST_MR * COLUMNS * 4;
    for (int64_t t = t0; t < t1; ++t) {
      const Low& low = lows[t / chunks];
      const Engine& e = low.e;
      const int64_t j0 = t % chunks * COLUMNS, n = std::min(COLUMNS, N - j0), k = e.padded(low.r);
      for (int64_t j = 0; j < n; j += e.nr) {
        const int64_t nj = std::min<int64_t>(e.nr, n - j);
        e.panel(turned(rows_of(low.b)), 0, low.r, j0 + j, nj, e.width(nj), panels + j * k * e.element());
      }
      const Session session(e);
      for (int64_t m0 = 0; m0 < low.tokens; m0 += e.mr) {
        const int64_t m = std::min<int64_t>(e.mr, low.tokens - m0);
        const Segment h{k, shared.data() + low.at + m0 * low.low_row * e.element(), low.low_row, nullptr};
        for (int64_t j = 0; j < n; j += e.nr) {
          Segment all = h;
          all.b = panels + j * k * e.element();
          e.tile(&all, 1, c + j, COLUMNS, int(m), e.width(std::min<int64_t>(e.nr, n - j)), false);
        }
        each_token(low, order, T, m0, m, [&](int64_t i, int64_t token) {
          float* line = c + i * COLUMNS;
          if (!low.bias.empty())
            for (int64_t j = 0; j < n; ++j) line[j] += low.bias[j0 + j];
          char* to = y_data + (token * N + j0) * y_size;
          e.add_row(to, y_size == 2, 1.0f, line, 1.0f, n, to);
        });
      }
    }
  });
}

}  // namespace peft_fast
