// Where an operator runs: the tensor's own device, torch's current stream there; and what its tensors are.
#pragma once
#if !defined(PEFT_FAST_HOST_SHIM)
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include "common/tensor.h"
#include "cuda/skinny.h"

namespace peft_fast::cuda {

constexpr const char* CALL = "\ndo: call peft_fast.ops.lora_linear";

class Place {
 public:
#if defined(PEFT_FAST_HOST_SHIM)
  explicit Place(const Tensor&) {}
  int index() const { return 0; }
  Stream stream() const { return nullptr; }
  int64_t wanted_blocks() const { return 2 * multiprocessors(0); }
#else
  explicit Place(const Tensor& t) : index_(t.get_device()), guard_(index_) {
    use_device(index_);  // the runtime linked into this library keeps a current device of its own
  }

  int index() const { return index_; }

  Stream stream() const {
    using Get = int32_t (*)(int32_t, void**);
    // a CPU build of torch has no such symbol, so it cannot be linked against
    static const Get get = [] {
      void* found = dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
      if (!found)
        if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD))
          found = dlsym(library, "aoti_torch_get_current_cuda_stream");
      return reinterpret_cast<Get>(found);
    }();
    void* stream = nullptr;
    STD_TORCH_CHECK(get && get(index_, &stream) == 0,
                    "given: a torch that does not tell its CUDA stream\nneeded: a CUDA build of torch 2.11 or later\n"
                    "do: use backend='torch'");
    return stream;
  }

  int64_t wanted_blocks() const { return 2 * multiprocessors(index_); }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return F32;
    case ScalarType::BFloat16: return BF16;
    case ScalarType::Half: return F16;
    default: STD_TORCH_CHECK(false, "given: ", name, " of another dtype\nneeded: float32, bfloat16 or float16", CALL);
  }
  return F32;
}

inline Tokens tokens(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && (t.stride(1) == 1 || t.size(1) <= 1),
                  "given: ", name, " whose rows are not dense\nneeded: (M, columns) with neighbouring columns", CALL);
  const int64_t size = int64_t(t.element_size()), ld = t.size(0) > 1 ? t.stride(0) : t.size(1);
  const bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && ld * size % 16 == 0;
  return {t.const_data_ptr(), ld, t.size(0), t.size(1), aligned};
}

}  // namespace peft_fast::cuda
