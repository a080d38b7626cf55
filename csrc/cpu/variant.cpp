// One instruction set's row kernels; CMake compiles this file once per set.
#include "variant.h"

#include "dual_attn_vectors.h"
#include "row_linear.h"
#include "row_ops.h"
#if defined(ORTHRUS_ISA_amx_bf16)
#include "dual_attn_amx.h"
#include "row_linear_amx.h"
#elif !defined(ORTHRUS_HAS_DOT2)
#include "process_logits.h"
#include "row_linear_widened.h"
#endif

namespace orthrus::cpu::ORTHRUS_ISA {

#if defined(ORTHRUS_ISA_amx_bf16)
using Bf16Tile = AmxTile;
#else
using Bf16Tile = VectorTile<bf16_t>;
#endif

extern const Bf16Kernels kOfBf16 = {
    {row_linear<bf16_t>, qkv_commit<bf16_t>, dual_attn<Bf16Tile>, rms_norm<bf16_t>, embed<bf16_t>},
    kDecodesWords,
};

#if !defined(ORTHRUS_HAS_DOT2)
extern const FloatKernels kOfFloats = {
    {row_linear<float>, qkv_commit<float>, dual_attn<VectorTile<float>>, rms_norm<float>, embed<float>},
    process_logits,
};
#endif

}  // namespace orthrus::cpu::ORTHRUS_ISA
