// The launchers, operators and kernels of csrc/cuda as CPU kernels of the same operators, for the tests.
#define PEFT_FAST_HOST_SHIM
#define PEFT_FAST_CUDA_ARCHS "host"
#include "cuda/expand.cuh"
#include "cuda/gemm.cpp"
#if defined(PEFT_FAST_HOPPER)
#include "cuda/hopper.cu"
#endif
#include "cuda/operators.cpp"
#include "cuda/outer.cuh"
#include "cuda/runtime.cu"
#include "cuda/shrink.cuh"

STABLE_TORCH_LIBRARY_FRAGMENT(peft_fast, m) { m.def("shim_mask(Tensor seed, int M, int K, float p) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(peft_fast, CPU, m) {
  m.impl("lora_shrink", TORCH_BOX(&peft_fast::cuda::lora_shrink));
  m.impl("lora_outer", TORCH_BOX(&peft_fast::cuda::lora_outer));
  m.impl("lora_shrink_outer", TORCH_BOX(&peft_fast::cuda::lora_shrink_outer));
  m.impl("lora_expand", TORCH_BOX(&peft_fast::cuda::lora_expand));
  m.impl("lora_gemm", TORCH_BOX(&peft_fast::cuda::lora_gemm));
  m.impl("gemm_add_", TORCH_BOX(&peft_fast::cuda::gemm_add));
  m.impl("shim_mask", TORCH_BOX(&peft_fast::cuda::cuda_dropout_mask));
}
