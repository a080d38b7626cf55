// One instruction set's row kernels; CMake compiles this file once per set.
#include "variant.h"

#include "dual_attn.h"
#include "process_logits.h"
#include "row_linear.h"
#include "row_ops.h"

namespace orthrus::cpu::ORTHRUS_ISA {

extern const Variant kVariant = {
    {row_linear<bf16_t>, qkv_commit<bf16_t>, dual_attn<bf16_t>, rms_norm<bf16_t>, embed<bf16_t>},
    {row_linear<float>, qkv_commit<float>, dual_attn<float>, rms_norm<float>, embed<float>},
    process_logits,
};

}  // namespace orthrus::cpu::ORTHRUS_ISA
