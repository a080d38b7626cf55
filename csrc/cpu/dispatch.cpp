// Picks the instruction-set variant once, and routes each op to it or to the recording tape.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "consensus.h"
#include "count_tokens.h"
#include "orthrus/ops.h"
#include "tape.h"
#include "variant.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace orthrus::cpu {
namespace {

#if defined(ORTHRUS_HAS_avx512_bf16)
bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if defined(ORTHRUS_HAS_amx_bf16)
// Tiles want the system's leave too, which is asked for here: it is for the process, all its threads and children, and
// makes signal stacks hold 8 KB more (one that is too small already is a refusal).
bool has_amx_bf16() {
#if defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr int kArchReqXcompPerm = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile) &&
         syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Choice {
  const char* name;
  bool (*offered)();
  const Variant* variant;
};

// Best first.
const Choice kChoices[] = {
#if defined(ORTHRUS_HAS_amx_bf16)
    {"amx_bf16", has_amx_bf16, &amx_bf16::kVariant},
#endif
#if defined(ORTHRUS_HAS_avx512_bf16)
    {"avx512_bf16", has_avx512_bf16, &avx512_bf16::kVariant},
#endif
#if defined(ORTHRUS_HAS_avx2)
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, &avx2::kVariant},
#endif
    {"portable", [] { return true; }, &portable::kVariant},
};

const Choice* find(const std::string& name) {
  for (const Choice& c : kChoices) {
    if (c.name != name) continue;
    if (!c.offered()) throw std::runtime_error("ORTHRUS_CPU_ISA: this machine does not offer " + name);
    return &c;
  }
  throw std::runtime_error("ORTHRUS_CPU_ISA: must be amx_bf16, avx512_bf16, avx2 or portable, got " + name);
}

const Choice* choose() {
  const char* wanted = std::getenv("ORTHRUS_CPU_ISA");
  if (wanted && *wanted) return find(wanted);
  return std::find_if(std::begin(kChoices), std::end(kChoices), [](const Choice& c) { return c.offered(); });
}

std::atomic<const Choice*>& chosen() {
  static std::atomic<const Choice*> choice{choose()};
  return choice;
}

const Variant& variant() { return *chosen().load(std::memory_order_relaxed)->variant; }

template <typename T>
const ElementKernels<T>& kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return variant().f32;
  } else {
    return variant().bf16;
  }
}

template <typename Params, typename Run>
void record_or(const Params& p, Run run) {
  if (Tape* tape = Tape::recording()) {
    tape->append(p);
  } else {
    run(p);
  }
}

}  // namespace

const char* isa() { return chosen().load()->name; }
void set_isa(const char* name) { chosen() = find(name); }

void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t num_bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + num_bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <typename T>
void row_linear(const RowLinearParamsOf<T>& p) { record_or(p, kernels<T>().row_linear); }
template <typename T>
void qkv_commit(const QkvCommitParamsOf<T>& p) { record_or(p, kernels<T>().qkv_commit); }
template <typename T>
void dual_attn(const DualAttnParamsOf<T>& p) { record_or(p, kernels<T>().dual_attn); }
template <typename T>
void rms_norm(const RmsNormParamsOf<T>& p) { record_or(p, kernels<T>().rms_norm); }
template <typename T>
void embed(const EmbedParamsOf<T>& p) { record_or(p, kernels<T>().embed); }

#define ORTHRUS_INSTANTIATE(T)                           \
  template void row_linear(const RowLinearParamsOf<T>&); \
  template void qkv_commit(const QkvCommitParamsOf<T>&); \
  template void dual_attn(const DualAttnParamsOf<T>&);   \
  template void rms_norm(const RmsNormParamsOf<T>&);     \
  template void embed(const EmbedParamsOf<T>&);
ORTHRUS_INSTANTIATE(bf16_t)
ORTHRUS_INSTANTIATE(float)
#undef ORTHRUS_INSTANTIATE

void consensus(const ConsensusParams& p) { record_or(p, run_consensus); }
void process_logits(const ProcessLogitsParams& p) { record_or(p, variant().process_logits); }
void count_tokens(const CountTokensParams& p) { record_or(p, run_count_tokens); }

}  // namespace orthrus::cpu
