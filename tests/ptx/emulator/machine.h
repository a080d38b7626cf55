// The state of a launch: clusters, CTAs, warps, shared memory with a status for each byte, copies in flight.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <random>
#include <stdexcept>
#include <unordered_map>

#include "program.h"

namespace ptx {

enum class Order { kForward, kBackward, kRandom };
struct Modes {
  bool random = false;
  int concurrent = 1;     // CTAs that run interleaved
  uint32_t seed = 0;
  uint64_t limit = 1ull << 40;  // warp instructions in a launch
  bool mapped = false;          // kernels also use mapped memory, such as a checkpoint
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class LaneState : uint8_t { kReady, kAtCollective, kAtBarrier, kAtMbarrier, kAtCluster, kDone };

// State bits of each byte of shared memory.
constexpr uint8_t kWritten = 1, kInFlight = 2, kUnfenced = 4, kMbarrier = 8;

// What each warp of a cluster knows of the others' clocks. A warp's own clock advances with every release.
using Clocks = std::array<uint32_t, 32>;
inline void join(Clocks& a, const Clocks& b) {
  for (size_t k = 0; k < a.size(); ++k) a[k] = std::max(a[k], b[k]);
}

// The last accesses to a granule (the kernel's smallest access of shared memory), by the clocks of the warps.
struct Word {
  uint32_t written = 0, writer = 0;
  Mask agreeing = 0;  // warps that have concurrently written the same, as replicated layouts of Triton do
  std::array<uint32_t, 24> read = {};  // by the first 24 warps of the cluster
};

struct Shared {
  std::vector<Word> words;
  std::vector<uint8_t> bytes, state, readers;  // readers: products in flight, per 16 bytes
  std::vector<Clocks> read;                    // by each warp's threads, per 16 bytes; only if a kernel has wgmma
};

struct Mbarrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  bool fenced = false;        // for copies
  uint32_t fenced_in = ~0u;   // for other CTAs, by a warp that had arrived this often at the cluster's barrier
  Clocks released = {};
};

struct BulkCopy {
  uint32_t dst;
  uint32_t bytes;
  uint32_t mbarrier;
  uint64_t src;                // null: a box of a tensor
  const struct TensorMap* map;
  int column, row;
};

struct CopyAsync {
  uint32_t dst;
  uint64_t src;
  uint32_t bytes, size;        // to write, to read
  uint32_t group;
};

struct Product {  // a warp's share of a wgmma
  const Instruction* instruction;
  uint64_t a, b;
  bool accumulate;
  uint32_t group;
  uint32_t a_regs[4][32];        // if a is not in shared memory
  std::vector<uint32_t> chunks;  // of 16 bytes, which it reads
};

struct Cta;
struct Warp {
  Cta* cta = nullptr;
  int registers = 0;  // per thread, if setmaxnreg has set them
  uint8_t* file = nullptr;
  int index = 0;
  size_t clock = 0;   // index of its own clock in Clocks
  uint32_t cluster_arrivals = 0, cluster_waits = 0;  // at the cluster's barrier
  Mask live = 0;
  uint32_t pc[32] = {};
  LaneState state[32] = {};
  Mask waited_pdl = 0, fenced_global = 0;
  Mask fenced_shared = ~0u;  // lanes that have read no shared memory since their fence
  uint32_t fenced = 0;       // its clock when all lanes had fenced, for copies over what they have read
  std::deque<CopyAsync> copies[32];
  uint32_t copy_group[32] = {};
  std::vector<std::pair<uint32_t, uint32_t>> unfenced[32];
  std::deque<Product> products;
  uint32_t product_group = 0, num_products = 0;
  std::map<Place, std::vector<float>> sums;  // of products in flight, by their first accumulator
  bool wgmma_fenced = false;
  int at_barrier = -1;
  Clocks seen = {};
  uintptr_t known_begin = 1, known_end = 0;  // the last allocation seen

  template <class T>
  T* reg(Place place) {
    return reinterpret_cast<T*>(file + place);
  }
  Mask in(LaneState s) const {
    Mask m = 0;
    for (int l = 0; l < 32; ++l) m |= static_cast<Mask>(state[l] == s && (live >> l & 1)) << l;
    return m;
  }
};

struct NamedBarrier {
  int arrived = 0, expected = 0;
};

struct alignas(64) Line {  // alignment of the parameters: tensor maps need it
  uint8_t bytes[64];
};

// A CTA's clock advances with every release to the device. An acquire updates what it knows of the others' clocks.
using CtaClocks = std::map<uint32_t, uint32_t>;
inline void join(CtaClocks& a, const CtaClocks& b) {
  for (const auto& [cta, clock] : b) a[cta] = std::max(a[cta], clock);
}
struct GlobalWrite {
  uint32_t cta, clock;
};

struct Launch {
  const Module* module;
  const Kernel* kernel;
  Modes modes;
  Order order;
  uint32_t grid[3], cluster, threads;  // cluster: CTAs along x
  uint32_t dynamic_shared;
  bool pdl;                // it may begin before the preceding grid has ended
  std::vector<Line> params;
  std::mt19937 random;
  uint64_t clock = 0;
  std::vector<std::pair<uintptr_t, uintptr_t>> before_wait;  // what may be read ahead of griddepcontrol.wait
  struct Traffic* traffic = nullptr;                         // counters, if requested
  std::unordered_map<uint64_t, GlobalWrite> writes = {};     // the last one per 4 bytes; only if a kernel has atomics
  std::map<uint64_t, CtaClocks> released = {};               // by atomics, per address
};

struct Cta {
  Launch* launch;
  struct Cluster* cluster;
  uint32_t rank;        // in the cluster
  std::array<uint32_t, 3> id;
  uint32_t number = 0;  // in the launch
  CtaClocks known;      // including its own
  std::vector<Warp> warps;
  std::vector<uint8_t> files;
  Shared shared;
  NamedBarrier barriers[16];
  std::map<uint32_t, Mbarrier> mbarriers;
  std::deque<BulkCopy> bulk;
  std::vector<std::pair<uint32_t, uint32_t>> published;  // written ahead of a barrier by threads, without a fence

  Cta(Cluster& of, uint32_t rank, const std::array<uint32_t, 3>& index);
  bool has_ended() const;
  void check_end() const;
  void settle(Mbarrier& barrier);
};

// CTAs that run together; a single one unless the launch sets another size.
struct Cluster {
  Launch* launch;
  std::vector<std::unique_ptr<Cta>> ctas;
  uint32_t phase = 0;  // of its barrier
  Clocks fenced = {};  // of each warp, as its releases have published

  Cluster(Launch& l, const std::array<uint32_t, 3>& first);
  bool run(bool to_the_end);   // until all threads have exited, or for a while; returns whether they have
  bool land_one();             // lands a bulk copy; returns whether there was one
  void settle();               // updates the barrier after threads have arrived or exited
};

// Shared memory of a cluster's CTAs: addresses from mapa name their CTA above these bits, all others are the own CTA's.
constexpr int kRankShift = 24;
struct SharedPlace {
  Cta& cta;
  uint32_t address;  // in that CTA
};
SharedPlace in_cluster(Warp& w, const Instruction& i, int lane, uint32_t address);

[[noreturn]] void fail(Warp& w, const Instruction& i, int lane, const std::string& what);
void report(Warp& w, const Instruction& i, int lane, const std::string& what);

// [begin, end) of the tensor memory that contains an address; if there is none, an empty range without the address.
std::pair<uintptr_t, uintptr_t> allocation(uintptr_t address);
// The same, but if mapped memory counts, any address is within bounds (of the 64 bytes around it).
std::pair<uintptr_t, uintptr_t> bounds(uintptr_t address, const Modes& modes);

// Reports an access that is not ordered after another warp's. value: what it writes, if known.
void check_races(Cta& cta, Warp& w, const Instruction& i, int lane, uint32_t address, uint32_t bytes, bool writes,
                 const uint8_t* value = nullptr);

void check_order(Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes, bool writes);

// Checked access.
uint8_t* shared_at(Cta& cta, Warp& w, const Instruction& i, int lane, uint32_t address, uint32_t bytes, bool writes,
                   uint32_t alignment = 0, const uint8_t* value = nullptr);
inline uint8_t* shared_at(Warp& w, const Instruction& i, int lane, uint32_t address, uint32_t bytes, bool writes,
                          uint32_t alignment = 0, const uint8_t* value = nullptr) {
  return shared_at(*w.cta, w, i, lane, address, bytes, writes, alignment, value);
}
uint8_t* global_at(Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes, bool writes);
uint8_t* param_at(Warp& w, const Instruction& i, int lane, uint64_t address, uint32_t bytes);
Mbarrier& mbarrier_at(Cta& cta, Warp& w, const Instruction& i, int lane, uint32_t address, bool of_a_copy);
void mark_written(Warp& w, int lane, uint32_t address, uint32_t bytes);
inline void release_fences(Warp& w) { w.cta->cluster->fenced[w.clock] = w.fenced; }

void land(Cta& cta, const BulkCopy& copy);
void land_copies(Warp& w, int lane, uint32_t pending_groups);
void complete_products(Warp& w, uint32_t pending_groups);
uint32_t swizzled(uint32_t address, int bytes);

// What the emulated cuTensorMapEncodeTiled stores in a CUtensorMap.
struct TensorMap {
  uint64_t magic;
  uint64_t base;
  uint64_t columns, rows, stride_bytes;
  uint32_t box_columns, box_rows, swizzle_bytes, element_bytes;
};
constexpr uint64_t kTensorMapMagic = 0x70616d726f736e74;

// Decoders by family: they set the instruction's handler and places, and return false if it is not theirs.
struct Parsed;
bool decode_arithmetic(Parsed& p);
bool decode_bits(Parsed& p);
bool decode_memory(Parsed& p);
bool decode_copies(Parsed& p);
bool decode_ordering(Parsed& p);
bool decode_collective(Parsed& p);
bool decode_matrices(Parsed& p);
void classify(const Parsed& p);  // sets unit and memory of a decoded instruction

}  // namespace ptx
