// The row kernels of one instruction set. variant.cpp is compiled once per set, each into its own
// namespace; its headers must not instantiate inline functions of the standard library, which the
// linker would merge across variants and so hand AVX-512 code to a machine without it.
#pragma once
#include "orthrus/params.h"

namespace orthrus::cpu {

struct Variant {
  void (*row_linear)(const RowLinearParams&);
  void (*qkv_commit)(const QkvCommitParams&);
  void (*dual_attn)(const DualAttnParams&);
  void (*process_logits)(const ProcessLogitsParams&);
  void (*rms_norm)(const RmsNormParams&);
  void (*embed)(const EmbedParams&);
};

namespace portable { extern const Variant kVariant; }
namespace avx2 { extern const Variant kVariant; }
namespace avx512_bf16 { extern const Variant kVariant; }

}  // namespace orthrus::cpu
