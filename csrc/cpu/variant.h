// The row kernels of one instruction set. variant.cpp is compiled once per set, each time into its own namespace. Its
// headers must not instantiate inline functions of the standard library: the linker would merge them across variants
// and so hand AVX-512 code to a machine without it.
#pragma once
#include "orthrus/params.h"

namespace orthrus::cpu {

// The kernels that work on weights, activations or cache, for elements of type T.
template <typename T>
struct ElementKernels {
  void (*row_linear)(const RowLinearParamsOf<T>&);
  void (*qkv_commit)(const QkvCommitParamsOf<T>&);
  void (*dual_attn)(const DualAttnParamsOf<T>&);
  void (*rms_norm)(const RmsNormParamsOf<T>&);
  void (*embed)(const EmbedParamsOf<T>&);
};

struct Bf16Kernels : ElementKernels<bf16_t> {
  bool takes_coded_weights;  // and wants them: see coded_weight.h
};

struct FloatKernels : ElementKernels<float> {
  void (*process_logits)(const ProcessLogitsParams&);
};

// amx_bf16, avx512_bf16 and neon_bf16 add only bf16 instructions to the sets that they extend and share for floats.
namespace portable { extern const Bf16Kernels kOfBf16; extern const FloatKernels kOfFloats; }
namespace avx2 { extern const Bf16Kernels kOfBf16; extern const FloatKernels kOfFloats; }
namespace avx512 { extern const Bf16Kernels kOfBf16; extern const FloatKernels kOfFloats; }
namespace avx512_bf16 { extern const Bf16Kernels kOfBf16; }
namespace neon { extern const Bf16Kernels kOfBf16; extern const FloatKernels kOfFloats; }
namespace neon_bf16 { extern const Bf16Kernels kOfBf16; }
namespace amx_bf16 {
extern const Bf16Kernels kOfBf16;
bool tiles_offered();  // asks the system; call only where there is AVX-512
}

// For row_linear.h: up to this many rows prefetch nothing where each weight is read once, on this processor.
extern const int64_t most_rows_without_ahead;

}  // namespace orthrus::cpu
