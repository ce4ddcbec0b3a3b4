// W is read once, as it lies; what is beside it costs as little as it can.
#include "cpu/few_tokens.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/scratch.h"

namespace peft_fast {
namespace {

constexpr int64_t PAD = 32;                  // Engine::dots reads x up to the next multiple of it
constexpr int64_t COLUMNS = 256;             // of y at a time: what Engine::sums writes, and the first-level cache keeps
constexpr int64_t FEW = 8;                    // tokens
constexpr int64_t TASK_BYTES = 128 << 10;    // of weights: fewer are not worth another thread

int64_t bytes(bool bf16) { return bf16 ? 2 : 4; }
const void* from(const FewTokens::Rows& m, int64_t i) { return (const char*)m.data + i * m.row * bytes(m.bf16); }

// scale · a vector (N,), for tokens [first, first + tokens)
struct Added {
  FewTokens::Line line;
  float scale;
  int64_t first, tokens;
};

struct Placed {
  const FewTokens::Low& low;
  int64_t at;             // where its columns of H begin
  int64_t first, tokens;  // its own
};

// which token of x is the i-th one
struct Order {
  const int64_t* rows;
  int64_t T;  // tokens of a row

  int64_t operator()(int64_t i) const { return rows ? rows[i / T] * T + i % T : i; }
};

// rows of x in an engine's elements, zero up to the next PAD
struct Packed {
  char* data;
  int64_t ld;

  Packed(const Engine& e, const FewTokens& c, const Order& order, char* out, int64_t ld_) : data(out), ld(ld_) {
    const Source x{c.x.data, c.x.bf16, c.x.row, 1}, probe{c.probe, false, c.K, 1};
    for (int64_t m = 0; m < c.tokens(); ++m) {
      char* to = out + m * ld * e.element();
      std::memset(to + c.K * e.element(), 0, (ld - c.K) * e.element());
      e.rows(m < c.M ? x : probe, m < c.M ? order(m) : 0, 1, 0, c.K, to, ld);
    }
  }
};

// f of columns, each of which costs `bytes` of weights, and before them g of `head` parts that cost `step` columns each
template <class G, class F>
void split(int64_t head, int64_t columns, int64_t bytes, int64_t step, const G& g, const F& f) {
  const int64_t tasks = head + ceil_div(columns, step);
  const int64_t worth = ceil_div(TASK_BYTES, std::max<int64_t>(1, bytes * step));
  torch::stable::parallel_for(0, tasks, worth, [&](int64_t t0, int64_t t1) {
    if (t0 < head) g(t0, std::min(head, t1));
    const int64_t end = std::min(columns, (t1 - head) * step);
    for (int64_t j = std::max<int64_t>(0, t0 - head) * step; j < end; j += COLUMNS) f(j, std::min(COLUMNS, end - j));
  });
}

// what some threads have yet to do before others go on
class Left {
 public:
  explicit Left(int64_t n) : n_(n) {}
  void done(int64_t n) { n_.fetch_sub(n, std::memory_order_release); }
  void wait() const {
    for (int spins = 0; n_.load(std::memory_order_acquire) > 0;)
      if (++spins % 1024 == 0) std::this_thread::yield();
  }

 private:
  std::atomic<int64_t> n_;
};

bool zero(const FewTokens& c, const FewTokens::Rows& b, int64_t r) {
  for (int64_t i = 0; i < c.N; ++i) {
    const char* row = (const char*)from(b, i);
    for (int64_t j = 0; j < r; ++j)
      if (b.bf16 ? ((const uint16_t*)row)[j] & 0x7fff : ((const uint32_t*)row)[j] & 0x7fffffff) return false;
  }
  return true;
}

}  // namespace

void few_tokens(const FewTokens& c) {
  const auto& [K, N] = std::tie(c.K, c.N);
  const int64_t M = c.tokens();
  const Order order{c.order, c.order ? M / c.n_order : 0};
  const bool columns = K > 1 && c.w_col != 1;  // the weight's neighbours lie along n
  const Engine& wide = engine(false);
  const Engine& e = c.x.bf16 && c.w_bf16 && !columns ? engine(true) : wide;

  std::vector<Placed> lows;
  std::vector<Added> lines;
  if (c.bias.data) lines.push_back({c.bias, 1.0f, 0, M});
  bool many = false;  // has an adapter more than FEW tokens?
  int64_t R = 0, first = 0, r_most = 0;
  int64_t low_bytes = 0, b_bytes = 0;  // of A, a row of it; of B, a column of y
  for (const FewTokens::Low* low = c.lows; low < c.lows + c.n_lows; ++low) {
    const int64_t width = round_up(low->r, PAD), tokens = c.order ? low->tokens : M;
    r_most = std::max(r_most, low->r);
    many |= tokens > FEW;
    // adapters that share their tokens lie side by side in H, the others begin a row alike
    lows.push_back({*low, c.order ? 0 : R, first, tokens});
    if (low->bias.data) lines.push_back({low->bias, float(low->scaling), first, tokens});
    R = c.order ? std::max(R, width) : R + width;
    first += c.order ? tokens : 0;
    low_bytes = std::max<int64_t>(low_bytes, K * bytes(low->a.bf16));
    b_bytes += low->r * bytes(low->b.bf16);
  }

  const int64_t ld = (ceil_div(K, PAD) | 1) * PAD;  // so that tokens do not meet in one set of the cache
  Scratch scratch(M * (ld * (e.half ? 6 : 4) + R * 4));
  float* const h = (float*)scratch.data();
  const Packed xs(wide, c, order, scratch.data() + M * R * 4, ld);
  const Packed xe = e.half ? Packed(e, c, order, scratch.data() + M * (R + ld) * 4, ld) : xs;
  if (R) std::memset(h, 0, M * R * 4);
  // H = s·x·Aᵀ, a few rows of one A at a time
  constexpr int64_t STEP = 4;
  struct Job {
    const Placed* of;
    int64_t j, n;
  };
  std::vector<Job> jobs;
  for (const Placed& of : lows)
    for (int64_t j = 0; j < of.low.r && of.tokens; j += STEP) jobs.push_back({&of, j, std::min(STEP, of.low.r - j)});
  Left left(int64_t(jobs.size()));
  const auto lower = [&](int64_t j0, int64_t j1) {
    for (int64_t i = j0; i < j1; ++i) {
      const auto& [of, j, n] = jobs[i];
      const FewTokens::Rows& A = of->low.a;
      float* to = h + of->first * R + of->at + j;
      wide.dots(from(A, j), A.bf16, A.row, n, xs.data + of->first * ld * 4, ld, K, of->tokens, to, R, false);
      for (int64_t m = 0; m < of->tokens; ++m)
        for (int64_t k = 0; k < n; ++k) to[m * R + k] *= float(of->low.scaling);
    }
    left.done(j1 - j0);
  };
  const int64_t count = int64_t(jobs.size()), step = columns ? 64 : 16, element = bytes(c.w_bf16);
  // where each row of A costs what it weighs, H comes first in the threads' one round: who computes none of it begins
  // with the weight, and waits before the first B. A part of it is as heavy as a step of columns
  const bool one_round = M <= FEW && !c.order;
  const int64_t parts = ceil_div(count * low_bytes * STEP, std::max<int64_t>(1, step * K * element));
  const int64_t head = one_round && count ? std::max<int64_t>(1, parts) : 0;
  if (!one_round)
    torch::stable::parallel_for(0, count, ceil_div(TASK_BYTES, std::max<int64_t>(1, low_bytes * STEP)), lower);

  const auto part_of_lower = [&](int64_t t0, int64_t t1) { lower(t0 * count / head, t1 * count / head); };
  split(head, N, K * element + b_bytes, step, part_of_lower, [&](int64_t j, int64_t n) {
    Scratch own((M + 2 + (many ? M + r_most : 0)) * COLUMNS * 4);
    float* const to_round = (float*)own.data();
    float *const sum = to_round + M * COLUMNS, *const part = sum + COLUMNS;
    const char* at = (const char*)c.w + j * c.w_row * element;
    if (columns) wide.sums(at, c.w_bf16, c.w_col, n, (const float*)xs.data, ld, K, M, to_round, COLUMNS);
    else e.dots(at, c.w_bf16, c.w_row, n, xe.data, ld, K, M, to_round, COLUMNS, false);
    left.wait();
    for (const Placed& of : lows) {
      const FewTokens::Rows& B = of.low.b;
      float* to = to_round + of.first * COLUMNS;
      const float* low = h + of.first * R + of.at;
      if (of.tokens <= FEW) {
        wide.dots(from(B, j), B.bf16, B.row, n, low, R, of.low.r, of.tokens, to, COLUMNS, true);
        continue;
      }
      // sums over so few ranks cost less a vector of columns than a column each
      float *const turned = part + COLUMNS, *const added = turned + r_most * COLUMNS;
      wide.rows({from(B, j), B.bf16, 1, B.row}, 0, of.low.r, 0, n, turned, COLUMNS);
      wide.sums(turned, false, COLUMNS, n, low, R, of.low.r, of.tokens, added, COLUMNS);
      for (int64_t m = 0; m < of.tokens; ++m)
        for (int64_t i = 0; i < n; ++i) to[m * COLUMNS + i] += added[m * COLUMNS + i];
    }
    if (c.probe) std::memcpy(c.check + j, to_round + c.M * COLUMNS, n * sizeof(float));
    if (c.norm) {
      wide.rows({c.m.data, c.m.bf16, 0, c.m.step}, 0, 1, j, n, part, n);
      for (int64_t i = 0; i < n; ++i) part[i] /= c.norm[j + i];
      for (int64_t m = 0; m < c.M; ++m)
        for (int64_t i = 0; i < n; ++i) to_round[m * COLUMNS + i] *= part[i];
    }
    std::fill(sum, sum + n, 0.0f);
    for (const Added& of : lines) {
      wide.rows({of.line.data, of.line.bf16, 0, of.line.step}, 0, 1, j, n, part, n);
      const bool all = of.tokens == M;
      float* to = all ? sum : to_round + of.first * COLUMNS;
      for (int64_t m = 0; m < (all ? 1 : of.tokens); ++m, to += COLUMNS)
        for (int64_t i = 0; i < n; ++i) to[i] += of.scale * part[i];
    }
    Target to{(char*)c.y + j * bytes(c.x.bf16), c.x.bf16, N, 1};
    to.bias = lines.empty() ? nullptr : sum;
    const int64_t rows = c.order ? 1 : c.M;
    for (int64_t m = 0; m < c.M; m += rows)
      for (int64_t i = 0; i < n; i += e.nr)
        e.finish(to_round + m * COLUMNS + i, COLUMNS, int(rows), int(std::min<int64_t>(e.nr, n - i)), order(m), i, to);
  });
}

}  // namespace peft_fast

__attribute__((visibility("default"))) int peft_fast_few_tokens(const peft_fast::FewTokens* c, int64_t size) {
  if (size != sizeof *c) return 0;  // of another build
  try {
    bool trained = false;
    for (int64_t i = 0; i < c->n_lows && !trained; ++i)
      trained = c->lows[i].bias.data || !peft_fast::zero(*c, c->lows[i].b, c->lows[i].r);
    if (trained) peft_fast::few_tokens(*c);
    return trained;
  } catch (...) {
    return 0;  // whom lora_decode fails too, it tells
  }
}
