#include "cpu/lora_group.h"

#include "cpu/dropout.h"
#include "cpu/gemm.h"

namespace peft_fast {
namespace {

// all adapters side by side, sibling after sibling: sibling i owns columns [begins[i], begins[i + 1]) of H and D
struct Adapters {
  struct Run {  // columns that see x through one mask: an adapter with dropout, or neighbours without
    int64_t begin, rank;
    float keep_scale;
    MaskBits mask;
  };
  std::vector<int64_t> begins{0};
  std::vector<Run> runs;
  std::vector<float> scaling, kept;  // of each column; kept: times 1 / (1 - p)

  Adapters(const Engine& e, const std::optional<Tensor>& seed, const std::vector<int64_t>& counts,
           const std::vector<int64_t>& ranks, const std::vector<double>& scalings, const std::vector<double>& ps,
           int64_t M, int64_t K) {
    STD_TORCH_CHECK(ranks.size() == scalings.size() && ranks.size() == ps.size(),
                    "given: ranks, scalings and ps of different lengths\nneeded: one of each per adapter\n"
                    "do: call peft_fast.ops");
    size_t next = 0;
    for (int64_t count : counts) {
      for (; count > 0 && next < ranks.size(); --count, ++next) add(e, seed, next, ranks, scalings, ps, M, K);
      begins.push_back(R());
    }
    STD_TORCH_CHECK(next == ranks.size(),
                    "given: counts that do not sum to the adapters\nneeded: those of each sibling\n"
                    "do: call peft_fast.ops");
  }

  int64_t R() const { return int64_t(scaling.size()); }

  // out (M, R) = s·drop(x)·Aᵀ
  Product shrink(const Source& x, int64_t K, const Tensor& a, const Tensor& out) const {
    Product p;
    std::vector<size_t> left;  // of each run; those without a mask share one
    for (const Run& run : runs) {
      size_t l = 0;
      while (l < p.lefts.size() && (run.mask || p.lefts[l].a.mask)) ++l;
      if (l == p.lefts.size()) p.lefts.push_back({run.mask ? run.mask.over(x) : x, K});
      left.push_back(l);
    }
    for (size_t i = 0; i < runs.size(); ++i)
      p.columns.push_back(columns(p, left[i], turned(from_row(rows_of(a), runs[i].begin)), runs[i].begin, runs[i].rank,
                                  kept, out));
    return p;
  }

  // out (M, R) = s·g_i·B_i
  Product shrink(const std::vector<Left>& gs, const std::vector<Tensor>& bs, const Tensor& out) const {
    Product p{gs, {}};
    for (size_t i = 0; i < gs.size(); ++i)
      p.columns.push_back(columns(p, i, rows_of(bs[i]), begins[i], begins[i + 1] - begins[i], scaling, out));
    return p;
  }

 private:
  void add(const Engine& e, const std::optional<Tensor>& seed, size_t i, const std::vector<int64_t>& ranks,
           const std::vector<double>& scalings, const std::vector<double>& ps, int64_t M, int64_t K) {
    const bool masked = ps[i] > 0;
    const float keep_scale = !masked ? 1.0f : ps[i] < 1 ? float(1 / (1 - ps[i])) : 0.0f;
    if (masked) {
      STD_TORCH_CHECK(seed && seed->numel() == int64_t(ranks.size()) && seed->scalar_type() == ScalarType::Long &&
                          seed->is_contiguous(),
                      "given: dropout without seeds\nneeded: int64, one per adapter\ndo: draw_seed(n)");
      const uint64_t own = uint64_t(((const int64_t*)seed->const_data_ptr())[i]);
      runs.push_back({R(), ranks[i], keep_scale, MaskBits(e, own, M, K, ps[i])});
    } else if (runs.empty() || runs.back().mask) {
      runs.push_back({R(), ranks[i], keep_scale, {}});
    } else {
      runs.back().rank += ranks[i];
    }
    scaling.resize(R() + ranks[i], float(scalings[i]));
    kept.resize(R(), float(scalings[i]) * keep_scale);
  }

  // columns [begin, begin + rank) of out, the product of one left operand
  Columns columns(const Product& p, size_t left, const Source& b, int64_t begin, int64_t rank,
                  const std::vector<float>& scale, const Tensor& out) const {
    Columns c{rank, std::vector<Right>(p.lefts.size()), {}, target(out, R(), 1)};
    c.rights[left].b = b;
    c.y.data = (float*)c.y.data + begin;
    c.y.column_scale = scale.data() + begin;
    return c;
  }
};

// a W without columns stands for no base product at all
bool has_product(const Tensor& w, bool transposed) { return w.size(transposed ? 0 : 1) > 0; }

// W_i, maybe in codes, which lie row by row
Source base(const Tensor& w, bool transposed, bool half, const std::vector<const Codes*>& codes, size_t i) {
  Source s = weight(w, transposed, half);
  if (i >= codes.size() || !codes[i]) return s;
  return {s.data, false, w.size(1), 1, half, nullptr, 0, codes[i]};
}

// what forward and backward know of sibling i
void check_sibling(const Tensor& w, const Tensor& a, const Tensor& b, bool transposed, int64_t N, int64_t K,
                   const Adapters& adapters, size_t i) {
  check_float(b, "B");
  const int64_t R = adapters.R();
  STD_TORCH_CHECK(w.size(transposed ? 1 : 0) == N &&
                      (w.size(transposed ? 0 : 1) == K || !has_product(w, transposed)) && a.size(0) == R &&
                      (R == 0 || a.size(1) == K) && b.size(0) == N &&
                      b.size(1) == adapters.begins[i + 1] - adapters.begins[i],
                  "given: shapes that do not fit\nneeded: x (..., K), W (N, K), A (R, K), B (N, r), g (..., N)\n"
                  "do: call peft_fast.ops, which names the one that is wrong");
}

void check_lists(bool fit) {
  STD_TORCH_CHECK(fit, "given: lists of different lengths\nneeded: one entry per sibling\ndo: call peft_fast.ops");
}

}  // namespace

const void* packed_data(const std::optional<Tensor>& packed, const Engine& e, int64_t K, int64_t N) {
  if (!packed) return nullptr;
  STD_TORCH_CHECK(packed->numel() == packed_bytes(e, K, N),
                  "given: a packed weight of another size or instruction set\nneeded: pack_weight of this weight\n"
                  "do: clear the cache, peft_fast.ops.packing.clear()");
  return packed->const_data_ptr();
}

std::vector<float> widened(const Tensor& bias, int64_t N) {
  check_float(bias, "bias");
  STD_TORCH_CHECK(bias.numel() == N, "given: a bias of another length\nneeded: (N,)\ndo: pass the bias of W's layer");
  const Tensor dense = torch::stable::contiguous(bias);
  std::vector<float> wide(N);
  engine(false).rows({dense.const_data_ptr(), is_bf16(dense), N, 1}, 0, 1, 0, N, wide.data(), N);
  return wide;
}

std::tuple<std::vector<Tensor>, Tensor> lora_group(
    const Tensor& x_, const std::vector<Tensor>& ws, const std::vector<std::optional<Tensor>>& biases, const Tensor& a,
    const std::vector<Tensor>& bs, const std::optional<Tensor>& seed, const std::vector<int64_t>& counts,
    const std::vector<int64_t>& ranks, const std::vector<double>& scalings, const std::vector<double>& ps,
    const std::vector<bool>& transposed, const std::vector<std::optional<Tensor>>& packed) {
  return group_forward(x_, ws, biases, a, bs, seed, counts, ranks, scalings, ps, transposed, packed, {});
}

std::tuple<std::vector<Tensor>, Tensor> group_forward(
    const Tensor& x_, const std::vector<Tensor>& ws, const std::vector<std::optional<Tensor>>& biases, const Tensor& a,
    const std::vector<Tensor>& bs, const std::optional<Tensor>& seed, const std::vector<int64_t>& counts,
    const std::vector<int64_t>& ranks, const std::vector<double>& scalings, const std::vector<double>& ps,
    const std::vector<bool>& transposed, const std::vector<std::optional<Tensor>>& packed,
    const std::vector<const Codes*>& codes) {
  const Matrix x = matrix(x_, "x");
  const Engine& e = engine(x.source.bf16);
  const int64_t M = x.rows, K = x.cols;
  const size_t n = ws.size();
  check_lists(biases.size() == n && bs.size() == n && counts.size() == n && transposed.size() == n &&
              packed.size() == n);
  check_float(a, "A");
  const Adapters adapters(e, seed, counts, ranks, scalings, ps, M, K);
  Tensor h = empty_like(x_, {M, adapters.R()}, ScalarType::Float);
  std::vector<Tensor> ys;
  std::vector<std::vector<float>> wide(n);
  Product product{{{x.source, K}}, {}};
  for (size_t i = 0; i < n; ++i) {
    const int64_t N = ws[i].size(transposed[i] ? 1 : 0), begin = adapters.begins[i], R = adapters.begins[i + 1] - begin;
    check_sibling(ws[i], a, bs[i], transposed[i], N, K, adapters, i);
    ys.push_back(empty_like(x_, with_last(x_, N)));
    Right right{};
    if (has_product(ws[i], transposed[i]))
      right = {turned(base(ws[i], transposed[i], x.source.bf16, codes, i)), packed_data(packed[i], e, K, N)};
    Columns c{N, {right}, {}, target(ys[i], N, 1)};
    if (R > 0) c.low.push_back({from_col(rows_of(h), begin), turned(rows_of(bs[i])), R});
    if (biases[i]) c.y.bias = (wide[i] = widened(*biases[i], N)).data();
    product.columns.push_back(std::move(c));
  }
  const Product skinny = adapters.shrink(x.source, K, a, h);
  gemm(e, M, product, adapters.R() > 0 ? &skinny : nullptr);
  return {ys, h};
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> lora_group_backward(
    const std::vector<Tensor>& gs, const Tensor& x, const std::vector<Tensor>& ws, const Tensor& a,
    const std::vector<Tensor>& bs, const Tensor& h, const std::optional<Tensor>& seed,
    const std::vector<int64_t>& counts, const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
    const std::vector<double>& ps, const std::vector<bool>& transposed, bool needs_x,
    const std::vector<bool>& needs_bias, bool needs_a, const std::vector<bool>& needs_b, bool wide_dx,
    const std::vector<std::optional<Tensor>>& packed) {
  return group_backward(gs, x, ws, a, bs, h, seed, counts, ranks, scalings, ps, transposed, needs_x, needs_bias,
                        needs_a, needs_b, wide_dx, packed, {});
}

std::tuple<Tensor, Tensor, std::vector<Tensor>, std::vector<Tensor>> group_backward(
    const std::vector<Tensor>& gs_, const Tensor& x_, const std::vector<Tensor>& ws, const Tensor& a,
    const std::vector<Tensor>& bs, const Tensor& h, const std::optional<Tensor>& seed,
    const std::vector<int64_t>& counts, const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
    const std::vector<double>& ps, const std::vector<bool>& transposed, bool needs_x,
    const std::vector<bool>& needs_bias, bool needs_a, const std::vector<bool>& needs_b, bool wide_dx,
    const std::vector<std::optional<Tensor>>& packed, const std::function<Source(const Tensor& dx)>& between,
    const std::vector<const Codes*>& codes) {
  check_float(x_, "x");
  const Engine& e = engine(is_bf16(x_));
  STD_TORCH_CHECK(x_.dim() >= 1 && h.dim() == 2, "given: x or H of other dimensions\nneeded: x (..., K), H (M, R)\n"
                                                 "do: call peft_fast.ops and let autograd run the backward");
  const int64_t K = x_.size(x_.dim() - 1), M = h.size(0);
  const size_t n = gs_.size();
  check_lists(ws.size() == n && bs.size() == n && counts.size() == n && transposed.size() == n &&
              needs_bias.size() == n && needs_b.size() == n && packed.size() == n);
  check_float(a, "A");
  const Adapters adapters(e, seed, counts, ranks, scalings, ps, M, K);
  const int64_t R = adapters.R();
  needs_a = needs_a && R > 0;
  const std::vector<int64_t> none{0};
  Tensor dx = empty_like(x_, needs_x ? std::vector<int64_t>(x_.sizes().begin(), x_.sizes().end()) : none,
                         wide_dx ? ScalarType::Float : x_.scalar_type());
  Tensor da = empty_like(a, needs_a ? std::vector<int64_t>{R, K} : none);
  Tensor d = empty_like(x_, {M, needs_x || needs_a ? R : 0}, ScalarType::Float);
  STD_TORCH_CHECK(x_.numel() == M * K && h.size(1) == R && h.scalar_type() == ScalarType::Float,
                  "given: another H than the forward's\nneeded: H (M, R), float32\n"
                  "do: call peft_fast.ops and let autograd run the backward");
  std::vector<Tensor> dbs, dbiases;
  std::vector<Matrix> gs;  // keep copies alive
  const float one = 1.0f;
  Product product;
  Columns columns{K, {}, {}, target(dx, K, 1)};
  std::vector<Tokens> tokens;
  for (size_t i = 0; i < n; ++i) {
    gs.push_back(matrix(gs_[i], "the output's gradient"));
    const Matrix& g = gs.back();
    const int64_t N = g.cols, begin = adapters.begins[i], rank = adapters.begins[i + 1] - begin;
    check_sibling(ws[i], a, bs[i], transposed[i], N, K, adapters, i);
    STD_TORCH_CHECK(g.rows == M && g.source.bf16 == is_bf16(x_),
                    "given: a gradient that does not fit the forward\nneeded: g (..., N) of y, in x's dtype\n"
                    "do: call peft_fast.ops and let autograd run the backward");
    product.lefts.push_back({g.source, N});
    Right right{};
    if (has_product(ws[i], transposed[i]))
      right = {base(ws[i], transposed[i], is_bf16(x_), codes, i), packed_data(packed[i], e, N, K)};
    columns.rights.push_back(right);
    // dBᵀ = Hᵀ·G and dbias = 1ᵀ·G, one pass over G
    const bool db = needs_b[i] && rank > 0;
    dbs.push_back(empty_like(bs[i], db ? std::vector<int64_t>{N, rank} : none));
    dbiases.push_back(empty_like(x_, {needs_bias[i] ? N : 0}, ScalarType::Float));
    Tokens over{g.source, N, {}};
    if (db) over.talls.push_back({turned(from_col(rows_of(h), begin)), rank, target(dbs[i], 1, rank)});
    if (needs_bias[i]) over.talls.push_back({{&one, false, 0, 0}, 1, target(dbiases[i], N, 1)});
    tokens.push_back(std::move(over));
  }
  const Product skinny = d.numel() > 0 ? adapters.shrink(product.lefts, bs, d) : Product{};
  // x only where its values are read: whoever needs dx alone may have kept nothing but its shape
  const Matrix x = needs_a ? matrix(x_, "x") : Matrix{x_, {}, M, K};
  Tokens over{x.source, K, {}};
  for (const Adapters::Run& run : adapters.runs) {
    const Source low = from_col(rows_of(d), run.begin), mask = run.mask ? run.mask.over({}) : Source{};
    if (needs_x) columns.low.push_back({low, from_row(rows_of(a), run.begin), run.rank, mask, run.keep_scale});
    if (needs_a) {
      // dA = Dᵀ·drop(x)
      Tall tall{turned(low), run.rank, target(da, K, 1), mask};
      tall.y.data = (char*)tall.y.data + run.begin * K * (tall.y.bf16 ? 2 : 4);
      tall.y.scale = run.keep_scale;
      over.talls.push_back(tall);
    }
  }
  if (needs_x) {
    product.columns.push_back(std::move(columns));
    gemm(e, M, product, d.numel() > 0 ? &skinny : nullptr);
  } else {
    gemm(e, M, skinny);
  }
  if (between) over.b = between(dx);
  tokens.push_back(std::move(over));
  gemm_tokens(e, M, tokens);
  return {dx, da, dbs, dbiases};
}

}  // namespace peft_fast
