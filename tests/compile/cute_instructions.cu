// The same instructions twice, by our wrappers and by CuTe's: test_cute.py compares the PTX. Never run.
// Ours first: CUTLASS includes cudaTypedefs.h within its own namespace.
#include "orthrus/launch.cuh"
#include "orthrus/sm80.cuh"
#include "orthrus/sm90.cuh"

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/grid_dependency_control.h>
#include <cutlass/arch/reg_reconfig.h>

#include <utility>

namespace ours = orthrus::cuda;

struct Operands {
  float* out;
  const void* source;
  uint64_t a, b;
  uint32_t a_registers[4];
  int accumulate;
  ours::sm90::TensorMap map;
};

template <int kN, int... kI>
__device__ void cute_wgmma(float* d, uint64_t a, uint64_t b, int accumulate, std::integer_sequence<int, kI...>) {
  using Op = decltype(cute::SM90::GMMA::ss_op_selector<cutlass::bfloat16_t, cutlass::bfloat16_t, float,
                                                       cute::Shape<cute::_64, cute::Int<kN>, cute::_64>>());
  Op::fma(a, b, d[kI]..., static_cast<cute::SM90::GMMA::ScaleOut>(accumulate));
}

template <int kN, int... kI>
__device__ void cute_wgmma(float* d, const uint32_t (&a)[4], uint64_t b, int accumulate,
                           std::integer_sequence<int, kI...>) {
  using Op = decltype(cute::SM90::GMMA::rs_op_selector<cutlass::bfloat16_t, cutlass::bfloat16_t, float,
                                                       cute::Shape<cute::_64, cute::Int<kN>, cute::_64>>());
  Op::fma(a[0], a[1], a[2], a[3], b, d[kI]..., static_cast<cute::SM90::GMMA::ScaleOut>(accumulate));
}

template <int kN, int... kI>
__device__ void cute_wgmma_transposed(float* d, const uint32_t (&a)[4], uint64_t b, int accumulate,
                                      std::integer_sequence<int, kI...>) {
  using cute::SM90::GMMA::Major;
  using Op = decltype(cute::SM90::GMMA::rs_op_selector<cutlass::bfloat16_t, cutlass::bfloat16_t, float,
                                                       cute::Shape<cute::_64, cute::Int<kN>, cute::_64>, Major::K,
                                                       Major::MN>());
  Op::fma(a[0], a[1], a[2], a[3], b, d[kI]..., static_cast<cute::SM90::GMMA::ScaleOut>(accumulate));
}

// `a`: a descriptor or registers.
template <bool kOurs, int kN, bool kTransposed = false, typename A>
__device__ void multiply(const Operands& o, const A& a) {
  float d[kN / 2];
  for (int i = 0; i < kN / 2; ++i) d[i] = o.out[i];
  if constexpr (kOurs) {
    ours::sm90::wgmma_fence();
    if constexpr (kTransposed) {
      ours::sm90::wgmma_transposed<kN>(d, a, o.b, o.accumulate);
    } else {
      ours::sm90::wgmma<kN>(d, a, o.b, o.accumulate);
    }
    ours::sm90::wgmma_commit();
    ours::sm90::wgmma_wait<1>();
  } else {
    cute::warpgroup_arrive();
    const auto numbers = std::make_integer_sequence<int, kN / 2>();
    if constexpr (kTransposed) {
      cute_wgmma_transposed<kN>(d, a, o.b, o.accumulate, numbers);
    } else {
      cute_wgmma<kN>(d, a, o.b, o.accumulate, numbers);
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
  }
  for (int i = 0; i < kN / 2; ++i) o.out[i] = d[i];
}

template <bool kOurs, int kN>
__device__ void multiply(const Operands& o) {
  multiply<kOurs, kN>(o, o.a);
  multiply<kOurs, kN>(o, o.a_registers);
}

template <bool kOurs>
__global__ void __launch_bounds__(384) instructions(const __grid_constant__ Operands o) {
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ uint64_t barrier;
  multiply<kOurs, 16>(o);
  multiply<kOurs, 32>(o);
  multiply<kOurs, 64>(o);
  multiply<kOurs, 96>(o);
  multiply<kOurs, 128>(o);
  multiply<kOurs, 192>(o, o.a);
  multiply<kOurs, 256>(o, o.a);
  multiply<kOurs, 64, true>(o, o.a_registers);
  multiply<kOurs, 128, true>(o, o.a_registers);
#ifdef CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
  multiply<kOurs, 112>(o);
  multiply<kOurs, 160>(o);
#endif
  uint32_t a[4];
  if constexpr (kOurs) {
    using namespace ours::sm90;
    barrier_init(&barrier, 1);
    fence_barrier_init();
    cluster_sync_relaxed();
    barrier_arrive_at(&barrier, 1);
    barrier_arrive_expect(ours::shared_address(&barrier), 8192);
    bulk_load(ours::shared_address(shared), o.source, 8192, ours::shared_address(&barrier));
    barrier_wait(&barrier, 1);
    o.out[2] = elect_one();
    prefetch_map(&o.map);
    give_registers<40>();
    take_registers<232>();
    ours::named_barrier(3, 256);
    ours::load_matrices(a, ours::shared_address(shared + threadIdx.x * 16));
    o.out[0] = __uint_as_float(a[0] + a[1] + a[2] + a[3]);
    ours::load_matrices_transposed(a, ours::shared_address(shared + threadIdx.x * 16));
    ours::pdl_launch_dependents();
    ours::pdl_wait();
  } else {
    using namespace cute;
    initialize_barrier(barrier, 1);
    cutlass::arch::fence_barrier_init();
    tma_store_fence();
    __syncwarp();
    cluster_arrive_relaxed();
    cluster_wait();
    cutlass::arch::ClusterBarrier::arrive(&barrier, 1, true);
    set_barrier_transaction_bytes(barrier, 8192);
    SM90_BULK_COPY_G2S::copy(o.source, &barrier, shared, 8192);
    wait_barrier(barrier, 1);
    wait_barrier(barrier, 1);  // ours looks once before it takes the time
    o.out[2] = elect_one_sync();
    prefetch_tma_descriptor(reinterpret_cast<const TmaDescriptor*>(&o.map));
    cutlass::arch::warpgroup_reg_dealloc<40>();
    cutlass::arch::warpgroup_reg_alloc<232>();
    cutlass::arch::NamedBarrier::sync(256, 3 - cutlass::arch::NamedBarrier::ReservedNamedBarrierCount);
    const auto& row = *reinterpret_cast<uint128_t*>(shared + threadIdx.x * 16);
    SM75_U32x4_LDSM_N::copy(row, a[0], a[1], a[2], a[3]);
    o.out[0] = __uint_as_float(a[0] + a[1] + a[2] + a[3]);
    SM75_U16x8_LDSM_T::copy(row, a[0], a[1], a[2], a[3]);
    cutlass::arch::launch_dependent_grids();
    cutlass::arch::wait_on_dependent_grids();
  }
  o.out[1] = __uint_as_float(a[0] + a[1] + a[2] + a[3]);
}

template __global__ void instructions<true>(const __grid_constant__ Operands);
template __global__ void instructions<false>(const __grid_constant__ Operands);
