// Picks the instruction-set variant once, and routes each op to it or to the recording tape.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "consensus.h"
#include "orthrus/ops.h"
#include "tape.h"
#include "variant.h"

namespace orthrus::cpu {
namespace {

struct Choice {
  const char* name;
  bool supported;
  const Variant* variant;
};

Choice choose() {
  const Choice choices[] = {
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
  const char* wanted = std::getenv("ORTHRUS_CPU_ISA");
  for (const Choice& c : choices) {
    if (wanted && *wanted ? c.name == std::string(wanted) : c.supported) {
      if (c.supported) return c;
      throw std::runtime_error(std::string("ORTHRUS_CPU_ISA: this CPU has no ") + c.name);
    }
  }
  throw std::runtime_error(std::string("ORTHRUS_CPU_ISA: must be avx512_bf16, avx2 or portable, got ") + wanted);
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
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

const char* isa() { return chosen().name; }

void row_linear(const RowLinearParams& p) { record_or(p, chosen().variant->row_linear); }
void qkv_commit(const QkvCommitParams& p) { record_or(p, chosen().variant->qkv_commit); }
void dual_attn(const DualAttnParams& p) { record_or(p, chosen().variant->dual_attn); }
void consensus(const ConsensusParams& p) { record_or(p, run_consensus); }
void rms_norm(const RmsNormParams& p) { record_or(p, chosen().variant->rms_norm); }
void embed(const EmbedParams& p) { record_or(p, chosen().variant->embed); }

}  // namespace orthrus::cpu
