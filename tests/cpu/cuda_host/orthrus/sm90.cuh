// Twin of csrc/include/orthrus/sm90.cuh for host-compiled kernels. Copies land late, one at a time, oldest or newest
// first, onto poison; a wgmma reads shared memory only when its group is waited for: a stage that is read too early
// or released too soon gives a wrong result. Alignments and sizes that the device would refuse end the test.
#pragma once
#include <functional>

#include "orthrus/sm80.cuh"
#include "orthrus/wgmma_descriptor.h"

#define __CUDA_ARCH_FEAT_SM90_ALL

inline void __trap() { std::abort(); }

namespace cuda_host {

struct Transaction {
  int arrivals = 0, pending = 0, parity = 0;
  int64_t bytes = 0;
  void settle() {
    if (pending < 0 || bytes >= 1 << 20) fail("a barrier counts more than it can");
    if (pending || bytes) return;
    parity ^= 1;
    pending = arrivals;
  }
};

// A copy made asynchronously for the thread that asks for it, and the barrier that counts its bytes.
struct BulkCopy {
  uint64_t* barrier;
  int bytes;
  void* dst;
  std::function<void()> run;
};

inline std::map<uint64_t*, Transaction> transactions;
inline auto& copies_in_flight = *new std::deque<BulkCopy>;  // never freed, as any thread may end the process
inline std::map<std::pair<int, uint64_t*>, races::Thread> copiers;  // by the block's set of fibers and the barrier
struct Prefetched {
  const uint8_t* source;
  int bytes;
  bool early;  // before the thread waited for earlier kernels
};
inline std::vector<Prefetched> prefetched;  // by the launch
inline Groups<std::function<void()>> wgmma_groups;

// Stands for the hardware that reads the operands of a warp's products.
struct Multiplier {
  races::Thread thread;
  uint64_t asked = 0, read = 0;
};
inline std::map<std::pair<int, int>, Multiplier> multipliers;  // by the block's set of fibers and the warp

inline Multiplier& multiplier() {
  const races::Unseen unseen;
  const auto [at, is_new] = multipliers.try_emplace({Block::current().set(), self / 32});
  if (is_new) at->second.thread = races::make_thread("a product");
  return at->second;
}

inline bool fenced[kMaxThreads];  // since the thread last owned its accumulators

// Addresses as the device counts them; the driver keeps the first KiB.
constexpr uint32_t kSharedBegin = 1024;
inline uint32_t address(const void* p, uint32_t alignment) {
  const ptrdiff_t offset = static_cast<const uint8_t*>(p) - dynamic_shared[rank()];
  if (offset < 0 || offset >= shared_bytes || offset % alignment) fail("a bad address in shared memory");
  return kSharedBegin + static_cast<uint32_t>(offset);
}
inline uint8_t* pointer(uint32_t address, int rank = cuda_host::rank()) {
  if (address < kSharedBegin || address - kSharedBegin >= static_cast<uint32_t>(shared_bytes))
    fail("an operand lies outside of shared memory");
  return dynamic_shared[rank] + (address - kSharedBegin);
}
// The same place in another block of the cluster.
inline uint8_t* place_in(int rank, const void* p) {
  if (rank >= Block::current().blocks()) fail("a block that the cluster has not");
  if (Block::current().has_ended(rank)) fail("shared memory of a block that has ended");
  return pointer(address(p, 1), rank);
}

// Where threads that complete a barrier's phase synchronise with threads that wait for it.
inline void* phase(uint64_t* barrier, int parity) { return reinterpret_cast<char*>(barrier) + parity; }
inline void* current_phase(uint64_t* barrier) { return phase(barrier, transactions[barrier].parity); }

inline void ask_for(BulkCopy copy) {
  const races::Unseen unseen;
  races::release(copy.dst);
  copies_in_flight.push_back(std::move(copy));
}

inline void land(const BulkCopy& copy) {
  const auto [copier, is_new] = copiers.try_emplace({Block::current().set(), copy.barrier});
  if (is_new) copier->second = races::make_thread("a bulk copy");
  void* const landed = current_phase(copy.barrier);
  const races::Thread self = races::current();
  races::become(copier->second);
  races::acquire(copy.dst);
  copy.run();
  races::release(landed);
  races::become(self);
  transactions[copy.barrier].bytes -= copy.bytes;
  transactions[copy.barrier].settle();
}

}  // namespace cuda_host

namespace orthrus::cuda::sm90 {

struct TensorMap {
  const uint16_t* data;
  int rows, columns, box_rows;
};

// Refuses what the driver refuses.
inline cudaError_t make_row_map(TensorMap* map, const uint16_t* data, int rows, int columns, int box_rows) {
  *map = {data, rows, columns, box_rows};
  const bool good = reinterpret_cast<uintptr_t>(data) % 16 == 0 && rows > 0 && columns > 0 && columns % 8 == 0 &&
                    box_rows > 0 && box_rows <= 256;
  return good ? cudaSuccess : cudaErrorInvalidValue;
}
inline void prefetch_map(const TensorMap*) {}

inline bool elect_one() {
  __syncwarp();
  return threadIdx.x % 32 == 0;
}

inline void barrier_init(uint64_t* barrier, int arrivals) {
  cuda_host::address(barrier, 8);
  *barrier = 0;
  const cuda_host::races::Unseen unseen;
  cuda_host::transactions[barrier] = {arrivals, arrivals, 0, 0};
}
inline void fence_barrier_init() { cuda_host::races::release(cuda_host::Block::current().fenced()); }
inline void fence_proxy_async_shared() {}  // the PTX tier notices where it is missing
inline void fence_proxy_async_global() {
  cuda_host::need_wait();
  const cuda_host::races::Unseen unseen;
  cuda_host::proxy_fenced[cuda_host::self] = true;
}
inline void barrier_arrive_expect(uint64_t* barrier, int bytes) {
  __atomic_load_n(barrier, __ATOMIC_RELAXED);
  const cuda_host::races::Unseen unseen;
  cuda_host::races::release(cuda_host::current_phase(barrier));
  cuda_host::transactions[barrier].bytes += bytes;
  --cuda_host::transactions[barrier].pending;
  cuda_host::transactions[barrier].settle();
}
inline void barrier_arrive(uint64_t* barrier) { barrier_arrive_expect(barrier, 0); }
inline void barrier_arrive_at(uint64_t* barrier, int rank) {
  barrier_arrive(reinterpret_cast<uint64_t*>(cuda_host::place_in(rank, barrier)));
}
inline void cluster_sync_relaxed() {
  __syncwarp();
  cuda_host::Block::current().wait(cuda_host::Fiber::kCluster);
  cuda_host::races::acquire(cuda_host::Block::current().fenced());
}
inline void barrier_wait(uint64_t* barrier, int parity) {
  __atomic_load_n(barrier, __ATOMIC_RELAXED);
  const cuda_host::races::Unseen unseen;
  cuda_host::poll([&] {
    if (cuda_host::transactions[barrier].parity != parity) return true;
    auto& copies = cuda_host::copies_in_flight;
    if (!copies.empty() && cuda_host::descending) {
      cuda_host::land(copies.back());
      copies.pop_back();
    } else if (!copies.empty()) {
      cuda_host::land(copies.front());
      copies.pop_front();
    }
    return false;
  });
  cuda_host::races::acquire(cuda_host::phase(barrier, parity));
}

inline void bulk_load(void* dst, const void* src, int bytes, uint64_t* barrier, uint64_t = 0) {
  cuda_host::address(dst, 16);
  if (reinterpret_cast<uintptr_t>(src) % 16 || bytes % 16) cuda_host::fail("a bulk copy is not of whole 16 bytes");
  const bool* warp = cuda_host::waited + cuda_host::self / 32 * 32;
  if (!cuda_host::waited[cuda_host::self] && std::count(warp, warp + 32, true))
    cuda_host::fail("a load ahead of pdl_wait may be held up by another lane, which waits already");
  std::memset(dst, 0xff, bytes);
  cuda_host::ask_for({barrier, bytes, dst, [=] { std::memcpy(dst, src, bytes); }});
}
// The same, with addresses.
inline void barrier_arrive_expect(SharedAddress barrier, int bytes) {
  barrier_arrive_expect(reinterpret_cast<uint64_t*>(barrier), bytes);
}
inline void barrier_wait(SharedAddress barrier, int parity) {
  barrier_wait(reinterpret_cast<uint64_t*>(barrier), parity);
}
inline void bulk_load(SharedAddress dst, const void* src, int bytes, SharedAddress barrier, uint64_t = 0) {
  bulk_load(reinterpret_cast<void*>(dst), src, bytes, reinterpret_cast<uint64_t*>(barrier));
}

inline void bulk_prefetch(const void* src, int bytes) {
  const cuda_host::races::Unseen unseen;
  if (reinterpret_cast<uintptr_t>(src) % 16 || bytes % 16) cuda_host::fail("a prefetch of odd bytes");
  cuda_host::prefetched.push_back({static_cast<const uint8_t*>(src), bytes, !cuda_host::waited[cuda_host::self]});
  volatile uint8_t last = static_cast<const uint8_t*>(src)[bytes - 1];  // a sanitizer notices a wild address
  (void)last;
}

// A load to block `rank` of the cluster.
inline void tensor_load_to(int rank, void* dst, const TensorMap* map, int column, int row, uint64_t* barrier) {
  cuda_host::need_wait();
  if (!cuda_host::proxy_fenced[cuda_host::self]) cuda_host::fail("a copy of what threads have stored, without a fence");
  const TensorMap m = *map;
  const uint32_t begin = cuda_host::address(dst, 128);
  dst = cuda_host::place_in(rank, dst);
  barrier = reinterpret_cast<uint64_t*>(cuda_host::place_in(rank, barrier));
  __atomic_load_n(barrier, __ATOMIC_RELAXED);  // it must exist
  std::memset(dst, 0xff, m.box_rows * 128);
  cuda_host::ask_for({barrier, m.box_rows * 128, dst, [=] {
    for (int r = 0; r < m.box_rows; ++r) {
      for (int chunk = 0; chunk < 8; ++chunk) {
        uint8_t* to = cuda_host::pointer(cuda_host::swizzle_128(begin + r * 128 + chunk * 16), rank);
        if (row + r < m.rows) {
          std::memcpy(to, m.data + static_cast<int64_t>(row + r) * m.columns + column + chunk * 8, 16);
        } else {
          std::memset(to, 0, 16);
        }
      }
    }
  }});
}
inline void tensor_load(SharedAddress dst, const TensorMap* map, int column, int row, SharedAddress barrier) {
  tensor_load_to(cuda_host::rank(), reinterpret_cast<void*>(dst), map, column, row,
                 reinterpret_cast<uint64_t*>(barrier));
}
inline void tensor_load_multicast(SharedAddress dst, const TensorMap* map, int column, int row, SharedAddress barrier,
                                  uint16_t ctas) {
  for (int rank = 0; rank < 16; ++rank)
    if (ctas >> rank & 1)
      tensor_load_to(rank, reinterpret_cast<void*>(dst), map, column, row, reinterpret_cast<uint64_t*>(barrier));
}

inline uint64_t matrix_descriptor(const void* smem) { return matrix_descriptor_at(cuda_host::address(smem, 1024)); }
inline uint64_t matrix_descriptor(SharedAddress matrix) {
  return matrix_descriptor(reinterpret_cast<const void*>(matrix));
}
inline uint64_t transposed_descriptor(SharedAddress matrix, int bytes_to_next_columns) {
  return transposed_descriptor_at(cuda_host::address(reinterpret_cast<const void*>(matrix), 1024),
                                  bytes_to_next_columns);
}

inline void wgmma_fence() {
  const cuda_host::races::Unseen unseen;
  cuda_host::fenced[cuda_host::self] = true;
}
using Row = float[16];
inline void widen_row(uint64_t matrix, int row, Row& to) {
  // Eight elements of a row lie together: the swizzle moves 16 bytes at a time.
  for (int k = 0; k < 16; k += 8) {
    const uint8_t* from = cuda_host::pointer(cuda_host::operand_address(matrix, row, k));
    for (int i = 0; i < 8; ++i) to[k + i] = cuda_host::widen(from + i * 2);
  }
}

// Row `row` of B where its rows lie along k.
inline void widen_transposed(uint64_t matrix, int row, Row& to) {
  using namespace cuda_host;
  for (int k = 0; k < 16; ++k) to[k] = widen(pointer(transposed_address(matrix, row, k)));
}

// Adds to four accumulators at which two rows and two columns meet.
inline void add_products(float* d, const float* row0, const float* row1, const float* column0, const float* column1) {
  float sums[4] = {d[0], d[1], d[2], d[3]};  // a copy, which no operand can alias
  for (int k = 0; k < 16; ++k) {
    sums[0] += row0[k] * column0[k];
    sums[1] += row0[k] * column1[k];
    sums[2] += row1[k] * column0[k];
    sums[3] += row1[k] * column1[k];
  }
  std::copy_n(sums, 4, d);
}

// d (+)= A B^T, computed when it is waited for. `a_rows(rows)` gives the rows of A that belong to the thread's
// accumulators; `read_a(row)` reads, as this thread, one of the 16 rows of A of its warp.
template <int kN, bool kTransposed = false, class Rows, class Read>
void product(float* d, uint64_t b, int accumulate, const Rows& a_rows, const Read& read_a) {
  using namespace cuda_host;
  if (!fenced[self]) fail("wgmma without a fence");
  if (!(kTransposed ? is_transposed_128(b) : is_swizzled_128(b))) fail("a bad matrix descriptor");
  // Rows of A and 16 bytes of B at a time, divided among the warp's lanes: read at once, or at any time until they are
  // waited for.
  auto read = [=, lane = threadIdx.x % 32] {
    if (lane < 16) read_a(lane);
    for (int chunk = lane; chunk < 2 * kN; chunk += 32) {
      const uint32_t at = kTransposed ? transposed_address(b, chunk / 16 * 8, chunk % 16)
                                      : operand_address(b, chunk / 2, chunk % 2 * 8);
      races::reads(pointer(at), 16);
    }
  };
  auto multiply = [=, thread = threadIdx.x % 128] {
    static_assert(kN % 8 == 0, "accumulators come by four");
    Row rows[2], columns[2];
    a_rows(rows);
    for (int i = 0; i < kN / 2; i += 4) {
      for (int j = 0; j < 2; ++j) {
        const int column = wgmma_accumulator(thread, i + j).column;
        kTransposed ? widen_transposed(b, column, columns[j]) : widen_row(b, column, columns[j]);
      }
      if (!accumulate) std::fill_n(d + i, 4, 0.f);
      add_products(d + i, rows[0], rows[1], columns[0], columns[1]);
    }
  };
  read();
  races::release(&multiplier().asked);
  add_to_group<std::function<void()>>(wgmma_groups, [=] {
    Multiplier& by = multiplier();
    const races::Thread self = races::current();
    races::become(by.thread);
    races::acquire(&by.asked);
    read();
    races::release(&by.read);
    races::become(self);
    const races::Unseen unseen;
    multiply();
  });
}

template <int kN>
void wgmma(float* d, uint64_t a, uint64_t b, int accumulate) {
  if (!cuda_host::is_swizzled_128(a)) cuda_host::fail("a bad matrix descriptor");
  const int thread = threadIdx.x % 128, first = thread / 32 * 16;
  product<kN>(
      d, b, accumulate,
      [=](Row (&rows)[2]) {
        for (int j = 0; j < 2; ++j) widen_row(a, cuda_host::wgmma_accumulator(thread, j * 2).row, rows[j]);
      },
      [=](int row) {
        for (int k = 0; k < 16; k += 8)
          cuda_host::races::reads(cuda_host::pointer(cuda_host::operand_address(a, first + row, k)), 16);
      });
}

// Registers are read at once: this does not check that they stay unchanged.
template <int kN, bool kTransposed = false>
void product_of_registers(float* d, const uint32_t (&a)[4], uint64_t b, int accumulate) {
  struct Registers {
    uint32_t a[4];
  };
  Registers mine;
  std::copy_n(a, 4, mine.a);
  const auto lanes = cuda_host::Block::current().exchange(mine);
  std::array<std::array<float, 16>, 2> of_mine;  // rows of A
  for (int j = 0; j < 2; ++j) {
    for (int k = 0; k < 16; ++k) {
      const cuda_host::Place at = cuda_host::mma_a(threadIdx.x % 32 / 4 + 8 * j, k);
      of_mine[j][k] = cuda_host::widen(reinterpret_cast<const uint8_t*>(lanes[at.lane].a) + at.index * 2);
    }
  }
  product<kN, kTransposed>(
      d, b, accumulate,
      [=](Row (&rows)[2]) {
        for (int j = 0; j < 2; ++j) std::copy_n(of_mine[j].data(), 16, rows[j]);
      },
      [](int) {});
}
template <int kN>
void wgmma(float* d, const uint32_t (&a)[4], uint64_t b, int accumulate) {
  product_of_registers<kN>(d, a, b, accumulate);
}
template <int kN>
void wgmma_transposed(float* d, const uint32_t (&a)[4], uint64_t b, int accumulate) {
  product_of_registers<kN, true>(d, a, b, accumulate);
}
inline void wgmma_commit() { cuda_host::close_group(cuda_host::wgmma_groups); }
template <int kPending>
void wgmma_wait() {
  cuda_host::run_groups(cuda_host::wgmma_groups, kPending, [](const auto& run) { run(); });
  const cuda_host::races::Unseen unseen;
  cuda_host::fenced[cuda_host::self] = false;
  cuda_host::Block::current().exchange(0);  // .sync.aligned: the warp's lanes pass together, when all operands are read
  cuda_host::races::acquire(&cuda_host::multiplier().read);
}
template <int>
void give_registers() {}
template <int>
void take_registers() {}
template <typename Sums>
void pin(Sums&) {}

}  // namespace orthrus::cuda::sm90
