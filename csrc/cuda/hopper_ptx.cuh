// Hopper's own instructions: tensor memory accelerator, barriers of a cluster, products of a warpgroup.
// Shared memory is addressed as the instructions do, by 32-bit numbers. On the host: tests/cuda/hopper_shim.h.
#pragma once
#include <cuda.h>  // types only: libcuda is not linked

#include "cuda/launch.cuh"

#define DYNAMIC_SHARED(name)                                            \
  extern __shared__ __align__(1024) unsigned char dynamic_shared_bytes[]; \
  const uint32_t name = uint32_t(__cvta_generic_to_shared(dynamic_shared_bytes))

namespace peft_fast::cuda {

using TensorMap = CUtensorMap;

// a wait this long is a fault of the pipeline: an error then, where it would be a hang
constexpr uint64_t PATIENCE = 20'000'000'000;  // ns
constexpr uint32_t POLLS = 1024;               // between looks at the clock

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// barriers just initialised can be seen by the other block and by the tensor memory accelerator
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// at the barrier of the same address in block `rank` of the cluster
__device__ inline void barrier_arrive(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(rank)
      : "memory");
}

__device__ inline bool barrier_passed(uint32_t barrier, uint32_t parity) {
  uint32_t passed;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(passed)
      : "r"(barrier), "r"(parity)
      : "memory");
  return passed;
}

__device__ inline uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint64_t since = 0;
  for (uint32_t polls = 1; !barrier_passed(barrier, parity); ++polls) {
    if (polls % POLLS) continue;
    if (!since) since = nanoseconds();
    else if (nanoseconds() - since > PATIENCE) __trap();
  }
}

__device__ inline void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// the box at (column, row) -> shared memory at `to`, its bytes counted at `barrier`
__device__ inline void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int32_t column, int32_t row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// the same for every block of the cluster in `blocks`, a bit each: same addresses, each at its own barrier
__device__ inline void tma_load_all(uint32_t to, const TensorMap* map, uint32_t barrier, int32_t column, int32_t row,
                                    uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}

__device__ inline void tma_store(const TensorMap* map, uint32_t from, int32_t column, int32_t row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
               "r"(column), "r"(row)
               : "memory");
}

__device__ inline void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// all but the last N committed stores have read their shared memory
template <int N>
__device__ inline void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

__device__ inline void store_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// what this thread wrote to shared memory can be seen by the tensor memory accelerator
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void warpgroup_sync(int barrier) {
  asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory");
}

template <int N>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// four 8×8 matrices; lane 8·i + j gives the address of row j of matrix i
__device__ inline void stmatrix(uint32_t to, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r0), "r"(r1), "r"(r2),
               "r"(r3)
               : "memory");
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int N>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// all products are in c; the compiler must not read it earlier
template <int N>
__device__ inline void wgmma_finish(float (&c)[N]) {
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

#define PEFT_FAST_SUMS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define PEFT_FAST_SUMS_128 \
  PEFT_FAST_SUMS_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define PEFT_FAST_OPERANDS_64 \
  "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), \
  "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), \
  "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), \
  "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), \
  "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), \
  "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), \
  "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), \
  "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])

#define PEFT_FAST_OPERANDS_128 \
  PEFT_FAST_OPERANDS_64, \
  "+f"(c[64]), "+f"(c[65]), "+f"(c[66]), "+f"(c[67]), "+f"(c[68]), "+f"(c[69]), "+f"(c[70]), "+f"(c[71]), \
  "+f"(c[72]), "+f"(c[73]), "+f"(c[74]), "+f"(c[75]), "+f"(c[76]), "+f"(c[77]), "+f"(c[78]), "+f"(c[79]), \
  "+f"(c[80]), "+f"(c[81]), "+f"(c[82]), "+f"(c[83]), "+f"(c[84]), "+f"(c[85]), "+f"(c[86]), "+f"(c[87]), \
  "+f"(c[88]), "+f"(c[89]), "+f"(c[90]), "+f"(c[91]), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95]), \
  "+f"(c[96]), "+f"(c[97]), "+f"(c[98]), "+f"(c[99]), "+f"(c[100]), "+f"(c[101]), "+f"(c[102]), "+f"(c[103]), \
  "+f"(c[104]), "+f"(c[105]), "+f"(c[106]), "+f"(c[107]), "+f"(c[108]), "+f"(c[109]), "+f"(c[110]), "+f"(c[111]), \
  "+f"(c[112]), "+f"(c[113]), "+f"(c[114]), "+f"(c[115]), "+f"(c[116]), "+f"(c[117]), "+f"(c[118]), "+f"(c[119]), \
  "+f"(c[120]), "+f"(c[121]), "+f"(c[122]), "+f"(c[123]), "+f"(c[124]), "+f"(c[125]), "+f"(c[126]), "+f"(c[127])

#define PEFT_FAST_WGMMA(columns, type, sums, operands, a_, b_, add_, turned_)                     \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add_ ", 0;\n"                                 \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type               \
               " {" sums "}, " a_ ", " b_ ", p, 1, 1, 0, " turned_ ";\n}"                         \
               : operands                                                                         \
               : "l"(a), "l"(b), "r"(add), "n"(int(TURNED)))

// c (64, 256) = a (64, 16)·b (16, 256), added to c where `add`; b's columns are neighbours in memory if TURNED
template <class T, bool TURNED>
__device__ inline void wgmma(float (&c)[128], uint64_t a, uint64_t b, int add) {
#define PEFT_FAST_WGMMA_256(type) \
  PEFT_FAST_WGMMA("256", type, PEFT_FAST_SUMS_128, PEFT_FAST_OPERANDS_128, "%128", "%129", "%130", "%131")
  if constexpr (T::dtype == BF16) PEFT_FAST_WGMMA_256("bf16");
  else PEFT_FAST_WGMMA_256("f16");
}

// the same with 128 columns
template <class T, bool TURNED>
__device__ inline void wgmma(float (&c)[64], uint64_t a, uint64_t b, int add) {
#define PEFT_FAST_WGMMA_128(type) \
  PEFT_FAST_WGMMA("128", type, PEFT_FAST_SUMS_64, PEFT_FAST_OPERANDS_64, "%64", "%65", "%66", "%67")
  if constexpr (T::dtype == BF16) PEFT_FAST_WGMMA_128("bf16");
  else PEFT_FAST_WGMMA_128("f16");
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// null where the driver does not know tensor maps
inline Encode encoder() {
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<Encode>(error == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr);
  }();
  return encode;
}

inline bool can_describe() { return encoder() != nullptr; }

// (rows, cols) of 16-bit elements, rows ld apart, in swizzled boxes of box_rows × 64; zero outside; false: refused
inline bool describe(TensorMap& map, Dtype dtype, const void* data, int64_t rows, int64_t cols, int64_t ld,
                     int box_rows) {
  const cuuint64_t sizes[2] = {cuuint64_t(cols), cuuint64_t(rows)}, strides[1] = {cuuint64_t(ld) * 2};
  const cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, steps[2] = {1, 1};
  return encoder()(&map, dtype == BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
                   const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// the kernel says itself how many blocks are a cluster
template <class Job>
void launch_clusters(void (*kernel)(Job), int64_t blocks, int threads, size_t shared, Stream stream, const Job& job) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             int(shared)));
  kernel<<<unsigned(blocks), unsigned(threads), shared, static_cast<cudaStream_t>(stream)>>>(job);
  check(cudaGetLastError());
}

}  // namespace peft_fast::cuda
