// Picks the instruction-set variant once, and routes each op to it or to the recording tape.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "consensus.h"
#include "count_tokens.h"
#include "orthrus/ops.h"
#include "tape.h"
#include "variant.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace orthrus::cpu {
namespace {

struct Choice {
  const char* name;
  bool supported;
  const Variant* variant;
};

const Choice kChoices[] = {
#if defined(ORTHRUS_HAS_avx512_bf16)
    {"avx512_bf16",
     __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
     &avx512_bf16::kVariant},
#endif
#if defined(ORTHRUS_HAS_avx2)
    {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &avx2::kVariant},
#endif
    {"portable", true, &portable::kVariant},
};

const Choice* find(const std::string& name) {
  for (const Choice& c : kChoices) {
    if (c.name != name) continue;
    if (!c.supported) throw std::runtime_error("ORTHRUS_CPU_ISA: this CPU has no " + name);
    return &c;
  }
  throw std::runtime_error("ORTHRUS_CPU_ISA: must be avx512_bf16, avx2 or portable, got " + name);
}

const Choice* choose() {
  const char* wanted = std::getenv("ORTHRUS_CPU_ISA");
  if (wanted && *wanted) return find(wanted);
  return std::find_if(std::begin(kChoices), std::end(kChoices), [](const Choice& c) { return c.supported; });
}

std::atomic<const Choice*>& chosen() {
  static std::atomic<const Choice*> choice{choose()};
  return choice;
}

const Variant& variant() { return *chosen().load(std::memory_order_relaxed)->variant; }

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

void row_linear(const RowLinearParams& p) { record_or(p, variant().row_linear); }
void qkv_commit(const QkvCommitParams& p) { record_or(p, variant().qkv_commit); }
void dual_attn(const DualAttnParams& p) { record_or(p, variant().dual_attn); }
void consensus(const ConsensusParams& p) { record_or(p, run_consensus); }
void process_logits(const ProcessLogitsParams& p) { record_or(p, variant().process_logits); }
void count_tokens(const CountTokensParams& p) { record_or(p, run_count_tokens); }
void rms_norm(const RmsNormParams& p) { record_or(p, variant().rms_norm); }
void embed(const EmbedParams& p) { record_or(p, variant().embed); }

}  // namespace orthrus::cpu
