// kernel(job) on a grid, with the shared memory it needs.
#pragma once
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/device.cuh"

namespace peft_fast::cuda {

#if defined(PEFT_FAST_HOST_SHIM)
template <class Job>
void launch(void (*kernel)(Job), int64_t x, int64_t y, size_t shared, Stream, const Job& job) {
  shim::run(uint32_t(x), uint32_t(y), THREADS, shared, [&] { kernel(job); });
}
#else
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA says: ") + cudaGetErrorString(error));
}

template <class Job>
void launch(void (*kernel)(Job), int64_t x, int64_t y, size_t shared, Stream stream, const Job& job) {
  // a device keeps the attribute, but which devices have it is not worth remembering
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared)));
  kernel<<<dim3(unsigned(x), unsigned(y)), THREADS, shared, static_cast<cudaStream_t>(stream)>>>(job);
  check(cudaGetLastError());
}
#endif

}  // namespace peft_fast::cuda
