// csrc/cuda/hopper.cu for ctypes: the host's launcher, the kernel and a model of Hopper around it.
#define PEFT_FAST_HOST_SHIM
#include "cuda/hopper.cu"

namespace peft_fast::cuda {
int multiprocessors(int) { return hopper_shim::settings().multiprocessors; }
}  // namespace peft_fast::cuda

using peft_fast::cuda::HopperGemm;

// (all else is hidden: two models in one process would share their inline functions' statics)
#define EXPORT extern "C" __attribute__((visibility("default")))

// what went wrong, or an empty string
EXPORT const char* hopper(const HopperGemm* job, int multiprocessors, uint32_t seed, double eagerness) {
  static std::string answer;
  hopper_shim::settings() = {seed, eagerness, multiprocessors};
  try {
    peft_fast::cuda::hopper_gemm(*job, 0, nullptr);
    answer.clear();
  } catch (const std::exception& why) {
    answer = why.what();
  }
  return answer.c_str();
}

EXPORT uint64_t operand_at(uint32_t address, uint32_t leading) {
  return peft_fast::cuda::operand_at(address, leading);
}

EXPORT bool is_wide(int64_t M, int64_t N, int64_t clusters) { return peft_fast::cuda::is_wide(M, N, clusters); }

// (row, column) of every tile
EXPORT void origins(bool wide, int32_t tiles_m, int32_t tiles_n, int32_t* to) {
  using namespace peft_fast::cuda;
  for (int32_t tile = 0; tile < tiles_m * tiles_n; ++tile) {
    const Origin at = wide ? origin_of<WIDE>(tile, tiles_m, tiles_n) : origin_of<NARROW>(tile, tiles_m, tiles_n);
    to[2 * tile] = at.row, to[2 * tile + 1] = at.column;
  }
}
