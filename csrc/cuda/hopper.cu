// The Hopper GEMM's host side: what it takes, its tensor maps, its grid.
#include <cmath>

#include "cuda/hopper.cuh"

namespace peft_fast::cuda {

// one instantiation per file: hopper_<dtype>.cu, hopper_turned_<dtype>.cu
#if !defined(PEFT_FAST_HOST_SHIM)
extern template void launch_hopper<Bf16, false>(const HopperJob&, bool, bool, int64_t, Stream);
extern template void launch_hopper<Bf16, true>(const HopperJob&, bool, bool, int64_t, Stream);
extern template void launch_hopper<Half, false>(const HopperJob&, bool, bool, int64_t, Stream);
extern template void launch_hopper<Half, true>(const HopperJob&, bool, bool, int64_t, Stream);
#endif

namespace {

constexpr int64_t MOST = int64_t(1) << 30;  // coordinates are 32-bit, and so is a row beyond the last tile

#if defined(PEFT_FAST_HOST_SHIM)
bool is_hopper(int) { return true; }
#else
bool is_hopper(int device) {
  static int known[64];  // 1 yes, 2 no; an int is written whole, and every thread writes the same one
  if (device < 0 || device >= 64) return false;
  if (!known[device]) {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    known[device] = major == 9 && minor == 0 ? 1 : 2;
  }
  return known[device] == 1;
}
#endif

// the tensor memory accelerator wants rows on 16 bytes, and rows that do not overlap
bool suits(const void* data, int64_t cols, int64_t ld) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld % 8 == 0 && ld >= cols && ld < MOST;
}

// how many tiles a cluster goes through
int64_t rounds(int64_t M, int64_t N, int BN, int64_t clusters) {
  return ceil_div(ceil_div(M, BM * CLUSTER) * ceil_div(N, BN), clusters);
}

// a narrow tile has half the work and three quarters of the loads of a wide one: an estimate, never timed, takes it for
// 0.6 of a wide one's time, so that it pays where wide tiles leave many clusters without work
bool is_wide(int64_t M, int64_t N, int64_t clusters) {
  return rounds(M, N, WIDE, clusters) * 5 <= rounds(M, N, NARROW, clusters) * 3;
}

}  // namespace

const char* hopper_refuses(const HopperGemm& job, int device) {
  if (!is_hopper(device)) return "the Hopper GEMM needs compute capability 9.0";
  if (!can_describe()) return "the Hopper GEMM needs a driver that knows tensor maps (CUDA 12)";
  if (job.dtype != BF16 && job.dtype != F16) return "the Hopper GEMM takes bfloat16 and float16";
  if (job.M < 1 || job.N < 1 || job.K < 1 || job.R < 0) return "the Hopper GEMM has nothing to do";
  if (job.M > MOST || job.N > MOST || job.K > MOST || job.R > MOST) return "the Hopper GEMM counts with 32 bits";
  if (job.p > 0 && (!job.seed || job.R == 0)) return "dropout needs a seed and an adapter";
  if (job.bias && (job.p > 0 || (job.bias_dtype != F32 && job.bias_dtype != job.dtype)))
    return "the Hopper GEMM adds a bias of its own dtype or float32, without dropout";
  const bool rows = suits(job.left, job.K, job.left_ld) && suits(job.out, job.N, job.out_ld) &&
                    suits(job.right, job.turned ? job.N : job.K, job.right_ld);
  const bool low = job.R == 0 || (suits(job.low_left, job.R, job.low_left_ld) &&
                                  suits(job.low_right, job.turned ? job.N : job.R, job.low_right_ld));
  return rows && low ? nullptr : "the Hopper GEMM wants every operand's rows on 16 bytes";
}

void hopper_gemm(const HopperGemm& job, int device, Stream stream) {
  if (const char* why = hopper_refuses(job, device)) throw std::runtime_error(why);
  HopperJob to{};
  const bool t = job.turned;
  const int64_t clusters = std::max(multiprocessors(device) / CLUSTER, 1);
  const bool wide = is_wide(job.M, job.N, clusters);
  const int BN = wide ? WIDE : NARROW, box = t ? BK : BN / CLUSTER;
  const auto right = [&](TensorMap& map, const void* data, int64_t depth, int64_t ld) {
    return describe(map, job.dtype, data, t ? depth : job.N, t ? job.N : depth, ld, box);
  };
  bool described = describe(to.left, job.dtype, job.left, job.M, job.K, job.left_ld, BM) &&
                   right(to.right, job.right, job.K, job.right_ld) &&
                   describe(to.out, job.dtype, job.out, job.M, job.N, job.out_ld, 64);
  if (job.R)
    described = described && describe(to.low_left, job.dtype, job.low_left, job.M, job.R, job.low_left_ld, BM) &&
                right(to.low_right, job.low_right, job.R, job.low_right_ld);
  if (!described) throw std::runtime_error("CUDA refuses to describe an operand to the tensor memory accelerator");
  to.bias = job.bias, to.bias_dtype = job.bias_dtype, to.seed = job.seed;
  to.scale = float(job.p < 1 ? 1 / (1 - job.p) : 0), to.threshold = uint32_t(std::nearbyint(job.p * 65536));
  to.M = int32_t(job.M), to.N = int32_t(job.N), to.R = int32_t(job.R);
  to.low_steps = int32_t(ceil_div(job.R, BK)), to.base_steps = int32_t(ceil_div(job.K, BK));
  to.tiles_m = int32_t(ceil_div(job.M, BM * CLUSTER)), to.tiles_n = int32_t(ceil_div(job.N, BN));
  const int64_t tiles = int64_t(to.tiles_m) * to.tiles_n;
  if (tiles > MOST) throw std::runtime_error("the Hopper GEMM counts with 32 bits");
  const auto launch = job.dtype == BF16 ? (t ? &launch_hopper<Bf16, true> : &launch_hopper<Bf16, false>)
                                        : (t ? &launch_hopper<Half, true> : &launch_hopper<Half, false>);
  launch(to, job.p > 0, wide, CLUSTER * std::min(tiles, clusters), stream);
}

}  // namespace peft_fast::cuda
