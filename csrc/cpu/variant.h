// The row kernels of one instruction set. variant.cpp is compiled once per set, each into its own
// namespace; its headers must not instantiate inline functions of the standard library, which the
// linker would merge across variants and so hand AVX-512 code to a machine without it.
#pragma once
#include "orthrus/params.h"

namespace orthrus::cpu {

// Those that work on weights, activations or cache, for elements of T.
template <typename T>
struct ElementKernels {
  void (*row_linear)(const RowLinearParamsOf<T>&);
  void (*qkv_commit)(const QkvCommitParamsOf<T>&);
  void (*dual_attn)(const DualAttnParamsOf<T>&);
  void (*rms_norm)(const RmsNormParamsOf<T>&);
  void (*embed)(const EmbedParamsOf<T>&);
};

struct Variant {
  ElementKernels<bf16_t> bf16;
  ElementKernels<float> f32;
  void (*process_logits)(const ProcessLogitsParams&);
  bool takes_coded_weights;  // and wants them: see coded_weight.h
};

namespace portable { extern const Variant kVariant; }
namespace avx2 { extern const Variant kVariant; }
namespace avx512 { extern const Variant kVariant; }
namespace avx512_bf16 { extern const Variant kVariant; }
namespace neon { extern const Variant kVariant; }
namespace neon_bf16 { extern const Variant kVariant; }
namespace amx_bf16 {
extern const Variant kVariant;
bool tiles_offered();  // asks the system; to be called where there is AVX-512
}

}  // namespace orthrus::cpu
