// Picks the instruction-set variant, and routes each op to it or to the recording tape.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "float_mode.h"
#include "orthrus/ops.h"
#include "slot_ops.h"
#include "tape.h"
#include "variant.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace orthrus::cpu {
namespace {

#if defined(ORTHRUS_HAS_avx2)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

#if defined(ORTHRUS_HAS_avx512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(ORTHRUS_HAS_avx512_bf16)
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

#if defined(ORTHRUS_HAS_amx_bf16)
bool has_amx_bf16() { return has_avx512_bf16() && amx_bf16::tiles_offered(); }
#endif

#if defined(ORTHRUS_HAS_neon_bf16)
bool has_neon_bf16() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers do not name
  return getauxval(AT_HWCAP2) & kBf16;
#else
  return false;
#endif
}
#endif

bool always() { return true; }

#if defined(ORTHRUS_HAS_avx512_bf16)
// A vdpbf16ps does the work of two fused multiply-adds, but takes as long as four of them on Intel's cores.
bool has_fast_vdpbf16ps() { return !__builtin_cpu_is("intel"); }
#endif

#if defined(__x86_64__)
bool is_zen5_or_newer() {
  __builtin_cpu_init();  // this may run before the constructor that does it
  unsigned eax, ebx, ecx, edx;
  return __builtin_cpu_is("amd") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) &&
         (eax >> 8 & 0xf) + (eax >> 20 & 0xff) >= 26;  // its family
}
#else
bool is_zen5_or_newer() { return false; }
#endif

struct Choice {
  const char* name;
  bool (*offered)();
  bool (*preferred)();  // over those below, if offered and none is named
  const Bf16Kernels* of_bf16;
  const FloatKernels* of_floats;
};

// Best first.
const Choice kChoices[] = {
#if defined(ORTHRUS_HAS_amx_bf16)
    {"amx_bf16", has_amx_bf16, always, &amx_bf16::kOfBf16, &avx512::kOfFloats},
#endif
#if defined(ORTHRUS_HAS_avx512_bf16)
    {"avx512_bf16", has_avx512_bf16, has_fast_vdpbf16ps, &avx512_bf16::kOfBf16, &avx512::kOfFloats},
#endif
#if defined(ORTHRUS_HAS_avx512)
    {"avx512", has_avx512, always, &avx512::kOfBf16, &avx512::kOfFloats},
#endif
#if defined(ORTHRUS_HAS_avx2)
    {"avx2", has_avx2, always, &avx2::kOfBf16, &avx2::kOfFloats},
#endif
#if defined(ORTHRUS_HAS_neon_bf16)
    {"neon_bf16", has_neon_bf16, always, &neon_bf16::kOfBf16, &neon::kOfFloats},
#endif
#if defined(ORTHRUS_HAS_neon)
    {"neon", always, always, &neon::kOfBf16, &neon::kOfFloats},
#endif
    {"portable", always, always, &portable::kOfBf16, &portable::kOfFloats},
};

const Choice* find(const std::string& name) {
  for (const Choice& c : kChoices) {
    if (c.name == name && c.offered()) return &c;
  }
  std::string names;
  for (const Choice& c : kChoices) {
    if (c.offered()) names += std::string(names.empty() ? "" : ", ") + c.name;
  }
  throw std::runtime_error("ORTHRUS_CPU_ISA: must be one of " + names + ", got " + name);
}

const Choice* choose() {
  const char* wanted = std::getenv("ORTHRUS_CPU_ISA");
  if (wanted && *wanted) return find(wanted);
  return std::find_if(std::begin(kChoices), std::end(kChoices),
                      [](const Choice& c) { return c.offered() && c.preferred(); });
}

std::atomic<const Choice*>& chosen() {
  static std::atomic<const Choice*> choice{choose()};
  return choice;
}

const Choice& choice() { return *chosen().load(std::memory_order_relaxed); }

template <typename T>
const ElementKernels<T>& kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return *choice().of_floats;
  } else {
    return *choice().of_bf16;
  }
}

template <typename Op>
void record_or_run(const Op& op) {
  if (Tape* tape = Tape::recording()) {
    tape->append(op);
  } else {
    const FloatMode mode;
    op();
  }
}

// Groups can only be checked when the op runs: a tape may read different ones from replay to replay.
void check_groups(const Rows& rows) {
  const auto check = [&](int32_t group, int32_t row) {
    if (rows.group_start[group] == row) return;
    throw std::invalid_argument("dual_attn: rows.group_start[" + std::to_string(group) + "] must be " +
                                std::to_string(row) + ", got " + std::to_string(rows.group_start[group]));
  };
  check(0, 0);
  check(rows.num_groups_ar, rows.num_rows_ar);
  check(rows.num_groups, rows.num_rows);
  for (int32_t group = 0; group < rows.num_groups; ++group) {
    const int32_t size = rows.group_start[group + 1] - rows.group_start[group];
    if (size < 0 || size > rows.max_group_rows) {
      throw std::invalid_argument("dual_attn: group " + std::to_string(group) + " must have 0 ... " +
                                  std::to_string(rows.max_group_rows) + " (rows.max_group_rows) rows, got " +
                                  std::to_string(size));
    }
  }
  if (rows.blocks_per_seq <= 1 || rows.num_rows == 0) return;
  for (int32_t group = rows.num_groups_ar; group < rows.num_groups; ++group) {  // equally tall, by checks.py
    const int32_t first = group - (group - rows.num_groups_ar) % rows.blocks_per_seq;
    const int32_t seq = rows.seq[rows.group_start[group]], wanted = rows.seq[rows.group_start[first]];
    if (seq == wanted) continue;
    throw std::invalid_argument("dual_attn: group " + std::to_string(group) + " must be of sequence " +
                                std::to_string(wanted) + ", as the blocks before it (rows.blocks_per_seq), got " +
                                std::to_string(seq));
  }
}

}  // namespace

// In addition to what a core's own prefetcher requests, each prefetch holds one of L1's few miss buffers until its line
// arrives: for one row, a core of Zen 4 then reads 21 GB/s instead of 30. On Zen 5, passes over 1, 2 and 3 rows take
// 0.94, 0.87 and 0.89 times as long with prefetches. Other processors have not been measured.
const int64_t most_rows_without_ahead = is_zen5_or_newer() ? 0 : 3;

const char* isa() { return chosen().load()->name; }
void set_isa(const char* name) { chosen() = find(name); }
bool takes_coded_weights() { return choice().of_bf16->takes_coded_weights; }

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t num_bytes) {
#if defined(__linux__)
  static const uintptr_t page = sysconf(_SC_PAGESIZE);
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + num_bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <typename T>
void row_linear(const RowLinearParamsOf<T>& p) {
  record_or_run([p] {
    if ((is_coded(p.weight_bits) || is_coded(p.weight_diff_bits)) && !takes_coded_weights()) {
      throw std::invalid_argument(std::string("row_linear: weights must be packed for ") + isa() +
                                  ", got coded ones, which avx2, avx512 and avx512_bf16 take");
    }
    kernels<T>().row_linear(p);
  });
}
template <typename T>
void qkv_commit(const QkvCommitParamsOf<T>& p) { record_or_run([p] { kernels<T>().qkv_commit(p); }); }
template <typename T>
void dual_attn(const DualAttnParamsOf<T>& p) {
  record_or_run([p] {
    check_groups(p.rows);
    kernels<T>().dual_attn(p);
  });
}
template <typename T>
void rms_norm(const RmsNormParamsOf<T>& p) { record_or_run([p] { kernels<T>().rms_norm(p); }); }
template <typename T>
void embed(const EmbedParamsOf<T>& p) { record_or_run([p] { kernels<T>().embed(p); }); }

#define ORTHRUS_INSTANTIATE(T)                           \
  template void row_linear(const RowLinearParamsOf<T>&); \
  template void qkv_commit(const QkvCommitParamsOf<T>&); \
  template void dual_attn(const DualAttnParamsOf<T>&);   \
  template void rms_norm(const RmsNormParamsOf<T>&);     \
  template void embed(const EmbedParamsOf<T>&);
ORTHRUS_INSTANTIATE(bf16_t)
ORTHRUS_INSTANTIATE(float)
#undef ORTHRUS_INSTANTIATE

void consensus(const ConsensusParams& p) { record_or_run([p] { run_consensus(p); }); }
void process_logits(const ProcessLogitsParams& p) { record_or_run([p] { choice().of_floats->process_logits(p); }); }
void count_tokens(const CountTokensParams& p) { record_or_run([p] { run_count_tokens(p); }); }

}  // namespace orthrus::cpu
