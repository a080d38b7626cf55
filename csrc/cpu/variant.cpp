// One instruction set's row kernels; CMake compiles this file once per set.
#include "variant.h"

#include "dual_attn.h"
#include "process_logits.h"
#include "row_linear.h"
#include "row_ops.h"

namespace orthrus::cpu::ORTHRUS_ISA {

extern const Variant kVariant = {row_linear, qkv_commit, dual_attn, process_logits, rms_norm, embed};

}  // namespace orthrus::cpu::ORTHRUS_ISA
