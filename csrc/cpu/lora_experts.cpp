#include "cpu/lora_experts.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "cpu/gemm.h"
#include "cpu/scratch.h"

namespace peft_fast {
namespace {

// one expert's matrix of a stack (E, rows, cols), in any strides
Source of(const Tensor& t, int64_t e) {
  return {(const char*)t.const_data_ptr() + e * t.stride(0) * (is_bf16(t) ? 2 : 4), is_bf16(t), t.stride(1),
          t.stride(2)};
}

void check_fits(bool fits) {
  STD_TORCH_CHECK(fits,
                  "given: stacks that do not fit\nneeded: x (., K), W (E, N, K) in its dtype, A and B of E experts\n"
                  "do: call peft_fast.ops.lora_experts, which names the one that is wrong");
}

// what all passes know: whose rows are whose, and the sizes
struct Routed {
  const Engine& engine;
  const Tensor& w;
  Matrix x;
  const int64_t* order;
  std::vector<int64_t> begins{0};
  int64_t S, k, E, K, N, most = 0;  // most: rows of the busiest
  bool transposed;

  Routed(const Tensor& x_, const Tensor& w_, const Tensor& order_, const Tensor& counts, int64_t k_, bool transposed_)
      : engine(peft_fast::engine(is_bf16(x_))), w(w_), x(matrix(x_, "x")),
        order((const int64_t*)order_.const_data_ptr()), S(order_.numel()), k(k_), E(counts.numel()), K(x.cols),
        transposed(transposed_) {
    check_float(w, "W");
    check_fits(w.dim() == 3 && x_.dim() == 2 && is_bf16(w) == is_bf16(x_) && w.size(0) == E &&
               w.size(transposed ? 1 : 2) == K);
    N = w.size(transposed ? 2 : 1);
    bool fits = order_.is_contiguous() && counts.is_contiguous() && order_.scalar_type() == ScalarType::Long &&
                counts.scalar_type() == ScalarType::Long && (x.rows == S || k > 0);
    const auto* n = (const int64_t*)counts.const_data_ptr();
    for (int64_t e = 0; e < E && fits; ++e)
      fits = n[e] >= 0, begins.push_back(begins.back() + n[e]), most = std::max(most, n[e]);
    for (int64_t s = 0; s < S && k > 0 && fits; ++s) fits = order[s] >= 0 && order[s] / k < x.rows;
    STD_TORCH_CHECK(fits && begins.back() == S,
                    "given: a routing of other rows\nneeded: counts that sum to the rows, each a row of x\n"
                    "do: pass route_experts(...) of these tokens");
  }

  Source weight_of(int64_t e) const { return transposed ? turned(of(w, e)) : of(w, e); }  // (N, K)

  std::vector<int64_t> busy() const {
    std::vector<int64_t> found;
    for (int64_t e = 0; e < E; ++e)
      if (rows(e) > 0) found.push_back(e);
    return found;
  }

  // f(expert, first row, rows) for each that has rows: an expert a task where there are enough of them
  template <class F>
  void each(const F& f) const {
    std::vector<int64_t> busy = this->busy();
    // the longest first, so that no thread begins with one when all others are done
    std::stable_sort(busy.begin(), busy.end(), [&](int64_t l, int64_t r) { return rows(l) > rows(r); });
    auto run = [&](int64_t e) { f(e, begins[e], rows(e)); };
    const int64_t threads = torch::stable::get_num_threads();
    if (int64_t(busy.size()) < threads || most * threads > 2 * S) {
      for (int64_t e : busy) run(e);
      return;
    }
    std::atomic<size_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      for (size_t i; (i = next++) < busy.size();) run(busy[i]);
    });
  }
  int64_t rows(int64_t e) const { return begins[e + 1] - begins[e]; }
  int64_t gathered_bytes(int64_t m) const { return k > 0 ? m * K * (x.source.bf16 ? 2 : 4) + 64 : 64; }

  // rows [s0, s0 + m) of x as the experts read them
  Source gather(int64_t s0, int64_t m, char* out) const {
    if (k == 0) return from_row(x.source, s0);
    const int64_t size = x.source.bf16 ? 2 : 4;
    const auto* from = (const char*)x.source.data;
    for (int64_t i = 0; i < m; ++i)
      std::memcpy(out + i * K * size, from + order[s0 + i] / k * x.source.row * size, K * size);
    return {out, x.source.bf16, K, 1};
  }
};

// the same with gradients: the adapters side by side, expert after expert
struct Experts : Routed {
  std::vector<float> scaling;  // of each column of H
  int64_t R;

  Experts(const Tensor& x_, const Tensor& w_, const Tensor& a, const Tensor& b, const Tensor& order_,
          const Tensor& counts, int64_t k_, const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
          bool transposed_)
      : Routed(x_, w_, order_, counts, k_, transposed_) {
    check_float(a, "A");
    check_float(b, "B");
    check_fits(a.dim() == 3 && b.dim() == 3 && ranks.size() == scalings.size());
    R = a.size(1);
    for (size_t i = 0; i < ranks.size(); ++i) scaling.resize(scaling.size() + ranks[i], float(scalings[i]));
    check_fits(a.size(0) == E && b.size(0) == E && a.size(2) == K && b.size(1) == N && b.size(2) == R &&
               int64_t(scaling.size()) == R);
  }

  // out (m, R) = s · left · right
  Product shrink(const Source& left, int64_t depth, const Source& right, float* out) const {
    Columns c{R, {{right}}, {}, {out, false, R, 1}};
    c.y.column_scale = scaling.data();
    return {{{left, depth}}, {c}};
  }
};

// expert e's part of a stack that is to be filled, as a target
Target part(const Tensor& t, int64_t e, int64_t row, int64_t col) {
  Target to = target(t, row, col);
  to.data = (char*)to.data + e * t.size(1) * t.size(2) * (to.bf16 ? 2 : 4);
  return to;
}

void clear(const Tensor& t, int64_t e, int64_t count) {
  const int64_t size = is_bf16(t) ? 2 : 4;
  std::memset((char*)t.mutable_data_ptr() + e * count * size, 0, count * size);
}

// biases (E, N) in float32
std::vector<float> widened(const std::optional<Tensor>& bias, int64_t E, int64_t N) {
  if (!bias) return {};
  check_float(*bias, "bias");
  STD_TORCH_CHECK(bias->numel() == E * N, "given: biases of another size\nneeded: (E, N)\ndo: pass the stack's own");
  std::vector<float> wide(E * N);
  const Tensor dense = torch::stable::contiguous(*bias);
  engine(false).rows({dense.const_data_ptr(), is_bf16(dense), E * N, 1}, 0, 1, 0, E * N, wide.data(), E * N);
  return wide;
}

// one adapter as PEFT keeps it: A (E·r, K) expert after expert, B (N, r·E) rank after rank
struct Low {
  Tensor a;
  const Tensor& b;
  int64_t E, r, at;  // at: where its columns of H begin
  float scaling;

  Low(const Routed& x, const Tensor& a_, const Tensor& b_, double s, int64_t at_)
      : a(a_), b(b_), E(x.E), r(0), at(at_), scaling(float(s)) {
    check_float(a, "A");
    check_float(b, "B");
    check_fits(a.dim() == 2 && b.dim() == 2 && E > 0 && a.size(0) % E == 0 && a.size(1) == x.K && b.size(0) == x.N &&
               b.size(1) == a.size(0));
    r = a.size(0) / E;
    if (x.K > 1 && a.stride(1) != 1) a = torch::stable::contiguous(a);
  }
  Source a_of(int64_t e) const { return from_row(rows_of(a), e * r); }  // (r, K)
  Source b_of(int64_t e) const {                                        // (N, r)
    Source s = from_col(rows_of(b), e);
    s.col *= E;
    return s;
  }
};

constexpr int64_t PAD = 32;                // Engine::dots reads x up to the next multiple of it
constexpr int64_t COLUMNS = 256;           // of y at a time: what Engine::sums writes, and the first-level cache keeps
constexpr int64_t TASK_BYTES = 128 << 10;  // of weights: fewer are not worth another thread

// y of few rows an expert: W_e is read once as it lies, all experts in one go; `columns`: its neighbours lie along n
void as_it_lies(const Routed& x, const std::vector<Low>& lows, const std::vector<float>& bias, bool columns,
                const Tensor& y) {
  const Engine& wide = engine(false);
  const Engine& e = columns ? wide : x.engine;
  const std::vector<int64_t> busy = x.busy();
  const int64_t K = x.K, N = x.N, S = x.S, ld = (ceil_div(K, PAD) | 1) * PAD;
  const int64_t R = lows.empty() ? 0 : lows.back().at + round_up(lows.back().r, PAD);
  Scratch scratch(S * (R * 4 + ld * (e.half ? 6 : 4)));
  auto* const h = (float*)scratch.data();
  auto* const xs = (float*)(scratch.data() + S * R * 4);
  char* const xe = e.half ? scratch.data() + S * (R + ld) * 4 : (char*)xs;
  std::memset(h, 0, S * R * 4);
  torch::stable::parallel_for(0, S, ceil_div(TASK_BYTES, ld * 4), [&](int64_t s0, int64_t s1) {
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t row = x.k > 0 ? x.order[s] / x.k : s;
      auto pack = [&](const Engine& to, char* out) {
        std::memset(out + K * to.element(), 0, (ld - K) * to.element());
        to.rows(x.x.source, row, 1, 0, K, out, ld);
      };
      pack(wide, (char*)(xs + s * ld));
      if (e.half) pack(e, xe + s * ld * e.element());
    }
  });

  // H = s·x·Aᵀ, a few rows of one A at a time
  constexpr int64_t STEP = 4;
  struct Job {
    int64_t expert;
    const Low* low;
    int64_t j;
  };
  std::vector<Job> jobs;
  for (int64_t i : busy)
    for (const Low& low : lows)
      for (int64_t j = 0; j < low.r; j += STEP) jobs.push_back({i, &low, j});
  torch::stable::parallel_for(0, int64_t(jobs.size()), ceil_div(TASK_BYTES, std::max<int64_t>(1, K * 4 * STEP)),
                              [&](int64_t j0, int64_t j1) {
    for (int64_t job = j0; job < j1; ++job) {
      const auto& [i, low, j] = jobs[job];
      const int64_t s0 = x.begins[i], m = x.rows(i), n = std::min(STEP, low->r - j);
      const Source a = from_row(low->a_of(i), j);
      float* to = h + s0 * R + low->at + j;
      wide.dots(a.data, a.bf16, a.row, n, xs + s0 * ld, ld, K, m, to, R, false);
      for (int64_t s = 0; s < m; ++s)
        for (int64_t c = 0; c < n; ++c) to[s * R + c] *= low->scaling;
    }
  });

  int64_t r_most = 0, column_bytes = K * (x.x.source.bf16 ? 2 : 4);
  for (const Low& low : lows) r_most = std::max(r_most, low.r), column_bytes += low.r * 4;
  // blocks of columns, more of them where the threads would not all have some
  const int64_t enough = std::max<int64_t>(1, 4 * torch::stable::get_num_threads() / int64_t(busy.size()));
  const int64_t step = std::min(COLUMNS, round_up(ceil_div(N, enough), 64)), blocks = ceil_div(N, step);
  const int64_t worth = ceil_div(TASK_BYTES, std::max<int64_t>(1, column_bytes * step));
  torch::stable::parallel_for(0, int64_t(busy.size()) * blocks, worth, [&](int64_t t0, int64_t t1) {
    Scratch own((2 * x.most + r_most) * COLUMNS * 4);
    auto *const c = (float*)own.data(), *const added = c + x.most * COLUMNS, *const turned_b = added + x.most * COLUMNS;
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t i = busy[t / blocks], j = t % blocks * step, n = std::min(step, N - j);
      const int64_t s0 = x.begins[i], m = x.rows(i);
      const Source w = from_row(x.weight_of(i), j);
      if (columns) wide.sums(w.data, w.bf16, w.col, n, xs + s0 * ld, ld, K, m, c, COLUMNS);
      else e.dots(w.data, w.bf16, w.row, n, xe + s0 * ld * e.element(), ld, K, m, c, COLUMNS, false);
      for (const Low& low : lows) {
        const Source b = from_row(low.b_of(i), j);
        for (int64_t k = 0; k < low.r; ++k)
          wide.rows({from_col(b, k).data, b.bf16, 0, b.row}, 0, 1, 0, n, turned_b + k * COLUMNS, COLUMNS);
        wide.sums(turned_b, false, COLUMNS, n, h + s0 * R + low.at, R, low.r, m, added, COLUMNS);
        for (int64_t s = 0; s < m; ++s)
          for (int64_t q = 0; q < n; ++q) c[s * COLUMNS + q] += added[s * COLUMNS + q];
      }
      Target to = target(y, N, 1);
      if (!bias.empty()) to.bias = bias.data() + i * N;
      for (int64_t q = 0; q < n; q += e.nr)
        e.finish(c + q, COLUMNS, int(m), int(std::min<int64_t>(e.nr, n - q)), s0, j + q, to);
    }
  });
}

// y of many rows an expert: products of packed operands, expert by expert
void packed(const Routed& x, const std::vector<Low>& lows, const std::vector<float>& bias, const Tensor& y) {
  const int64_t K = x.K, N = x.N, R = lows.empty() ? 0 : lows.back().at + lows.back().r;
  const int64_t size = is_bf16(y) ? 2 : 4;
  x.each([&](int64_t e, int64_t s0, int64_t m) {
    const int64_t h_bytes = round_up(m * R * 4, 64);
    Scratch own(h_bytes + x.gathered_bytes(m));
    auto* const h = (float*)own.data();
    const Source rows = x.gather(s0, m, own.data() + h_bytes);
    Product skinny{{{rows, K}}, {}};
    Columns c{N, {{turned(x.weight_of(e))}}, {}, {(char*)y.mutable_data_ptr() + s0 * N * size, is_bf16(y), N, 1}};
    for (const Low& low : lows) {
      Target to{h + low.at, false, R, 1};
      to.scale = low.scaling;
      skinny.columns.push_back({low.r, {{turned(low.a_of(e))}}, {}, to});
      c.low.push_back({{h + low.at, false, R, 1}, turned(low.b_of(e)), low.r});
    }
    if (!bias.empty()) c.y.bias = bias.data() + e * N;
    gemm(x.engine, m, {{{rows, K}}, {c}}, lows.empty() ? nullptr : &skinny);
  });
}

}  // namespace

Tensor lora_experts_infer(const Tensor& x_, const Tensor& w, const std::optional<Tensor>& bias,
                          const std::vector<Tensor>& as, const std::vector<Tensor>& bs, const Tensor& order,
                          const Tensor& counts, int64_t k, const std::vector<double>& scalings, bool transposed,
                          int64_t few) {
  const Routed x(x_, w, order, counts, k, transposed);
  check_fits(as.size() == bs.size() && as.size() == scalings.size());
  Tensor y = empty_like(x_, {x.S, x.N});
  if (x.S == 0 || x.N == 0) return y;
  const Source first = x.weight_of(0);
  const bool rows = x.K <= 1 || first.col == 1, lies = rows || x.N <= 1 || first.row == 1;
  const bool seldom = x.most <= few && lies;
  std::vector<Low> lows;
  int64_t at = 0;
  for (size_t i = 0; i < as.size(); ++i) {
    lows.emplace_back(x, as[i], bs[i], scalings[i], at);
    at += seldom ? round_up(lows.back().r, PAD) : lows.back().r;
  }
  const std::vector<float> wide = widened(bias, x.E, x.N);
  if (seldom) as_it_lies(x, lows, wide, !rows, y);
  else packed(x, lows, wide, y);
  return y;
}

std::tuple<Tensor, Tensor> lora_experts(const Tensor& x_, const Tensor& w, const std::optional<Tensor>& bias,
                                        const Tensor& a, const Tensor& b, const Tensor& order, const Tensor& counts,
                                        int64_t k, const std::vector<int64_t>& ranks,
                                        const std::vector<double>& scalings, bool transposed) {
  const Experts x(x_, w, a, b, order, counts, k, ranks, scalings, transposed);
  const int64_t K = x.K, N = x.N, R = x.R;
  Tensor y = empty_like(x_, {x.S, N}), h = empty_like(x_, {x.S, R}, ScalarType::Float);
  const std::vector<float> wide = widened(bias, x.E, N);
  auto* const h_data = (float*)h.mutable_data_ptr();
  auto* const y_data = (char*)y.mutable_data_ptr();
  const int64_t size = is_bf16(y) ? 2 : 4;
  x.each([&](int64_t e, int64_t s0, int64_t m) {
    Scratch own(x.gathered_bytes(m));
    const Source rows = x.gather(s0, m, own.data());
    float* const low = h_data + s0 * R;
    Columns c{N, {{turned(x.weight_of(e))}}, {{{low, false, R, 1}, turned(of(b, e)), R}},
              {y_data + s0 * N * size, is_bf16(y), N, 1}};
    if (bias) c.y.bias = wide.data() + e * N;
    const Product skinny = x.shrink(rows, K, turned(of(a, e)), low);
    gemm(x.engine, m, {{{rows, K}}, {c}}, &skinny);
  });
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_experts_backward(
    const Tensor& g_, const Tensor& x_, const Tensor& w, const Tensor& a, const Tensor& b, const Tensor& h,
    const Tensor& order, const Tensor& counts, int64_t k, const std::vector<int64_t>& ranks,
    const std::vector<double>& scalings, bool transposed, const std::vector<bool>& needs) {
  STD_TORCH_CHECK(needs.size() == 4, "given: needs of another length\nneeded: x, A, B, bias\n"
                                     "do: call peft_fast.ops.lora_experts and let autograd run the backward");
  const Experts x(x_, w, a, b, order, counts, k, ranks, scalings, transposed);
  const Matrix g = matrix(g_, "the output's gradient");
  const int64_t K = x.K, N = x.N, R = x.R;
  STD_TORCH_CHECK(g.rows == x.S && g.cols == N && g.source.bf16 == x.x.source.bf16 && h.is_contiguous() &&
                      h.numel() == x.S * R && h.scalar_type() == ScalarType::Float,
                  "given: a gradient or an H that does not fit the forward\nneeded: g (S, N) in x's dtype, H (S, R)\n"
                  "do: call peft_fast.ops.lora_experts and let autograd run the backward");
  auto sized = [&](bool need, std::vector<int64_t> size) { return need ? size : std::vector<int64_t>{0}; };
  Tensor dx = empty_like(x_, sized(needs[0], {x.S, K}));
  Tensor da = empty_like(a, sized(needs[1], {x.E, R, K})), db = empty_like(b, sized(needs[2], {x.E, N, R}));
  Tensor dbias = empty_like(x_, sized(needs[3], {x.E, N}), ScalarType::Float);
  for (int64_t e = 0; e < x.E; ++e) {
    if (x.rows(e) > 0) continue;
    if (needs[1]) clear(da, e, R * K);
    if (needs[2]) clear(db, e, N * R);
    if (needs[3]) clear(dbias, e, N);
  }
  const float one = 1.0f;
  x.each([&](int64_t e, int64_t s0, int64_t m) {
    const int64_t d_bytes = round_up(m * R * 4, 64);
    Scratch own(d_bytes + x.gathered_bytes(m));
    auto* const d = (float*)own.data();
    const Source ge = from_row(g.source, s0), low{d, false, R, 1};
    const Product skinny = x.shrink(ge, N, of(b, e), d);
    if (needs[0]) {
      Target to = target(dx, K, 1);
      to.data = (char*)to.data + s0 * K * (to.bf16 ? 2 : 4);
      gemm(x.engine, m, {{{ge, N}}, {{K, {{x.weight_of(e)}}, {{low, of(a, e), R}}, to}}}, &skinny);
    } else if (needs[1]) {
      gemm(x.engine, m, skinny);
    }
    std::vector<Tokens> tokens{{ge, N, {}}};
    const Source he{(const float*)h.const_data_ptr() + s0 * R, false, R, 1};
    if (needs[2]) tokens[0].talls.push_back({turned(he), R, part(db, e, 1, R)});
    if (needs[3]) {
      Target to = target(dbias, N, 1);
      to.data = (float*)to.data + e * N;
      tokens[0].talls.push_back({{&one, false, 0, 0}, 1, to});
    }
    if (needs[1]) tokens.push_back({x.gather(s0, m, own.data() + d_bytes), K, {{turned(low), R, part(da, e, K, 1)}}});
    gemm_tokens(x.engine, m, tokens);
  });
  return {dx, da, db, dbias};
}

}  // namespace peft_fast
