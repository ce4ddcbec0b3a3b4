// The operators over the skinny kernels: shapes, chunks of ranks, splits, workspaces. Compiled by the C++ compiler;
// without PEFT_FAST_CUDA_ARCHS it holds nothing but the answer that there are no CUDA kernels.
#include <algorithm>
#include <cmath>
#include <string>

#include "common/tensor.h"

#if defined(PEFT_FAST_CUDA_ARCHS)
#include "cuda/place.h"

namespace peft_fast::cuda {
namespace {

Operand operand(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, "given: ", name, " that is no matrix\nneeded: 2 dimensions", CALL);
  return {t.const_data_ptr(), t.stride(0), t.stride(1), dtype_of(t, name)};
}

struct Seeds {
  const int64_t* data = nullptr;
  Seeds(const std::optional<Tensor>& seed, const std::vector<double>& ps) {
    if (std::all_of(ps.begin(), ps.end(), [](double p) { return p <= 0; })) return;
    STD_TORCH_CHECK(seed && seed->numel() == int64_t(ps.size()) && seed->scalar_type() == ScalarType::Long &&
                        seed->is_contiguous(),
                    "given: dropout without seeds\nneeded: int64, one per adapter, on x's device\ndo: draw_seed(n)");
    data = static_cast<const int64_t*>(seed->const_data_ptr());
  }
};

// the adapters' rank columns, at most `widest` a chunk and MAX_CHUNKS a launch
std::vector<Chunks> chunked(const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
                            const std::vector<double>& ps, int64_t R) {
  std::vector<Chunks> launches;
  int64_t begin = 0;
  STD_TORCH_CHECK(ranks.size() == ps.size() && ranks.size() == scalings.size(),
                  "given: ranks, scalings and ps of different lengths\nneeded: one of each per adapter", CALL);
  for (size_t i = 0; i < ranks.size(); ++i) {
    const double keep = ps[i] < 1 ? 1 / (1 - ps[i]) : 0;
    for (int64_t r = 0; r < ranks[i]; r += CHUNK) {
      const int32_t count = int32_t(std::min(ranks[i] - r, int64_t(CHUNK)));
      if (launches.empty() || launches.back().n == MAX_CHUNKS) launches.push_back({});
      Chunks& last = launches.back();
      last.at[last.n++] = {int32_t(begin + r), count, float(scalings[i] * keep), float(keep),
                           uint32_t(std::nearbyint(ps[i] * 65536)), int32_t(i)};
      last.widest = std::max(last.widest, count);
    }
    begin += ranks[i];
  }
  STD_TORCH_CHECK(begin == R, "given: ranks that do not sum to ", R, " rows\nneeded: one rank per adapter", CALL);
  return launches;
}

int64_t chunks_of(const std::vector<Chunks>& launches) {
  int64_t n = 0;
  for (const Chunks& one : launches) n += one.n;
  return n;
}

int widest_of(const std::vector<Chunks>& launches) {
  int widest = 1;
  for (const Chunks& one : launches) widest = std::max(widest, one.widest);
  return widest;
}

// a result that `splits` blocks sum up, in float32 slabs where that is more than one
class Result {
 public:
  // out (rows, cols), contiguous; `turned`: its rows are what the kernel calls columns
  Result(Tensor out, int64_t splits, bool turned)
      : out_(std::move(out)), splits_(splits), dtype_(dtype_of(out_, "a result")) {
    const int64_t n = out_.numel(), ld = out_.size(1);
    if (splits_ > 1) parts_ = torch::stable::new_empty(out_, {splits_ * n}, ScalarType::Float);
    void* const data = splits_ > 1 ? parts_->mutable_data_ptr() : out_.mutable_data_ptr();
    sums = {data, splits_ > 1 ? F32 : dtype_, turned ? 1 : ld, turned ? ld : 1, n};
  }

  const Tensor& finish(Stream stream) const {
    if (splits_ > 1)
      finalize(static_cast<const float*>(parts_->const_data_ptr()), splits_, out_.numel(), out_.mutable_data_ptr(),
               dtype_, stream);
    return out_;
  }

  Sums sums;

 private:
  Tensor out_;
  int64_t splits_;
  Dtype dtype_;
  std::optional<Tensor> parts_;
};

Tensor zeros(const Tensor& like, int64_t rows, int64_t cols, const Place& place) {
  Tensor out = torch::stable::new_empty(like, {rows, cols});
  if (out.numel() > 0) finalize(nullptr, 0, out.numel(), out.mutable_data_ptr(), dtype_of(out, "zeros"), place.stream());
  return out;
}

// how many blocks share the tokens, and how many tokens each takes
int64_t rows_each(int64_t M, int64_t blocks, int64_t wanted) {
  const int64_t most = ceil_div(M, ROWS), splits = std::min({most, std::max<int64_t>(wanted / blocks, 1), GRID_Y});
  return ceil_div(most, splits) * ROWS;
}

}  // namespace

// x (M, C), op (R, C) -> (M, R) in x's dtype = s·drop(x)·opᵀ
Tensor lora_shrink(const Tensor& x, const Tensor& op, const std::optional<Tensor>& seed,
                   const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
                   const std::vector<double>& ps) {
  const Dtype dtype = dtype_of(x, "x");
  const Tokens t = tokens(x, "x");
  const int64_t R = op.size(0);
  STD_TORCH_CHECK(op.dim() == 2 && op.size(1) == t.C, "given: an operand of another width\nneeded: (R, C)", CALL);
  const std::vector<Chunks> launches = chunked(ranks, scalings, ps, R);
  const Seeds seeds(seed, ps);
  if (t.M == 0 || R == 0) return torch::stable::new_empty(x, {t.M, R});
  const Place place(x);
  if (t.C == 0) return zeros(x, t.M, R, place);
  int64_t range = std::min(most_range(widest_of(launches)), ceil_div(t.C, GROUP) * GROUP);
  const int64_t rows = std::min(ceil_div(t.M, ROWS), GRID_Y) * chunks_of(launches);
  while (range > GROUP && ceil_div(t.C, range) * rows < place.wanted_blocks()) range = ceil_div(range / 2, GROUP) * GROUP;
  const Result h(torch::stable::new_empty(x, {t.M, R}), ceil_div(t.C, range), false);
  for (const Chunks& chunks : launches)
    shrink(dtype, {t, operand(op, "the adapter"), range, seeds.data, h.sums, chunks}, place.stream());
  return h.finish(place.stream());
}

// d (M, R), x (M, C) -> dᵀ·drop(x) as (R, C), or (C, R) if turned, in like's dtype
Tensor lora_outer(const Tensor& d, const Tensor& x, const Tensor& like, const std::optional<Tensor>& seed,
                  const std::vector<int64_t>& ranks, const std::vector<double>& ps, bool turned) {
  const Dtype dtype = dtype_of(x, "x");
  const Tokens t = tokens(x, "x"), small = tokens(d, "d");
  const int64_t R = small.C;
  STD_TORCH_CHECK(small.M == t.M && dtype_of(d, "d") == dtype, "given: d and x of different tokens or dtypes\n"
                  "needed: (M, R) and (M, C) of one dtype", CALL);
  const std::vector<Chunks> launches = chunked(ranks, std::vector<double>(ranks.size(), 1.0), ps, R);
  const Seeds seeds(seed, ps);
  const int64_t rows = turned ? t.C : R, cols = turned ? R : t.C;
  if (R == 0 || t.C == 0) return torch::stable::new_empty(like, {rows, cols});
  const Place place(x);
  if (t.M == 0) return zeros(like, rows, cols, place);
  const int64_t each = rows_each(t.M, ceil_div(t.C, GROUP) * chunks_of(launches), place.wanted_blocks());
  const Result out(torch::stable::new_empty(like, {rows, cols}), ceil_div(t.M, each), turned);
  for (const Chunks& chunks : launches)
    outer(dtype, {t, small, each, 1, seeds.data, out.sums, {}, {}, chunks}, place.stream());
  return out.finish(place.stream());
}

// g (M, N), op (R, N) = Bᵀ, h (M, R) -> (D (M, R) in g's dtype = s·g·opᵀ, dB (N, R) in op's = gᵀ·h)
std::tuple<Tensor, Tensor> lora_shrink_outer(const Tensor& g, const Tensor& op, const Tensor& h,
                                             const std::vector<int64_t>& ranks, const std::vector<double>& scalings) {
  const Dtype dtype = dtype_of(g, "g");
  const Tokens t = tokens(g, "g"), small = tokens(h, "h");
  const int64_t R = op.size(0);
  STD_TORCH_CHECK(op.dim() == 2 && op.size(1) == t.C && small.M == t.M && small.C == R && dtype_of(h, "h") == dtype,
                  "given: g, B and H that do not fit\nneeded: (M, N), (R, N) and (M, R)", CALL);
  const std::vector<double> none(ranks.size(), 0.0);
  const std::vector<Chunks> launches = chunked(ranks, scalings, none, R);
  // wider ranks leave no registers for both sums, and float32 has no tensor cores to keep busy
  if (dtype == F32 || widest_of(launches) > 16 || t.M == 0 || t.C == 0 || R == 0)
    return {lora_shrink(g, op, {}, ranks, scalings, none), lora_outer(h, g, op, {}, ranks, none, true)};
  const Place place(g);
  const int64_t all = ceil_div(t.C, GROUP), row_blocks = ceil_div(t.M, ROWS);
  int64_t groups = std::min<int64_t>(MOST_GROUPS, all);
  while (groups > 1 && ceil_div(all, groups) * row_blocks * chunks_of(launches) < place.wanted_blocks()) --groups;
  const int64_t blocks = ceil_div(all, groups);
  const int64_t each = rows_each(t.M, blocks * chunks_of(launches), place.wanted_blocks());
  const Result d(torch::stable::new_empty(g, {t.M, R}), blocks, false);
  const Result db(torch::stable::new_empty(op, {t.C, R}), ceil_div(t.M, each), true);
  for (const Chunks& chunks : launches)
    shrink_outer(dtype, {t, small, each, int32_t(groups), nullptr, db.sums, operand(op, "B"), d.sums, chunks},
                 place.stream());
  const Stream stream = place.stream();
  return {d.finish(stream), db.finish(stream)};
}

// p (M, R), q (R, C), bias (C,) -> (M, C) in p's dtype = Σ mask∘(p·q)/(1 − p) + bias
Tensor lora_expand(const Tensor& p, const Tensor& q, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& seed, const std::vector<int64_t>& ranks,
                   const std::vector<double>& ps) {
  const Dtype dtype = dtype_of(p, "p");
  const Tokens t = tokens(p, "p");
  const Operand right = operand(q, "the adapter");
  const int64_t C = q.size(1);
  STD_TORCH_CHECK(q.size(0) == t.C && (!bias || (bias->dim() == 1 && bias->numel() == C)),
                  "given: an operand or a bias of another size\nneeded: (R, C) and (C,)", CALL);
  const std::vector<Chunks> launches = chunked(ranks, std::vector<double>(ranks.size(), 1.0), ps, t.C);
  STD_TORCH_CHECK(launches.size() == 1, "given: ", chunks_of(launches), " chunks of ranks\nneeded: 1 to ", MAX_CHUNKS,
                  "\ndo: use backend='torch'");
  const Seeds seeds(seed, ps);
  Tensor out = torch::stable::new_empty(p, {t.M, C});
  if (out.numel() == 0) return out;
  const Place place(p);
  Operand added{nullptr, 0, 0, F32};
  if (bias) added = {bias->const_data_ptr(), 0, bias->stride(0), dtype_of(*bias, "bias")};
  const bool aligned = reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 16 == 0 && C % 8 == 0;
  expand(dtype, {t, right, added, seeds.data, out.mutable_data_ptr(), C, C, aligned, launches[0]}, place.stream());
  return out;
}

// seed () int64 -> bool (M, K), true = kept
Tensor cuda_dropout_mask(const Tensor& seed, int64_t M, int64_t K, double p) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1 && M >= 0 && K >= 0,
                  "given: a seed that is not one int64\nneeded: one element of draw_seed(n)\ndo: pass seed[i]");
  Tensor out = torch::stable::new_empty(seed, {M, K}, ScalarType::Bool);
  if (out.numel() == 0) return out;
  const Place place(seed);
  mask(static_cast<const int64_t*>(seed.const_data_ptr()), M, K, uint32_t(std::nearbyint(p * 65536)),
       static_cast<bool*>(out.mutable_data_ptr()), place.stream());
  return out;
}

}  // namespace peft_fast::cuda

#if !defined(PEFT_FAST_HOST_SHIM)
STABLE_TORCH_LIBRARY_IMPL(peft_fast, CUDA, m) {
  m.impl("lora_shrink", TORCH_BOX(&peft_fast::cuda::lora_shrink));
  m.impl("lora_outer", TORCH_BOX(&peft_fast::cuda::lora_outer));
  m.impl("lora_shrink_outer", TORCH_BOX(&peft_fast::cuda::lora_shrink_outer));
  m.impl("lora_expand", TORCH_BOX(&peft_fast::cuda::lora_expand));
  m.impl("dropout_mask", TORCH_BOX(&peft_fast::cuda::cuda_dropout_mask));
}
#endif
#endif  // PEFT_FAST_CUDA_ARCHS

#if !defined(PEFT_FAST_HOST_SHIM)
namespace peft_fast {

// the architectures the CUDA kernels were compiled for; empty: not compiled
std::string cuda_archs() {
#if defined(PEFT_FAST_CUDA_ARCHS)
  return PEFT_FAST_CUDA_ARCHS;
#else
  return "";
#endif
}

// why the CUDA runtime finds no device; empty when there is one
std::string cuda_no_device() {
#if defined(PEFT_FAST_CUDA_ARCHS)
  return cuda::no_device();
#else
  return "the extension was built without CUDA kernels";
#endif
}

}  // namespace peft_fast

STABLE_TORCH_LIBRARY_IMPL(peft_fast, CompositeExplicitAutograd, m) {
  m.impl("cuda_archs", TORCH_BOX(&peft_fast::cuda_archs));
  m.impl("cuda_no_device", TORCH_BOX(&peft_fast::cuda_no_device));
}
#endif
