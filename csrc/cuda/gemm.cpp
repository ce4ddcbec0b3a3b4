// The GEMMs of the size of the layer: cuBLASLt adding into what the adapter wrote, and the Hopper GEMM that does both.
#if defined(PEFT_FAST_CUDA_ARCHS)
#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <string>

#include "cuda/cublaslt.h"
#include "cuda/place.h"
#if defined(PEFT_FAST_HOPPER)
#include "cuda/hopper.h"
#endif

namespace peft_fast::cuda {
namespace {

constexpr const char* LIBRARIES[] = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so", nullptr};
constexpr uint64_t MOST_WORKSPACE = 32 << 20;
constexpr size_t MOST_ENTRIES = 4096;  // token counts that differ from call to call would fill the memory

// a row-major matrix as column-major BLAS sees its memory: itself transposed, or not
struct Operand2d {
  const void* data;
  int64_t rows, cols, ld;
  bool turned, fits;  // turned: neighbouring rows, the columns ld apart
};

Operand2d operand2d(const Tensor& t) {
  const int64_t rows = t.size(0), cols = t.size(1);
  const int64_t row = rows > 1 ? t.stride(0) : cols, col = cols > 1 ? t.stride(1) : 1;
  const void* data = t.const_data_ptr();
  if (col == 1 && row >= cols) return {data, rows, cols, row, false, true};
  const int64_t across = cols > 1 ? t.stride(1) : rows;
  const bool fits = (rows <= 1 || t.stride(0) == 1) && across >= rows;
  return {data, rows, cols, across, true, fits};
}

uint32_t alignment(const void* data) {
  uint32_t bytes = 256;
  while (reinterpret_cast<uintptr_t>(data) % bytes) bytes /= 2;
  return bytes;
}

// device, dtype, tf32, M, N, K, then for a, b and out the leading dimension (negative: turned) and the alignment
using Key = std::array<int64_t, 12>;

struct Entry {
  lt::Desc desc = nullptr;
  lt::Layout a = nullptr, b = nullptr, out = nullptr;
  lt::Algo algo{};
  size_t workspace = 0;
  bool found = false;
};

class Lt {
 public:
  static Lt& get() {
    static Lt* const one = new Lt;  // never destroyed: at exit, cuBLAS may be gone before
    return *one;
  }

  bool add(Tensor& out, const Tensor& a, const Tensor& b, bool tf32) {
    const Operand2d left = operand2d(a), right = operand2d(b), to = operand2d(out);
    if (!api_.whole || !left.fits || !right.fits || !to.fits || to.turned) return false;
    const Place place(out);
    const Stream stream = place.stream();
    const Dtype dtype = dtype_of(out, "out");
    const uint32_t aligned[3] = {alignment(right.data), alignment(left.data), alignment(to.data)};
    const Key key{place.index(), dtype, tf32, left.rows, right.cols, left.cols,
                  left.turned ? -left.ld : left.ld, right.turned ? -right.ld : right.ld, to.ld,
                  aligned[0], aligned[1], aligned[2]};
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = entries_.find(key);
    if (found == entries_.end()) {
      const lt::Handle handle = handle_of(place.index(), stream);
      if (!handle) return false;
      if (entries_.size() >= MOST_ENTRIES) clear();
      found = entries_.emplace(key, choose(handle, dtype, tf32, left, right, to, aligned)).first;
    }
    Entry& entry = found->second;
    if (!entry.found) return false;
    // from torch's allocator, so that it belongs to the stream, or to the graph that is being captured
    std::optional<Tensor> workspace;
    if (entry.workspace) workspace = torch::stable::new_empty(out, {int64_t(entry.workspace)}, ScalarType::Byte);
    const float one = 1;
    // memory read in columns: outᵀ (N, M) = bᵀ·aᵀ + outᵀ
    entry.found = !api_.Matmul(handles_[place.index()], entry.desc, &one, right.data, entry.a, left.data, entry.b, &one,
                               to.data, entry.out, out.mutable_data_ptr(), entry.out, &entry.algo,
                               workspace ? workspace->mutable_data_ptr() : nullptr, entry.workspace, stream);
    return entry.found;
  }

 private:
  lt::Handle handle_of(int device, Stream stream) {
    lt::Handle& handle = handles_[device];
    // a handle may take memory of its own, which a capture forbids: torch's GEMM runs this once
    if (!handle && !is_capturing(stream) && api_.Create(&handle)) handle = nullptr;
    return handle;
  }

  Entry choose(lt::Handle handle, Dtype dtype, bool tf32, const Operand2d& left, const Operand2d& right,
               const Operand2d& to, const uint32_t (&aligned)[3]) const {
    const int type = dtype == BF16 ? lt::R_16BF : dtype == F16 ? lt::R_16F : lt::R_32F;
    const int trans[2] = {right.turned ? lt::OP_T : lt::OP_N, left.turned ? lt::OP_T : lt::OP_N};
    const auto layout = [&](lt::Layout& out, const Operand2d& m) {
      return api_.MatrixLayoutCreate(&out, type, m.turned ? m.rows : m.cols, m.turned ? m.cols : m.rows, m.ld);
    };
    Entry entry;
    lt::Preference preference = nullptr;
    // parts of a split sum meet in float32, never in the output's dtype
    const uint32_t reduction = lt::REDUCTION_COMPUTE_TYPE;
    bool good = !api_.MatmulDescCreate(&entry.desc, tf32 ? lt::COMPUTE_32F_FAST_TF32 : lt::COMPUTE_32F, lt::R_32F) &&
                !api_.MatmulDescSetAttribute(entry.desc, lt::DESC_TRANSA, &trans[0], sizeof(int)) &&
                !api_.MatmulDescSetAttribute(entry.desc, lt::DESC_TRANSB, &trans[1], sizeof(int)) &&
                !layout(entry.a, right) && !layout(entry.b, left) && !layout(entry.out, to) &&
                !api_.MatmulPreferenceCreate(&preference) && set(preference, lt::PREF_MAX_WORKSPACE_BYTES, MOST_WORKSPACE) &&
                set(preference, lt::PREF_REDUCTION_SCHEME_MASK, reduction);
    for (int i = 0; good && i < 4; ++i)
      good = set(preference, lt::PREF_MIN_ALIGNMENT_A_BYTES + i, aligned[std::min(i, 2)]);
    lt::HeuristicResult result{};
    int count = 0;
    if (good)
      good = !api_.MatmulAlgoGetHeuristic(handle, entry.desc, entry.a, entry.b, entry.out, entry.out, preference, 1,
                                          &result, &count) &&
             count > 0 && !result.state;
    if (preference) api_.MatmulPreferenceDestroy(preference);
    entry.found = good, entry.algo = result.algo, entry.workspace = result.workspace_size;
    return entry;
  }

  template <class Value>
  bool set(lt::Preference preference, int name, const Value& value) const {
    return !api_.MatmulPreferenceSetAttribute(preference, name, &value, sizeof value);
  }

  void clear() {
    for (auto& [key, entry] : entries_) {
      for (lt::Layout layout : {entry.a, entry.b, entry.out})
        if (layout) api_.MatrixLayoutDestroy(layout);
      if (entry.desc) api_.MatmulDescDestroy(entry.desc);
    }
    entries_.clear();
  }

  const lt::Api api_ = lt::find(LIBRARIES);
  std::mutex mutex_;
  std::map<int, lt::Handle> handles_;
  std::map<Key, Entry> entries_;
};

}  // namespace

bool gemm_add(Tensor out, const Tensor& a, const Tensor& b, bool tf32) {
  STD_TORCH_CHECK(out.dim() == 2 && a.dim() == 2 && b.dim() == 2 && a.size(0) == out.size(0) &&
                      b.size(1) == out.size(1) && a.size(1) == b.size(0) && a.scalar_type() == out.scalar_type() &&
                      b.scalar_type() == out.scalar_type(),
                  "given: matrices that do not fit\nneeded: (M, N), (M, K) and (K, N) of one dtype", CALL);
  if (out.numel() == 0 || a.numel() == 0) return true;
  return Lt::get().add(out, a, b, tf32);
}

std::tuple<Tensor, std::string> lora_gemm(const Tensor& left, const Tensor& right, const Tensor& low_left,
                                          const Tensor& low_right, const std::optional<Tensor>& bias,
                                          const std::optional<Tensor>& seed, double p, bool turned) {
  Tensor nothing = torch::stable::new_empty(left, {0});
#if defined(PEFT_FAST_HOPPER)
  const Tokens x = tokens(left, "left"), w = tokens(right, "right"), h = tokens(low_left, "low_left"),
               b = tokens(low_right, "low_right");
  const int64_t N = turned ? w.C : w.M, K = turned ? w.M : w.C, R = h.C;
  const Dtype dtype = dtype_of(left, "left");
  const bool one_dtype = dtype_of(right, "right") == dtype && dtype_of(low_left, "low_left") == dtype &&
                         dtype_of(low_right, "low_right") == dtype;
  STD_TORCH_CHECK(one_dtype && x.C == K && h.M == x.M && (turned ? b.C == N && b.M == R : b.M == N && b.C == R) &&
                      (!bias || (bias->dim() == 1 && bias->numel() == N && bias->is_contiguous())) &&
                      (p <= 0 || (seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long)),
                  "given: operands that do not fit\nneeded: (M, K), (N, K), (M, R), (N, R), turned (K, N), (R, N)", CALL);
  const Place place(left);
  Tensor out = torch::stable::new_empty(left, {x.M, N});
  HopperGemm job{};
  job.dtype = dtype, job.turned = turned;
  job.M = x.M, job.N = N, job.K = K, job.R = R;
  job.left = x.data, job.right = w.data, job.low_left = h.data, job.low_right = b.data;
  job.left_ld = x.ld, job.right_ld = w.ld, job.low_left_ld = h.ld, job.low_right_ld = b.ld;
  if (bias) job.bias = bias->const_data_ptr(), job.bias_dtype = dtype_of(*bias, "bias");
  if (p > 0) job.seed = static_cast<const int64_t*>(seed->const_data_ptr()), job.p = p;
  job.out = out.mutable_data_ptr(), job.out_ld = N;
  if (const char* why = hopper_refuses(job, place.index())) return {nothing, why};
  hopper_gemm(job, place.index(), place.stream());
  return {out, ""};
#else
  return {nothing, "the Hopper GEMM was not built, which needs 90a in PEFT_FAST_CUDA_ARCHS"};
#endif
}

}  // namespace peft_fast::cuda

#if !defined(PEFT_FAST_HOST_SHIM)
STABLE_TORCH_LIBRARY_IMPL(peft_fast, CUDA, m) {
  m.impl("gemm_add_", TORCH_BOX(&peft_fast::cuda::gemm_add));
  m.impl("lora_gemm", TORCH_BOX(&peft_fast::cuda::lora_gemm));
}
#endif
#endif  // PEFT_FAST_CUDA_ARCHS
