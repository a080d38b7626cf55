// Kernels that race unless the one thing that orders them is present; a search for races has to see it missing.
#include "orthrus/launch.cuh"
#include "orthrus/sm90.cuh"

namespace orthrus::cuda {
namespace {

struct Params {
  bool ordered;
  int32_t* memory;  // 4096 zeros
  sm90::TensorMap map;  // of the beginning of `memory`, 8 rows in boxes of 4
};

constexpr int kStageBytes = 1024;
struct alignas(1024) Shared {
  uint8_t stage[kStageBytes];
  int32_t of_thread[256];
  uint64_t full, empty;
};
Shared& shared() { return *reinterpret_cast<Shared*>(dynamic_shared()); }

using Kernel = void (*)(Params);

void block_barrier(Params p) {
  pdl_wait();
  shared().of_thread[threadIdx.x] = 1;
  if (p.ordered) __syncthreads();
  p.memory[threadIdx.x] = shared().of_thread[threadIdx.x ^ 32];
}

void warp_barrier(Params p) {
  pdl_wait();
  shared().of_thread[threadIdx.x] = 1;
  p.ordered ? __syncwarp() : static_cast<void>(__shfl_sync(~0u, 1, 0));  // the shuffle only moves a register
  p.memory[threadIdx.x] = shared().of_thread[threadIdx.x ^ 1];
}

void static_shared_memory(Params p) {
  __shared__ int32_t of_thread[256];
  pdl_wait();
  of_thread[threadIdx.x] = 1;
  if (p.ordered) __syncthreads();
  p.memory[blockIdx.x * blockDim.x + threadIdx.x] = of_thread[threadIdx.x ^ 32];
}

void named_barriers(Params p) {
  pdl_wait();
  const int group = threadIdx.x / 64;
  shared().of_thread[threadIdx.x] = 1;
  named_barrier(1 + group, 64);
  p.memory[threadIdx.x] = shared().of_thread[p.ordered ? threadIdx.x ^ 32 : threadIdx.x ^ 64];
}

void last_block_reads_all(Params p) {
  pdl_wait();
  if (threadIdx.x != 0) return;
  p.memory[1 + blockIdx.x] = 1;
  const int before = p.ordered ? add_acq_rel(p.memory, 1) : atomicAdd(p.memory, 1);
  int sum = 0;
  if (before == static_cast<int>(gridDim.x) - 1)
    for (unsigned b = 0; b < gridDim.x; ++b) sum += p.memory[1 + b];
  p.memory[64 + blockIdx.x] = sum;
}

void reads_the_launch_before(Params p) {
  const int early = p.ordered ? 0 : p.memory[threadIdx.x];
  pdl_wait();
  const int late = p.memory[threadIdx.x];
  __syncthreads();
  p.memory[threadIdx.x ^ 32] = early + late + 1;
}

// One thread copies, the others read: full once the copy has landed, empty once they have read it.
void ring(bool waits, bool releases_late, const uint8_t* from, int32_t* to) {
  Shared& s = shared();
  if (threadIdx.x == 0) {
    sm90::barrier_init(&s.full, 1);
    sm90::barrier_init(&s.empty, 1);
  }
  __syncthreads();
  pdl_wait();
  if (threadIdx.x == 32) {
    for (int i = 0; i < 2; ++i) {
      if (i == 1) sm90::barrier_wait(&s.empty, 0);
      sm90::barrier_arrive_expect(&s.full, kStageBytes);
      sm90::bulk_load(s.stage, from, kStageBytes, &s.full);
    }
  } else if (threadIdx.x == 0) {
    if (!waits) to[0] = s.stage[0];
    sm90::barrier_wait(&s.full, 0);
    if (!releases_late) sm90::barrier_arrive(&s.empty);
    to[0] = s.stage[0];
    if (releases_late) sm90::barrier_arrive(&s.empty);
    sm90::barrier_wait(&s.full, 1);
    to[1] = s.stage[1];
  }
}
void waits_for_a_copy(Params p) { ring(p.ordered, true, reinterpret_cast<uint8_t*>(p.memory), p.memory + 1024); }
void releases_what_it_has_read(Params p) {
  ring(true, p.ordered, reinterpret_cast<uint8_t*>(p.memory), p.memory + 1024);
}

// Each of a cluster's two blocks loads one half into both blocks, which read all of it before it is loaded again.
void share_a_ring(const Params& p, bool fences, bool releases_late) {
  Shared& s = shared();
  const int rank = blockIdx.x % 2;
  if (threadIdx.x == 0) {
    sm90::barrier_init(&s.full, 1);
    sm90::barrier_init(&s.empty, 2);
    if (fences) sm90::fence_barrier_init();
  }
  sm90::cluster_sync_relaxed();
  pdl_wait();
  if (threadIdx.x == 32) {
    sm90::fence_proxy_async_global();
    for (int i = 0; i < 2; ++i) {
      if (i == 1) sm90::barrier_wait(&s.empty, 0);
      sm90::barrier_arrive_expect(&s.full, kStageBytes);
      sm90::tensor_load_multicast(shared_address(s.stage + rank * kStageBytes / 2), &p.map, 0, rank * 4,
                                  shared_address(&s.full), 3);
    }
    sm90::barrier_wait(&s.empty, 1);
  } else if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      sm90::barrier_wait(&s.full, i);
      if (!releases_late) sm90::barrier_arrive_at(&s.empty, 1 - rank);
      p.memory[1024 + blockIdx.x] = s.stage[(1 - rank) * kStageBytes / 2];
      if (releases_late) sm90::barrier_arrive_at(&s.empty, 1 - rank);
      sm90::barrier_arrive_at(&s.empty, rank);
    }
  }
}
void fences_what_its_cluster_uses(Params p) { share_a_ring(p, p.ordered, true); }
void releases_to_its_cluster(Params p) { share_a_ring(p, true, p.ordered); }

void barriers_are_there(Params p) {
  pdl_wait();
  if (threadIdx.x == 0) sm90::barrier_init(&shared().full, 64);
  if (p.ordered) __syncthreads();
  sm90::barrier_arrive(&shared().full);
}

void waits_for_small_copies(Params p) {
  pdl_wait();
  copy16(shared_address(shared().of_thread + 4 * threadIdx.x), p.memory, true);
  copy_commit();
  p.ordered ? copy_wait<0>() : copy_wait<1>();
  __syncthreads();
  p.memory[1024 + threadIdx.x] = shared().of_thread[4 * (threadIdx.x ^ 32)];
  copy_wait<0>();
}

void copies_onto_what_was_read(Params p) {
  int32_t* const mine = shared().of_thread + 4 * threadIdx.x;
  pdl_wait();
  copy16(shared_address(mine), p.memory, true);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  p.memory[1024 + threadIdx.x] = shared().of_thread[4 * (threadIdx.x ^ 32)];
  if (p.ordered) __syncthreads();
  copy16(shared_address(mine), p.memory, true);
  copy_commit();
  __syncthreads();
  copy_wait<0>();
}

void multiplies_what_has_landed(Params p) {
  struct alignas(1024) Operands {
    uint8_t a[8192], b[2048];
    uint64_t full;
  };
  Operands& operands = *reinterpret_cast<Operands*>(dynamic_shared());
  if (threadIdx.x == 0) sm90::barrier_init(&operands.full, 1);
  __syncthreads();
  pdl_wait();
  if (threadIdx.x == 128) {
    sm90::barrier_arrive_expect(&operands.full, sizeof(operands.a) + sizeof(operands.b));
    sm90::bulk_load(operands.a, p.memory, sizeof(operands.a), &operands.full);
    sm90::bulk_load(operands.b, p.memory, sizeof(operands.b), &operands.full);
  }
  if (threadIdx.x >= 128) return;
  float sums[8] = {};
  if (p.ordered) sm90::barrier_wait(&operands.full, 0);
  sm90::wgmma_fence();
  sm90::wgmma<16>(sums, sm90::matrix_descriptor(operands.a), sm90::matrix_descriptor(operands.b), false);
  sm90::wgmma_commit();
  if (!p.ordered) sm90::barrier_wait(&operands.full, 0);
  sm90::wgmma_wait<0>();
}

int run(Kernel kernel, int blocks, int threads, int cluster, Params params) {
  sm90::make_row_map(&params.map, reinterpret_cast<uint16_t*>(params.memory), 8, 64, 4);
  return launch(kernel, params, dim3(blocks), threads, 16384, cuda_host::kStream, device_info(), cluster);
}

}  // namespace
}  // namespace orthrus::cuda

#define RACY(name, launches, blocks, threads, cluster)                                           \
  extern "C" void name(int ordered) {                                                            \
    static int32_t* const memory = new int32_t[4096]{};                                          \
    for (int i = 0; i < launches; ++i)                                                           \
      orthrus::cuda::run(orthrus::cuda::name, blocks, threads, cluster, {ordered != 0, memory}); \
  }
RACY(block_barrier, 1, 1, 64, 1)
RACY(warp_barrier, 1, 1, 32, 1)
RACY(static_shared_memory, 1, 4, 64, 1)
RACY(named_barriers, 1, 1, 128, 1)
RACY(last_block_reads_all, 1, 3, 32, 1)
RACY(reads_the_launch_before, 2, 1, 64, 1)
RACY(waits_for_a_copy, 1, 1, 64, 1)
RACY(releases_what_it_has_read, 1, 1, 64, 1)
RACY(fences_what_its_cluster_uses, 1, 2, 64, 2)
RACY(releases_to_its_cluster, 1, 2, 64, 2)
RACY(barriers_are_there, 1, 1, 64, 1)
RACY(waits_for_small_copies, 1, 1, 64, 1)
RACY(copies_onto_what_was_read, 1, 1, 64, 1)
RACY(multiplies_what_has_landed, 1, 1, 160, 1)
