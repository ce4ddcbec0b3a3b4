// The functions of cuBLASLt that csrc/cuda/cublaslt.h looks up, by loops over column-major host memory.
// It refuses what cuBLASLt refuses: a leading dimension below the rows, a workspace smaller than it asked for.
#include <cstdint>
#include <cstring>

#include "cuda/cublaslt.h"

using namespace peft_fast::cuda::lt;

namespace {

struct FakeDesc {
  int compute, scale, trans[2] = {OP_N, OP_N};
};
struct FakeLayout {
  int type;
  int64_t rows, cols, ld;
};
struct FakePreference {
  uint64_t workspace = 0;
  uint32_t reduction = 7, aligned[4] = {};
};
constexpr size_t WORKSPACE = 4096;
constexpr Status INVALID = 7;
int heuristics = 0, calls = 0, fail_at = -1;

float get(const void* data, int type, int64_t i) {
  if (type == R_32F) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (type == R_16F) {
    _Float16 h;
    std::memcpy(&h, &bits, 2);
    return float(h);
  }
  const uint32_t wide = uint32_t(bits) << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}

void put(void* data, int type, int64_t i, float f) {
  if (type == R_32F) {
    static_cast<float*>(data)[i] = f;
  } else if (type == R_16F) {
    const _Float16 h = _Float16(f);
    std::memcpy(static_cast<uint16_t*>(data) + i, &h, 2);
  } else {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    static_cast<uint16_t*>(data)[i] = uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int fake_heuristics() { return heuristics; }
EXPORT int fake_calls() { return calls; }
EXPORT void fake_fail_at(int call) { fail_at = call; }

EXPORT Status cublasLtCreate(Handle* handle) {
  static int one;
  *handle = &one;
  return 0;
}
EXPORT Status cublasLtMatmulDescCreate(Desc* out, int compute, int scale) {
  *out = new FakeDesc{compute, scale};
  return 0;
}
EXPORT Status cublasLtMatmulDescSetAttribute(Desc desc, int name, const void* value, size_t size) {
  if (size != 4 || (name != DESC_TRANSA && name != DESC_TRANSB)) return INVALID;
  std::memcpy(&static_cast<FakeDesc*>(desc)->trans[name - DESC_TRANSA], value, 4);
  return 0;
}
EXPORT Status cublasLtMatmulDescDestroy(Desc desc) {
  delete static_cast<FakeDesc*>(desc);
  return 0;
}
EXPORT Status cublasLtMatrixLayoutCreate(Layout* out, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  if (ld < int64_t(rows)) return INVALID;
  *out = new FakeLayout{type, int64_t(rows), int64_t(cols), ld};
  return 0;
}
EXPORT Status cublasLtMatrixLayoutDestroy(Layout layout) {
  delete static_cast<FakeLayout*>(layout);
  return 0;
}
EXPORT Status cublasLtMatmulPreferenceCreate(Preference* out) {
  *out = new FakePreference;
  return 0;
}
EXPORT Status cublasLtMatmulPreferenceSetAttribute(Preference preference, int name, const void* value, size_t size) {
  auto* const p = static_cast<FakePreference*>(preference);
  if (name == PREF_MAX_WORKSPACE_BYTES && size == 8) std::memcpy(&p->workspace, value, 8);
  else if (name == PREF_REDUCTION_SCHEME_MASK && size == 4) std::memcpy(&p->reduction, value, 4);
  else if (name >= PREF_MIN_ALIGNMENT_A_BYTES && name < PREF_MIN_ALIGNMENT_A_BYTES + 4 && size == 4)
    std::memcpy(&p->aligned[name - PREF_MIN_ALIGNMENT_A_BYTES], value, 4);
  else return INVALID;
  return 0;
}
EXPORT Status cublasLtMatmulPreferenceDestroy(Preference preference) {
  delete static_cast<FakePreference*>(preference);
  return 0;
}
EXPORT Status cublasLtMatmulAlgoGetHeuristic(Handle, Desc, Layout, Layout, Layout, Layout, Preference preference,
                                             int requested, HeuristicResult* result, int* found) {
  const auto* const p = static_cast<FakePreference*>(preference);
  ++heuristics;
  *found = 0;
  if (requested != 1 || p->workspace < WORKSPACE || p->reduction != REDUCTION_COMPUTE_TYPE) return INVALID;
  // what the caller promised of its pointers is what the algorithm may rely on
  for (int i = 0; i < 4; ++i) result->algo.data[i] = p->aligned[i];
  result->workspace_size = WORKSPACE;
  result->state = 0;
  *found = 1;
  return 0;
}
EXPORT Status cublasLtMatmul(Handle, Desc desc, const void* alpha, const void* a, Layout la, const void* b, Layout lb,
                             const void* beta, const void* c, Layout lc, void* d, Layout ld, const Algo* algo,
                             void* workspace, size_t size, void*) {
  if (calls++ == fail_at) return INVALID;
  const auto& how = *static_cast<FakeDesc*>(desc);
  const auto &A = *static_cast<FakeLayout*>(la), &B = *static_cast<FakeLayout*>(lb), &C = *static_cast<FakeLayout*>(ld);
  const void* const pointers[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i)
    if (!algo->data[i] || reinterpret_cast<uintptr_t>(pointers[i]) % algo->data[i]) return INVALID;
  const bool ta = how.trans[0] == OP_T, tb = how.trans[1] == OP_T;
  const int64_t m = ta ? A.cols : A.rows, k = ta ? A.rows : A.cols, n = tb ? B.rows : B.cols;
  if ((tb ? B.cols : B.rows) != k || C.rows != m || C.cols != n || lc != ld || size < WORKSPACE) return INVALID;
  std::memset(workspace, 0xFF, size);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float sum = 0;
      for (int64_t l = 0; l < k; ++l)
        sum += get(a, A.type, ta ? l + i * A.ld : i + l * A.ld) * get(b, B.type, tb ? j + l * B.ld : l + j * B.ld);
      const int64_t at = i + j * C.ld;
      put(d, C.type, at,
          *static_cast<const float*>(alpha) * sum + *static_cast<const float*>(beta) * get(c, C.type, at));
    }
  return 0;
}
