// The whole layer as one GEMM on Hopper: what its launcher takes. No torch and no CUDA headers.
//
// Proven on the host (tests/cuda/test_hopper*.py) and compiled, never yet run or timed on a GPU: it is used where
// backend="cuda", plan="fused" ask for it by name, after a self-test.
#pragma once
#include "cuda/skinny.h"

namespace peft_fast::cuda {

// out (M, N) = left (M, K)·right + mask∘(low_left (M, R)·low_right)/(1 − p) + bias (N,), all in dtype but bias.
// Forward: x, W, H, B. Backward: g, W, D, A with the layer's N in the place of K. One mask for all R columns.
struct HopperGemm {
  Dtype dtype;
  bool turned;  // false: right (N, K), low_right (N, R); true: right (K, N), low_right (R, N)
  int64_t M, N, K, R;
  const void *left, *right, *low_left, *low_right;
  int64_t left_ld, right_ld, low_left_ld, low_right_ld;
  const void* bias;  // or null
  Dtype bias_dtype;
  const int64_t* seed;  // on the device; not read where p = 0
  double p;
  void* out;
  int64_t out_ld;
};

// why not these operands on this device; null where hopper_gemm takes them
const char* hopper_refuses(const HopperGemm& job, int device);
// raises std::runtime_error with CUDA's own words where a launch fails
void hopper_gemm(const HopperGemm& job, int device, Stream stream);

}  // namespace peft_fast::cuda
