#include "cpu/decode.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>

#include "cpu/scratch.h"

namespace peft_fast {
namespace {

constexpr int64_t PAD = 32;                  // Engine::dots reads x up to the next multiple of it
constexpr int64_t COLUMNS = 256;             // of y at a time: what Engine::sums writes, and the first-level cache keeps
constexpr int64_t FEW = 8;                    // tokens
constexpr int64_t TASK_BYTES = 128 << 10;    // of weights: fewer are not worth another thread

void check_fits(bool fits) {
  STD_TORCH_CHECK(fits, "given: shapes that do not fit\nneeded: x (..., K), W (N, K), A (r, K), B (N, r), biases (N,)\n"
                        "do: call peft_fast.ops.lora_decode, which names the one that is wrong");
}

// a matrix (rows, k) whose k are neighbours, copied if they are not
struct Rows {
  Tensor kept;
  const char* data;
  bool bf16;
  int64_t row;

  Rows(const Tensor& t, const char* name, int64_t rows, int64_t k)
      : kept(k <= 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t)), data((const char*)kept.const_data_ptr()),
        bf16(is_bf16(kept)), row(kept.stride(0)) {
    check_float(t, name);
    check_fits(t.size(0) == rows && t.size(1) == k);
  }
  const void* from(int64_t i) const { return data + i * row * (bf16 ? 2 : 4); }
};

// scale · a vector (N,), for tokens [first, first + tokens)
struct Line {
  Source source;
  float scale;
  int64_t first, tokens;

  Line(const Tensor& t, const char* name, int64_t N, double s, int64_t first_, int64_t tokens_)
      : source{}, scale(float(s)), first(first_), tokens(tokens_) {
    check_float(t, name);
    check_fits(t.dim() == 1 && t.size(0) == N);
    source = {t.const_data_ptr(), is_bf16(t), 0, t.stride(0)};
  }
};

struct Low {
  Rows a, b;
  int64_t r, at;  // where its columns of H begin
  float scaling;
  int64_t first, tokens;  // its own
};

// which token of x is the i-th one
struct Order {
  const std::vector<int64_t>& rows;  // of x, as its first dimension counts them; empty: as they lie
  int64_t T;                         // tokens of a row

  Order(const std::vector<int64_t>& order, int64_t M, int64_t b) : rows(order), T(b ? M / b : 0) {
    std::vector<bool> seen(order.size());
    for (int64_t row : order) {
      check_fits(row >= 0 && row < b && int64_t(order.size()) == b && !seen[row]);
      seen[row] = true;
    }
  }
  int64_t operator()(int64_t i) const { return rows.empty() ? i : rows[i / T] * T + i % T; }
};

// rows of x in an engine's elements, zero up to the next PAD
struct Packed {
  char* data;
  int64_t ld;

  Packed(const Engine& e, const Matrix& x, const Order& order, char* out, int64_t ld_) : data(out), ld(ld_) {
    for (int64_t m = 0; m < x.rows; ++m) {
      char* to = out + m * ld * e.element();
      std::memset(to + x.cols * e.element(), 0, (ld - x.cols) * e.element());
      e.rows(x.source, order(m), 1, 0, x.cols, to, ld);
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

// f of each element's bits, the sign shifted out, until one is false
template <class F>
bool every(const Source& s, int64_t rows, int64_t cols, const F& f) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t at = i * s.row + j * s.col;
      const uint32_t bits = s.bf16 ? uint32_t(((const uint16_t*)s.data)[at]) << 16 : ((const uint32_t*)s.data)[at];
      if (!f(bits << 1)) return false;
    }
  return true;
}

bool zero(const Tensor& t) {
  check_float(t, "B");
  check_fits(t.dim() == 2);
  return every(rows_of(t), t.size(0), t.size(1), [](uint32_t bits) { return bits == 0; });
}

bool finite(const Source& s, int64_t rows, int64_t cols) {
  return every(s, rows, cols, [](uint32_t bits) { return bits < 0xff000000u; });
}

bool finite(const Tensor& t) {
  check_float(t, "A");
  check_fits(t.dim() == 2);
  return finite(rows_of(t), t.size(0), t.size(1));
}

// the product that torch's own layer makes
Tensor base_alone(const Tensor& x, int64_t M, const Tensor& w, const std::optional<Tensor>& bias, bool transposed) {
  // Conv1D makes a matrix of x, and multiplies it with w
  const bool flat = transposed && x.dim() != 2;
  const Tensor left = flat ? torch::stable::reshape(x, {M, x.size(x.dim() - 1)}) : x;
  const Tensor right = transposed ? torch::stable::transpose(w, 0, 1) : w;
  std::array<StableIValue, 3> stack{torch::stable::detail::from(left), torch::stable::detail::from(right),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor y = torch::stable::detail::to<Tensor>(stack[0]);
  return flat ? torch::stable::reshape(y, with_last(x, right.size(0))) : y;
}

}  // namespace

bool all_zero(const std::vector<Tensor>& ts) { return std::all_of(ts.begin(), ts.end(), zero); }

Tensor lora_decode(const Tensor& x_, const Tensor& w, const std::optional<Tensor>& bias, const std::vector<Tensor>& as,
                   const std::vector<Tensor>& bs, const std::vector<std::optional<Tensor>>& low_biases,
                   const std::vector<double>& scalings, bool transposed, const std::vector<int64_t>& order_,
                   const std::vector<int64_t>& counts) {
  const Matrix x = matrix(x_, "x");
  check_float(w, "W");
  const int64_t M = x.rows, K = x.cols, size = x.source.bf16 ? 2 : 4;
  const size_t n_low = as.size();
  check_fits(w.dim() == 2 && w.size(transposed ? 0 : 1) == K && bs.size() == n_low && low_biases.size() == n_low &&
             scalings.size() == n_low && (order_.empty() || (counts.size() == n_low && x_.dim() >= 2)));
  const int64_t N = w.size(transposed ? 1 : 0);
  // adapters that were not trained add nothing: who compares such a layer with its base asks for closer than sums in
  // another order are, and gets the base's bits
  bool fresh = order_.empty() && is_bf16(w) == is_bf16(x_) && (!bias || is_bf16(*bias) == is_bf16(x_));
  for (size_t i = 0; i < n_low && fresh; ++i)
    fresh = zero(bs[i]) && !low_biases[i] && std::isfinite(scalings[i]) && finite(as[i]);
  if (fresh && finite(x.source, M, K)) return base_alone(x_, M, w, bias, transposed);
  Tensor y = empty_like(x_, with_last(x_, N));
  if (M == 0 || N == 0) return y;
  const Order order(order_, M, x_.size(0));

  Source base = weight(w, transposed, false);
  const Tensor dense = K <= 1 || N <= 1 || base.row == 1 || base.col == 1 ? w : torch::stable::contiguous(w);
  base = weight(dense, transposed, false);
  const bool columns = K > 1 && base.col != 1;  // the weight's neighbours lie along n
  const Engine& wide = engine(false);
  const Engine& e = x.source.bf16 && base.bf16 && !columns ? engine(true) : wide;

  std::vector<Low> lows;
  std::vector<Line> lines;
  if (bias) lines.emplace_back(*bias, "bias", N, 1.0, 0, M);
  bool many = false;  // has an adapter more than FEW tokens?
  int64_t R = 0, first = 0, r_most = 0;
  int64_t low_bytes = 0, b_bytes = 0;  // of A, a row of it; of B, a column of y
  for (size_t i = 0; i < n_low; ++i) {
    check_fits(as[i].dim() == 2 && bs[i].dim() == 2);
    const int64_t r = as[i].size(0), width = round_up(r, PAD);
    const int64_t tokens = order_.empty() ? M : counts[i] * order.T;
    r_most = std::max(r_most, r);
    many |= tokens > FEW;
    check_fits(tokens >= 0 && first + tokens <= M);
    // adapters that share their tokens lie side by side in H, the others begin a row alike
    lows.push_back({Rows(as[i], "A", r, K), Rows(bs[i], "B", N, r), r, order_.empty() ? R : 0, float(scalings[i]),
                    first, tokens});
    if (low_biases[i]) lines.emplace_back(*low_biases[i], "bias of B", N, scalings[i], first, tokens);
    R = order_.empty() ? R + width : std::max(R, width);
    first += order_.empty() ? 0 : tokens;
    low_bytes = std::max<int64_t>(low_bytes, K * (lows.back().a.bf16 ? 2 : 4));
    b_bytes += r * (lows.back().b.bf16 ? 2 : 4);
  }

  const int64_t ld = (ceil_div(K, PAD) | 1) * PAD;  // so that tokens do not meet in one set of the cache
  Scratch scratch(M * (ld * (e.half ? 6 : 4) + R * 4));
  float* const h = (float*)scratch.data();
  const Packed xs(wide, x, order, scratch.data() + M * R * 4, ld);
  const Packed xe = e.half ? Packed(e, x, order, scratch.data() + M * (R + ld) * 4, ld) : xs;
  if (R) std::memset(h, 0, M * R * 4);
  // H = s·x·Aᵀ, a few rows of one A at a time
  constexpr int64_t STEP = 4;
  struct Job {
    const Low* low;
    int64_t j, n;
  };
  std::vector<Job> jobs;
  for (const Low& low : lows)
    for (int64_t j = 0; j < low.r && low.tokens; j += STEP) jobs.push_back({&low, j, std::min(STEP, low.r - j)});
  Left left(int64_t(jobs.size()));
  const auto lower = [&](int64_t j0, int64_t j1) {
    for (int64_t i = j0; i < j1; ++i) {
      const auto& [low, j, n] = jobs[i];
      float* to = h + low->first * R + low->at + j;
      wide.dots(low->a.from(j), low->a.bf16, low->a.row, n, xs.data + low->first * ld * 4, ld, K, low->tokens, to, R,
                false);
      for (int64_t m = 0; m < low->tokens; ++m)
        for (int64_t k = 0; k < n; ++k) to[m * R + k] *= low->scaling;
    }
    left.done(j1 - j0);
  };
  const int64_t count = int64_t(jobs.size()), step = columns ? 64 : 16, element = base.bf16 ? 2 : 4;
  // where each row of A costs what it weighs, H comes first in the threads' one round: who computes none of it begins
  // with the weight, and waits before the first B. A part of it is as heavy as a step of columns
  const bool one_round = M <= FEW && order_.empty();
  const int64_t parts = ceil_div(count * low_bytes * STEP, std::max<int64_t>(1, step * K * element));
  const int64_t head = one_round && count ? std::max<int64_t>(1, parts) : 0;
  if (!one_round)
    torch::stable::parallel_for(0, count, ceil_div(TASK_BYTES, std::max<int64_t>(1, low_bytes * STEP)), lower);

  const char* w_data = (const char*)base.data;
  const auto part_of_lower = [&](int64_t t0, int64_t t1) { lower(t0 * count / head, t1 * count / head); };
  split(head, N, K * element + b_bytes, step, part_of_lower, [&](int64_t j, int64_t n) {
    Scratch own((M + 2 + (many ? M + r_most : 0)) * COLUMNS * 4);
    float* const c = (float*)own.data();
    float *const sum = c + M * COLUMNS, *const part = sum + COLUMNS;
    const char* at = w_data + j * base.row * element;
    if (columns) wide.sums(at, base.bf16, base.col, n, (const float*)xs.data, ld, K, M, c, COLUMNS);
    else e.dots(at, base.bf16, base.row, n, xe.data, ld, K, M, c, COLUMNS, false);
    left.wait();
    for (const Low& low : lows) {
      float* to = c + low.first * COLUMNS;
      const float* from = h + low.first * R + low.at;
      if (low.tokens <= FEW) {
        wide.dots(low.b.from(j), low.b.bf16, low.b.row, n, from, R, low.r, low.tokens, to, COLUMNS, true);
        continue;
      }
      // sums over so few ranks cost less a vector of columns than a column each
      float *const turned = part + COLUMNS, *const added = turned + r_most * COLUMNS;
      wide.rows({low.b.from(j), low.b.bf16, 1, low.b.row}, 0, low.r, 0, n, turned, COLUMNS);
      wide.sums(turned, false, COLUMNS, n, from, R, low.r, low.tokens, added, COLUMNS);
      for (int64_t m = 0; m < low.tokens; ++m)
        for (int64_t i = 0; i < n; ++i) to[m * COLUMNS + i] += added[m * COLUMNS + i];
    }
    std::fill(sum, sum + n, 0.0f);
    for (const Line& line : lines) {
      wide.rows(line.source, 0, 1, j, n, part, n);
      const bool all = line.tokens == M;
      float* to = all ? sum : c + line.first * COLUMNS;
      for (int64_t m = 0; m < (all ? 1 : line.tokens); ++m, to += COLUMNS)
        for (int64_t i = 0; i < n; ++i) to[i] += line.scale * part[i];
    }
    Target to{(char*)y.mutable_data_ptr() + j * size, x.source.bf16, N, 1};
    to.bias = lines.empty() ? nullptr : sum;
    const int64_t rows = order_.empty() ? M : 1;
    for (int64_t m = 0; m < M; m += rows)
      for (int64_t i = 0; i < n; i += e.nr)
        e.finish(c + m * COLUMNS + i, COLUMNS, int(rows), int(std::min<int64_t>(e.nr, n - i)), order(m), i, to);
  });
  return y;
}

}  // namespace peft_fast
