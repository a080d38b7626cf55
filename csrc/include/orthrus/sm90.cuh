// The sm_90a instructions that kernels stream with: mbarriers, bulk and tensor copies, wgmma. Thin wrappers over PTX,
// no policy. The host shim of the CPU tests provides its own version.
#pragma once
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "orthrus/sm80.cuh"
#include "orthrus/wgmma_descriptor.h"

namespace orthrus::cuda::sm90 {

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the async proxy; the threads of the CTA or of its cluster still need a barrier.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

// Orders what the thread has seen in global memory before its later copies, which belong to the async proxy.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Orders what the thread has read in shared memory before copies into it that any thread issues after a barrier, and
// what it has written, or its cp.async, before wgmma reads it behind a barrier.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the barrier at the same address in CTA `rank` of the cluster, as CUTLASS does: not with .release.cluster,
// for which ptxas fences all of memory. So memory that a peer CTA multicasts into may be released only if wgmma alone
// has read it, once a wait has confirmed that. What threads have read may be released to copies of their own CTA only,
// behind fence_proxy_async_shared.
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
               "r"(rank)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive_expect(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Blocks until the barrier's phase of this parity has completed. Copies take microseconds, so it traps 2^34
// clocks, some ten seconds, after the first look: an error is better than a hang.
__device__ __forceinline__ void barrier_wait(SharedAddress barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n.reg .s64 start, now;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra completed;\n"
      "mov.u64 start, %%clock64;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra completed;\n"
      "mov.u64 now, %%clock64;\n"
      "sub.s64 now, now, start;\n"
      "setp.lt.s64 done, now, 17179869184;\n"
      "@done bra again;\n"
      "trap;\n"
      "completed:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  barrier_wait(shared_address(barrier), parity);
}

__device__ __forceinline__ void bulk_load(SharedAddress dst, const void* src, int bytes, SharedAddress barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];" ::"r"(dst),
               "l"(src), "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void bulk_load(SharedAddress dst, const void* src, int bytes, SharedAddress barrier,
                                          uint64_t policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1], %2, [%3], %4;" ::"r"(dst),
               "l"(src), "r"(bytes), "r"(barrier), "l"(policy)
               : "memory");
}

// Prefetches global memory into L2.
__device__ __forceinline__ void bulk_prefetch(const void* src, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(src), "r"(bytes) : "memory");
}

using TensorMap = CUtensorMap;

// Driver functions, unlike the runtime's, need a current context in the calling thread. A thread that has only asked
// for the device's number has none, and torch does not set a device that is current already.
inline cudaError_t bind_context() {
  static thread_local bool bound = false;
  if (bound) return cudaSuccess;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const cudaError_t error = cudaSetDevice(device);  // from CUDA 12 on it makes the context current
  bound = error == cudaSuccess;
  return error;
}

// A tensor map over the rows of a bf16 matrix in boxes of `box_rows` x 64 elements, 128-byte swizzled in shared memory.
inline cudaError_t make_row_map(TensorMap* map, const uint16_t* data, int rows, int columns, int box_rows) {
  static const auto encode = [] {
    void* function = nullptr;  // from the driver, which this module does not link
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride_bytes[1] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t step[2] = {1, 1};
  if (!encode) return cudaErrorCallRequiresNewerDriver;
  if (const cudaError_t error = bind_context()) return error;
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<uint16_t*>(data), size,
                                 stride_bytes, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return static_cast<cudaError_t>(result);  // driver and runtime number errors alike
}

// True in one thread of the calling warp. ptxas knows that this thread is alone; under any other condition it issues
// every copy in a loop over the lanes that may be active, some 40 clocks each.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .b32 leader;\n.reg .pred p;\nelect.sync leader|p, %1;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(elected)
               : "r"(~0u));
  return elected;
}

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box of a 2-D tensor map whose first element is (row, column); elements outside the tensor are 0.
__device__ __forceinline__ void tensor_load(SharedAddress dst, const TensorMap* map, int column, int row,
                                            SharedAddress barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%2, %3}], [%4];" ::"r"(dst),
               "l"(map), "r"(column), "r"(row), "r"(barrier)
               : "memory");
}

// The same, to this address in each CTA of the cluster whose bit is set in `ctas`; it counts on that CTA's own barrier.
__device__ __forceinline__ void tensor_load_multicast(SharedAddress dst, const TensorMap* map, int column, int row,
                                                      SharedAddress barrier, uint16_t ctas) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(dst),
               "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(ctas)
               : "memory");
}

// Waits for every thread of the cluster. Orders nothing but barriers that were initialised before a fence.
__device__ __forceinline__ void cluster_sync_relaxed() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ uint64_t matrix_descriptor(SharedAddress matrix) { return matrix_descriptor_at(matrix); }
__device__ __forceinline__ uint64_t matrix_descriptor(const void* smem) {
  return matrix_descriptor_at(shared_address(smem));
}
__device__ __forceinline__ uint64_t transposed_descriptor(SharedAddress matrix, int bytes_to_next_columns) {
  return transposed_descriptor_at(matrix, bytes_to_next_columns);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Move registers between the warpgroups of a CTA; all warps of a warpgroup must execute the instruction.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Keeps the compiler from moving accesses to accumulators, or to operands in registers, across an asynchronous
// instruction.
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void pin(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <typename T, int kCount>
__device__ __forceinline__ void pin(T (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) pin(x[i]);
}

// d (+)= A[64 x 16] B[N x 16]^T, both in shared memory.
template <int kN>
__device__ void wgmma(float* d, uint64_t a, uint64_t b, int accumulate);

// The same, with A in registers. Thread t of the warpgroup holds two inputs each of features f, f + 8, f and f + 8, f =
// 16*(t/32) + (t%32)/4: the first two from input 2*(t%4) on, the last two from that plus 8. It must not change them
// until the instruction has completed.
template <int kN>
__device__ void wgmma(float* d, const uint32_t (&a)[4], uint64_t b, int accumulate);

// d (+)= A[64 x 16] B[16 x N], with A in registers and a transposed descriptor of B.
template <int kN>
__device__ void wgmma_transposed(float* d, const uint32_t (&a)[4], uint64_t b, int accumulate);

// The N / 2 accumulators of a thread: the names of the asm's first operands, then these operands.
#define ORTHRUS_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ORTHRUS_NAMES_16 ORTHRUS_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define ORTHRUS_NAMES_32 \
  ORTHRUS_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ORTHRUS_NAMES_48 \
  ORTHRUS_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define ORTHRUS_NAMES_56 ORTHRUS_NAMES_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define ORTHRUS_NAMES_64 ORTHRUS_NAMES_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define ORTHRUS_NAMES_80 \
  ORTHRUS_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define ORTHRUS_NAMES_96 \
  ORTHRUS_NAMES_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define ORTHRUS_NAMES_128                                                                                            \
  ORTHRUS_NAMES_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
                   "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define ORTHRUS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ORTHRUS_16(i) ORTHRUS_4(i), ORTHRUS_4(i + 4), ORTHRUS_4(i + 8), ORTHRUS_4(i + 12)
#define ORTHRUS_SUMS_8 ORTHRUS_4(0), ORTHRUS_4(4)
#define ORTHRUS_SUMS_16 ORTHRUS_16(0)
#define ORTHRUS_SUMS_32 ORTHRUS_SUMS_16, ORTHRUS_16(16)
#define ORTHRUS_SUMS_48 ORTHRUS_SUMS_32, ORTHRUS_16(32)
#define ORTHRUS_SUMS_56 ORTHRUS_SUMS_48, ORTHRUS_4(48), ORTHRUS_4(52)
#define ORTHRUS_SUMS_64 ORTHRUS_SUMS_48, ORTHRUS_16(48)
#define ORTHRUS_SUMS_80 ORTHRUS_SUMS_64, ORTHRUS_16(64)
#define ORTHRUS_SUMS_96 ORTHRUS_SUMS_80, ORTHRUS_16(80)
#define ORTHRUS_SUMS_128 ORTHRUS_SUMS_96, ORTHRUS_16(96), ORTHRUS_16(112)

// `sums`: N / 2, which is also the number of operand a; those of b and accumulate follow.
#define ORTHRUS_WGMMA(n, sums, b_number, accumulate_number)                                            \
  template <>                                                                                          \
  __device__ __forceinline__ void wgmma<n>(float* d, uint64_t a, uint64_t b, int accumulate) {         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate_number ", 0;\n"                      \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" ORTHRUS_NAMES_##sums "}, " \
                 "%" #sums ", %" #b_number ", p, 1, 1, 0, 0;\n}\n"                                     \
                 : ORTHRUS_SUMS_##sums                                                                 \
                 : "l"(a), "l"(b), "r"(accumulate));                                                   \
  }
ORTHRUS_WGMMA(16, 8, 9, 10)
ORTHRUS_WGMMA(32, 16, 17, 18)
ORTHRUS_WGMMA(64, 32, 33, 34)
ORTHRUS_WGMMA(96, 48, 49, 50)
ORTHRUS_WGMMA(112, 56, 57, 58)
ORTHRUS_WGMMA(128, 64, 65, 66)
ORTHRUS_WGMMA(160, 80, 81, 82)
ORTHRUS_WGMMA(192, 96, 97, 98)
ORTHRUS_WGMMA(256, 128, 129, 130)
#undef ORTHRUS_WGMMA

// `sums`: N / 2, which is also the number of the first operand behind them.
#define ORTHRUS_WGMMA(name, n, sums, a1, a2, a3, b_number, accumulate_number, transposed)                  \
  template <>                                                                                              \
  __device__ __forceinline__ void name<n>(float* d, const uint32_t (&a)[4], uint64_t b, int accumulate) {  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate_number ", 0;\n"                          \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" ORTHRUS_NAMES_##sums "}, "     \
                 "{%" #sums ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_number ", p, 1, 1, " #transposed ";\n}\n" \
                 : ORTHRUS_SUMS_##sums                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                   \
  }
ORTHRUS_WGMMA(wgmma, 16, 8, 9, 10, 11, 12, 13, 0)
ORTHRUS_WGMMA(wgmma, 32, 16, 17, 18, 19, 20, 21, 0)
ORTHRUS_WGMMA(wgmma, 64, 32, 33, 34, 35, 36, 37, 0)
ORTHRUS_WGMMA(wgmma, 96, 48, 49, 50, 51, 52, 53, 0)
ORTHRUS_WGMMA(wgmma, 112, 56, 57, 58, 59, 60, 61, 0)
ORTHRUS_WGMMA(wgmma, 128, 64, 65, 66, 67, 68, 69, 0)
ORTHRUS_WGMMA(wgmma, 160, 80, 81, 82, 83, 84, 85, 0)
ORTHRUS_WGMMA(wgmma_transposed, 64, 32, 33, 34, 35, 36, 37, 1)
ORTHRUS_WGMMA(wgmma_transposed, 128, 64, 65, 66, 67, 68, 69, 1)
#undef ORTHRUS_WGMMA

}  // namespace orthrus::cuda::sm90
