// The part of cuBLASLt's C interface that we use, looked up in the library torch has loaded: no header, no link.
#pragma once
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace peft_fast::cuda::lt {

// names and values as in cublasLt.h and library_types.h, where they are part of the ABI since CUDA 11
using Status = int;
using Handle = void*;
using Desc = void*;
using Layout = void*;
using Preference = void*;
enum : int { R_32F = 0, R_16F = 2, R_16BF = 14 };
enum : int { COMPUTE_32F = 68, COMPUTE_32F_FAST_TF32 = 77 };
enum : int { DESC_TRANSA = 3, DESC_TRANSB = 4, OP_N = 0, OP_T = 1 };
enum : int { PREF_MAX_WORKSPACE_BYTES = 1, PREF_REDUCTION_SCHEME_MASK = 3, PREF_MIN_ALIGNMENT_A_BYTES = 5 };
enum : uint32_t { REDUCTION_COMPUTE_TYPE = 2 };

struct Algo {
  uint64_t data[8];
};

struct HeuristicResult {
  Algo algo;
  size_t workspace_size;
  Status state;
  float waves_count;
  int reserved[4];
};

struct Api {
  Status (*Create)(Handle*) = nullptr;
  Status (*MatmulDescCreate)(Desc*, int compute, int scale) = nullptr;
  Status (*MatmulDescSetAttribute)(Desc, int, const void*, size_t) = nullptr;
  Status (*MatmulDescDestroy)(Desc) = nullptr;
  Status (*MatrixLayoutCreate)(Layout*, int type, uint64_t rows, uint64_t cols, int64_t ld) = nullptr;
  Status (*MatrixLayoutDestroy)(Layout) = nullptr;
  Status (*MatmulPreferenceCreate)(Preference*) = nullptr;
  Status (*MatmulPreferenceSetAttribute)(Preference, int, const void*, size_t) = nullptr;
  Status (*MatmulPreferenceDestroy)(Preference) = nullptr;
  Status (*MatmulAlgoGetHeuristic)(Handle, Desc, Layout a, Layout b, Layout c, Layout d, Preference, int requested,
                                   HeuristicResult*, int* found) = nullptr;
  Status (*Matmul)(Handle, Desc, const void* alpha, const void* a, Layout, const void* b, Layout, const void* beta,
                   const void* c, Layout, void* d, Layout, const Algo*, void* workspace, size_t, void* stream) = nullptr;
  bool whole = false;
};

// only a library that is loaded already is looked at: a second cuBLAS beside torch's would be another version's
inline Api find(const char* const* names) {
  Api api;
  void* library = nullptr;
  for (; *names && !library; ++names) library = dlopen(*names, RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return api;
  api.whole = true;
  const auto take = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    api.whole = api.whole && function;
  };
  take(api.Create, "cublasLtCreate");
  take(api.MatmulDescCreate, "cublasLtMatmulDescCreate");
  take(api.MatmulDescSetAttribute, "cublasLtMatmulDescSetAttribute");
  take(api.MatmulDescDestroy, "cublasLtMatmulDescDestroy");
  take(api.MatrixLayoutCreate, "cublasLtMatrixLayoutCreate");
  take(api.MatrixLayoutDestroy, "cublasLtMatrixLayoutDestroy");
  take(api.MatmulPreferenceCreate, "cublasLtMatmulPreferenceCreate");
  take(api.MatmulPreferenceSetAttribute, "cublasLtMatmulPreferenceSetAttribute");
  take(api.MatmulPreferenceDestroy, "cublasLtMatmulPreferenceDestroy");
  take(api.MatmulAlgoGetHeuristic, "cublasLtMatmulAlgoGetHeuristic");
  take(api.Matmul, "cublasLtMatmul");
  return api;
}

}  // namespace peft_fast::cuda::lt
