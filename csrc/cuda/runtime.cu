// Everything but the half-precision products: their choice by dtype, float32, sums of splits, masks, the device.
#include "cuda/simt.cuh"

namespace peft_fast::cuda {

// one instantiation per file: <kernel>_<dtype>.cu
template <class T>
void launch_shrink(const Shrink&, Stream);
template <class T>
void launch_outer(const Outer&, Stream);
template <class T>
void launch_shrink_outer(const Outer&, Stream);
template <class T>
void launch_expand(const Expand&, Stream);

namespace {

struct Finalize {
  const float* parts;
  int64_t splits, n;
  void* out;
  int32_t dtype;
};

__global__ void __launch_bounds__(THREADS) finalize_kernel(const __grid_constant__ Finalize job) {
  const int64_t step = int64_t(gridDim.x) * THREADS;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < job.n; i += step) {
    float sum = 0.0f;
#pragma unroll 4
    for (int64_t s = 0; s < job.splits; ++s) sum += job.parts[s * job.n + i];
    store_any(job.out, job.dtype, i, sum);
  }
}

struct Mask {
  const int64_t* seed;
  int64_t M, K;
  uint32_t threshold;
  bool* out;
};

__global__ void __launch_bounds__(THREADS) mask_kernel(const __grid_constant__ Mask job) {
  const int64_t counters = (job.K + GROUP - 1) / GROUP * 16, n = job.M * counters;
  const uint64_t seed = uint64_t(*job.seed);
  const int64_t step = int64_t(gridDim.x) * THREADS;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < n; i += step) {
    const int64_t m = i / counters, counter = i % counters;
    uint32_t w[4];
    philox(w, seed, uint32_t(counter), uint64_t(m));
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int64_t k = counter / 16 * GROUP + e / 2 * 32 + counter % 16 * 2 + e % 2;
      if (k < job.K) job.out[m * job.K + k] = kept(w[e / 2], job.threshold) >> e % 2 & 1;
    }
  }
}

int64_t octets(const Chunks& chunks) { return ceil_div(chunks.widest, OCTET) * chunks.n; }
int64_t blocks_of_tokens(int64_t M) { return std::min(ceil_div(M, WARPS * 4), GRID_Y); }
int64_t blocks_of_elements(int64_t n) { return std::min(ceil_div(n, THREADS), int64_t(1) << 16); }

}  // namespace

void shrink(Dtype dtype, const Shrink& job, Stream stream) {
  if (dtype == BF16) return launch_shrink<Bf16>(job, stream);
  if (dtype == F16) return launch_shrink<Half>(job, stream);
  launch(shrink_f32_kernel, ceil_div(job.x.C, job.range) * octets(job.chunks), blocks_of_tokens(job.x.M), 0, stream,
         job);
}

void outer(Dtype dtype, const Outer& job, Stream stream) {
  if (dtype == BF16) return launch_outer<Bf16>(job, stream);
  if (dtype == F16) return launch_outer<Half>(job, stream);
  launch(outer_f32_kernel, ceil_div(job.x.C, GROUP) * octets(job.chunks), ceil_div(job.x.M, job.rows),
         sizeof(float) * WARPS * OCTET * GROUP, stream, job);
}

void shrink_outer(Dtype dtype, const Outer& job, Stream stream) {
  dtype == BF16 ? launch_shrink_outer<Bf16>(job, stream) : launch_shrink_outer<Half>(job, stream);
}

void expand(Dtype dtype, const Expand& job, Stream stream) {
  if (dtype == BF16) return launch_expand<Bf16>(job, stream);
  if (dtype == F16) return launch_expand<Half>(job, stream);
  launch(expand_f32_kernel, ceil_div(job.C, GROUP), blocks_of_tokens(job.p.M), 0, stream, job);
}

void finalize(const float* parts, int64_t splits, int64_t n, void* out, Dtype dtype, Stream stream) {
  launch(finalize_kernel, blocks_of_elements(n), 1, 0, stream, Finalize{parts, splits, n, out, dtype});
}

void mask(const int64_t* seed, int64_t M, int64_t K, uint32_t threshold, bool* out, Stream stream) {
  launch(mask_kernel, blocks_of_elements(M * ceil_div(K, GROUP) * 16), 1, 0, stream,
         Mask{seed, M, K, threshold, out});
}

#if defined(PEFT_FAST_HOST_SHIM)
int multiprocessors(int) { return shim::MULTIPROCESSORS; }
void use_device(int) {}
bool is_capturing(Stream) { return false; }
const char* no_device() { return ""; }
#else
int multiprocessors(int device) {
  static int known[64];  // an int is written whole, and every thread writes the same one
  if (device < 0 || device >= 64) return 1;
  if (!known[device]) check(cudaDeviceGetAttribute(&known[device], cudaDevAttrMultiProcessorCount, device));
  return known[device];
}

void use_device(int device) { check(cudaSetDevice(device)); }

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  return status != cudaStreamCaptureStatusNone;
}

const char* no_device() {
  int count = 0, driver = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver)
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver
               ? "the NVIDIA driver is older than the CUDA that the kernels were built with"
               : "there is no NVIDIA driver";
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count ? "" : "no CUDA device is visible";
}
#endif

}  // namespace peft_fast::cuda
